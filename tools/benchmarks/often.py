"""A checkpoint every five seconds of a guest that writes: is the hundredth pause as short as the first, does it end?

The guest writes, reads back and compares (``mode=writer``), so that a wrong byte would show itself here too.  Each
checkpoint is asked for when its time has come, whether or not the one before is saved (``--wait`` lets it begin when
it can); the layers of each disk are looked at on the control socket all the while.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator

from benchmarks import context, figures, guests, product
from blkckpt import paths
from blkckpt.control import client
from tests.support import guest

PERIOD = 5.0
SECONDS = 120
MEMORY, DISK = 256, 256 << 20
OPTIONS = {"rate": 800, "span": 128, "dirty": 500, "fill": 32}
LOOK_SECONDS = 0.2
REST_SECONDS = 60.0


class Layers:
    """How many layers the disk of *vm* has, as the server says while the block lasts."""

    def __init__(self, vm: paths.VmPaths) -> None:
        self._vm = vm
        self._changed = threading.Condition()
        self._ended = False
        self.seen: list[int] = []

    def _look(self) -> None:
        with client.Client.connect(self._vm.control_socket, name="bench") as connection:
            while not self._ended:
                (disk,) = connection.status()["disks"]
                with self._changed:
                    self.seen.append(1 + len(disk["overlays"]))
                    self._changed.notify_all()
                    self._changed.wait(LOOK_SECONDS)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, name="layers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            thread.join(10)

    def wait_for_one(self, seconds: float) -> None:
        """Until the disk is one layer again, but not longer than *seconds*."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.seen) and self.seen[-1] == 1, seconds)


def _answer(child: subprocess.Popen[str]) -> float:
    """The milliseconds for which the checkpoint that *child* took stopped the guest."""
    said, complaint = child.communicate(timeout=120)
    if child.returncode:
        raise context.BenchError(f"blkckpt checkpoint failed: {complaint.strip()}")
    return float(json.loads(said)["stopped_ms"])


def _take(context_: context.Context, box: guest.Sandbox, seconds: float) -> list[float]:
    began, taken = time.monotonic(), []
    for number in range(int(seconds / PERIOD)):
        time.sleep(max(0.0, began + number * PERIOD - time.monotonic()))
        taken.append(box.start("checkpoint", "often", "--name", f"c{number}", "--wait", "60", "--json"))
    stopped = [_answer(one) for one in taken]
    context_.say(f"  {len(stopped)} checkpoints in {time.monotonic() - began:.0f} s")
    return stopped


def run(context_: context.Context) -> list[figures.Figure]:
    guests.need_image()
    seconds = context_.pick(30, SECONDS)
    context_.say(f"a checkpoint every {PERIOD:g} s for {seconds} s of a guest that writes")
    with (
        product.sandbox(context_.directory, "often") as box,
        guests.ours(box, "often", "writer", MEMORY, DISK, **OPTIONS) as running,
    ):
        layers = Layers(paths.home(box.home).vm("often"))
        with layers.watched():
            stopped = figures.Samples(_take(context_, box, seconds), "ms")
            layers.wait_for_one(REST_SECONDS)
        if running.console.sweep() or running.console.complaints():
            raise context.BenchError("the guest read a wrong byte")
    depth = figures.Samples([float(one) for one in layers.seen], "layers")
    worst = max(stopped.values)
    return [
        figures.Figure(
            "every5s_worst_vs_median", "x", worst / stopped.median, {"guest stopped": stopped}, figures.at_most(3)
        ),
        figures.Figure("every5s_layers_most", "layers", max(depth.values), {"layers of the disk": depth}),
        figures.Figure("every5s_layers_end", "layers", depth.values[-1], {}, figures.at_most(1)),
    ]  # fmt: skip

"""From nothing to the first output of a restored guest: lazily by us, beside QEMU reading the whole stream.

The peer is QEMU alone: the same guest on a raw disk, its memory saved by QEMU's background snapshot into a file,
started with ``-incoming`` from that file.  Before each sample the page cache of the machine is dropped: the stream,
our image, and both programs' own files are read from the disk.

The figure with a bar is what a user sees: from the command to the guest's first line, the start of our interpreters
and of nbdkit included.  The other one begins, for both, at the start of the QEMU process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import context, figures, guests, product
from tests.support import guest

DESCRIPTION = "restore of a 2 GiB guest to its first output: lazily, and plain -incoming; caches dropped"

OURS, QEMU = "blkckpt restore", "qemu -incoming"
MEMORY, RANDOM_MIB = 2048, 640
DISK = 1 << 28
OPTIONS = {"fill": RANDOM_MIB, "dirty": 20, "beat": 20}
"""A heartbeat every 20 ms: how finely "first output" can be told."""


def _first_output(serial: guest.Serial, timeout: float = 120) -> None:
    serial.accept(timeout).beat(timeout)


@contextlib.contextmanager
def _stream(context_: context.Context) -> Iterator[tuple[list[str], guest.Serial]]:
    """QEMU's own full stream of the guest in ``stream``; gives the command line that it was made with."""
    disk = context_.directory / "plain.raw"
    with disk.open("wb") as file:
        file.truncate(DISK)
    with guests.serial(context_.directory) as serial:
        command = [*guest.machine(serial.path, "idle", memory=MEMORY, **OPTIONS), *guest.disk_arguments([disk])]
        with guests.plain(context_.directory, command, serial) as running:
            running.monitor.background_snapshot(f"exec:cat > {context_.directory / 'stream'}")
        yield command, serial


def _plain(context_: context.Context, command: list[str], serial: guest.Serial) -> float:
    context.drop_caches()
    stream = context_.directory / "stream"
    log = context_.directory / "incoming.log"
    began = time.monotonic()
    with context.process([*command, "-incoming", f"exec:cat {stream}"], log=log):
        _first_output(serial)
        return time.monotonic() - began


class Ours:
    """Restores checkpoint ``origin@c`` again and again; the user waits from the command to the first line."""

    def __init__(self, box: guest.Sandbox) -> None:
        self._box = box
        self._numbers = itertools.count()
        self.machine: list[float] = []
        """Of that, seconds from the start of the QEMU process: the rest is our own processes starting."""

    def sample(self) -> float:
        name = f"copy{next(self._numbers)}"
        context.drop_caches()
        began, began_boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        restoring = self._box.start("restore", "origin@c", "--as", name, "--detach", "--json")
        try:
            _first_output(self._box.serial)
            took = time.monotonic() - began
        finally:
            answer, complaint = restoring.communicate(timeout=120)
            if restoring.returncode != 0:
                raise context.BenchError(f"blkckpt restore failed: {complaint.strip()}")
        self.machine.append(took - (_started(json.loads(answer)["machine"]) - began_boot))
        self._box.stop(name)
        self._box.remove(name)
        return took


def _started(pid: int) -> float:
    """When process *pid* was started, seconds of CLOCK_BOOTTIME (to 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def run(context_: context.Context) -> list[figures.Figure]:
    guests.need_image()
    if not Path("/proc/sys/vm/drop_caches").exists():
        raise context.BenchError("the page cache cannot be dropped here; run as root")
    with product.sandbox(context_.directory) as box:
        context_.say(f"a checkpoint of a 2 GiB guest with {RANDOM_MIB} MiB of random data")
        with guests.ours(box, "origin", "idle", MEMORY, DISK, **OPTIONS):
            box.run("checkpoint", "origin", "--name", "c", timeout=600)
        context_.say("the same guest under QEMU alone, its full stream in a file")
        with _stream(context_) as (command, serial):
            ours = Ours(box)
            samplers = {OURS: ours.sample, QEMU: lambda: _plain(context_, command, serial)}
            peers = context_.round_robin(context_.pick(3, 7), samplers, "s")
    machine = {"its QEMU alone": figures.Samples(ours.machine, "s"), QEMU: peers[QEMU]}
    return [
        figures.ratio("lazy_restore_speedup", QEMU, OURS, peers, figures.at_least(8)),
        figures.ratio("lazy_restore_speedup_qemu", QEMU, "its QEMU alone", machine, None),
    ]

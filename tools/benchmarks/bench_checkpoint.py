"""What a checkpoint costs the guest, and how long it takes, beside QEMU's own ways of doing (less of) the same.

The peer of the pause is QEMU's *background snapshot* of the same running guest, in turns with ours: it saves memory
and devices only, into a command's input, and leaves the disks to somebody else.  The peer of the old way is
``savevm`` into a qcow2 disk, which saves everything and stops the guest for all of it.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from pathlib import Path

from benchmarks import context, figures, guests, product
from tests.support import guest

DESCRIPTION = "the pause of a checkpoint and its time, beside QEMU's background snapshot and savevm"

OURS, QEMU, SAVEVM = "blkckpt", "qemu background-snapshot", "qemu savevm"
DISCARD = "exec:cat > /dev/null"
DISK = 1 << 30
WRITER = {"rate": 300, "dirty": 200}
"""Operations a second on the disk, and pages of RAM rewritten a second, while checkpoints are taken."""

RANDOM_MIB = 640
"""Random data in the 2 GiB guest."""


class Checkpoints:
    """Takes checkpoints of VM *name* and remembers what they said."""

    def __init__(self, box: guest.Sandbox, running: guests.Guest, name: str) -> None:
        self._box, self._running, self._name = box, running, name
        self._numbers = itertools.count()

    def take(self) -> tuple[float, float]:
        """One checkpoint: ``(pause in ms, whole time of the command in s)``."""
        start = len(self._running.monitor.events)
        began = time.monotonic()
        self._box.run("checkpoint", self._name, "--name", f"c{next(self._numbers)}", timeout=600)
        took = time.monotonic() - began
        return self._running.monitor.only_pause(start), took

    def forget(self) -> None:
        """Remove the last checkpoint and its data, so that the next is as costly as a first one."""
        found = self._box.json("list", self._name)
        rows = found["checkpoints"] if isinstance(found, dict) else found
        self._box.run("rm", *[f"{self._name}@{row['name']}" for row in rows], "--yes")


def _stop_window(context_: context.Context, label: str, memory: int) -> tuple[figures.Figure, figures.Samples]:
    """Pauses of ours and of QEMU's own, in turns, in one guest that writes all the time."""
    name = f"stop{label}"
    context_.say(f"{label}: a guest that writes; checkpoints and QEMU's background snapshots in turns")
    with product.sandbox(context_.directory) as box, guests.ours(
        box, name, "writer", memory, DISK, fill=memory // 8, **WRITER
    ) as running:  # fmt: skip
        ours = Checkpoints(box, running, name)
        ours.take()  # the first of each finds cold caches, an empty store and untouched page tables
        running.monitor.background_snapshot(DISCARD)
        peers = context_.round_robin(
            context_.pick(5, 10),
            {OURS: lambda: ours.take()[0], QEMU: lambda: running.monitor.background_snapshot(DISCARD)[0]},
            "ms",
        )
        running.console.check()
    added = peers[OURS].median - peers[QEMU].median
    return figures.Figure(f"stop_window_added_ms_{label}", "ms", added, peers, figures.at_most(5)), peers[OURS]


def _savevm(context_: context.Context, memory: int) -> figures.Samples:
    """The pause of ``savevm`` in the same guest with a qcow2 disk."""
    context_.say("the same guest on a qcow2 disk: savevm")
    disk = context_.directory / "savevm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(DISK)], check=True)
    device = ["-blockdev", f"node-name=d0,driver=qcow2,file.driver=file,file.filename={disk},cache.direct=on",
              "-device", "virtio-blk-pci,drive=d0"]  # fmt: skip
    with guests.serial(context_.directory) as serial:
        command = [*guest.machine(serial.path, "writer", memory=memory, fill=memory // 8, **WRITER), *device]
        with guests.plain(context_.directory, command, serial) as running:
            numbers = itertools.count()
            sample = {SAVEVM: lambda: running.monitor.savevm(f"s{next(numbers)}")}
            return context_.round_robin(context_.pick(3, 5), sample, "ms")[SAVEVM]


def _time(context_: context.Context) -> list[figures.Figure]:
    """Whole time of a first checkpoint, with all that it stores, and what a second one adds."""
    name = "time"
    context_.say(f"a nearly idle guest of 2 GiB with {RANDOM_MIB} MiB of random data")
    with product.sandbox(context_.directory) as box, guests.ours(
        box, name, "idle", 2048, DISK, fill=RANDOM_MIB, dirty=20
    ) as running:  # fmt: skip
        ours = Checkpoints(box, running, name)
        running.monitor.background_snapshot(DISCARD)

        def first() -> float:
            took = ours.take()[1]
            ours.forget()
            context.settle()
            return took

        peers = context_.round_robin(
            context_.pick(2, 5), {OURS: first, QEMU: lambda: running.monitor.background_snapshot(DISCARD)[1]}, "s"
        )
        sizes = [_disk_usage(box.home)]
        for _ in range(2):
            ours.take()
            sizes.append(_disk_usage(box.home))
        added = [later - before for before, later in itertools.pairwise(sizes)]
    stored = {
        f"{nth} checkpoint": figures.Samples([size / 2**20], "MiB")
        for nth, size in zip(("first", "second"), added, strict=True)
    }
    return [
        figures.ratio("checkpoint_time_vs_qemu", OURS, QEMU, peers, figures.at_most(1.3)),
        figures.Figure("second_checkpoint_bytes_ratio", "x", added[1] / added[0], stored, figures.at_most(0.05)),
    ]


def _disk_usage(home: Path) -> int:
    """Bytes that the home's store really takes."""
    total = 0
    for path in (home / "store").rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def run(context_: context.Context) -> list[figures.Figure]:
    guests.need_image()
    small, ours = _stop_window(context_, "512m", 512)
    savevm = _savevm(context_, 512)
    peers = {SAVEVM: savevm, OURS: ours}
    large, _ = _stop_window(context_, "4g", 4096)
    return [
        small,
        large,
        figures.ratio("savevm_over_stop_window", SAVEVM, OURS, peers, figures.at_least(30)),
        *_time(context_),
    ]

"""Eight machines from one checkpoint beside one: how long until all go on, and what memory an idle one adds.

An idle guest with 1 GiB, of which 128 MiB are random data, its checkpoint's memory image in the page cache (as after
the checkpoint, or after the first fork).  A sample is ``blkckpt fork -n N`` from the command to its end, when every
guest goes on; one and eight take turns.

Memory is Pss of QEMU, the disk server and the supervisor of each fork, added up, when eight have been idle for a while:
private pages, and of what they share with each other (the image, programs, libraries) each its part.  So the sum over
all forks is what they take together.

The figures::

    fork8_vs_1        time of eight ÷ time of one
    fork_cpu          processor seconds that one of the eight costs until all go on (no bar)
    fork_rss_share    memory of one of the eight ÷ the guest's memory
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import context, figures, guests, product
from tests.support import guest

DESCRIPTION = "fork -n 8 of a running guest's checkpoint beside fork -n 1: time, and memory an idle fork adds"

MANY = 8
MEMORY = 1024
FILL = 128
DISK = 1 << 28
IDLE_SECONDS = 8.0
"""From the last start until memory is measured: the disks' background fill is over then."""
_PARTS = ("supervisor", "server", "machine")


class Forks:
    """``fork`` of one checkpoint, again and again."""

    def __init__(self, box: guest.Sandbox) -> None:
        self._box = box
        self._numbers = itertools.count()
        self.cpu: list[float] = []
        with guests.ours(box, "v", "idle", MEMORY, DISK, fill=FILL, dirty=0, beat=1000):
            box.run("checkpoint", "v", "--name", "c", timeout=600)

    def start(self, count: int) -> tuple[float, list[dict[str, Any]]]:
        """Seconds until *count* went on, and what runs."""
        before = os.times()
        began = time.monotonic()
        found = self._box.json("fork", "v@c", "-n", str(count), "--as", f"f{next(self._numbers)}")["forks"]
        took = time.monotonic() - began
        after = os.times()
        own = after.children_user + after.children_system - before.children_user - before.children_system
        if count == MANY:
            self.cpu.append((own + sum(_processor(one[part]) for one in found for part in _PARTS)) / count)
        return took, found

    def check(self, count: int) -> None:
        """Every guest really runs."""
        for _ in range(count):
            self._box.serial.accept().beat()

    def end(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            self._box.stop(one["vm"])
            self._box.remove(one["vm"])

    def sample(self, count: int) -> float:
        took, found = self.start(count)
        self.check(count)
        self.end(found)
        return took

    def memory(self) -> list[float]:
        """Pss of each of eight idle forks, MiB."""
        _, found = self.start(MANY)
        self.check(MANY)
        time.sleep(IDLE_SECONDS)
        sizes = [sum(_pss(one[part]) for part in _PARTS) / 1024 for one in found]
        self.end(found)
        return sizes


def _processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pss(pid: int) -> int:
    """KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise context.BenchError(f"process {pid} has no Pss")


def run(context_: context.Context) -> list[figures.Figure]:
    guests.need_image()
    with product.sandbox(context_.directory) as box:
        context_.say(f"a checkpoint of an idle guest of {MEMORY} MiB")
        forks = Forks(box)
        forks.sample(1)
        one, many = "fork -n 1", f"fork -n {MANY}"
        samplers = {one: lambda: forks.sample(1), many: lambda: forks.sample(MANY)}
        times = context_.round_robin(context_.pick(3, 7), samplers, "s")
        context_.say("memory of idle forks")
        memory = figures.Samples(forks.memory(), "MiB")
    cpu = figures.Samples(forks.cpu, "s")
    return [
        figures.ratio("fork8_vs_1", many, one, times, figures.at_most(3)),
        figures.Figure("fork_cpu", "s", cpu.median, {many: cpu}),
        figures.Figure("fork_rss_share", "x", memory.median / MEMORY, {"an idle fork": memory}, figures.at_most(0.1)),
    ]

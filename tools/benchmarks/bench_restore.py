"""From nothing to the first output of a restored guest: lazily by us, beside QEMU reading the whole stream.

The peer is QEMU alone: the same guest on a raw disk, its memory saved by QEMU's background snapshot into a file,
started with ``-incoming`` from that file.  The time runs from the command to the guest's first line, the start of our
interpreters and of nbdkit included.

What is cold.  Before each sample the page cache of the whole machine is dropped.  Then, for both alike, another and
small guest is restored by us and started from a stream by QEMU, and stopped: QEMU, its libraries and firmware, Python
and our programs are in memory again, as they are on a host that runs virtual machines, and *all data of the guest* is
on the disk: the stream; our memory image, manifest and chunks; the disks.  That nothing of the stream and of the image
is cached is checked before every sample.

The figures::

    lazy_restore_speedup        4 GiB guest with 2.5 GiB of random data, as described; this one has a bar
    lazy_restore_speedup_2g     2 GiB guest with 640 MiB of random data
    lazy_restore_speedup_cold   the latter when the programs are on the disk too: a host's first restore after boot
    …_qemu                      of the same samples, from the start of our QEMU process on: what anybody could reach
                                who starts this QEMU with this machine

The peer's time is the guest's data by the disk's speed; ours is nearly all the start of programs, and does not grow
with the data.  So the ratio grows with the data, and with a slower disk: a disk that reads 600 MB/s gives the whole
stream of the small guest in 1.5 s, of which QEMU's own start with the lean stream takes 0.3.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import context, figures, guests, product
from tests.support import guest

DESCRIPTION = "lazy restore of a guest to its first output, and plain -incoming; the guest's data on the disk"

OURS, QEMU = "blkckpt restore", "qemu -incoming"
DISK = 1 << 28
BEAT_MS = 20
"""A heartbeat every 20 ms: how finely "first output" can be told."""


@dataclass(frozen=True, slots=True)
class Size:
    """A guest: megabytes of memory, and of them random data."""

    name: str
    memory: int
    fill: int

    @property
    def options(self) -> dict[str, int]:
        return {"fill": self.fill, "dirty": 20, "beat": BEAT_MS}


SMALL = Size("small", 128, 8)
USUAL = Size("usual", 2048, 640)
LARGE = Size("large", 4096, 2560)


class Plain:
    """A guest of QEMU alone and its full stream in a file."""

    def __init__(self, context_: context.Context, size: Size, serial: guest.Serial) -> None:
        self._context, self._serial = context_, serial
        self.stream = context_.directory / f"{size.name}.stream"
        disk = context_.directory / f"{size.name}.raw"
        with disk.open("wb") as file:
            file.truncate(DISK)
        machine = guest.machine(serial.path, "idle", memory=size.memory, **size.options)
        self._command = [*machine, *guest.disk_arguments([disk])]
        with guests.plain(context_.directory, self._command, serial) as running:
            running.monitor.background_snapshot(f"exec:cat > {self.stream}")

    @property
    def data(self) -> list[Path]:
        """What has to be cold."""
        return [self.stream]

    def sample(self) -> float:
        began = time.monotonic()
        command = [*self._command, "-incoming", f"exec:cat {self.stream}"]
        with context.process(command, log=self._context.directory / "incoming.log"):
            _first_output(self._serial)
            return time.monotonic() - began


class Ours:
    """A checkpoint, restored again and again with *words*; the user waits from the command to the first line."""

    def __init__(self, box: guest.Sandbox, size: Size, *words: str) -> None:
        self._box, self._name, self._words = box, size.name, words
        self._numbers = itertools.count()
        self.machine: list[float] = []
        """Of each sample, seconds from the start of the QEMU process: the rest is our own processes starting."""
        with guests.ours(box, size.name, "idle", size.memory, DISK, **size.options):
            box.run("checkpoint", size.name, "--name", "c", timeout=600)

    @property
    def data(self) -> list[Path]:
        """What has to be cold."""
        home = self._box.home
        return [*(home / "vms" / self._name / "memory").rglob("*.raw"), *(home / "store" / "packs").rglob("*.pack")]

    def sample(self) -> float:
        name = f"{self._name}{next(self._numbers)}"
        began, began_boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        restoring = self._box.start("restore", f"{self._name}@c", "--as", name, "--detach", "--json", *self._words)
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


def _first_output(serial: guest.Serial, timeout: float = 120) -> None:
    serial.accept(timeout).beat(timeout)


def _started(pid: int) -> float:
    """When process *pid* was started, seconds of CLOCK_BOOTTIME (to 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _cached(path: Path) -> int:
    """Bytes of *path* that are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "res", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cold(one: Plain | Ours, warm_programs: Callable[[], None] | None) -> float:
    """A sample of *one* with its data on the disk, and the programs in memory if *warm_programs* brings them there."""
    context.drop_caches()
    if warm_programs:
        warm_programs()
    for path in one.data:
        if found := _cached(path):
            raise context.BenchError(f"{found} bytes of {path} are in the page cache, which was dropped")
    return one.sample()


@contextlib.contextmanager
def small(context_: context.Context, serial: guest.Serial, *words: str) -> Iterator[Callable[[], None]]:
    """A small guest in a home of its own: what it gives brings the programs of both peers into the page cache."""
    with product.sandbox(context_.directory, "programs") as box:
        both = (Ours(box, SMALL, *words), Plain(context_, SMALL, serial))

        def warm() -> None:
            for one in both:
                one.sample()

        yield warm


def _peers(
    context_: context.Context, size: Size, serial: guest.Serial, warm: Callable[[], None], rounds: int, unprepared: int
) -> tuple[dict[str, figures.Samples], dict[str, figures.Samples], figures.Samples]:
    """Samples of both with the programs in memory and (*unprepared* rounds) without; our QEMU's share of the first."""
    context_.say(f"a checkpoint of a guest of {size.memory} MiB with {size.fill} MiB of random data")
    with product.sandbox(context_.directory) as box:
        ours = Ours(box, size)
        context_.say("the same guest under QEMU alone, its full stream in a file")
        plain = Plain(context_, size, serial)
        context_.say("their data on the disk, the programs in memory")
        samplers = {OURS: lambda: cold(ours, warm), QEMU: lambda: cold(plain, warm)}
        found = context_.round_robin(rounds, samplers, "s")
        machine = figures.Samples(list(ours.machine), "s")
        everything = {}
        if unprepared:
            context_.say("data and programs on the disk")
            samplers = {OURS: lambda: cold(ours, None), QEMU: lambda: cold(plain, None)}
            everything = context_.round_robin(unprepared, samplers, "s")
        plain.stream.unlink()
    return found, everything, machine


def run(context_: context.Context) -> list[figures.Figure]:
    guests.need_image()
    if not Path("/proc/sys/vm/drop_caches").exists():
        raise context.BenchError("the page cache cannot be dropped here; run as root")
    rounds = context_.pick(3, 7)
    with guests.serial(context_.directory) as serial, small(context_, serial) as warm:
        usual, first, machine = _peers(context_, USUAL, serial, warm, rounds, context_.pick(1, 3))
        large, _, large_machine = _peers(context_, LARGE, serial, warm, rounds, 0)
    return [
        figures.ratio("lazy_restore_speedup", QEMU, OURS, large, figures.at_least(8)),
        _ceiling("lazy_restore_speedup_qemu", large, large_machine),
        figures.ratio("lazy_restore_speedup_2g", QEMU, OURS, usual, None),
        _ceiling("lazy_restore_speedup_2g_qemu", usual, machine),
        figures.ratio("lazy_restore_speedup_cold", QEMU, OURS, first, None),
    ]


def _ceiling(name: str, found: dict[str, figures.Samples], machine: figures.Samples) -> figures.Figure:
    """*found* as if our processes before QEMU's start took no time."""
    alone = "its QEMU alone"
    return figures.ratio(name, QEMU, alone, {alone: machine, QEMU: found[QEMU]}, None)

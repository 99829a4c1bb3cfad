"""What a bench is given: a directory of its own, a way to say what it is doing, and rounds that take turns."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import figures


class BenchError(Exception):
    """A bench cannot go on; one line for the user."""


@dataclass(frozen=True, slots=True)
class Context:
    """One run of one bench."""

    directory: Path
    quick: bool
    console: Console

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)

    def pick(self, quick: int, full: int) -> int:
        return quick if self.quick else full

    def round_robin(
        self, rounds: int, samplers: Mapping[str, Callable[[], float]], unit: str
    ) -> dict[str, figures.Samples]:
        """Take *rounds* samples of each, in turns, each round starting with another one."""
        one = {name: _single(sample) for name, sample in samplers.items()}
        return self.cells(rounds, one, unit)[""]

    def cells(
        self, rounds: int, samplers: Mapping[str, Callable[[], Mapping[str, float]]], unit: str
    ) -> dict[str, dict[str, figures.Samples]]:
        """The same for samplers of several cells each: ``result[cell][peer]``."""
        values: dict[str, dict[str, list[float]]] = {}
        order = list(samplers)
        for turn in range(rounds):
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                sample = samplers[name]()
                for cell, value in sample.items():
                    values.setdefault(cell, {peer: [] for peer in order})[name].append(value)
                said = ", ".join(f"{cell} {figures.number(value)}".strip() for cell, value in sample.items())
                self.say(f"  round {turn + 1}/{rounds} {name}: {said} {unit}")
        return {
            cell: {peer: figures.Samples(found, unit) for peer, found in peers.items()}
            for cell, peers in values.items()
        }


def _single(sample: Callable[[], float]) -> Callable[[], Mapping[str, float]]:
    return lambda: {"": sample()}


@contextlib.contextmanager
def process(command: list[str], *, log: Path, stop: int = signal.SIGTERM) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* while the block lasts; its output goes to *log*.  It dies with the block, by force if need be."""
    with log.open("ab") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield child
    finally:
        end(child, stop)


def end(child: subprocess.Popen[bytes], stop: int = signal.SIGTERM, patience: float = 20) -> None:
    if child.poll() is None:
        child.send_signal(stop)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def wait_for(
    condition: Callable[[], bool], what: str, deadline: float, child: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until *condition*, but not past *deadline* seconds nor past the end of *child*."""
    limit = time.monotonic() + deadline
    while not condition():
        if child is not None and child.poll() is not None:
            raise BenchError(f"{what}: the program ended with {child.returncode}")
        if time.monotonic() > limit:
            raise BenchError(f"{what}: nothing within {deadline:g} s")
        time.sleep(0.005)


def random_file(path: Path, size: int) -> None:
    """A file of *size* random bytes, on disk and in the page cache."""
    with path.open("wb") as file:
        written = 0
        while written < size:
            written += file.write(os.urandom(min(16 << 20, size - written)))
    settle()


def compressible_file(path: Path, size: int) -> None:
    """As :func:`random_file`, but half of every 4 KiB block is zeros: what compresses about as well as a real disk."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            noise = os.urandom(1 << 19)
            file.write(b"".join(noise[at : at + 2048] + bytes(2048) for at in range(0, len(noise), 2048)))
    settle()


def warm(path: Path) -> None:
    """Bring all of *path* into the page cache."""
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Let *path*, which is on disk, out of the page cache."""
    settle()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle() -> None:
    """Write out dirty pages now, so that nobody's sample pays for another's."""
    os.sync()


def drop_caches() -> None:
    """Forget the page cache of the whole machine (needs root)."""
    settle()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def short_path(directory: Path) -> Path:
    """A path for a socket that belongs to *directory*: short enough for ``sun_path``."""
    return Path(f"/tmp/bench-{os.getpid()}-{abs(hash(directory)) & 0xFFFF:x}.sock")

"""fio over NBD: one job, and what it achieved.

Traps of its ``nbd`` engine (3.33): ``fdatasync=`` is refused (``fsync=`` works), ``trim_percentage`` aborts it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import context

RAMP = "0.3"
_MINIMUM = 200
"""Operations in a window below which a 99th percentile says nothing."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of load: fio's *rw*, block size, queue depth, and more options."""

    name: str
    rw: str
    bs: str = "4k"
    depth: int = 32
    options: tuple[str, ...] = ()


def _command(uri: str, cell: Cell, size: int, *options: str) -> list[str]:
    return ["fio", "--output-format=json", "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--rw={cell.rw}",
            f"--bs={cell.bs}", f"--iodepth={cell.depth}", f"--size={size}", *cell.options, *options]  # fmt: skip


def _run(command: list[str], directory: Path) -> float:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode != 0:
        raise context.BenchError(f"fio failed: {(result.stderr or result.stdout).strip()[-400:]}")
    # The nbd engine greets on standard output before the JSON.
    job: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise context.BenchError(f"fio reports error {job['error']}; see the server's log")
    return float(job["read"]["iops"]) + float(job["write"]["iops"])


def timed(uri: str, cell: Cell, size: int, directory: Path, *, seconds: float, seed: int = 1) -> float:
    """Operations per second of *cell* over *seconds*, after a short warming up."""
    options = ["--time_based=1", f"--runtime={seconds}", f"--ramp_time={RAMP}", "--norandommap", f"--randseed={seed}"]
    return _run(_command(uri, cell, size, *options), directory)


def counted(uri: str, cell: Cell, size: int, directory: Path, *, operations: int, seed: int) -> float:
    """Operations per second of exactly *operations*, none twice at one place: the same work for every server."""
    return _run(_command(uri, cell, size, f"--number_ios={operations}", f"--randseed={seed}"), directory)


def once(uri: str, cell: Cell, size: int, directory: Path) -> float:
    """Operations per second of going over the first *size* bytes once."""
    return _run(_command(uri, cell, size), directory)


def allocate(uri: str, size: int, directory: Path, bs: str = "256k") -> None:
    """Write the first *size* bytes once, in order."""
    _run(_command(uri, Cell("allocate", "write", bs), size), directory)


class Stream:
    """A load that runs until the block ends, each operation's time and latency noted."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._done: npt.NDArray[np.float64] = np.zeros(0)
        self._latency: npt.NDArray[np.float64] = np.zeros(0)

    def read(self) -> None:
        """Take fio's log (``msec of the day, nsec, direction, …``)."""
        rows = np.loadtxt(self._log, delimiter=",", usecols=(0, 1), ndmin=2)
        self._done, self._latency = rows[:, 0] / 1e3, rows[:, 1] / 1e6

    def window(self, begin: float, end: float) -> tuple[float, float]:
        """``(operations a second, 99th percentile of the latency in ms)`` between two ``time.time()``."""
        inside = (self._done >= begin) & (self._done < end)
        count = int(inside.sum())
        if not count:
            return 0.0, (end - begin) * 1e3
        if count < _MINIMUM:
            return count / (end - begin), float(self._latency[inside].max())
        return count / (end - begin), float(np.percentile(self._latency[inside], 99))


@contextlib.contextmanager
def stream(uri: str, cell: Cell, size: int, directory: Path) -> Iterator[Stream]:
    """Run *cell* beside the block; its :meth:`Stream.window` may be asked when the block has ended."""
    prefix = directory / f"stream-{time.monotonic_ns()}"
    options = ["--time_based=1", "--runtime=600", "--norandommap", f"--write_lat_log={prefix}", "--log_unix_epoch=1"]
    log = prefix.with_name(f"{prefix.name}_clat.1.log")
    result = Stream(log)
    try:
        with context.process(_command(uri, cell, size, *options), log=directory / "fio.log", stop=signal.SIGINT):
            yield result
        result.read()
    finally:
        for path in directory.glob(f"{prefix.name}*"):
            path.unlink()

"""Progress of long work, on standard error: bytes, rate, time left.

On a terminal rich draws one bar a stage; elsewhere there is a plain line now and then, so that a log of a CI run
stays readable.  Work below calls :meth:`Reporter.update` from any thread, as often as it likes.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from blkckpt import units

if TYPE_CHECKING:
    from rich import progress as rich_progress

INTERVAL = 5.0
"""Seconds between two plain lines of one stage: a checkpoint of a few seconds prints none, a copy of minutes a few."""


class Reporter(Protocol):
    """What a verb hands down; a context manager around the work."""

    def update(self, stage: str, done: int, total: int | None) -> None: ...

    def count(self, stage: str, done: int) -> None:
        """*done* things, of an unknown number, that are no bytes."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def reporter(*, quiet: bool = False, stream: IO[str] | None = None) -> Reporter:
    """The reporter that fits *stream* (standard error): bars, lines, or nothing when *quiet*."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    return Bars(stream) if stream.isatty() else Lines(stream)


class Silent:
    """Says nothing."""

    def update(self, stage: str, done: int, total: int | None) -> None:
        return

    def count(self, stage: str, done: int) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class Bars(Silent):
    """One rich bar a stage; gone when the work is done."""

    def __init__(self, stream: IO[str]) -> None:
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._lock = threading.Lock()
        rich: Any = importlib.import_module("rich.progress")  # loaded for a terminal only
        self._progress: rich_progress.Progress = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.DownloadColumn(binary_units=True),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
            console=importlib.import_module("rich.console").Console(file=stream),
            transient=True,
        )

    def update(self, stage: str, done: int, total: int | None) -> None:
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def count(self, stage: str, done: int) -> None:
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=None)
        self._progress.update(self._tasks[stage], description=f"{stage}: {done:,}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@dataclass
class _Stage:
    began: float
    base: int
    """Bytes that were done when the stage was first seen: they do not count for the rate."""
    said: float
    done: int = 0
    total: int | None = None
    spoke: bool = field(default=False)
    things: bool = field(default=False)
    """Counts things, not bytes."""


class Lines(Silent):
    """A plain line every :data:`INTERVAL` seconds, and a last one for a stage that spoke."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.Lock()

    def update(self, stage: str, done: int, total: int | None) -> None:
        if not done and not total:
            return
        now = self._clock()
        with self._lock:
            entry = self._stages.setdefault(stage, _Stage(began=now, base=done, said=now))
            entry.done, entry.total = done, total
            if now - entry.said >= INTERVAL:
                entry.said, entry.spoke = now, True
                self._say(stage, entry, now)

    def count(self, stage: str, done: int) -> None:
        now = self._clock()
        with self._lock:
            entry = self._stages.setdefault(stage, _Stage(began=now, base=0, said=now, things=True))
            entry.done = done
            if now - entry.said >= INTERVAL:
                entry.said, entry.spoke = now, True
                self._say(stage, entry, now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for name, entry in self._stages.items():
                if entry.spoke and kind is None:
                    self._say(name, entry, self._clock())

    def _say(self, name: str, entry: _Stage, now: float) -> None:
        if entry.things:
            words = f"{name}: {entry.done:,}"
        else:
            words = describe(name, entry.done, entry.total, entry.base, now - entry.began)
        print(f"blkckpt: {words}", file=self._stream)
        self._stream.flush()


def describe(stage: str, done: int, total: int | None, base: int, seconds: float) -> str:
    """``memory: 1.0 GiB of 2.0 GiB (50 %), 512.0 MiB/s, 2.0 s left``; parts that are not known are left out."""
    words = units.format_size(done)
    if total:
        words += f" of {units.format_size(total)} ({min(100, 100 * done // total)} %)"
    rate = (done - base) / seconds if seconds > 0 else 0.0
    if rate > 0:
        words += f", {units.format_size(rate)}/s"
        if total and done < total:
            words += f", {units.format_duration((total - done) / rate)} left"
    return f"{stage}: {words}"

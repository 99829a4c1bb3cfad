"""What goes on while the disks are at rest: filling restored disks from their images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from blkckpt import errors
from blkckpt.disk import format as formats
from blkckpt.disk import job, member, statefile

T = TypeVar("T")

RETRY_FIRST, RETRY_MOST = 1.0, 30.0
"""Pauses before work that met an error (ENOSPC in the base, a store not mounted) is tried again."""


def patiently(work: Callable[[], T], doing: str, warn: Callable[[str | None], None], stop: threading.Event) -> T:
    """Do *work*, again and again until it succeeds.  *warn* is told why it waits, and ``None`` when it is done.

    Raises StateError when stopped, and at once what no later try can mend (D9).
    """
    delay = RETRY_FIRST
    while True:
        try:
            result = work()
        except (errors.StateError, errors.PoisonedError):
            raise
        except (OSError, errors.BlkckptError) as error:
            warn(f"{doing} waits: {error}")
        else:
            warn(None)
            return result
        if stop.wait(delay):
            raise errors.StateError(f"{doing} was stopped; it goes on when the disks are served again")
        delay = min(delay * 2, RETRY_MOST)


class Filler:
    """The thread that fills disks, one after the other.  *warn* is told why it waits, and ``None`` when it goes on.

    Stopped while a checkpoint is under way, so that the layers a copy child reads keep still.
    """

    def __init__(self, file: statefile.StateFile, warn: Callable[[str | None], None]) -> None:
        self._file = file
        self._warn = warn
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, members: Sequence[member.Member]) -> None:
        if members:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(members, self._stop), name="disk-fill", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Returns when the window under way is done; what is filled stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self, members: Sequence[member.Member], stop: threading.Event) -> None:
        for item in members:
            try:
                self._fill(item, stop)
            except errors.PoisonedError as error:
                self._warn(str(error))
            except errors.StateError:
                return

    def _fill(self, item: member.Member, stop: threading.Event) -> None:
        pace = job.Pace(stop, lambda: item.disk.activity)

        def fill() -> formats.DiskState:
            state = item.fill(pace, lambda done, total: None)
            self._file.save({state.name: state})
            return state

        doing = f"filling disk {item.disk.name} from its checkpoint"
        item.drop_source(patiently(fill, doing, self._warn, stop), stop)

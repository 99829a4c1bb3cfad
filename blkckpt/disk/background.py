"""What goes on behind the guest: overlays are committed, and restored disks are filled from their images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from blkckpt import errors
from blkckpt.disk import format as formats
from blkckpt.disk import job, layer, member, statefile, states

T = TypeVar("T")

FILL_RESTS = 9
"""Nothing waits for a fill, and a guest that reads what is not there yet needs the processors to decompress it."""

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


class Emptier:
    """Commits free overlays: those without a claim to stay.  *held* says which overlays checkpoints need.

    Used from any number of threads, which take turns.
    """

    def __init__(
        self,
        states: states.States,
        gate_lock: threading.Lock,
        held: Callable[[], frozenset[str]],
        warn: Callable[[str | None], None],
        stop: threading.Event,
    ) -> None:
        self._states = states
        self._gate_lock = gate_lock
        self._held = held
        self._warn = warn
        self._stop = stop
        self._turn = threading.Lock()
        self._at_work = False

    @property
    def busy_locked(self) -> bool:
        """Whether an overlay is free, or on its way down."""
        return self._at_work or self._free_locked() is not None

    def _free_locked(self) -> tuple[member.Member, layer.Overlay] | None:
        """A disk and its lowest free overlay, if there is one."""
        held = self._held()
        for item in self._states.members.values():
            if (overlay := item.to_commit(held)) is not None:
                return item, overlay
        return None

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Commit every free overlay, the lowest first; always ends (D8), unless stopped."""
        with self._turn:
            while True:
                with self._gate_lock:
                    free = self._free_locked()
                    self._at_work = free is not None
                if free is None:
                    return
                try:
                    self._commit(*free, progress)
                except BaseException:
                    self._at_work = False
                    raise

    def _commit(self, item: member.Member, overlay: layer.Overlay, progress: Callable[[int, int], None]) -> None:
        pace = job.Pace(self._stop, lambda: item.activity)

        def commit() -> None:
            item.empty(overlay, pace, progress)
            with self._states.lock:
                state = item.without(overlay)
                self._states.replace({state.name: state})

        patiently(commit, f"committing disk {item.disk.name}", self._warn, self._stop)
        item.forget(overlay, self._stop)


class Filler:
    """The thread that fills disks, one after the other.  *warn* is told why it waits, and ``None`` when it goes on.

    Stopped while a checkpoint is under way, so that the layers a copy child reads keep still.
    """

    def __init__(self, file: statefile.StateFile, warn: Callable[[str | None], None]) -> None:
        self._file = file
        self._warn = warn
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.after = 0.0
        """Seconds before the first disk is begun, once."""

    def start(self, members: Sequence[member.Member]) -> None:
        """Fill *members*; no effect while they are being filled.  Waits for nothing."""
        if members and not (self._thread is not None and self._thread.is_alive()):
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
        if stop.wait(self.after):
            return
        self.after = 0.0
        for item in members:
            try:
                self._fill(item, stop)
            except errors.PoisonedError as error:
                self._warn(str(error))
            except errors.StateError:
                return

    def _fill(self, item: member.Member, stop: threading.Event) -> None:
        pace = job.Pace(stop, lambda: item.activity, rests=FILL_RESTS)

        def fill() -> formats.DiskState:
            state = item.fill(pace, lambda done, total: None)
            self._file.save({state.name: state})
            return state

        doing = f"filling disk {item.disk.name} from its checkpoint"
        item.drop_source(patiently(fill, doing, self._warn, stop), stop)

"""A piece of background work that others watch and wait for."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from blkckpt import errors, log
from blkckpt.disk import api

_log = log.get(__name__)


class Job:
    """State, progress and outcome of one copy, commit or abort.  Every method may be called from any thread."""

    def __init__(self, kind: str) -> None:
        self.id = secrets.token_hex(8)
        self.kind = kind
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._cancelled = threading.Event()
        self._done = 0
        self._total = 0
        self._result: Mapping[str, Any] | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Job], Mapping[str, Any]]) -> Job:
        """Run *work* in a daemon thread; what it returns or raises is the outcome."""
        threading.Thread(target=self.run, args=(work,), name=f"{self.kind}-{self.id}", daemon=True).start()
        return self

    def run(self, work: Callable[[Job], Mapping[str, Any]]) -> Job:
        """As :meth:`start`, in this thread."""
        began = time.monotonic()
        try:
            self.finish(work(self))
        except BaseException as error:
            self.fail(error)
        _log.info("job ended", extra={"fields": {"kind": self.kind, "seconds": round(time.monotonic() - began, 3)}})
        return self

    def progress(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total = done, total

    def finish(self, result: Mapping[str, Any]) -> None:
        self._result = result
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, errors.BlkckptError):
            _log.error("job failed", extra={"fields": {"kind": self.kind, "error": repr(error)}}, exc_info=error)
        self._error = error
        self._ended.set()

    def cancel(self) -> None:
        """Ask the work to stop; it ends as failed, or done if it was just ending."""
        self._cancelled.set()

    @property
    def cancelled(self) -> threading.Event:
        return self._cancelled

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the job has ended within *timeout* seconds."""
        return self._ended.wait(timeout)

    def outcome(self) -> Mapping[str, Any]:
        """The result of an ended job; raises its error."""
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise errors.StateError(f"the {self.kind} job {self.id} is still running")
        return self._result

    def status(self) -> api.JobStatus:
        with self._lock:
            done, total = self._done, self._total
        state = "running" if self.running else "failed" if self._error is not None else "done"
        error = self._error
        text = None if error is None else str(error) or type(error).__name__
        kind = None if error is None else type(error).__name__
        return api.JobStatus(self.id, self.kind, state, done, total, self._result, text, kind)


class Registry:
    """The jobs of a group: those that run, and the last :data:`REMEMBERED`."""

    REMEMBERED = 64

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def run(self, kind: str, work: Callable[[Job], Mapping[str, Any]]) -> Job:
        """Start a job."""
        started = Job(kind)
        self._jobs[started.id] = started
        for known in list(self._jobs.values())[: -self.REMEMBERED]:
            if not known.running:
                del self._jobs[known.id]
        return started.start(work)

    def find(self, job_id: str) -> Job:
        """The job with that id; NotFoundError."""
        found = self._jobs.get(job_id)
        if found is None:
            raise errors.NotFoundError(f"no job {job_id}")
        return found

    def running(self) -> list[Job]:
        """Those that run, oldest first."""
        return [known for known in list(self._jobs.values()) if known.running]

    def latest(self) -> Job | None:
        """The newest that runs, else the newest."""
        known = self.running() or list(self._jobs.values())
        return known[-1] if known else None


class Pace:
    """How background work leaves the machine to the guest: told of each piece of it.

    While the guest is active the work rests *rests* times as long as it worked, 7 times if nothing else is said: an
    eighth of a processor and of the disk's time at most, but never less than :data:`FLOOR`, so that it ends whatever
    the guest does.  An idle guest does not slow it.  A *rate* in bytes a second bounds it in any case.
    """

    FLOOR = 32 << 20
    """Bytes a second, of those that are told, however slow the disk is."""

    SLICE = 0.00025
    """Seconds of work without a rest.  Where guest, server and this share the processors, the scheduler lets 3 ms of
    work pass before it turns to them again: with one rest in 16 ms that was the guest's 99th percentile."""

    IDLE = 0.02
    """Seconds without a request after which the guest is taken for idle.  Not the time of one piece of work: that a
    guest did nothing meanwhile may be because this work had its processor."""

    def __init__(
        self,
        stop: threading.Event,
        activity: Callable[[], int] = lambda: 0,
        rate: int | None = None,
        *,
        rests: float = 7,
    ) -> None:
        self.stop = stop
        self._rests = rests
        self._activity = activity
        self._rate = rate
        self._seen = activity()
        self._idle_since = -math.inf
        self._moved = 0
        self._began = time.monotonic()

    def check(self) -> None:
        """Raise :class:`errors.StateError` if the work is to stop."""
        if self.stop.is_set():
            raise errors.StateError("stopped; it goes on when the disks are served again")

    def rest(self, moved: int) -> None:
        """Yield after *moved* bytes, if it is time to; raises as :meth:`check`."""
        self._moved += moved
        worked = time.monotonic() - self._began
        if worked < self.SLICE:
            return
        pause = min(worked * self._rests, self._moved / self.FLOOR) if self._active() else 0.0
        if self._rate:
            pause = max(pause, self._moved / self._rate - worked)
        if pause > 0:
            self.stop.wait(pause)
        self._moved = 0
        self._began = time.monotonic()
        self.check()

    def _active(self) -> bool:
        """Whether the guest was, within :data:`IDLE`."""
        seen, now = self._activity(), time.monotonic()
        if seen != self._seen:
            self._seen, self._idle_since = seen, now
        return now - self._idle_since < self.IDLE

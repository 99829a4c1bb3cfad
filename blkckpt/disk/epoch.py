"""The gate: which requests are in flight, in which epoch, on which blocks (steps 810 and 812, rules D4 and D5).

*Epoch.*  Every request is admitted to the current epoch and keeps its view (layers, write target) until it leaves.
:meth:`Gate.advance_locked` puts a new view in force: O(1), it waits for nobody; requests of the old epoch finish in
the old view.  :meth:`Gate.wait_drained` is what the copier, and whoever closes a layer's files, waits for.

*Tickets.*  A mutating request holds a ticket for its blocks.  Two plain writes may overlap: the guest has asked for
both at once.  A request that must read a block before it writes it (a copy-up), and a window of the commit or the
fill, are exclusive: they wait for every earlier ticket that overlaps, of any epoch, and every later one waits for
them.  Waiting is only ever for earlier tickets, so there is no deadlock and no starvation.  Whether exclusion is
needed is asked at admission, under the lock, of the same view the request will use.

*Watches.*  A window of the commit copies its blocks while writers go on, and must know afterwards which of them
somebody wrote to meanwhile: :meth:`Gate.watch` notes every ticket that meets its blocks, from those in flight at its
beginning on.  The fast path notes its own.

*One lock.*  All gates of a VM share one lock, so that their epochs advance at one instant: a request on disk B that
was issued after one on disk A was acknowledged can never land on the earlier side of the switch.

*The fast path* (C, in the same process) takes no lock and no ticket.  A :class:`Port` tells it of every view and of
every exclusive ticket, and :meth:`Port.settle` waits for those of its requests that may not have heard (rules F1 to
F5 in :mod:`blkckpt.disk`).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from blkckpt import errors

V = TypeVar("V")
V_contra = TypeVar("V_contra", contravariant=True)

SETTLE_SECONDS = 1.0
"""How long one call waits for requests of the fast path; it is repeated.  They take microseconds, or hang with the
disk."""


class Port(Protocol[V_contra]):
    """The fast path, as the gate of one disk sees it."""

    def publish(self, view: V_contra | None) -> None:
        """Requests that come from now on use *view*; with ``None`` they take the way through the gate."""

    def exclude(self, runs: Sequence[tuple[int, int]]) -> Any:
        """Requests that come from now on and write to *runs* take the way through the gate."""

    def include(self, excluded: Any) -> None:
        """Undo :meth:`exclude`, which returned *excluded*."""

    def watch(self, runs: Sequence[tuple[int, int]]) -> Any:
        """Requests that come from now on and write to *runs* are noted."""

    def noted(self) -> Sequence[tuple[int, int]]:
        """What was; for whoever excludes all of it, and has settled."""

    def unwatch(self, watched: Any) -> None:
        """Undo :meth:`watch`, which returned *watched*."""

    def settle(self, seconds: float) -> bool:
        """Whether every request that was in flight at the call has left within *seconds*."""


class NoPort(Generic[V_contra]):
    """No fast path."""

    def publish(self, view: V_contra | None) -> None: ...

    def exclude(self, runs: Sequence[tuple[int, int]]) -> Any:
        return None

    def include(self, excluded: Any) -> None: ...

    def watch(self, runs: Sequence[tuple[int, int]]) -> Any:
        return None

    def noted(self) -> Sequence[tuple[int, int]]:
        return ()

    def unwatch(self, watched: Any) -> None: ...

    def settle(self, seconds: float) -> bool:
        return True


class Epoch(Generic[V]):
    """An admission period.  ``active`` is guarded by the gate's lock."""

    __slots__ = ("active", "number", "view")

    def __init__(self, number: int, view: V) -> None:
        self.number = number
        self.view = view
        self.active = 0


class Ticket(Generic[V]):
    """One mutating request in flight on blocks ``[first, end)``."""

    __slots__ = ("end", "epoch", "excluded", "exclusive", "first", "spans", "view")

    def __init__(self, epoch: Epoch[V], first: int, end: int, exclusive: bool) -> None:
        self.epoch = epoch
        self.view = epoch.view
        self.first = first
        self.end = end
        self.exclusive = exclusive
        self.spans: tuple[list[int], list[int]] | None = None
        self.excluded: Any = None

    def overlaps(self, other: Ticket[V]) -> bool:
        if self.first >= other.end or other.first >= self.end:
            return False
        if self.spans is not None:
            return _touches(self.spans, other.first, other.end)
        if other.spans is not None:
            return _touches(other.spans, self.first, self.end)
        return True


def _touches(spans: tuple[list[int], list[int]], first: int, end: int) -> bool:
    """Whether one of the sorted, disjoint spans ``(starts, ends)`` meets ``[first, end)``."""
    starts, ends = spans
    index = bisect.bisect_left(starts, end) - 1
    return index >= 0 and ends[index] > first


class Watch:
    """Which of some blocks were written to since it began; made by :meth:`Gate.watch`."""

    __slots__ = ("_noted", "_runs", "_spans", "_touched")

    def __init__(self, runs: Sequence[tuple[int, int]], noted: Callable[[], Sequence[tuple[int, int]]]) -> None:
        self._runs = runs
        self._noted = noted
        self._spans = ([run[0] for run in runs], [run[1] for run in runs])
        self._touched: list[tuple[int, int]] = []

    def note(self, first: int, end: int) -> None:
        """A request writes to ``[first, end)``.  Under the gate's lock."""
        if _touches(self._spans, first, end):
            self._touched.append((first, end))

    def untouched(self) -> list[tuple[int, int]]:
        """The runs without the blocks that were written to; for whoever holds writers off."""
        left: list[tuple[int, int]] = []
        touched, position = _joined([*self._touched, *self._noted()]), 0
        for first, end in self._runs:
            while position < len(touched) and touched[position][1] <= first:
                position += 1
            for low, high in itertools.islice(touched, position, None):
                if low >= end:
                    break
                if first < low:
                    left.append((first, low))
                first = max(first, high)
            if first < end:
                left.append((first, end))
        return left


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """*runs* in order, those that meet as one."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(runs):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((first, end))
    return joined


class Gate(Generic[V]):
    """The in-flight table of one disk."""

    def __init__(self, lock: threading.Lock, view: V, port: Port[V] | None = None) -> None:
        self.lock = lock
        self.current: Epoch[V] = Epoch(0, view)
        self.port: Port[V] = port or NoPort()
        self.port.publish(view)
        self._settled = -1  # the fast path has left this epoch and those before
        self._left = threading.Condition(lock)
        self._waiting = 0
        self._exclusive = 0
        self._tickets: dict[Ticket[V], None] = {}
        self._watch: Watch | None = None
        self._old: list[Epoch[V]] = []
        self.waits = 0
        """Requests (812) and windows of a commit that had to wait for a request in flight."""
        self.drains, self.drain_seconds = 0, 0.0
        """How often, and how long in all, :meth:`wait_drained` had to wait."""

    # ---- requests that change nothing ----

    def enter(self) -> Epoch[V]:
        """Admit a read, flush or extents request."""
        with self.lock:
            epoch = self.current
            epoch.active += 1
            return epoch

    def leave(self, epoch: Epoch[V]) -> None:
        with self.lock:
            epoch.active -= 1
            if self._waiting:
                self._left.notify_all()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Epoch[V]]:
        """:meth:`enter` and :meth:`leave`."""
        epoch = self.enter()
        try:
            yield epoch
        finally:
            self.leave(epoch)

    # ---- requests that change blocks ----

    def begin(self, first: int, end: int, exclusive: Callable[[V, int, int], bool] | None = None) -> Ticket[V]:
        """Admit a mutating request; returns when it may go on.

        *exclusive*, given for requests that cover blocks in part, says of the view whether a copy-up is needed.
        """
        with self.lock:
            epoch = self.current
            alone = exclusive is not None and exclusive(epoch.view, first, end)
            ticket = Ticket(epoch, first, end, alone)
            self._tickets[ticket] = None
            epoch.active += 1
            if self._watch is not None:
                self._watch.note(first, end)
            if alone or self._exclusive:
                self._admit_locked(ticket)
            return ticket

    @contextlib.contextmanager
    def watch(self, runs: Sequence[tuple[int, int]]) -> Iterator[Watch]:
        """Note who writes to the sorted, disjoint *runs* of blocks while the block lasts.  One at a time."""
        watch = Watch(runs, self.port.noted)
        while not self.port.settle(SETTLE_SECONDS):  # what may still note for the watch before
            pass
        with self.lock:
            assert self._watch is None, "two windows of one disk at a time"
            self._watch = watch
            for ticket in self._tickets:
                watch.note(ticket.first, ticket.end)
            watched = self.port.watch(runs)
        try:
            while not self.port.settle(SETTLE_SECONDS):
                pass
            yield watch
        finally:
            with self.lock:
                self._watch = None
                self.port.unwatch(watched)

    def exclude(self, runs: Sequence[tuple[int, int]]) -> Ticket[V]:
        """Hold off everybody else's writes to the sorted, disjoint *runs* of blocks, once those in flight are done."""
        with self.lock:
            ticket = Ticket(self.current, runs[0][0], runs[-1][1], True)
            ticket.spans = ([run[0] for run in runs], [run[1] for run in runs])
            self._tickets[ticket] = None
            ticket.epoch.active += 1
            self._admit_locked(ticket)
            return ticket

    def finish(self, ticket: Ticket[V]) -> None:
        with self.lock:
            del self._tickets[ticket]
            ticket.epoch.active -= 1
            if ticket.exclusive:
                self._exclusive -= 1
                self.port.include(ticket.excluded)
            if self._waiting:
                self._left.notify_all()

    def _admit_locked(self, ticket: Ticket[V]) -> None:
        if ticket.exclusive:
            self._exclusive += 1
            starts, ends = ticket.spans or ([ticket.first], [ticket.end])
            ticket.excluded = self.port.exclude(list(zip(starts, ends, strict=True)))
        self._waiting += 1
        try:
            blocked = self._blocked_locked(ticket)
            self.waits += blocked
            while blocked:
                self._left.wait()
                blocked = self._blocked_locked(ticket)
        finally:
            self._waiting -= 1
        if ticket.exclusive and not self.port.settle(0):
            self._settle_unlocked()

    def _settle_unlocked(self) -> None:
        """Wait for the fast path without the lock, which the caller holds: it may wait for a disk."""
        self.lock.release()
        try:
            while not self.port.settle(SETTLE_SECONDS):
                pass
        finally:
            self.lock.acquire()

    def _blocked_locked(self, ticket: Ticket[V]) -> bool:
        """Whether an earlier ticket stands in the way (tickets are kept in order of arrival)."""
        for other in self._tickets:
            if other is ticket:
                return False
            if (ticket.exclusive or other.exclusive) and other.overlaps(ticket):
                return True
        raise AssertionError("a ticket waits that is not in the table")

    # ---- epochs ----

    def advance_locked(self, view: V) -> Epoch[V]:
        """Put *view* in force for requests admitted from now on; returns the epoch that ended."""
        old = self.current
        self._old = [epoch for epoch in self._old if epoch.active]
        self._old.append(old)
        self.current = Epoch(old.number + 1, view)
        self.port.publish(view)
        return old

    def close_fast_locked(self) -> None:
        """Every request passes this gate, and so the lock, until the next :meth:`advance_locked`.

        When several disks advance at one instant all are closed before the first advances: a request of the fast path
        on the second, issued after one on the first was answered in its new epoch, would be in the old one (F3).
        """
        self.port.publish(None)

    def shut(self) -> None:
        """No request comes any more: wait for those of the fast path, before the files are closed (F2)."""
        with self.lock:
            self.port.publish(None)
        while not self.port.settle(SETTLE_SECONDS):
            pass

    def wait_drained(self, until: Epoch[V], deadline: float) -> None:
        """Wait until every request of *until* and of the epochs before it has left.

        *deadline* is a ``time.monotonic()`` value; raises :class:`errors.DeadlineError`.
        """
        with self.lock:
            self._waiting += 1
            began = time.monotonic()
            waited = False
            try:
                while any(epoch.number <= until.number and epoch.active for epoch in self._old):
                    waited = True
                    self._left.wait(_left_until(deadline))
            finally:
                self._waiting -= 1
                if waited:
                    self.drains += 1
                    self.drain_seconds += time.monotonic() - began
            ended = min(until.number, self.current.number - 1)
        if ended > self._settled:
            seconds = 0.0
            while not self.port.settle(seconds):
                seconds = min(SETTLE_SECONDS, _left_until(deadline))
            self._settled = max(self._settled, ended)

    def in_flight(self) -> int:
        """How many requests are inside."""
        with self.lock:
            return self.current.active + sum(epoch.active for epoch in self._old)


def _left_until(deadline: float) -> float:
    """Seconds until *deadline*; raises when it is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise errors.DeadlineError("requests in flight did not finish in time; is a disk hanging?")
    return left

"""The gate: which requests are in flight, in which epoch, on which blocks (steps 810 and 812, rules D4 and D5).

*Epoch.*  Every request is admitted to the current epoch and keeps its view (layers, write target) until it leaves.
:meth:`Gate.advance_locked` puts a new view in force: O(1), it waits for nobody; requests of the old epoch finish in
the old view.  :meth:`Gate.wait_drained` is what the copier, and whoever closes a layer's files, waits for.

*Tickets.*  A mutating request holds a ticket for its blocks.  Two plain writes may overlap: the guest has asked for
both at once.  A request that must read a block before it writes it (a copy-up), and a window of the commit or the
fill, are exclusive: they wait for every earlier ticket that overlaps, of any epoch, and every later one waits for
them.  Waiting is only ever for earlier tickets, so there is no deadlock and no starvation.  Whether exclusion is
needed is asked at admission, under the lock, of the same view the request will use.

*One lock.*  All gates of a VM share one lock, so that their epochs advance at one instant: a request on disk B that
was issued after one on disk A was acknowledged can never land on the earlier side of the switch.

*The fast path* (C, in the same process) takes no lock.  It shares ``Gate.words``, unsigned 64-bit words in plain
memory:

=====  ===================================================================================================
word
=====  ===================================================================================================
0      number of the current epoch (written here)
1      how many reasons there are to stay out: exclusive tickets, arming (written here; 0 = open)
2      mutating requests of the fast path in flight, all epochs (counted there, atomically)
8-15   requests of the fast path in flight, by epoch number modulo 8 (counted there, atomically)
=====  ===================================================================================================

It counts itself in, then looks at words 0 and 1, and backs out if the epoch is another or the gate is not open.
Modulo 8 is enough: its requests take microseconds, and a round of a checkpoint has five epochs and waits twice.
"""

from __future__ import annotations

import bisect
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from blkckpt import errors

V = TypeVar("V")

EPOCH, CLOSED, WRITERS, COUNTS = 0, 1, 2, 8
FAST_POLL = 0.0005
"""The fast path signals nobody; its requests take microseconds, so looking again after half a millisecond is rare."""


class Epoch(Generic[V]):
    """An admission period.  ``active`` is guarded by the gate's lock."""

    __slots__ = ("active", "number", "view")

    def __init__(self, number: int, view: V) -> None:
        self.number = number
        self.view = view
        self.active = 0


class Ticket(Generic[V]):
    """One mutating request in flight on blocks ``[first, end)``."""

    __slots__ = ("end", "epoch", "exclusive", "first", "spans", "view")

    def __init__(self, epoch: Epoch[V], first: int, end: int, exclusive: bool) -> None:
        self.epoch = epoch
        self.view = epoch.view
        self.first = first
        self.end = end
        self.exclusive = exclusive
        self.spans: tuple[list[int], list[int]] | None = None

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


class Gate(Generic[V]):
    """The in-flight table of one disk."""

    def __init__(self, lock: threading.Lock, view: V) -> None:
        self.lock = lock
        self.current: Epoch[V] = Epoch(0, view)
        self.words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._left = threading.Condition(lock)
        self._waiting = 0
        self._exclusive = 0
        self._tickets: dict[Ticket[V], None] = {}
        self._old: list[Epoch[V]] = []

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
            if alone or self._exclusive:
                self._admit_locked(ticket)
            return ticket

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
                self.words[CLOSED] -= 1
            if self._waiting:
                self._left.notify_all()

    def _admit_locked(self, ticket: Ticket[V]) -> None:
        if ticket.exclusive:
            self._exclusive += 1
            self.words[CLOSED] += 1
        self._waiting += 1
        try:
            while self._blocked_locked(ticket):
                self._left.wait()
            while ticket.exclusive and self.words[WRITERS]:
                self._left.wait(FAST_POLL)
        finally:
            self._waiting -= 1

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
        self._old = [epoch for epoch in self._old if self._active_locked(epoch)]
        self._old.append(old)
        self.current = Epoch(old.number + 1, view)
        self.words[EPOCH] = old.number + 1
        return old

    def close_fast_locked(self) -> None:
        """Keep the fast path out, because every request must be looked at (arming)."""
        self.words[CLOSED] += 1

    def open_fast_locked(self) -> None:
        self.words[CLOSED] -= 1

    def _active_locked(self, epoch: Epoch[V]) -> bool:
        return bool(epoch.active or self.words[COUNTS + epoch.number % 8])

    def wait_drained(self, until: Epoch[V], deadline: float) -> None:
        """Wait until every request of *until* and of the epochs before it has left.

        *deadline* is a ``time.monotonic()`` value; raises :class:`errors.DeadlineError`.
        """
        with self.lock:
            self._waiting += 1
            try:
                while any(epoch.number <= until.number and self._active_locked(epoch) for epoch in self._old):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise errors.DeadlineError("requests in flight did not finish in time; is a disk hanging?")
                    fast = any(self.words[COUNTS : COUNTS + 8])
                    self._left.wait(min(left, FAST_POLL) if fast else left)
            finally:
                self._waiting -= 1

    def in_flight(self) -> int:
        """How many requests are inside."""
        with self.lock:
            return self.current.active + sum(epoch.active for epoch in self._old)

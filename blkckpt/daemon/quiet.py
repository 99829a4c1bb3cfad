"""The quietest moment within a window: when to stop looking.  Pure.

Looks at a disk's load come one after another, and one that was let go does not come back: the problem of optimal
stopping that is called the secretary problem.  The rule, with *e* = 2.718…::

    1.  Only look during the first 1/e of the window.
    2.  After that take the first moment at or below the quietest seen before it.
    3.  At the end of the window take whatever there is.

Of all rules that use only which look was quieter, it finds the very quietest most often (in 1/e of the cases, as the
number of looks grows).  Two things are known here that the classical problem does not know: the load cannot be below
zero, so a moment without any request is taken at once, also while only looking; and an equal is as good as the best.

Source: E. B. Dynkin, "The optimum choice of the instant for stopping a Markov process", 1963; T. S. Ferguson, "Who
Solved the Secretary Problem?", Statistical Science 4 (1989), 282-289.

The load is bytes a second, read and written, and :data:`REQUEST_BYTES` for each request: what a request costs beside
its data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REQUEST_BYTES = 4096
LOOKS = 60
"""In a window, at most: enough for the rule, and no load by itself."""
SHORTEST_SECONDS = 0.05
LONGEST_SECONDS = 10.0
"""Between two looks."""

COUNTERS = ("reads", "writes", "read_bytes", "written_bytes")


@dataclass(frozen=True, slots=True)
class Counters:
    """What the disks of a VM have done since their server started: *server* tells one server from the next."""

    server: int
    requests: int
    moved: int


@dataclass(frozen=True, slots=True)
class Look:
    """One look: *elapsed* seconds of the window; the load since the look before, None where that says nothing."""

    elapsed: float
    load: float | None


def counters(server: int, disks: Sequence[Mapping[str, object]]) -> Counters:
    """The sum over the *disks* of a disk server's status."""
    reads, writes, read_bytes, written_bytes = (
        sum(int(str(disk.get(name) or 0)) for disk in disks) for name in COUNTERS
    )
    return Counters(server, reads + writes, read_bytes + written_bytes)


def load(before: Counters | None, now: Counters | None, seconds: float) -> float | None:
    """The load between two looks; None for the first one, and when the server was started meanwhile."""
    if before is None or now is None or before.server != now.server or seconds <= 0:
        return None
    moved, requests = now.moved - before.moved, now.requests - before.requests
    return None if moved < 0 or requests < 0 else (moved + REQUEST_BYTES * requests) / seconds


def interval(window: float) -> float:
    """Seconds between two looks in a window of so many."""
    return min(max(window / LOOKS, SHORTEST_SECONDS), LONGEST_SECONDS)


def choose(looks: Sequence[Look], window: float, elapsed: float) -> str | None:
    """Why the moment of the newest look is to be taken; None: look again.

    *elapsed* is how much of the *window* (seconds) is over now.
    """
    if elapsed >= window:
        return "the window ended"
    if not looks or (newest := looks[-1]).load is None:
        return None
    if newest.load == 0:
        return "the disks rest"
    if newest.elapsed < window / math.e:
        return None
    before = [look.load for look in looks[:-1] if look.load is not None]
    if before and newest.load <= min(before):
        return "the quietest moment so far"
    return None

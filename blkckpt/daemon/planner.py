"""What to do next for one VM, and what an attempt does to its record.  Pure: the clock is an argument.

:func:`decide`, the first row that fits::

    the VM cannot be checkpointed    SKIP   look again in OBSTACLE_SECONDS; the time stays due
    asked for by hand                RUN
    a retry waits and is not due     WAIT   until then
    a retry is due                   RUN
    no time of the schedule is due   WAIT   until the next
    due, a window, not chosen yet    LOOK   at the disks, again in a moment (:mod:`quiet`)
    due                              RUN

Rules:

* **T1** Times that were missed (the agent, the VM or the machine was down) are made good by one checkpoint, not by
  one each: an attempt settles every time up to its beginning.
* **T2** A failure is tried again after a delay that doubles (:func:`delay_ns`), with its reason kept.  A VM that does
  not run is no failure.
* **T3** The clock may be set.  Forward is as if times had been missed.  Back, by up to an interval, only lengthens the
  wait; by more than that, what is recorded lies in the future and is taken for now (:func:`corrected`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from blkckpt.daemon import quiet, record, schedule

SECOND = schedule.SECOND
OBSTACLE_NS = 2 * SECOND
"""Until a VM that does not run is looked at again: one question about a lock."""
LONGEST_WAIT_NS = 30 * SECOND
"""Nothing is waited for longer than this at a time: the clock may be set, the machine may sleep."""
FIRST_DELAY_NS = 5 * SECOND
LONGEST_DELAY_NS = 900 * SECOND
LEAST_LONGEST_NS = 60 * SECOND


class Do(enum.Enum):
    WAIT = "wait"
    SKIP = "skip"
    LOOK = "look"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Step:
    """*until_ns*: when to decide again at the latest.  *why*: for people."""

    do: Do
    until_ns: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is beside the clock and the files.

    *obstacle*: why the VM cannot be checkpointed now.  *asked*: somebody wants one at once.  *looks* and *elapsed*
    (seconds): the window, if it is open.
    """

    obstacle: str | None = None
    asked: bool = False
    looks: Sequence[quiet.Look] = ()
    elapsed: float = 0.0


def due_ns(wanted: schedule.Schedule, known: record.Record) -> int:
    """The first time of the schedule that is not settled."""
    if known.settled_ns is None:
        return wanted.anchor_ns
    return wanted.anchor_ns + ((known.settled_ns - wanted.anchor_ns) // wanted.every_ns + 1) * wanted.every_ns


def next_ns(wanted: schedule.Schedule, known: record.Record) -> int:
    """When the next attempt is due: a retry, else the schedule."""
    return due_ns(wanted, known) if known.retry_ns is None else known.retry_ns


def decide(now: int, wanted: schedule.Schedule, known: record.Record, here: Situation) -> Step:
    """What to do at *now* (wall clock, ns); *known* is :func:`corrected`."""
    at = next_ns(wanted, known)
    if here.obstacle is not None and (here.asked or now >= at):
        return Step(Do.SKIP, now + OBSTACLE_NS, here.obstacle)
    if here.asked:
        return Step(Do.RUN, now, "asked for")
    if now < at:
        return Step(Do.WAIT, min(at, now + LONGEST_WAIT_NS))
    if known.retry_ns is not None:
        return Step(Do.RUN, now, f"try {known.failures + 1}")
    if not wanted.window_ns:
        return Step(Do.RUN, now, "due")
    window = wanted.window_ns / SECOND
    if reason := quiet.choose(here.looks, window, here.elapsed):
        return Step(Do.RUN, now, reason)
    pause = min(quiet.interval(window), max(0.0, window - here.elapsed))
    return Step(Do.LOOK, now + int(pause * SECOND), "looks for a quiet moment")


def delay_ns(failures: int, every_ns: int) -> int:
    """How long to wait after so many failures in a row: 5 s (less for shorter schedules), doubling.

    The longest is the schedule's own interval, within a minute and a quarter of an hour.
    """
    longest = min(max(every_ns, LEAST_LONGEST_NS), LONGEST_DELAY_NS)
    first = min(FIRST_DELAY_NS, every_ns)
    return int(min(first << min(failures - 1, 40), longest))


def corrected(known: record.Record, wanted: schedule.Schedule, now: int) -> record.Record:
    """*known* without times that only a clock since put back can have written (T3).

    That of a schedule which had no attempt yet is its beginning.
    """
    settled, retry = known.settled_ns, known.retry_ns
    first = wanted.anchor_ns if settled is None else settled - wanted.every_ns
    if first > now:
        settled = now
    if retry is not None and retry > now + delay_ns(max(known.failures, 1), wanted.every_ns):
        retry = now
    if (settled, retry) == (known.settled_ns, known.retry_ns):
        return known
    return dataclasses.replace(known, settled_ns=settled, retry_ns=retry)


# What an attempt does to the record.


def begun(known: record.Record, child: record.Child) -> record.Record:
    """An attempt has begun: every time up to then is settled (T1)."""
    return dataclasses.replace(known, settled_ns=child.began_ns, running=child)


def succeeded(known: record.Record, success: record.Success) -> record.Record:
    return dataclasses.replace(known, failures=0, retry_ns=None, success=success, running=None)


def failed(known: record.Record, wanted: schedule.Schedule, problem: record.Problem) -> record.Record:
    """T2: another failure in the row."""
    failures = known.failures + 1
    retry = problem.at_ns + delay_ns(failures, wanted.every_ns)
    return dataclasses.replace(known, failures=failures, retry_ns=retry, problem=problem, running=None)


def interrupted(known: record.Record, now: int) -> record.Record:
    """We ended the attempt ourselves, being stopped: the next agent makes it good at once; it is no failure."""
    return dataclasses.replace(known, retry_ns=now, running=None)

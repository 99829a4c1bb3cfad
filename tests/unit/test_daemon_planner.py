"""When a checkpoint is due (T1 to T3), without a clock and without a process."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt.daemon import planner, quiet, record, schedule

S = schedule.SECOND
START = 1_700_000_000 * S
EVERY = 900 * S
WANTED = schedule.Schedule(EVERY, START)
NOTHING = planner.Situation()


def child(now: int) -> record.Child:
    return record.Child(1, 1, "boot", now)


def attempt(known: record.Record, now: int, *, fails: bool, wanted: schedule.Schedule = WANTED) -> record.Record:
    """The record after an attempt that took no time."""
    begun = planner.begun(known, child(now))
    if fails:
        return planner.failed(begun, wanted, record.Problem(now, "busy", "no"))
    return planner.succeeded(begun, record.Success(now, "one", 1.0, None, 0))


def at(now: int, known: record.Record, here: planner.Situation = NOTHING) -> planner.Step:
    return planner.decide(now, WANTED, known, here)


def test_the_first_is_taken_at_once_and_the_next_on_the_grid() -> None:
    assert at(START, record.Record()).do is planner.Do.RUN
    known = attempt(record.Record(), START + 7 * S, fails=False)
    assert planner.next_ns(WANTED, known) == START + EVERY, "late by 7 s, and yet no drift"
    assert at(START + EVERY - 1, known).do is planner.Do.WAIT
    assert at(START + EVERY, known).do is planner.Do.RUN


def test_t1_missed_times_are_made_good_by_one() -> None:
    known = attempt(record.Record(), START, fails=False)
    late = START + 1000 * EVERY + 5 * S
    assert at(late, known).do is planner.Do.RUN
    assert planner.next_ns(WANTED, attempt(known, late, fails=False)) == START + 1001 * EVERY


def test_t2_failures_are_retried_later_and_later_with_their_reason() -> None:
    known, now, pauses = record.Record(), START, []
    for _ in range(12):
        known = attempt(known, now, fails=True)
        assert known.retry_ns is not None and known.problem == record.Problem(now, "busy", "no")
        assert at(known.retry_ns - 1, known).do is planner.Do.WAIT
        pauses.append((known.retry_ns - now) // S)
        now = known.retry_ns
        assert at(now, known).do is planner.Do.RUN
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900, 900, 900]
    known = attempt(known, now, fails=False)
    assert (known.failures, known.retry_ns) == (0, None)
    assert known.problem is not None, "what failed last stays to be seen"


@pytest.mark.parametrize(("every", "longest"), [(1, 60), (30, 60), (300, 300), (86400, 900)])
def test_the_longest_pause_suits_the_schedule(every: int, longest: int) -> None:
    assert planner.delay_ns(1, every * S) == min(5, every) * S
    assert planner.delay_ns(10**6, every * S) == longest * S


def test_t2_a_vm_that_does_not_run_is_no_failure_and_is_picked_up() -> None:
    stopped = planner.Situation(obstacle="the VM does not run")
    known = attempt(record.Record(), START, fails=False)
    assert at(START + 1, known, stopped).do is planner.Do.WAIT, "nothing is due, so nothing is said"
    step = at(START + 50 * EVERY, known, stopped)
    assert (step.do, step.why) == (planner.Do.SKIP, "the VM does not run")
    assert step.until_ns - (START + 50 * EVERY) == planner.OBSTACLE_NS
    assert at(START + 50 * EVERY + 1, known).do is planner.Do.RUN


def test_asked_for_by_hand() -> None:
    asked = planner.Situation(asked=True)
    known = attempt(record.Record(), START, fails=True)
    assert at(START + 1, known, asked).do is planner.Do.RUN, "a retry that waits is no reason"
    assert at(START + 1, known, dataclasses.replace(asked, obstacle="x")).do is planner.Do.SKIP


def test_t3_the_clock_is_put_back() -> None:
    known = attempt(record.Record(), START + 100 * EVERY, fails=False)
    little = START + 99 * EVERY + 5 * S
    assert planner.corrected(known, WANTED, little) is known, "one wait is longer, and nothing is taken twice"
    assert planner.next_ns(WANTED, known) == START + 101 * EVERY
    year = START - 365 * 86400 * S
    again = planner.corrected(known, WANTED, year)
    assert year < planner.next_ns(WANTED, again) <= year + EVERY
    failing = attempt(known, START + 100 * EVERY, fails=True)
    assert planner.corrected(failing, WANTED, year).retry_ns == year


def test_another_interval_begins_anew_and_the_same_one_goes_on() -> None:
    known = attempt(record.Record(), START, fails=False)
    hourly = schedule.Schedule(3600 * S, START + 5 * S)
    assert planner.next_ns(hourly, known) == START + 5 * S
    assert planner.next_ns(dataclasses.replace(WANTED, rate=5), known) == START + EVERY


def test_an_interrupted_attempt_is_made_good_at_once() -> None:
    known = planner.interrupted(planner.begun(record.Record(), child(START)), START + 9 * S)
    assert known.failures == 0 and at(START + 9 * S, known).do is planner.Do.RUN


def test_the_window_is_looked_through_and_then_used() -> None:
    wanted = dataclasses.replace(WANTED, window_ns=60 * S)

    def look(looks: Sequence[quiet.Look], elapsed: float) -> planner.Step:
        return planner.decide(START, wanted, record.Record(), planner.Situation(looks=looks, elapsed=elapsed))

    first = look((), 0.0)
    assert first.do is planner.Do.LOOK and first.until_ns == START + S
    busy = [quiet.Look(float(second), 1e6 - second) for second in range(22)]
    assert look(busy, 21.0).do is planner.Do.LOOK
    assert look([*busy, quiet.Look(30.0, 5.0)], 30.0).do is planner.Do.RUN
    assert look([*busy, quiet.Look(30.0, 5e6)], 60.0).why == "the window ended"
    known = attempt(record.Record(), START, fails=True, wanted=wanted)
    assert known.retry_ns is not None
    assert planner.decide(known.retry_ns, wanted, known, NOTHING).do is planner.Do.RUN, "a retry has waited enough"


# The rules over random histories.

MINUTES = st.integers(0, 90).map(lambda minutes: minutes * 60 * S)
KINDS = ["down", "stopped", "fails", "fine"]
HISTORY = st.lists(st.tuples(MINUTES, st.sampled_from(KINDS)), min_size=1, max_size=10)


def play(history: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str, record.Record]]:
    """Live through stretches of time, each of one kind; yields every attempt with the record before it."""
    now, end, known = START, START, record.Record()
    for length, kind in history:
        if kind == "back":
            now, end = now - length, end - length
            continue
        end += length
        if kind == "down":
            now = max(now, end)
            known = record.decode(encoded(known))
        while now < end:
            known = planner.corrected(known, WANTED, now)
            here = planner.Situation(obstacle="the VM does not run" if kind == "stopped" else None)
            step = planner.decide(now, WANTED, known, here)
            assert now <= step.until_ns <= now + planner.LONGEST_WAIT_NS, "nothing sleeps for long"
            if step.do is planner.Do.RUN:
                yield now, kind, known
                known = attempt(known, now, fails=kind == "fails")
                now += S
            else:
                now = max(step.until_ns, now + 1)


def encoded(known: record.Record) -> bytes:
    body = {"magic": record.MAGIC, "version": record.VERSION, "record": dataclasses.asdict(known)}
    return json.dumps(body).encode()


@settings(deadline=None)
@given(HISTORY)
def test_whatever_happens_each_time_is_taken_once(history: Sequence[tuple[int, str]]) -> None:
    slots = []
    for now, kind, known in play(history):
        assert kind in ("fails", "fine"), "never without a VM, never without an agent"
        if kind == "fine":
            slots.append((now - START) // EVERY)
        if known.retry_ns is not None:
            assert now >= known.retry_ns
    retried = len(slots) - len(set(slots))
    assert slots == sorted(slots)
    assert retried <= sum(kind == "fails" for _, kind in history), "twice in one interval only if a retry came late"


@settings(deadline=None)
@given(HISTORY)
def test_a_vm_that_runs_never_waits_longer_than_an_interval(history: Sequence[tuple[int, str]]) -> None:
    history = [*history, (3 * EVERY, "fine")]
    end = START + sum(length for length, _ in history)
    taken = [now for now, kind, _ in play(history) if kind == "fine" and now >= end - 3 * EVERY]
    assert taken and taken[0] - (end - 3 * EVERY) <= EVERY
    assert all(later - earlier <= EVERY for earlier, later in itertools.pairwise(taken))


STEPS = st.lists(st.tuples(MINUTES, st.sampled_from([*KINDS, "back"])), max_size=10)


@settings(deadline=None)
@given(STEPS)
def test_t3_a_clock_that_is_put_back_costs_one_interval_at_most(history: Sequence[tuple[int, str]]) -> None:
    end = START + sum(-length if kind == "back" else length for length, kind in history)
    taken = [now for now, kind, _ in play([*history, (3 * EVERY, "last")]) if kind == "last"]
    assert taken and taken[0] - end <= 2 * EVERY
    assert all(later - earlier <= EVERY for earlier, later in itertools.pairwise(taken))

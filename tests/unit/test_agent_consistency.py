"""Where the members of a consistency group meet: all or none, and all stopped at one time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from blkckpt import errors
from blkckpt.agent import consistency, plan
from blkckpt.store import manifest

MEMBERS = ["a@c", "b@c", "d@c"]


def made(member: str) -> manifest.Manifest:
    vm, _, name = member.partition("@")
    return manifest.Manifest(vm, name, "0" * 32, 1, ())


def walker(
    meeting: consistency.Meeting, member: str, seen: list[tuple[str, plan.State]], fail_at: plan.State | None = None
) -> Callable[[], manifest.Manifest]:
    """Goes through the states of a plan as the runner does."""

    def walk() -> manifest.Manifest:
        for state in (plan.State.STOPPING, plan.State.SWITCHING, plan.State.RESUMING, plan.State.PUBLISHING):
            meeting.meet(state)
            if state is fail_at:
                raise errors.NoSpaceError("the store is full")
            seen.append((member, state))
            time.sleep(0.01 * (1 + MEMBERS.index(member)))
        return made(member)

    return walk


def test_nobody_goes_on_before_all_have_come() -> None:
    """No disk is switched while another guest runs, no guest is resumed before all disks have switched."""
    meeting, seen = consistency.Meeting(MEMBERS), []  # type: ignore[var-annotated]
    taken = consistency.together({one: walker(meeting, one, seen) for one in MEMBERS}, meeting)
    assert [one.vm for one in taken] == ["a", "b", "d"]
    states = [state for _, state in seen]
    for state in consistency.POINTS:
        before = [plan.State.STOPPING, plan.State.SWITCHING, plan.State.RESUMING, plan.State.PUBLISHING]
        last = before[before.index(state) - 1]
        assert max(i for i, one in enumerate(states) if one is last) < states.index(state)


@pytest.mark.parametrize("fail_at", [plan.State.STOPPING, plan.State.SWITCHING, plan.State.PUBLISHING])
def test_a3_one_that_fails_takes_all_back(fail_at: plan.State) -> None:
    meeting, seen = consistency.Meeting(MEMBERS), []  # type: ignore[var-annotated]
    takers = {one: walker(meeting, one, seen, fail_at if one == "b@c" else None) for one in MEMBERS}
    with pytest.raises((errors.NoSpaceError, errors.StateError), match="store is full"):
        consistency.together(takers, meeting)
    with pytest.raises(errors.StateError, match="b@c: the store is full"):
        meeting.check()


def test_the_spread_and_a_guest_that_ran_too_soon() -> None:
    meeting = consistency.Meeting(MEMBERS)
    with pytest.raises(errors.StateError, match="not known"):
        meeting.info()
    for number, member in enumerate(MEMBERS):
        meeting.note(member, 1_000_000 + 2000 * number, 1_500_000)
    assert meeting.info().spread == pytest.approx(0.004) and meeting.info().members == tuple(MEMBERS)
    meeting.note("a@c", 1_000_000, 1_003_000)
    with pytest.raises(errors.StateError, match="same time"):
        meeting.info()


def test_a2_a_stopped_guest_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "STOPPED_SECONDS", 0.05)
    meeting = consistency.Meeting(MEMBERS)
    with pytest.raises(errors.StateError, match="not there within"):
        meeting.meet(plan.State.SWITCHING)


def test_every_point_is_in_the_plans_of_its_modes() -> None:
    for mode in consistency.MODES:
        states = {state for state, _ in plan.TABLES[mode]} | {step[0] for step in plan.TABLES[mode].values()}
        assert states >= consistency.POINTS


def test_an_interrupted_group_waits_for_its_members() -> None:
    meeting = consistency.Meeting(["a@c"])
    ended = threading.Event()

    def take() -> manifest.Manifest:
        time.sleep(0.05)
        ended.set()
        raise errors.StateError("taken back")

    with pytest.raises(errors.StateError):
        consistency.together({"a@c": take}, meeting)
    assert ended.is_set()

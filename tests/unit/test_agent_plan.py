"""The table of a checkpoint: complete, without dead ends, and safe from every state (A1, A3)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt.agent import plan
from blkckpt.agent.plan import Action, Event, Mode, State

MODES = list(Mode)
PAIRS = [(mode, state) for mode in MODES for state in dict.fromkeys(s for s, _ in plan.TABLES[mode])]


def run(mode: Mode, fail_at: State | None = None) -> tuple[list[State], list[Action]]:
    """Walk to an end, failing (the whole step) in *fail_at*; the states seen and the actions asked for."""
    walk = plan.Plan(mode)
    actions = list(walk.step(Event.BEGIN))
    states = [walk.state]
    while not walk.ended:
        actions += walk.step(Event.FAILED if walk.state is fail_at else Event.DONE)
        states.append(walk.state)
        assert len(states) < 50
    return states, actions


def order(actions: list[Action], *wanted: Action) -> bool:
    """Whether *wanted* appear, in this order."""
    positions = [actions.index(action) for action in wanted]
    return positions == sorted(positions)


@pytest.mark.parametrize(("mode", "state"), PAIRS, ids=lambda value: value.value)
def test_every_pair_is_defined(mode: Mode, state: State) -> None:
    """Each state of a mode knows exactly the events that can happen in it; every other one changes nothing."""
    expected = {Event.BEGIN} if state is State.REST else {Event.DONE, Event.FAILED}
    for event in Event:
        walk = plan.Plan(mode)
        walk.state = state
        if event in expected:
            walk.step(event)
            assert walk.state is not state
        else:
            with pytest.raises(plan.IllegalStepError):
                walk.step(event)
            assert walk.state is state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", sorted(plan.ENDS, key=str))
def test_ends_know_no_event(mode: Mode, end: State) -> None:
    walk = plan.Plan(mode)
    walk.state = end
    for event in Event:
        with pytest.raises(plan.IllegalStepError):
            walk.step(event)
        assert walk.state is end


@pytest.mark.parametrize("mode", MODES)
def test_the_good_way(mode: Mode) -> None:
    states, actions = run(mode)
    assert states[-1] is State.FINISHED
    assert State.ABORTING not in states
    assert order(actions, Action.PREPARE_DISKS, Action.START_COPY, Action.AWAIT_COPY, Action.PUBLISH, Action.COMMIT)
    assert len(actions) == len(set(actions)), "an action twice"


@pytest.mark.parametrize("mode", MODES)
def test_s2_published_after_everything_is_durable(mode: Mode) -> None:
    _, actions = run(mode)
    waits = {Action.AWAIT_COPY, Action.AWAIT_MEMORY, Action.CHECK_MIGRATION} & set(actions)
    assert all(order(actions, wait, Action.PUBLISH) for wait in waits)


def test_the_switch_is_inside_the_instant() -> None:
    """BARRIER: armed and unread before the migration.  Others: after the stop or freeze, before the guest goes on."""
    barrier = run(Mode.BARRIER)[1]
    assert order(barrier, Action.PAUSE_READING, Action.ARM, Action.MIGRATE, Action.AWAIT_BARRIER, Action.RESUME_READING)
    for mode in (Mode.EXPLICIT, Mode.STOPPED):
        assert order(run(mode)[1], Action.STOP_GUEST, Action.SWITCH_NOW, Action.MIGRATE)
    assert order(run(Mode.STOPPED)[1], Action.MIGRATE, Action.CHECK_MIGRATION, Action.CONTINUE_GUEST)
    assert order(run(Mode.FROZEN)[1], Action.FREEZE, Action.SWITCH_NOW, Action.THAW)
    assert Action.STOP_GUEST not in barrier


FAILABLE = [(mode, state) for mode, state in PAIRS if state not in (State.REST, State.ABORTING)]


@pytest.mark.parametrize(("mode", "state"), FAILABLE, ids=lambda value: value.value)
def test_a3_every_failure_before_the_manifest_is_taken_back(mode: Mode, state: State) -> None:
    states, actions = run(mode, fail_at=state)
    if state is State.COMMITTING:
        assert states[-1] is State.FINISHED
        assert Action.ABORT_DISKS not in actions
        return
    assert states[-1] is State.TAKEN_BACK
    undo = plan.TABLES[mode][state, Event.FAILED][1]
    assert Action.ABORT_DISKS in undo
    assert Action.WITHDRAW_MANIFEST in undo
    assert Action.COMMIT not in actions
    if Action.START_RECEIVER in actions:
        assert {Action.END_MIGRATION, Action.STOP_RECEIVER, Action.REMOVE_MEMORY} <= set(undo)
        assert Action.RESTORE_CAPABILITIES in undo


@pytest.mark.parametrize(("mode", "state"), FAILABLE, ids=lambda value: value.value)
def test_a1_no_failure_leaves_the_guest_stopped(mode: Mode, state: State) -> None:
    """From any state with the guest possibly stopped or frozen, the way to every end continues or thaws it."""
    _, actions = run(mode, fail_at=state)
    if Action.STOP_GUEST in actions or Action.MIGRATE in actions:
        resumes = {Action.CONTINUE_GUEST, Action.AWAIT_RUNNING, Action.AWAIT_BARRIER}
        assert resumes & set(actions)
        if state is not State.COMMITTING:
            assert Action.CONTINUE_GUEST in actions
    if Action.FREEZE in actions:
        assert Action.THAW in actions


@pytest.mark.parametrize("mode", [Mode.EXPLICIT, Mode.STOPPED, Mode.FROZEN])
def test_a1_the_guest_comes_first_when_aborting(mode: Mode) -> None:
    undo = plan.TABLES[mode][State.SWITCHING, Event.FAILED][1]
    first = Action.THAW if mode is Mode.FROZEN else Action.CONTINUE_GUEST
    tidy = (Action.ABORT_DISKS, Action.WITHDRAW_MANIFEST)
    assert all(undo.index(first) < undo.index(action) for action in tidy)


@pytest.mark.parametrize("mode", [mode for mode in MODES if Action.START_GUARD in run(mode)[1]])
def test_a1_a_guard_stands_before_the_guest_is_touched(mode: Mode) -> None:
    _, actions = run(mode)
    for touch in {Action.STOP_GUEST, Action.MIGRATE, Action.FREEZE} & set(actions):
        assert order(actions, Action.START_GUARD, Action.AWAIT_GUARD, touch, Action.RELEASE_GUARD)


def test_the_guard_is_part_of_every_mode_that_touches_the_guest() -> None:
    for mode in MODES:
        actions = set(run(mode)[1])
        touches = actions & {Action.STOP_GUEST, Action.MIGRATE, Action.FREEZE}
        assert bool(touches) == (Action.START_GUARD in actions)


@given(st.sampled_from(MODES), st.lists(st.sampled_from(list(Event)), max_size=30))
def test_any_events_end_or_stay(mode: Mode, events: list[Event]) -> None:
    """However events come, the state is one of the mode's, and a published checkpoint is never taken back."""
    walk = plan.Plan(mode)
    known = {state for state, _ in itertools.chain(plan.TABLES[mode], plan.TABLES[mode].values())}
    committed = False
    for event in events:
        before = walk.state
        try:
            walk.step(event)
        except plan.IllegalStepError:
            assert walk.state is before
        assert walk.state in known
        committed = committed or walk.state is State.COMMITTING
        assert not (committed and walk.state is State.TAKEN_BACK)

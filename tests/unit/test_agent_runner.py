"""The runner against a world that fails wherever it is told to: what is taken back, in which order, what is said."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors, paths
from blkckpt.agent import checkpoint, plan, runner, turn
from blkckpt.agent.plan import Action, Event, Mode, State
from blkckpt.store import manifest, store
from blkckpt.vm import definition

DONE = manifest.Manifest("v", "c", "ab" * 16, 1, ())


class World:
    """Stands in for a checkpoint's work and keeps, as a model, what a guest would see."""

    def __init__(self, fail: dict[Action, BaseException] | None = None) -> None:
        self.vm = paths.home("/nonexistent").vm("v")
        self.fail = fail or {}
        self.done: list[Action] = []
        self.stopped = self.frozen = self.prepared = self.published = self.receiving = False
        self.finished_with: BaseException | None = None

    def perform(self, action: Action, mode: Mode) -> None:
        self.done.append(action)
        if action in self.fail:
            # The worst case: what changes the world has happened, what takes back has not.
            if action in (Action.STOP_GUEST, Action.FREEZE, Action.PREPARE_DISKS, Action.START_RECEIVER):
                self.change(action)
            raise self.fail[action]
        self.change(action)

    def change(self, action: Action) -> None:
        match action:
            case Action.PREPARE_DISKS:
                self.prepared = True
            case Action.ABORT_DISKS | Action.COMMIT:
                self.prepared = False
            case Action.STOP_GUEST:
                self.stopped = True
            case Action.CONTINUE_GUEST | Action.AWAIT_RUNNING:
                self.stopped = False
            case Action.FREEZE:
                self.frozen = True
            case Action.THAW:
                self.frozen = False
            case Action.PUBLISH:
                self.published = True
            case Action.WITHDRAW_MANIFEST:
                self.published = False
            case Action.START_RECEIVER:
                self.receiving = True
            case Action.AWAIT_MEMORY | Action.STOP_RECEIVER:
                self.receiving = False

    def finished(self, total: float, error: BaseException | None) -> manifest.Manifest:
        self.finished_with = error
        return DONE


def run(mode: Mode, world: World) -> manifest.Manifest:
    work: Any = world
    return runner._Runner(plan.Plan(mode), work, 0.0).run()


def good_actions(mode: Mode) -> list[Action]:
    world = World()
    assert run(mode, world) is DONE
    assert not (world.stopped or world.frozen or world.prepared or world.receiving)
    assert world.published
    return world.done


CASES = [(mode, action) for mode in Mode for action in good_actions(mode)]


@pytest.mark.parametrize(("mode", "action"), CASES, ids=lambda value: value.name.lower())
def test_a1_a3_any_failing_action(mode: Mode, action: Action) -> None:
    """Whatever fails: the guest runs, the disks are at rest, and there is a manifest exactly if it was committed."""
    world = World({action: errors.NoSpaceError("it broke")})
    if action is Action.COMMIT:
        assert run(mode, world) is DONE
        assert str(world.finished_with) == "it broke"
        assert world.published
        return
    once = {action} & set(plan.TABLES[mode][State.SAVING, Event.FAILED][1])
    with pytest.raises(errors.NoSpaceError, match="it broke"):
        run(mode, world)
    assert not world.published
    if not once:  # an action that fails in its abort row too cannot have had its effect
        assert not world.stopped
        assert not world.frozen
    assert not world.prepared
    assert not world.receiving


@pytest.mark.parametrize("mode", list(Mode))
def test_interrupted(mode: Mode) -> None:
    world = World({Action.AWAIT_COPY: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(mode, world)
    assert not (world.prepared or world.stopped or world.frozen or world.published or world.receiving)


def test_everything_is_tried_when_taking_back_fails() -> None:
    """One abort action that fails stops no other, and is said; the guest comes first whatever else fails."""
    troubles: dict[Action, BaseException] = {Action.SWITCH_NOW: errors.StateError("no switch")}
    troubles |= {action: errors.HypervisorError("stuck") for action in (Action.END_MIGRATION, Action.STOP_RECEIVER)}
    world = World(troubles)
    with pytest.raises(errors.StateError, match=r"no switch; besides, could not let the migration end.*: stuck; could"):
        run(Mode.EXPLICIT, world)
    assert not world.stopped
    assert not world.prepared


def test_a1_a_guest_that_cannot_be_continued_is_said_loudly() -> None:
    world = World({Action.SWITCH_NOW: errors.StateError("no"), Action.CONTINUE_GUEST: errors.HypervisorError("deaf")})
    with pytest.raises(errors.StateError, match="could not continue the guest if it was us who stopped it: deaf"):
        run(Mode.STOPPED, world)
    assert not world.prepared


def test_ctrl_c_while_taking_back_is_held_back() -> None:
    """A second Ctrl-C does not cut the taking back short."""

    class Impatient(World):
        def perform(self, action: Action, mode: Mode) -> None:
            if action is Action.ABORT_DISKS:
                os.kill(os.getpid(), signal.SIGINT)
            super().perform(action, mode)

    assert threading.current_thread() is threading.main_thread()
    world = Impatient({Action.AWAIT_COPY: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(Mode.BARRIER, world)
    assert world.done[-1] is Action.REMOVE_MEMORY
    assert not world.prepared


# --- what stands before ---


@pytest.fixture
def place(tmp_path: Path) -> store.Store:
    return store.Store.init(tmp_path / "store")


@pytest.fixture
def vm(tmp_path: Path) -> paths.VmPaths:
    vm = paths.home(tmp_path / "home").vm("v")
    paths.private_directory(vm.root)
    return vm


def defined(vm: paths.VmPaths) -> definition.VmDefinition:
    return definition.VmDefinition(vm.name, "ab", 1, (definition.DiskDefinition("vda", "/x", 512),))


def test_a_second_checkpoint_is_refused_at_once(vm: paths.VmPaths, place: store.Store) -> None:
    """A4."""
    with turn.take(vm), pytest.raises(errors.StateError, match="being taken already"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions())
    turn.take(vm).give_back()


def test_a_second_checkpoint_may_wait_for_its_turn(vm: paths.VmPaths, place: store.Store) -> None:
    """A4; it fails later, since nothing serves the disks."""
    held = turn.take(vm)
    threading.Timer(0.2, held.give_back).start()
    began = time.monotonic()
    with pytest.raises(errors.StateError, match="blkckpt run"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions(wait=20))
    assert 0.1 < time.monotonic() - began < 10


def test_nothing_serves_the_disks(vm: paths.VmPaths, place: store.Store) -> None:
    with pytest.raises(errors.StateError, match="blkckpt run"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions())


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 65])
def test_names_that_cannot_be(vm: paths.VmPaths, place: store.Store, name: str) -> None:
    with pytest.raises(errors.InputError, match="not a usable name"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions(name=name))


def test_an_unknown_pause(vm: paths.VmPaths, place: store.Store) -> None:
    with pytest.raises(errors.InputError, match="barrier, explicit, auto"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions(pause="never"))


def put(place: store.Store, name: str) -> None:
    with place.image_writer(512) as writer:
        writer.write(0, bytes([1]) * 512)
        image = writer.finish().image
    disk = manifest.DiskImage("vda", image, 512)
    place.put_manifest(manifest.Manifest("v", name, "ab" * 16, 1, (disk,)))


def test_a_name_in_use(vm: paths.VmPaths, place: store.Store) -> None:
    put(place, "mine")
    with pytest.raises(errors.StateError, match="already"):
        runner.take(vm, defined(vm), place, checkpoint.CheckpointOptions(name="mine"))


def test_default_names_are_the_time_and_unique(place: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    names = []
    for _ in range(3):
        names.append(runner._choose_name(place, "v", None))
        put(place, names[-1])
    assert names == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]

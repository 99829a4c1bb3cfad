"""Power loss under the store's feet: rules S1, S2 and S5.

After any cut: a checkpoint whose ``put_manifest`` had returned is there, one whose removal had returned is not, and
every one that is visible reads back whole and right, through a new writer and a collection that repacks as well.
Labels are all there or not at all, and there once they were acknowledged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.store import store
from tests.faults import crash, powerloss, recorder, store_workload

STEPS = 7


@pytest.fixture
def place(shm: Path) -> Path:
    """The directory that holds the store, and that each state is written to."""
    root = shm / "root"
    root.mkdir(mode=0o700)
    return root


def record(library: Path, place: Path, seed: int) -> list[recorder.Event]:
    log = place.parent / "log"
    events = recorder.run(
        library, place, log, "tests.faults.store_workload", str(place / "store"), str(seed), str(STEPS)
    )
    powerloss.assert_complete(crash.Machine.empty(place), events, place)
    return events


def failures(place: Path, events: Sequence[recorder.Event], count: int, seed: int, *, enough: int = 5) -> list[str]:
    """What is wrong after *count* cuts of *events*: those that were recorded, or what a bug had made of them."""
    machine = crash.Machine.empty(place)
    return powerloss.failures(
        machine, events, place, count, seed, lambda state: check(place, events[: state.cut]), enough=enough
    )


class Promises:
    """What the marks before the cut promise."""

    def __init__(self, events: Sequence[recorder.Event]) -> None:
        self.initialised = False
        self.tagged: dict[tuple[str, int], bool] = {}
        self.may: set[tuple[str, int]] = set()
        self.must: set[tuple[str, int]] = set()
        for event in events:
            if event.kind == recorder.MARK:
                self._take(event.mark)

    def _take(self, mark: dict[str, object]) -> None:
        if "init" in mark:
            self.initialised = True
        if not mark.keys() & {"put", "put_done", "remove", "remove_done", "tag", "tag_done"}:
            return
        ((verb, number),) = [(key, value) for key, value in mark.items() if key not in ("vm", "ack")]
        key = (str(mark["vm"]), int(str(number)))
        if verb == "put":
            self.may.add(key)
        elif verb == "put_done":
            self.must.add(key)
        elif verb == "remove":
            self.must.discard(key)
        elif verb in ("tag", "tag_done"):
            self.tagged[key] = verb == "tag_done"
        else:
            self.may.discard(key)


def check(place: Path, before: Sequence[recorder.Event]) -> str | None:
    """None if the store in *place* keeps the promises (S1, S2), else what is wrong."""
    promises = Promises(before)
    try:
        where = store.Store.open(place / "store")
    except errors.NotFoundError:
        return "S1: the store is gone" if promises.initialised else None
    except errors.CorruptError as error:
        return f"S1: {error}"
    with where:
        return _check_open(where, promises)


def _check_open(where: store.Store, promises: Promises) -> str | None:
    try:
        found = {(vm, int(name[1:])) for vm, name in where.names()}
        if missing := promises.must - found:
            return f"S1: published, but gone: {missing}"
        if extra := found - promises.may:
            return f"S1: never published, or removed: {extra}"
        if problem := _read_all(where, found) or _read_labels(where, found, promises):
            return problem
        new = store_workload.take(where, "later", max((n for _, n in found), default=5), random.Random(1), {})
        where.collect(repack=0.1)
        return _read_all(where, {*found, ("later", int(new.name[1:]))})
    except errors.BlkckptError as error:
        return f"S2: {type(error).__name__}: {error}"


def _read_all(where: store.Store, found: set[tuple[str, int]]) -> str | None:
    for vm, number in sorted(found):
        m = where.manifest(vm, f"c{number}")
        assert m.memory is not None
        ids = (m.disks[0].image, m.memory.blocks[0].image, m.memory.skeleton)
        for image_id, content in zip(ids, store_workload.images_of(number), strict=True):
            image = where.image(image_id)
            if image.read(0, image.size) != content:
                return f"S2: {vm}@c{number}: image {image_id} reads back wrong"
    return None


def _read_labels(where: store.Store, found: set[tuple[str, int]], promises: Promises) -> str | None:
    for vm, number in sorted(found):
        tags = where.labels(where.manifest(vm, f"c{number}")).tags
        allowed = [(f"t{number}", f"u{number}")] + [()] * (not promises.tagged.get((vm, number)))
        if tags not in allowed:
            return f"S1: {vm}@c{number} has the tags {tags}, not one of {allowed}"
    return None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_s1_s2_hold_after_any_power_cut(library: Path, place: Path, seed: int, full: bool) -> None:
    """S1, S2."""
    events = record(library, place, seed)
    count = 1500 if full else 60
    problems = failures(place, events, count, seed)
    assert not problems, "\n".join(problems)


def test_negative_control_manifest_before_packs(library: Path, place: Path) -> None:
    """S2 broken on purpose: packs are synced after the manifest's name is durable.  It must be seen."""
    events = record(library, place, 0)
    packs, manifests = f"{place}/store/packs", f"{place}/store/manifests"
    early = {event.inode for event in events if event.kind == recorder.RENAME and event.target.startswith(packs)}
    late = {event.inode for event in events if event.kind == recorder.SYNC and event.name.startswith(manifests)}
    broken = recorder.syncs_after(events, early, late)
    assert failures(place, broken, 500, 1, enough=1)


def test_negative_control_without_directory_syncs(library: Path, place: Path) -> None:
    """S1 broken on purpose: files are synced, names are not.  It must be seen."""
    events = record(library, place, 0)
    names = {event.inode for event in events if event.kind == recorder.SYNC and event.name}
    broken = recorder.without_syncs(events, names)
    assert failures(place, broken, 500, 1, enough=1)


def test_negative_control_sync_disabled(library: Path, place: Path) -> None:
    """fsync does nothing: it must be seen."""
    broken = recorder.without_syncs(record(library, place, 0))
    assert failures(place, broken, 500, 1, enough=1)


def test_negative_control_tables_before_repacked_packs(library: Path, place: Path) -> None:
    """S2 broken on purpose: what a collection writes to packs is not synced before the tables point there."""
    events = record(library, place, 0)
    packs = f"{place}/store/packs"
    collecting, early = False, set()
    for event in events:
        if event.kind == recorder.MARK:
            collecting = "collect" in event.mark
        elif collecting and event.kind == recorder.RENAME and event.target.startswith(packs):
            early.add(event.inode)
    assert early, "this seed does not repack"
    assert failures(place, recorder.without_syncs(events, early), 60, 1, enough=1)

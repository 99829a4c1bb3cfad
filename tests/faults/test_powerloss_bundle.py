"""Power loss while bundles are unpacked: rules S1 and S2, as for checkpoints that are taken here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import crash, powerloss, recorder, test_powerloss_store

STEPS = 5


def record(library: Path, place: Path, seed: int) -> list[recorder.Event]:
    place.mkdir(mode=0o700)
    words = (str(place / "store"), str(seed), str(STEPS))
    events = recorder.run(library, place, place.parent / "log", "tests.faults.bundle_workload", *words)
    powerloss.assert_complete(crash.Machine.empty(place), events, place)
    return events


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_s1_s2_hold_after_any_power_cut(library: Path, shm: Path, seed: int, full: bool) -> None:
    place = shm / "root"
    events = record(library, place, seed)
    problems = test_powerloss_store.failures(place, events, 1000 if full else 40, seed)
    assert not problems, "\n".join(problems)


def test_negative_control_manifest_before_packs(library: Path, shm: Path) -> None:
    """S2 broken on purpose: packs are synced after the manifest's name is durable.  It must be seen."""
    place = shm / "root"
    events = record(library, place, 0)
    packs, manifests = f"{place}/store/packs", f"{place}/store/manifests"
    early = {event.inode for event in events if event.kind == recorder.RENAME and event.target.startswith(packs)}
    late = {event.inode for event in events if event.kind == recorder.SYNC and event.name.startswith(manifests)}
    broken = recorder.syncs_after(events, early, late)
    assert test_powerloss_store.failures(place, broken, 500, 1, enough=1)

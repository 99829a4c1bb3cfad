"""Power loss under the disks' feet: rules D2, D3 and D8, seen from the guest.

A random life of two disks is recorded; after any cut the disks are opened as after a reboot (new boot id, no live
maps), every sector must be one that the ledger allows, the recovery runs to its end, and then every sector must
still read the same and nothing be left over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors, paths
from blkckpt.disk import api, group
from blkckpt.disk import format as formats
from blkckpt.store import reference, retained
from tests.faults import crash, disk_workload, ledger, powerloss, recorder

SIZES = {"vda": 600 * 1024 + 512, "vdb": 96 * 1024}
"""Small, so that a thousand states are soon read; the first one's last block is short (D11)."""

SEGMENTS = (("8", "kill"), ("6", "close"), ("8", "kill"))
"""One life: steps of the checkpoint procedure, and how the server ends; each segment finds what the last one left."""

SEEN = 1500
"""A seeded bug must be seen within so many states; as a rule it is within 100."""


class Place:
    """Where one recorded life takes place, and where every state is laid out again under the same names."""

    def __init__(self, directory: Path, library: Path, boot: Path) -> None:
        self.root = directory / "root"
        self.log = directory / "log"
        self.library = library
        self.boot = boot
        self.home = paths.home(self.root / "home")
        self.vm = self.home.vm(disk_workload.VM)
        self.kept = self.home.root / "kept"

    def base(self, name: str) -> Path:
        return self.root / f"{name}.raw"

    def create(self, seed: int) -> dict[str, ledger.DiskLedger]:
        """The VM before the recorder starts, its bases full of data."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.forget_live()
        self.root.mkdir(mode=0o700)
        contents = {name: random.Random(f"{name}{seed}").randbytes(size) for name, size in SIZES.items()}
        for name, content in contents.items():
            self.base(name).write_bytes(content)
        paths.private_directory(self.vm.root)
        paths.private_directory(self.kept)
        specs = [api.DiskSpec(name, str(self.base(name)), size) for name, size in SIZES.items()]
        group.DiskGroup.create(self.vm, uuid.UUID(int=seed).hex, specs)
        return {name: ledger.DiskLedger.of(content) for name, content in contents.items()}

    def forget_live(self) -> None:
        """What the machine forgets when its power goes."""
        for directory in (self.home.live, self.home.run):
            shutil.rmtree(directory, ignore_errors=True)

    def reboot(self) -> group.DiskGroup:
        """Open the disks as the first thing after a power cut."""
        self.forget_live()
        self.boot.write_text(f"{uuid.uuid4()}\n")
        return group.DiskGroup.open(
            self.vm, open_image=disk_workload.no_image, wanted=lambda mark: (self.kept / mark.checkpoint).exists()
        )

    def run(self, *arguments: str) -> list[recorder.Event]:
        return recorder.run(
            self.library, self.root, self.log, "tests.faults.disk_workload", str(self.home.root), *arguments
        )


@pytest.fixture
def place(shm: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    boot = shm / "boot_id"
    boot.write_text(formats.BOOT_ID.read_text())
    monkeypatch.setattr(formats, "BOOT_ID", boot)
    place = Place(shm, library, boot)
    yield place
    place.forget_live()


class Life:
    """One recorded life: the files it began with, what it did, what it was promised."""

    def __init__(self, place: Place, seed: int, *, retain: str = "") -> None:
        self.place = place
        self.retain = retain
        self.seed = seed
        self.ledgers = place.create(seed)
        self.start = crash.Machine.of_directory(place.root)
        self.bases = {place.base(name).stat().st_ino for name in SIZES}
        for number, (steps, end) in enumerate(SEGMENTS):
            self.events = place.run(str(seed * 10 + number), steps, end, *([retain] if retain else []))
        self._enter_marks()
        powerloss.assert_complete(self.machine(), self.events, place.root)

    def machine(self) -> crash.Machine:
        """A fresh machine in the state before the first event."""
        return self.start.copy()

    def _enter_marks(self) -> None:
        for now, event in enumerate(event for event in self.events if event.kind == recorder.MARK):
            self._enter(now, event.mark)

    def _enter(self, now: int, mark: dict[str, Any]) -> None:
        if "issue" in mark:
            length = mark["length"]
            data = disk_workload.content(mark["issue"], length) if mark["kind"] == "write" else bytes(length)
            self.ledgers[mark["disk"]].issue(now, mark["issue"], mark["offset"], data, fua=mark["fua"])
        elif "flush" in mark:
            self.ledgers[mark["disk"]].flush_issued(now, mark["flush"])
        elif "ack" in mark:
            for entry in self.ledgers.values():
                entry.acknowledged(now, mark["ack"])
        elif mark["stage"] == "closing":  # a clean stop is a flush of everything
            for entry in self.ledgers.values():
                entry.flush_issued(now, -1)
        elif mark["stage"] == "closed":
            for entry in self.ledgers.values():
                entry.acknowledged(now, -1)

    def inodes(self, suffix: str) -> set[int]:
        """The files of overlays whose name ends in *suffix*."""
        return {event.inode for event in self.events if event.kind == recorder.CREATE and event.name.endswith(suffix)}

    def check(self, now: int) -> str | None:
        """None if the files in the place are what a cut after *now* marks may leave: D2, D3, D8."""
        try:
            opened = self.place.reboot()
        except errors.BlkckptError as error:
            return f"cannot be opened: {type(error).__name__}: {error}"
        try:
            first = read_all(opened)
            if problem := self._compare(first, now):
                return problem
            opened.start()
            wait_for_rest(opened)
            if problem := self._retained(opened):
                return problem
            if read_all(opened) != first:
                return "D8: the recovery's commit changed what the disk reads"
        finally:
            opened.close()
        return self._residue()

    def _compare(self, contents: dict[str, bytes], now: int) -> str | None:
        for name, content in contents.items():
            if problem := self.ledgers[name].check(content, now):
                return f"{name} {problem}"
        return None

    def _retained(self, opened: group.DiskGroup) -> str | None:
        """D1, S2: every checkpoint that was published is the disk of its switch, and no other is kept."""
        names = {path.name for path in self.place.kept.iterdir() if not path.name.startswith(".")}
        held = {overlay.retained for disk in opened.status().disks for overlay in disk.overlays}
        if held != names:
            return f"A3, S2: kept is {sorted(map(str, held))}, published {sorted(names)}"
        for name in names:
            for disk, wanted in json.loads((self.place.kept / name).read_bytes()).items():
                found = reference.Reference(
                    disk_workload.image(name, disk), str(self.place.home.root), disk_workload.VM,
                    uuid.UUID(int=self.seed).hex, disk, SIZES[disk], name,
                )  # fmt: skip
                reader = retained.open_image(found)
                if reader is None or hashlib.sha256(reader.read(0, reader.size)).hexdigest() != wanted:
                    return f"D1: {disk} of {name} is not what it was at the switch"
                reader.close()
        return None

    def _residue(self) -> str | None:
        """D8: of the layers nothing is left; a clean stop keeps one map of changes a disk (D13)."""
        if self.retain:
            return None  # looked at while it was open
        left = sorted(path.name for path in self.place.vm.layers.glob("*"))
        kept = [name.split(".")[0] for name in left if name.endswith(".changed")]
        return None if kept == sorted(SIZES) and len(left) == len(SIZES) else f"D8: left behind: {left}"

    def failures(self, events: Sequence[recorder.Event], count: int, seed: int, *, enough: int = 5) -> list[str]:
        """What is wrong after *count* cuts of *events*: those that were recorded, or what a bug had made of them."""
        check = lambda state: self.check(state.marks)  # noqa: E731
        return powerloss.failures(self.machine(), events, self.place.root, count, seed, check, enough=enough)


def read_all(opened: group.DiskGroup) -> dict[str, bytes]:
    result = {}
    for name, disk in opened.disks.items():
        buffer = bytearray(disk.size)
        disk.pread(buffer, 0)
        result[name] = bytes(buffer)
    return result


def wait_for_rest(opened: group.DiskGroup) -> None:
    limit = time.monotonic() + 20
    while True:
        status = opened.status()
        passing = [overlay for disk in status.disks for overlay in disk.overlays if overlay.retained is None]
        job_ended = status.job is None or status.job.state != "running"
        if status.state is api.State.REST and job_ended and not passing:
            return
        assert time.monotonic() < limit, f"not at rest: {status}"
        time.sleep(0.001)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_d2_d3_d8_hold_after_any_power_cut(place: Place, seed: int, full: bool) -> None:
    """D2, D3, D8."""
    life = Life(place, seed)
    count = 2000 if full else 200
    problems = life.failures(life.events, count, seed)
    assert not problems, "\n".join(problems)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [31, 32])
def test_d1_s2_retained_checkpoints_hold_after_any_power_cut(place: Place, seed: int, full: bool) -> None:
    """D1, S2, A3: and D2, D3 of the disks that go on above them."""
    life = Life(place, seed, retain="retain")
    problems = life.failures(life.events, 2000 if full else 100, seed)
    assert not problems, "\n".join(problems)


def test_negative_control_retained_before_it_is_durable(place: Place) -> None:
    """S2 broken on purpose: bases that are never synced, below manifests that are.  It must be seen."""
    life = Life(place, 31, retain="retain")

    def check(_state: crash.State) -> str | None:
        opened = place.reboot()
        try:
            opened.start()
            wait_for_rest(opened)
            return life._retained(opened)
        finally:
            opened.close()

    events = recorder.without_syncs(life.events, life.bases)
    problems = powerloss.failures(life.machine(), events, place.root, SEEN, 31, check, enough=1)
    assert any("D1" in problem for problem in problems)


@pytest.mark.timeout(1800)
def test_d8_holds_when_the_recovery_is_cut_as_well(place: Place, full: bool) -> None:
    """D8: a second power cut during the recovery's own commit."""
    life = Life(place, 77)
    rng = random.Random(77)
    recovered = list(powerloss.states(life.machine(), life.events, 60 if full else 6, 77))
    for state in recovered:
        state.write(place.root)
        place.forget_live()
        place.log.unlink()
        machine = crash.Machine.of_directory(place.root)
        events = place.run("0", "0", "rest")
        check = functools.partial(_check_again, life, state.marks)
        problems = powerloss.failures(machine, events, place.root, 8, rng.getrandbits(30), check)
        assert not problems, f"after cut {state.cut}, seed {state.seed}:\n" + "\n".join(problems)


def _check_again(life: Life, now: int, _state: crash.State) -> str | None:
    return life.check(now)


def test_negative_control_map_before_data(place: Place) -> None:
    """D2 broken on purpose: the map is synced before the data of the blocks it names.  It must be seen."""
    life = Life(place, 1)
    data, maps = life.inodes(".data"), life.inodes(".map")
    assert data and maps
    assert life.failures(recorder.syncs_after(life.events, data, maps), SEEN, 1, enough=1)


def test_negative_control_cleared_before_the_base_is_synced(place: Place) -> None:
    """D8 broken on purpose: the map with the cleared bits is durable before the base is.  It must be seen."""
    life = Life(place, 2)
    maps = life.inodes(".map")
    assert life.failures(recorder.syncs_after(life.events, life.bases, maps), SEEN, 2, enough=1)


def test_negative_control_sync_disabled(place: Place) -> None:
    """D3 broken on purpose: fsync does nothing.  It must be seen."""
    life = Life(place, 3)
    assert life.failures(recorder.without_syncs(life.events), SEEN, 3, enough=1)

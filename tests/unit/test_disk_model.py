"""A disk against a bytearray, through every state and every kind of stop (hypothesis state machine).

After a clean stop or kill -9 every byte is the model's.  After power loss every sector is what it was at the last
flush or became since (coarse: the live maps are lost, file contents stay; the full simulation is in tests/faults).
Checkpoints are stacked: each copy's frozen layers are compared with the model of its switch, however late it comes and
whatever was committed meanwhile (D1), and what an incremental copy reads must cover every difference from the image
that it is relative to (D13).  Some checkpoints are retained, and are read from their layers, by a reader of its own and
by the copy that flattens them, until they are let go.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blkckpt.disk import api, barrier, chain, commit, copier, rounds
from tests.support import disks

SIZE = 37 * 4096 + 700
SECTOR = 512
LENGTHS = st.one_of(st.sampled_from((1, 511, 512, 4095, 4096, 4097, 8192, 20_000)), st.integers(1, 30_000))
OFFSETS = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 37).map(lambda block: block * 4096))
IMAGE = bytes(8192) + bytes(range(256)) * 200 + bytes(16384) + b"tail" * 1000


class Round:
    """A checkpoint under way."""

    def __init__(self, name: str, retain: bool) -> None:
        self.name = name
        self.retain = retain
        self.stage = "prepared"
        self.frozen = b""
        self.job: Any = None

    def switched(self, model: bytearray) -> None:
        self.stage, self.frozen = "switched", bytes(model)


class Machine(RuleBasedStateMachine):
    """A disk with a raw base."""

    image: bytes | None = None

    @initialize()
    def create(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(commit, "WINDOW_BYTES", 8192)
        self.patch.setattr(commit, "WINDOW_RUNS", 2)
        self.patch.setattr(copier, "copy", self.copy_disk)
        self.root = Path(tempfile.mkdtemp(prefix="blkckpt-model-"))
        self.rig = disks.Rig(self.root, {"vda": SIZE}, self.image)
        self.rig.wanted = lambda mark: mark.checkpoint in self.retained
        self.retained: dict[str, bytes] = {}
        start = self.image or b""
        self.model = bytearray(start.ljust(SIZE, b"\0"))
        self.since_flush = [bytes(self.model)]
        self.images: dict[str, bytes] = {"image-0": bytes(self.model)} if self.image else {}
        self.rounds: list[Round] = []
        self.frozen: dict[str, bytes] = {}
        self.count = 0
        self.fill_byte = 1

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.clean_up()
            shutil.rmtree(self.root)
            self.patch.undo()

    @property
    def disk(self) -> Any:
        return self.rig.group.disks["vda"]

    @property
    def state(self) -> api.State:
        return self.rig.group.status().state

    # ---- requests ----

    def changed(self) -> None:
        self.since_flush.append(bytes(self.model))

    @rule(offset=OFFSETS, length=LENGTHS, fua=st.booleans())
    def write(self, offset: int, length: int, fua: bool) -> None:
        length = min(length, SIZE - offset)
        self.fill_byte = self.fill_byte % 255 + 1
        data = bytes((self.fill_byte,)) * length
        self.disk.pwrite(data, offset, fua)
        self.model[offset : offset + length] = data
        self.changed()
        if fua:
            self.since_flush = [bytes(self.model)]

    @rule(offset=OFFSETS, length=LENGTHS, trim=st.booleans(), may_trim=st.booleans())
    def zero(self, offset: int, length: int, trim: bool, may_trim: bool) -> None:
        length = min(length, SIZE - offset)
        if trim:
            self.disk.trim(length, offset)
        else:
            self.disk.zero(length, offset, False, may_trim, False)
        self.model[offset : offset + length] = bytes(length)
        self.changed()

    @rule()
    def flush(self) -> None:
        self.disk.flush()
        self.since_flush = [bytes(self.model)]

    @rule(offset=OFFSETS, length=LENGTHS)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        buf = bytearray(length)
        self.disk.pread(buf, offset)
        assert buf == self.model[offset : offset + length]

    @rule(offset=OFFSETS, length=LENGTHS)
    def extents(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        position, last = offset, None
        for start, count, kind in self.disk.extents(length, offset):
            assert start == position and count > 0 and kind != last
            assert kind in (0, 3)
            if kind & chain.ZERO:
                assert not any(self.model[start : start + count])
            position, last = start + count, kind
        assert position == offset + length

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "rig"):
            assert self.rig.read() == self.model

    # ---- checkpoints ----

    def newest(self, stage: str) -> bool:
        return bool(self.rounds) and self.rounds[-1].stage == stage

    def some(self, stage: str) -> list[Round]:
        return [one for one in self.rounds if one.stage == stage]

    @precondition(lambda self: len(self.rounds) < 4 and not self.newest("prepared"))
    @rule(retain=st.booleans())
    def prepare(self, retain: bool) -> None:
        overlays = self.rig.group.status().disks[0].overlays
        if sum(overlay.retained is None for overlay in overlays) >= rounds.MAX_OVERLAYS:
            return
        retain = retain and self.image is None  # when a disk has been filled is a matter of chance
        self.count += 1
        self.rig.group.prepare(f"c{self.count}", retain=retain)
        self.rounds.append(Round(f"c{self.count}", retain))

    @precondition(lambda self: self.newest("prepared"))
    @rule()
    def switch(self) -> None:
        assert self.rig.group.switch().switched
        self.rounds[-1].switched(self.model)

    @precondition(lambda self: self.newest("prepared"))
    @rule(offset=OFFSETS, byte=st.integers(1, 255))
    def switch_by_a_write(self, offset: int, byte: int) -> None:
        question = disks.Switch()
        self.rig.group.arm(question, 1e12)
        self.write(offset, 5000, False)
        assert not self.rig.group.poll_barrier().switched
        question.state = barrier.BarrierState.PASSED
        self.rounds[-1].switched(self.model)
        self.write(offset, byte, False)
        assert self.state is api.State.SWITCHED

    def copy_disk(self, frozen: copier.FrozenDisk, options: copier.CopyOptions, _: Any, stop: Any) -> dict[str, Any]:
        """D1: the frozen layers are the disk of the switch.  D13: what is read covers what differs."""
        data = bytearray(SIZE)
        chain.read(frozen.view, data, 0)
        assert data == self.frozen[options.label.partition("/")[0].rpartition("@")[2]]
        if options.image is not None:
            return {"image": options.image, "size": SIZE}
        if frozen.changed is not None:
            assert frozen.parent is not None
            before = self.images[frozen.parent]
            own = [overlay.bits for overlay in frozen.view.layers if overlay.id not in frozen.inherited]
            for block in range(38):
                place = slice(block * 4096, (block + 1) * 4096)
                read = frozen.changed.test(block) or any(bits.test(block) for bits in own)
                assert before[place] == data[place] or read, block
        name = f"image-{len(self.images)}"
        self.images[name] = bytes(data)
        return {"image": name, "size": SIZE}

    @precondition(lambda self: self.to_save(retain=False))
    @rule(data=st.data(), newest=st.booleans())
    def copy(self, data: st.DataObject, newest: bool) -> None:
        """Of any that is not copied; it waits for those before it."""
        one = data.draw(st.sampled_from(self.to_save(retain=False)))
        names = list(self.images)
        parent = (names[-1] if newest else names[0]) if names else None
        self.frozen[one.name] = one.frozen
        one.job = self.rig.group.start_copy("/store", {"vda": parent}, label=one.name, checkpoint=one.name)
        one.stage = "copying"
        self.finish_copies()

    def to_save(self, *, retain: bool) -> list[Round]:
        return [one for one in self.some("switched") if one.retain is retain]

    @precondition(lambda self: self.to_save(retain=True))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.to_save(retain=True)))
        disks.finish(self.rig.group.start_retain(self.rig.marks(one.name), one.name))
        one.stage = "kept"

    @precondition(lambda self: self.some("kept") and len(self.retained) < 4)
    @rule(data=st.data(), heard=st.booleans())
    def publish(self, data: st.DataObject, heard: bool) -> None:
        """The manifest is there; the commit is heard, or the driver dies before it."""
        one = data.draw(st.sampled_from(self.some("kept")))
        self.retained[one.name] = self.frozen[one.name] = one.frozen
        disks.finish(self.rig.group.commit(one.name) if heard else self.rig.group.abort(one.name))
        self.rounds.remove(one)
        self.finish_copies()
        self.check_retained()

    def check_retained(self) -> None:
        """D1: what is retained is the disk of its switch, read from its files."""
        for name, content in self.retained.items():
            reader = self.rig.retained(name)
            assert reader is not None
            assert reader.read(0, SIZE) == content, name
            for start, count, zero in reader.extents(0, SIZE):
                assert not (zero and any(content[start : start + count]))
            reader.close()

    @precondition(lambda self: self.retained)
    @rule(data=st.data(), flatten=st.booleans())
    def give_up(self, data: st.DataObject, flatten: bool) -> None:
        """The manifest is gone, or names images."""
        name = data.draw(st.sampled_from(sorted(self.retained)))
        if flatten:
            disks.finish(self.rig.group.flatten(name))
        del self.retained[name]
        disks.finish(self.rig.group.review())
        assert self.rig.retained(name) is None
        self.check_retained()

    @precondition(lambda self: self.retained and not self.rounds)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.retained)))
        disks.finish(self.rig.group.abort())
        youngest = self.rig.group.status().disks[0].overlays[0].retained == name
        assert self.rig.group.retained.rewind(name) is youngest
        if youngest:
            self.model = bytearray(self.retained[name])
            self.changed()
        self.check_retained()

    def finish_copies(self) -> None:
        for one in self.rounds:
            if one.stage == "copying":
                disks.finish(one.job)
                one.stage = "copied"
            if one.stage != "copied":
                return

    @precondition(lambda self: self.some("copied"))
    @rule(data=st.data(), wait=st.booleans())
    def commit(self, data: st.DataObject, wait: bool) -> None:
        one = data.draw(st.sampled_from(self.some("copied")))
        job = self.rig.group.commit(one.name)
        self.rounds.remove(one)
        if wait:
            disks.finish(job)

    @precondition(lambda self: self.rounds)
    @rule(data=st.data(), wait=st.booleans())
    def abort(self, data: st.DataObject, wait: bool) -> None:
        one = data.draw(st.sampled_from(self.rounds))
        job = self.rig.group.abort(one.name)
        self.rounds.remove(one)
        if wait or one.stage == "prepared":
            disks.finish(job)
        self.finish_copies()

    @rule()
    def settle(self) -> None:
        """Give up what is under way."""
        self.rounds.clear()
        disks.finish(self.rig.group.abort())
        assert self.state is api.State.REST
        left = [name for name in self.rig.layer_files() if name.endswith((".data", ".live"))]
        assert len(left) == len(self.retained)
        self.check_retained()

    # ---- stops ----

    @rule()
    def kill(self) -> None:
        self.rig.kill()
        self.rounds.clear()
        self.check_retained()

    @rule()
    def stop(self) -> None:
        self.rig.stop()
        self.rounds.clear()
        self.since_flush = [bytes(self.model)]

    @rule()
    def lose_power(self) -> None:
        disks.other_boot(self.patch)
        self.rig.lose_power()
        self.rounds.clear()
        found = self.rig.read()
        for start in range(0, SIZE, SECTOR):
            place = slice(start, start + SECTOR)
            assert any(found[place] == version[place] for version in self.since_flush), f"sector at {start}"
        self.model = bytearray(found)
        self.changed()
        self.check_retained()
        if self.rig.group.status().disks[0].source is None:
            assert self.rig.group.status().disks[0].changed_since is None, "D13"


class RestoredMachine(Machine):
    """A disk over the image of a checkpoint, filled in the background."""

    image = IMAGE


SETTINGS = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
Machine.TestCase.settings = SETTINGS
RestoredMachine.TestCase.settings = SETTINGS
TestRaw = Machine.TestCase
TestRestored = RestoredMachine.TestCase

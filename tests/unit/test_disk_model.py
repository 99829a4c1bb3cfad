"""A disk against a bytearray, through every state and every kind of stop (hypothesis state machine).

After a clean stop or kill -9 every byte is the model's.  After power loss every sector is what it was at the last
flush or became since (coarse: the live maps are lost, file contents stay; the full simulation is in tests/faults).
At each checkpoint the frozen layers are compared with the model of the switch (D1), and the changed bits must cover
every difference from the checkpoint before (D13).
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

from blkckpt.disk import api, barrier, chain, commit, copier
from tests.support import disks

SIZE = 37 * 4096 + 700
SECTOR = 512
LENGTHS = st.one_of(st.sampled_from((1, 511, 512, 4095, 4096, 4097, 8192, 20_000)), st.integers(1, 30_000))
OFFSETS = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 37).map(lambda block: block * 4096))
IMAGE = bytes(8192) + bytes(range(256)) * 200 + bytes(16384) + b"tail" * 1000


class Machine(RuleBasedStateMachine):
    """A disk with a raw base."""

    image: bytes | None = None

    @initialize()
    def create(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(commit, "WINDOW_BYTES", 8192)
        self.patch.setattr(commit, "WINDOW_RUNS", 2)
        disks.stub_copies(self.patch, self.look)
        self.root = Path(tempfile.mkdtemp(prefix="blkckpt-model-"))
        self.rig = disks.Rig(self.root, {"vda": SIZE}, self.image)
        start = self.image or b""
        self.model = bytearray(start.ljust(SIZE, b"\0"))
        self.since_flush = [bytes(self.model)]
        self.images: dict[str, bytes] = {"image-0": bytes(self.model)} if self.image else {}
        self.frozen: bytes | None = None
        self.fill_byte = 1
        self.stage = "rest"

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

    def stopped(self) -> None:
        """A server that finds overlays commits them by itself; the model learns of it in ``settle``."""
        self.stage = "rest" if self.stage == "rest" else "committing"

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

    def rest(self) -> bool:
        return self.stage == "rest"

    @precondition(rest)
    @rule()
    def prepare(self) -> None:
        assert self.state is api.State.REST
        self.rig.group.prepare("c1")
        self.stage = "prepared"

    @precondition(lambda self: self.stage == "prepared")
    @rule()
    def switch(self) -> None:
        assert self.rig.group.switch().switched
        self.stage = "switched"
        self.frozen = bytes(self.model)

    @precondition(lambda self: self.stage == "prepared")
    @rule(offset=OFFSETS, byte=st.integers(1, 255))
    def switch_by_a_write(self, offset: int, byte: int) -> None:
        question = disks.Switch()
        self.rig.group.arm(question, 1e12)
        self.write(offset, 5000, False)
        assert not self.rig.group.poll_barrier().switched
        question.state = barrier.BarrierState.PASSED
        self.frozen = bytes(self.model)
        self.write(offset, byte, False)
        assert self.state is api.State.SWITCHED
        self.stage = "switched"

    def look(self, frozen: copier.FrozenDisk, parent: str | None) -> str:
        """D1: the frozen layers are the disk of the switch.  D13: the changed bits cover what differs."""
        data = bytearray(SIZE)
        chain.read(frozen.view, data, 0)
        assert self.frozen is not None and data == self.frozen
        if frozen.changed is not None:
            assert parent is not None
            before = self.images[parent]
            for block in range(38):
                place = slice(block * 4096, (block + 1) * 4096)
                assert before[place] == data[place] or frozen.changed.test(block), block
        name = f"image-{len(self.images)}"
        self.images[name] = bytes(data)
        return name

    @precondition(lambda self: self.stage == "switched")
    @rule(newest=st.booleans(), wait=st.booleans())
    def copy_and_commit(self, newest: bool, wait: bool) -> None:
        names = list(self.images)
        parent = (names[-1] if newest else names[0]) if names else None
        result = disks.finish(self.rig.group.start_copy("/store", {"vda": parent}))
        job = self.rig.group.commit()
        self.stage = "committing"
        if wait:
            self.settle_job(job)
            assert self.rig.group.status().disks[0].changed_since == result["disks"]["vda"]["image"]

    @precondition(lambda self: not self.rest())
    @rule(wait=st.booleans())
    def abort(self, wait: bool) -> None:
        job = self.rig.group.abort()
        self.stage = "committing"
        if wait:
            self.settle_job(job)

    def settle_job(self, job: Any) -> None:
        disks.finish(job)
        assert self.state is api.State.REST
        self.stage = "rest"
        assert not [name for name in self.rig.layer_files() if name.endswith(".data")]

    @precondition(lambda self: self.stage == "committing")
    @rule()
    def settle(self) -> None:
        self.settle_job(self.rig.group.abort())

    # ---- stops ----

    @rule()
    def kill(self) -> None:
        self.rig.kill()
        self.stopped()

    @rule()
    def stop(self) -> None:
        self.rig.stop()
        self.stopped()
        self.since_flush = [bytes(self.model)]

    @rule()
    def lose_power(self) -> None:
        disks.other_boot(self.patch)
        self.rig.lose_power()
        self.stopped()
        found = self.rig.read()
        for start in range(0, SIZE, SECTOR):
            place = slice(start, start + SECTOR)
            assert any(found[place] == version[place] for version in self.since_flush), f"sector at {start}"
        self.model = bytearray(found)
        self.changed()
        if self.rig.group.status().disks[0].source is None:
            assert self.rig.group.status().disks[0].changed_since is None, "D13"


class RestoredMachine(Machine):
    """A disk over the image of a checkpoint, filled in the background."""

    image = IMAGE


SETTINGS = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
Machine.TestCase.settings = SETTINGS
RestoredMachine.TestCase.settings = SETTINGS
TestRaw = Machine.TestCase
TestRestored = RestoredMachine.TestCase

"""Checkpoints through the control socket of a real server, with a real copy child and store."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from blkckpt import errors
from blkckpt.control import client, messages, service
from tests.nbd.conftest import MIB, SIZES
from tests.support import referee, server

Refereed = tuple[server.Stand, referee.Referee]


@pytest.fixture
def qmp() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def fill(handle: Any, size: int, seed: int) -> bytes:
    data = server.pattern(size, seed)
    handle.pwrite(data, 0)
    return data


class Writer:
    """Overwrites blocks of a disk from a thread of its own until it is stopped; ``model`` is what it has written."""

    def __init__(self, stand: server.Stand, export: str, model: bytes) -> None:
        self.model = bytearray(model)
        self.count = 0
        self._stand, self._export = stand, export
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            with self._stand.disk(self._export) as handle:
                while not self._stopped.wait(0.001):  # leaves some of the processor to the copy
                    self._write(handle)
        except BaseException as error:
            self.error = error

    def _write(self, handle: Any) -> None:
        self.count += 1
        size = len(self.model)
        offset = self.count * 7919 % (size - 5000)
        data = server.pattern(1 + self.count * 131 % 5000, self.count)
        handle.pwrite(data, offset)
        self.model[offset : offset + len(data)] = data
        assert handle.pread(len(data), offset) == data


def test_a_checkpoint_is_the_prefix_before_the_switch(stand: server.Stand) -> None:
    """D1: every write acknowledged before, none after, on every disk; then back on the base, nothing left (836)."""
    with stand.disk() as a, stand.disk("vdb") as b, stand.control() as peer:
        before = {"vda": fill(a, SIZES["vda"], 1), "vdb": fill(b, SIZES["vdb"], 2)}
        peer.prepare("one")
        a.pwrite(b"prepared, not switched", 5000)
        before["vda"] = before["vda"][:5000] + b"prepared, not switched" + before["vda"][5022:]
        switched = peer.switch()
        assert switched.switched
        assert switched.instant is not None
        assert abs(time.monotonic_ns() - switched.instant) < 60 * 10**9
        assert peer.switch().instant == switched.instant  # idempotent
        after = {"vda": fill(a, SIZES["vda"], 3), "vdb": before["vdb"][:4000] + bytes(10_000) + before["vdb"][14_000:]}
        b.trim(10_000, 4000)
        images = stand.copy(peer)
        peer.finish(peer.commit(), 60)
        assert a.pread(SIZES["vda"], 0) == after["vda"]
        assert b.pread(SIZES["vdb"], 0) == after["vdb"]
    for name, content in before.items():
        assert stand.image(images[name]["image"]) == content
    stand.wait_for_rest()
    assert stand.residue() == []
    stand.stop()
    for name, content in after.items():
        assert stand.base(name).read_bytes() == content


def test_writing_goes_on_through_many_checkpoints(stand: server.Stand) -> None:
    """834 converges while a guest writes; every image is what the disk was at its switch (asked of a quiet disk)."""
    with stand.disk() as a, stand.control() as peer:
        quiet = fill(a, SIZES["vda"], 1)
        with Writer(stand, "vdb", bytes(SIZES["vdb"])) as writer:
            for number in range(3):
                images = stand.checkpoint(peer, f"c{number}")
                assert stand.image(images["vda"]["image"]) == quiet
                quiet = quiet[:100] + server.pattern(5000, number) + quiet[5100:]
                a.pwrite(server.pattern(5000, number), 100)
        assert writer.count > 10
        with stand.disk("vdb") as b:
            assert b.pread(SIZES["vdb"], 0) == writer.model
    stand.wait_for_rest()
    stand.stop()
    assert stand.base("vdb").read_bytes() == writer.model


def test_the_second_copy_reads_what_has_changed(stand: server.Stand) -> None:
    with stand.disk() as a, stand.control() as peer:
        fill(a, SIZES["vda"], 1)
        first = stand.checkpoint(peer, "one")
        a.pwrite(b"changed" * 1000, MIB)
        peer.prepare("two")
        peer.switch()
        second = stand.copy(peer, {name: disk["image"] for name, disk in first.items()})
        peer.finish(peer.commit(), 60)
        assert second["vda"]["read"] <= 128 << 10
        assert second["vda"]["new"] < first["vda"]["new"] / 4
        assert stand.image(second["vda"]["image"]) == a.pread(SIZES["vda"], 0)


@pytest.mark.parametrize("stage", ["prepared", "switched", "copied"])
@pytest.mark.parametrize("end", ["abort", "vanish"])
def test_back_to_rest_from_every_stage(stand: server.Stand, stage: str, end: str) -> None:
    """D7 when the driver's connection ends; the same when it asks."""
    with stand.disk() as a, stand.control() as peer:
        model = bytearray(fill(a, SIZES["vda"], 1))
        peer.prepare("x")
        if stage != "prepared":
            peer.switch()
        a.pwrite(b"written in the overlay" * 300, 123)
        model[123 : 123 + 6600] = b"written in the overlay" * 300
        if stage == "copied":
            stand.copy(peer)
        if end == "abort":
            peer.finish(peer.abort(), 60)
        else:
            peer.close()
        stand.wait_for_rest()
        assert a.pread(SIZES["vda"], 0) == model
        assert stand.residue() == []
    stand.stop()
    assert stand.base("vda").read_bytes() == model


def test_a_silent_driver_loses_its_lease(stand: server.Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """D7: the connection stands, nobody speaks.  The lease is a minute; a test hook makes it short."""
    stand.stop()
    monkeypatch.setenv("BLKCKPT_TEST_LEASE", "0.5")
    with stand.hooked("tests.support.short_lease"), stand.disk() as a, stand.control() as peer:
        fill(a, SIZES["vda"], 1)
        peer.prepare("x")
        for _ in range(4):
            time.sleep(0.25)
            assert peer.status()["state"] == "prepared"  # every message renews it
        peer.switch()
        a.pwrite(b"overlay", 0)
        stand.wait_for_rest()
        assert a.pread(7, 0) == b"overlay"
        with pytest.raises(errors.StateError):
            peer.copy(stand.store_path, {})
    assert service.LEASE_SECONDS == 60


def test_a_long_flush_costs_no_lease(
    tmp_path: Path, qmp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that waits for the answer to ``arm`` is silent because of us."""
    monkeypatch.setenv("BLKCKPT_TEST_LEASE", "0.5")
    with (
        server.refereed(tmp_path, SIZES, "tests.support.short_lease") as (stand, judge),
        stand.disk() as a,
        stand.control() as peer,
    ):
        fill(a, SIZES["vda"], 1)
        peer.prepare("x")
        with judge.hold(lambda seen: seen.kind == "sync") as held:
            threading.Timer(2.0, held.released.set).start()
            peer.arm(qmp[0].fileno(), 60)
            assert held.arrived.is_set()
        assert peer.status()["state"] == "armed"
        stand.wait_for_rest()  # and then the lease runs again: wait_for_rest asks on another connection


def test_a_driver_that_vanishes_after_commit_changes_nothing(refereed: Refereed) -> None:
    """D7: a commit that has begun goes on."""
    stand, judge = refereed
    with stand.disk() as a:
        fill(a, SIZES["vda"], 1)
        peer = stand.control()
        peer.prepare("x")
        peer.switch()
        after = fill(a, SIZES["vda"], 2)
        stand.copy(peer)
        base = str(stand.base("vda"))
        with judge.hold(lambda seen: seen.kind == "write" and seen.path == base) as held:
            peer.commit()
            held.wait()
            peer.close()
            assert stand.state() == "committing"
        stand.wait_for_rest()
        assert a.pread(SIZES["vda"], 0) == after
    stand.stop()
    assert stand.base("vda").read_bytes() == after


def test_a_second_checkpoint_during_the_first_is_refused(stand: server.Stand) -> None:
    with stand.control() as peer, stand.control() as other:
        peer.prepare("one")
        with pytest.raises(errors.StateError):
            other.prepare("two")
        with pytest.raises(errors.StateError):
            other.switch()
        peer.finish(peer.abort(), 60)
        other.prepare("two")
        other.finish(other.abort(), 60)


def test_verbs_out_of_turn_change_nothing(stand: server.Stand) -> None:
    with stand.disk() as a, stand.control() as peer:
        model = fill(a, SIZES["vda"], 1)
        for verb in (peer.switch, peer.commit, peer.disarm, lambda: peer.copy(stand.store_path, {})):
            with pytest.raises(errors.StateError):
                verb()
        peer.prepare("x")
        for verb in (peer.commit, lambda: peer.copy(stand.store_path, {})):
            with pytest.raises(errors.StateError):
                verb()
        peer.switch()
        with pytest.raises(errors.StateError):
            peer.commit()  # nothing has been copied
        peer.finish(peer.abort(), 60)
        assert a.pread(SIZES["vda"], 0) == model


def test_a_store_that_is_none_fails_the_copy_only(stand: server.Stand, tmp_path: Path) -> None:
    with stand.disk() as a, stand.control() as peer:
        model = fill(a, SIZES["vda"], 1)
        peer.prepare("x")
        peer.switch()
        with pytest.raises(errors.BlkckptError, match="store"):
            peer.finish(peer.copy(tmp_path / "nowhere", dict.fromkeys(SIZES)), 60)
        stand.copy(peer)  # the same frozen chain, another store
        peer.finish(peer.commit(), 60)
        assert a.pread(SIZES["vda"], 0) == model


def test_no_space_in_the_run_of_prepare(refereed: Refereed) -> None:
    """A checkpoint that cannot even begin leaves nothing behind."""
    stand, judge = refereed
    with stand.disk() as a, stand.control() as peer:
        model = fill(a, SIZES["vda"], 1)
        full = judge.fail(lambda seen: ".map" in seen.path and seen.kind == "write", errno.ENOSPC)
        with full, pytest.raises(errors.NoSpaceError):
            peer.prepare("x")
        assert stand.state() == "rest"
        assert stand.residue() == []
        assert a.pread(SIZES["vda"], 0) == model
        stand.checkpoint(peer, "y")


# --- the armed window (810) ---

EVENTS = [
    b'{"event": "MIGRATION", "data": {"status": "setup"}}\r\n',
    b'{"event": "MIGRATION", "data": {"status": "active"}}\r\n',
    b'{"event": "STOP"}\r\n',
]
RESUME = b'{"event": "RESUME"}\r\n'


def test_writes_before_resume_belong_to_the_checkpoint(stand: server.Stand, qmp: Any) -> None:
    """§3: RESUME not visible: the old layer.  Visible: every disk moves first, whoever asks."""
    ours, theirs = qmp
    with stand.disk() as a, stand.disk("vdb") as b, stand.control() as peer:
        fill(a, SIZES["vda"], 1)
        fill(b, SIZES["vdb"], 2)
        peer.prepare("x")
        peer.arm(ours.fileno(), 60)
        a.pwrite(b"armed", 0)
        for event in EVENTS:
            theirs.sendall(event)
        b.pwrite(b"drained by the stop", 0)
        before = {"vda": a.pread(SIZES["vda"], 0), "vdb": b.pread(SIZES["vdb"], 0)}
        assert peer.switch(messages.SWITCH_BARRIER).waiting
        theirs.sendall(RESUME)
        a.pwrite(b"resumed", 0)  # moves both disks
        b.pwrite(b"resumed", 0)
        answer = peer.switch(messages.SWITCH_BARRIER)
        assert (answer.switched, answer.waiting, answer.violation) == (True, False, None)
        images = stand.copy(peer)
        peer.finish(peer.commit(), 60)
        for name, content in before.items():
            assert stand.image(images[name]["image"]) == content
        assert a.pread(7, 0) == b.pread(7, 0) == b"resumed"


def test_an_idle_guest_switches_when_the_agent_asks(stand: server.Stand, qmp: Any) -> None:
    ours, theirs = qmp
    with stand.control() as peer:
        peer.prepare("x")
        peer.arm(ours.fileno(), 60)
        theirs.sendall(b"".join(EVENTS) + RESUME)
        assert peer.switch(messages.SWITCH_BARRIER).switched
        peer.finish(peer.abort(), 60)


@pytest.mark.parametrize("how", ["a foreign cont", "QEMU dies", "the deadline passes"])
def test_a_violated_window_is_told_and_taken_back(stand: server.Stand, qmp: Any, how: str) -> None:
    ours, theirs = qmp
    with stand.disk() as a, stand.control() as peer:
        model = bytearray(fill(a, SIZES["vda"], 1))
        peer.prepare("x")
        peer.arm(ours.fileno(), 0.3 if how.startswith("the deadline") else 60)
        if how == "a foreign cont":
            theirs.sendall(RESUME)
        elif how == "QEMU dies":
            theirs.close()
        else:
            time.sleep(0.6)
        a.pwrite(b"served all the same", 0)
        model[:19] = b"served all the same"
        answer = peer.switch(messages.SWITCH_BARRIER)
        assert answer.violation
        assert not answer.switched
        peer.finish(peer.abort(), 60)
        assert a.pread(SIZES["vda"], 0) == model
        stand.wait_for_rest()


def test_disarmed_disks_stay_prepared(stand: server.Stand, qmp: Any) -> None:
    ours, theirs = qmp
    with stand.disk() as a, stand.control() as peer:
        peer.prepare("x")
        peer.arm(ours.fileno(), 60)
        peer.disarm()
        theirs.sendall(b"".join(EVENTS) + RESUME)
        a.pwrite(b"old side", 0)
        assert peer.status()["state"] == "prepared"
        before = a.pread(SIZES["vda"], 0)
        peer.switch()
        a.pwrite(b"new side", 0)
        assert stand.image(stand.copy(peer)["vda"]["image"]) == before


# --- kill -9 ---

STAGES = ["prepared", "armed", "switched", "copying", "copied", "committing", "committed"]


def drive(stand: server.Stand, judge: referee.Referee, peer: client.Client, handle: Any, stage: str) -> None:
    """Bring a checkpoint to *stage* and kill the server there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer.prepare("x")
        if stage == "armed":
            peer.arm(ours.fileno(), 60)
        if stage in ("prepared", "armed"):
            stand.kill()
            return
        peer.switch()
        handle.pwrite(server.pattern(3 * MIB, 9), 4000)
        handle.trim(100_000, 50_000)
        if stage == "copying":
            peer.copy(stand.store_path, dict.fromkeys(SIZES))
        elif stage != "switched":
            stand.copy(peer)
        base = str(stand.base("vda"))
        if stage == "committing":
            with judge.hold(lambda seen: seen.kind == "write" and seen.path == base and seen.offset > MIB) as held:
                peer.commit()
                held.wait()
                stand.kill()
        elif stage == "committed":
            peer.finish(peer.commit(), 60)
        stand.kill()


@pytest.mark.parametrize("stage", STAGES)
def test_kill_at_every_stage(refereed: Refereed, stage: str) -> None:
    """No acknowledged byte is lost, nothing is left over, and the next checkpoint is right."""
    stand, judge = refereed
    model = bytearray(server.pattern(SIZES["vda"], 1))
    with stand.control() as peer, stand.disk() as handle:
        handle.pwrite(model, 0)
        drive(stand, judge, peer, handle, stage)
    if stage not in ("prepared", "armed"):
        model[4000 : 4000 + 3 * MIB] = server.pattern(3 * MIB, 9)
        model[50_000:150_000] = bytes(100_000)
    stand.start()
    with stand.disk() as handle, stand.control() as peer:
        assert handle.pread(SIZES["vda"], 0) == model
        handle.pwrite(b"goes on", 77)
        model[77:84] = b"goes on"
        stand.wait_for_rest()
        assert stand.residue() == []
        assert handle.pread(SIZES["vda"], 0) == model
        images = stand.checkpoint(peer, "next")
        assert stand.image(images["vda"]["image"]) == model
    stand.stop()
    assert stand.base("vda").read_bytes() == model


def test_a_client_waits_in_the_queue_for_the_next_server(stand: server.Stand) -> None:
    """The listening sockets outlive nbdkit: connecting between two servers just takes longer."""
    with stand.disk() as handle:
        handle.pwrite(b"kept", 0)
    stand.kill()
    answers: list[bytes] = []

    def read() -> None:
        with stand.disk() as handle:
            answers.append(bytes(handle.pread(4, 0)))

    thread = threading.Thread(target=read)
    thread.start()
    stand.start()
    thread.join(60)
    assert answers == [b"kept"]


def test_a_request_in_flight_at_the_kill_is_old_or_new(refereed: Refereed) -> None:
    stand, judge = refereed
    with stand.disk() as handle:
        handle.pwrite(b"o" * 8192, 0)
        with judge.hold(lambda seen: seen.kind == "write") as held:
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"n" * 8192)), 0)
            handle.poll(100)
            held.wait()
            stand.kill()
        with pytest.raises(nbd.Error):
            handle.pread(1, 0)
    stand.start()
    with stand.disk() as handle:
        assert handle.pread(8192, 0) in (b"o" * 8192, b"n" * 8192)

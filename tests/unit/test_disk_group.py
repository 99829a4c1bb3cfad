"""All disks of a VM together: the barrier, the lease, copies, recovery, restored disks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blkckpt import durable, errors, paths
from blkckpt.disk import api, barrier, chain, copier, fill, group, member, stack, statefile
from blkckpt.disk import format as formats
from blkckpt.disk import job as jobs
from blkckpt.store import store
from tests.support import disks

SIZE = 2 << 20
WAIT = 20.0
PASSED, VIOLATED = barrier.BarrierState.PASSED, barrier.BarrierState.VIOLATED


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[disks.Rig]:
    made = disks.Rig(tmp_path, {"vda": SIZE, "vdb": SIZE + 4096})
    yield made
    made.clean_up()


def put(rig: disks.Rig, name: str, data: bytes, offset: int = 0) -> None:
    rig.group.disks[name].pwrite(data, offset)


def base(rig: disks.Rig, name: str = "vda") -> bytes:
    return rig.base(name).read_bytes()


def state(rig: disks.Rig) -> api.State:
    return rig.group.status().state


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


# ---- the barrier (DESIGN §3) ----


def test_while_armed_writes_stay_below_until_the_barrier_is_passed(rig: disks.Rig) -> None:
    question = disks.Switch()
    rig.group.prepare("c1")
    rig.group.arm(question, time.monotonic() + 60)
    put(rig, "vda", b"before")
    assert question.polls == 1 and base(rig)[:6] == b"before"
    buf = bytearray(4)
    rig.group.disks["vda"].pread(buf, 0)
    rig.group.disks["vda"].flush()
    assert question.polls == 1, "only mutating requests look"
    question.state = PASSED
    put(rig, "vdb", b"after")
    assert state(rig) is api.State.SWITCHED, "a write to one disk switches all"
    put(rig, "vda", b"after!")
    rig.group.disks["vda"].zero(100, 4096)
    assert base(rig)[:6] == b"before" and base(rig, "vdb")[:5] == bytes(5)
    outcome = rig.group.poll_barrier()
    assert outcome.switched and not outcome.waiting and outcome.instant is not None
    assert rig.group.switch() == outcome, "idempotent"


def test_an_idle_guest_is_switched_by_the_driver(rig: disks.Rig) -> None:
    question = disks.Switch()
    rig.group.prepare("c1")
    rig.group.arm(question, time.monotonic() + 60)
    assert rig.group.poll_barrier() == api.ArmState(False, True, None, None)
    question.state = PASSED
    assert rig.group.poll_barrier().switched


def test_a_request_admitted_before_another_switched_looks_again(rig: disks.Rig) -> None:
    """It was admitted to the armed epoch, and somebody else saw the barrier passed before it could look."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(disks.Switch):
        def poll(self) -> barrier.BarrierState:
            entered.set()
            assert go_on.wait(WAIT)
            return barrier.BarrierState.WAITING

    rig.group.prepare("c1")
    rig.group.arm(Slow(), time.monotonic() + 60)
    writer = threading.Thread(target=put, args=(rig, "vda", b"new"))
    writer.start()
    assert entered.wait(WAIT)
    rig.group.switch()
    go_on.set()
    writer.join(WAIT)
    assert base(rig)[:3] == bytes(3) and rig.read("vda")[:3] == b"new"


@pytest.mark.parametrize("broken", [False, True], ids=["violated", "raises"])
def test_a_violated_barrier_disarms(rig: disks.Rig, broken: bool) -> None:
    question = disks.Switch()
    rig.group.prepare("c1")
    rig.group.arm(question, time.monotonic() + 60)
    question.state, question.why = VIOLATED, "two RESUME events"
    if broken:
        question.poll = lambda: 1 / 0  # type: ignore[assignment, return-value]
    put(rig, "vda", b"below")
    assert base(rig)[:5] == b"below"
    outcome = rig.group.poll_barrier()
    assert not outcome.switched and not outcome.waiting and outcome.violation
    assert not rig.group.switch().switched, "a violated checkpoint cannot be switched any more"
    disks.finish(rig.group.abort())
    assert state(rig) is api.State.REST


def test_arming_has_a_deadline(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.arm(disks.Switch(), time.monotonic() + 0.05)
    until(lambda: state(rig) is api.State.PREPARED)
    assert "deadline" in str(rig.group.poll_barrier().violation)
    rig.group.arm(disks.Switch(), time.monotonic() + 60)
    assert rig.group.poll_barrier().violation is None, "armed anew"
    rig.group.disarm()
    rig.group.disarm()
    assert state(rig) is api.State.PREPARED


def test_all_disks_switch_at_one_instant(rig: disks.Rig) -> None:
    """A record written to disk A before disk B is never missing from A when it is present in B."""
    stop = threading.Event()

    def write(slot: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            put(rig, "vda", number.to_bytes(8, "little"), slot * 512)
            put(rig, "vdb", number.to_bytes(8, "little"), slot * 512)

    threads = [threading.Thread(target=write, args=(slot,)) for slot in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(15):
            rig.group.prepare(f"c{turn}")
            rig.group.switch()
            (under_way,) = rig.group._under_way.rounds
            for name, item in rig.group._members.items():
                item.freeze(under_way.parts[name], None, None).release()  # drained
            one, two = base(rig, "vda"), base(rig, "vdb")
            for slot in range(3):
                place = slice(slot * 512, slot * 512 + 8)
                first, second = int.from_bytes(one[place], "little"), int.from_bytes(two[place], "little")
                assert second <= first <= second + 1, (turn, slot, first, second)
            disks.finish(rig.group.abort())
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT)


def test_no_request_is_admitted_between_the_switch_of_one_disk_and_the_next(
    rig: disks.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vda has been switched, vdb has not: a write to vda that was answered now could be followed by one to vdb."""
    last = rig.group._members["vdb"]
    switch, answered = last.switch_locked, threading.Event()

    def write() -> None:
        put(rig, "vda", b"new")
        answered.set()

    def pause(part: member.Part) -> None:
        threading.Thread(target=write, daemon=True).start()
        assert not answered.wait(0.1)
        switch(part)

    rig.group.prepare("c1")
    monkeypatch.setattr(last, "switch_locked", pause)
    rig.group.switch()
    assert answered.wait(WAIT) and base(rig)[:3] == bytes(3)


# ---- order of the procedure ----


def test_what_does_not_fit_the_state_is_refused(rig: disks.Rig) -> None:
    with pytest.raises(errors.StateError):
        rig.group.switch()
    with pytest.raises(errors.StateError):
        rig.group.arm(disks.Switch(), time.monotonic() + 1)
    with pytest.raises(errors.StateError):
        rig.group.commit()
    with pytest.raises(errors.InputError):
        rig.group.prepare("../etc")
    assert disks.finish(rig.group.abort()) == {}
    rig.group.prepare("c1")
    with pytest.raises(errors.StateError, match="c1"):
        rig.group.prepare("c2")
    with pytest.raises(errors.StateError):
        rig.group.start_copy("/store", {})
    rig.group.switch()
    with pytest.raises(errors.StateError, match="copied"):
        rig.group.commit()
    with pytest.raises(errors.NotFoundError):
        rig.group.job("none")


def test_d7_a_silent_driver_loses_its_checkpoint(rig: disks.Rig) -> None:
    rig.group.prepare("c1", lease=60)
    rig.group.switch()
    put(rig, "vda", b"kept")
    rig.group.renew(0.02)
    until(lambda: state(rig) is api.State.REST)
    assert base(rig)[:4] == b"kept" and not rig.layer_files()


def test_abort_before_the_switch_removes_the_empty_overlays(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    assert len(rig.layer_files()) == 4
    put(rig, "vda", b"below")
    assert base(rig)[:5] == b"below"
    disks.finish(rig.group.abort())
    assert not rig.layer_files() and rig.group.status().checkpoint is None


def test_a_failed_save_in_prepare_keeps_what_the_state_may_name(
    rig: disks.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename has happened, the directory sync has failed: the state on disk names the overlays."""
    write_file = durable.write_file

    def fail_late(path: Path, data: bytes, mode: int = 0o600) -> None:
        write_file(path, data, mode)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable, "write_file", fail_late)
    with pytest.raises(errors.BlkckptError):
        rig.group.prepare("c1")
    monkeypatch.undo()
    assert state(rig) is api.State.REST and len(rig.layer_files()) == 4
    put(rig, "vda", b"goes on")
    rig.kill()
    disks.finish(rig.group.abort())
    assert not rig.layer_files() and rig.read("vda")[:7] == b"goes on"


# ---- the copy ----

CHILD = """
import json, os, sys
job = json.loads(sys.stdin.readline())
%s
"""
READS = """
layer = job["layers"][-1]
data = os.pread(layer["fd"], job["size"], 0)
print(json.dumps({"progress": {"done": 10, "total": 20}}), flush=True)
print(json.dumps({"result": {"image": "i-" + job["disk"], "read": len(data), "first": data[:4].decode(),
                             "kinds": [layer["kind"] for layer in job["layers"]], "label": job["label"]}}))
"""


def child(body: str) -> Sequence[str]:
    return (sys.executable, "-c", CHILD % body)


def test_the_copy_child_reads_the_frozen_layers(rig: disks.Rig) -> None:
    put(rig, "vda", b"old!")
    rig.group.prepare("c1")
    rig.group.switch()
    put(rig, "vda", b"new!")
    job = rig.group.start_copy("/store", {}, label="vm@c1", command=child(READS))
    result = disks.finish(job)
    assert result["disks"]["vda"] == {
        "image": "i-vda", "read": SIZE, "first": "old!", "kinds": ["raw"], "label": "vm@c1/vda",
    }  # fmt: skip
    assert job.status().done > 0 and rig.group.job(job.id) is job
    with pytest.raises(errors.StateError, match="already"):
        rig.group.start_copy("/store", {}, command=child(READS))
    disks.finish(rig.group.commit())
    assert base(rig)[:4] == b"new!"
    assert [disk.changed_since for disk in rig.group.status().disks] == ["i-vda", "i-vdb"]


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ('print(json.dumps({"error": {"type": "NoSpaceError", "message": "store full", "errno": 28}})); sys.exit(1)',
         errors.NoSpaceError, "store full"),
        ('print(json.dumps({"error": {"type": "Exception", "message": "odd"}})); sys.exit(1)', errors.BlkckptError,
         "odd"),
        ('print("rubbish")', errors.ProtocolError, "rubbish"),
        ('print(json.dumps([1]))', errors.ProtocolError, "1"),
        ("pass", errors.BlkckptError, "without a result"),
        ("os.kill(os.getpid(), 9)", errors.BlkckptError, "-9"),
        ('print(json.dumps({"result": {"image": "x"}}), flush=True); sys.exit(3)', errors.BlkckptError, "status 3"),
    ],
    ids=["error", "unknown", "rubbish", "type", "silent", "killed", "late"],
)  # fmt: skip
def test_a3_a_copy_that_fails_is_no_checkpoint(
    rig: disks.Rig, body: str, kind: type[errors.BlkckptError], says: str
) -> None:
    rig.group.prepare("c1")
    rig.group.switch()
    with pytest.raises(kind, match=says):
        disks.finish(rig.group.start_copy("/store", {}, command=child(body)))
    with pytest.raises(errors.StateError):
        rig.group.commit()
    disks.finish(rig.group.abort())
    assert not rig.layer_files()


def test_a_missing_copy_program_is_said(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.switch()
    with pytest.raises(errors.BlkckptError):
        disks.finish(rig.group.start_copy("/store", {}, command=("/nonexistent/program",)))


def test_abort_stops_the_copy_child(rig: disks.Rig, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f'open({str(pid_file)!r}, "w").write(str(os.getpid())); sys.stdin.read(); sys.exit(1)'
    rig.group.prepare("c1")
    rig.group.switch()
    job = rig.group.start_copy("/store", {}, command=child(body))
    until(lambda: pid_file.exists() and pid_file.read_text())
    disks.finish(rig.group.abort())
    assert state(rig) is api.State.REST and not job.running
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_d5_the_copy_waits_for_writes_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = disks.install(monkeypatch)
    rig = disks.Rig(tmp_path, {"vda": SIZE})
    seen = []

    def look(frozen: copier.FrozenDisk, parent: str | None) -> str:
        data = bytearray(4)
        chain.read(frozen.view, data, 0)
        seen.append(bytes(data))
        return "image"

    disks.stub_copies(monkeypatch, look)
    try:
        rig.group.prepare("c1")
        release = threading.Event()
        files.hold = lambda call, path, *_: release if call == "write" and path.name == "vda.raw" else None
        writer = threading.Thread(target=put, args=(rig, "vda", b"late"))
        writer.start()
        assert files.held.acquire(timeout=WAIT)
        rig.group.switch()
        job = rig.group.start_copy("/store", {})
        assert not job.wait(0.05) and not seen
        release.set()
        writer.join(WAIT)
        disks.finish(job)
        assert seen == [b"late"]
    finally:
        files.hold = lambda *what: None
        rig.clean_up()


def test_frozen_disks_go_into_a_real_store(rig: disks.Rig, tmp_path: Path) -> None:
    kept = store.Store.init(tmp_path / "store")
    content = os.urandom(SIZE)
    put(rig, "vda", content)
    images: list[str | None] = [None]
    for turn in range(3):
        rig.group.prepare(f"c{turn}")
        rig.group.switch()
        frozen = rig.read("vda")
        put(rig, "vda", os.urandom(5000), 100_000 * turn + 33)
        job = rig.group.start_copy(str(tmp_path / "store"), {"vda": images[-1]})
        result = disks.finish(job)["disks"]["vda"]
        images.append(result["image"])
        assert kept.image(result["image"]).read(0, SIZE) == frozen
        if turn:
            assert result["read"] < SIZE // 2, "incremental: only what changed is read"
        disks.finish(rig.group.commit())


# ---- stops and starts ----


def test_a_clean_stop_leaves_no_live_maps_and_a_clean_state(rig: disks.Rig) -> None:
    put(rig, "vda", b"x")
    rig.group.close()
    rig.group.close()
    assert not list(rig.vm.live.iterdir())
    assert formats.decode_state(rig.vm.state.read_bytes(), rig.vm.state).clean
    rig.open()
    assert not formats.decode_state(rig.vm.state.read_bytes(), rig.vm.state).clean


def test_a_clean_stop_in_the_middle_of_a_checkpoint_goes_on_at_the_next_start(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.switch()
    put(rig, "vda", b"kept")
    rig.stop()
    disks.finish(rig.group.abort())
    assert base(rig)[:4] == b"kept" and not rig.layer_files() and state(rig) is api.State.REST


@pytest.mark.parametrize("stage", ["prepared", "armed", "switched", "copied", "committing"])
def test_kill_at_every_stage_returns_to_rest_by_itself(
    rig: disks.Rig, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks.stub_copies(monkeypatch)
    put(rig, "vda", b"1" * 9000)
    rig.group.prepare("c1")
    if stage == "armed":
        rig.group.arm(disks.Switch(), time.monotonic() + 60)
    if stage in ("switched", "copied", "committing"):
        rig.group.switch()
    put(rig, "vda", b"2" * 5000, 100)
    if stage in ("copied", "committing"):
        disks.finish(rig.group.start_copy("/store", {}))
    if stage == "committing":
        rig.group.commit()
    expected = rig.read("vda")
    rig.kill()
    assert rig.read("vda") == expected
    until(lambda: state(rig) is api.State.REST)
    assert rig.read("vda") == expected == base(rig) and not rig.layer_files()
    assert len(list(rig.vm.live.iterdir())) == 2, "one map of changes a disk"


def test_d13_a_server_killed_while_it_opens_after_power_loss_leaves_nothing_to_believe(
    rig: disks.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its live maps are of this boot; they must be whole, or not be taken for the truth."""
    disks.stub_copies(monkeypatch)
    rig.group.prepare("c1")
    rig.group.switch()
    disks.finish(rig.group.start_copy("/store", {}))
    disks.finish(rig.group.commit())
    put(rig, "vda", b"1" * 4096)
    rig.group.prepare("c2")
    rig.group.switch()
    put(rig, "vda", b"2" * 4096)
    rig.group.disks["vda"].flush()
    disks.other_boot(monkeypatch)

    class KilledError(BaseException):
        pass

    def killed(*what: object, **fields: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(statefile.StateFile, "save", killed)
        with pytest.raises(KilledError):
            rig.lose_power(start=False)
    rig.open(start=False)
    assert rig.read("vda")[:4096] == b"2" * 4096
    assert rig.group.status().disks[0].changed_since is None


VICTIM = """
import os, sys
from blkckpt import paths
from blkckpt.disk import group
opened = group.DiskGroup.open(paths.home(sys.argv[1]).vm("vm"), open_image=None)
opened.start()
opened.prepare("c1")
number = 0
while True:
    number += 1
    if number == 50:
        opened.switch()
    opened.disks["vda"].pwrite(number.to_bytes(8, "little") * 75, number * 700 % (2 << 20))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_kill_9_of_a_real_server_loses_nothing_that_was_acknowledged(rig: disks.Rig) -> None:
    rig.group.close()
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(rig.root)], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    for line in victim.stdout:
        if int(line) >= 700:
            victim.kill()
            break
    acknowledged = max([700, *(int(line) for line in victim.stdout if line.endswith("\n"))])
    victim.wait()
    victim.stdout.close()
    rig.open()
    for _ in range(2):
        found = rig.read("vda")
        for number in range(1, acknowledged + 1):
            offset = number * 700 % SIZE
            assert found[offset : offset + 600] == number.to_bytes(8, "little") * 75, number
        until(lambda: state(rig) is api.State.REST)


def test_stacked_overlays_are_committed_the_bottom_most_first(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.switch()
    put(rig, "vda", b"a" * 12288)
    add_overlay(rig)
    assert [len(disk.overlays) for disk in rig.group.status().disks] == [2, 1]
    put(rig, "vda", b"b" * 4096, 4096)
    put(rig, "vda", b"c" * 10, 8192 + 5)
    expected = b"a" * 4096 + b"b" * 4096 + b"a" * 5 + b"c" * 10 + b"a" * 4081
    assert rig.read("vda")[:12288] == expected
    rig.kill(start=False)
    assert rig.read("vda")[:12288] == expected
    rig.group.start()
    disks.finish(rig.group.abort())
    assert rig.read("vda")[:12288] == expected == base(rig)[:12288] and not rig.layer_files()


def test_a_retained_overlay_stays(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.switch()
    put(rig, "vda", b"a" * 4096)
    add_overlay(rig, retain=True)
    put(rig, "vda", b"b" * 4096, 4096)
    put(rig, "vda", b"c" * 10, 5)
    expected = rig.read("vda")
    rig.group.start()
    disks.finish(rig.group.abort())
    assert [len(disk.overlays) for disk in rig.group.status().disks] == [1, 0]
    assert rig.read("vda") == expected and base(rig)[:8192] == bytes(8192)
    rig.stop()
    assert rig.read("vda") == expected and state(rig) is api.State.REST


def add_overlay(rig: disks.Rig, *, retain: bool = False) -> None:
    """Put another overlay over vda, as a second checkpoint during the first would."""
    rig.group.abandon()
    saved = formats.decode_state(rig.vm.state.read_bytes(), rig.vm.state)
    disk = saved.disks[0]
    layer_id = stack.new_id()
    stack.create_overlay(stack.Place(rig.vm, "vda", disk.size, saved.boot), layer_id).close()
    kept = formats.Retained("/nowhere", "c1", "ab" * 16, "cd" * 16) if retain else None
    below = tuple(dataclasses.replace(item, retained=kept) for item in disk.overlays)
    disk = dataclasses.replace(disk, overlays=(formats.OverlayState(layer_id), *below))
    durable.write_file(rig.vm.state, formats.encode_state(dataclasses.replace(saved, disks=(disk, *saved.disks[1:]))))
    rig.open(start=False)


def test_files_that_no_state_names_are_swept(rig: disks.Rig) -> None:
    orphan = "ab" * 16
    for kind in ("data", "map", "changed"):
        (rig.vm.layers / f"vda.{orphan}.{kind}").write_bytes(b"left over")
    (rig.vm.layers / "notes.txt").write_text("not ours to remove")
    (rig.vm.live / f"vda.{orphan}.live").write_bytes(b"left over")
    rig.kill()
    assert rig.layer_files() == ["notes.txt"] and len(list(rig.vm.live.iterdir())) == 2


def test_bad_disks_are_refused(tmp_path: Path) -> None:
    vm = paths.home(tmp_path / "other").vm("vm")
    (tmp_path / "short").write_bytes(b"x" * 100)

    def create(path: Path, size: int) -> None:
        group.DiskGroup.create(vm, "id", [api.DiskSpec("vda", str(path), size)])

    with pytest.raises(errors.InputError, match="100 bytes"):
        create(tmp_path / "short", 4096)
    with pytest.raises(errors.NotFoundError):
        create(tmp_path / "missing", 4096)
    with pytest.raises(errors.BlkckptError):
        create(tmp_path, 4096)
    with pytest.raises(errors.InputError):
        create(Path("/dev/null"), 4096)
    with pytest.raises(errors.NotFoundError):
        group.DiskGroup.open(vm, open_image=lambda ref: disks.MemoryImage(b""))


# ---- restored disks ----

IMAGE = bytes(65536) + os.urandom(300_000) + bytes(500_000) + os.urandom(100_001)
RESTORED = 1 << 20


@pytest.fixture
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[disks.Rig]:
    """A restored disk whose fill does nothing until ``fill()`` is called, but stops when it is told to."""
    held = threading.Event()
    run = fill.run

    def wait(gate: fill.Gate, file: Any, image: Any, pace: jobs.Pace, progress: Any) -> None:
        until(lambda: held.is_set() or pace.stop.is_set())
        pace.check()
        run(gate, file, image, pace, progress)

    monkeypatch.setattr(fill, "run", wait)
    made = disks.Rig(tmp_path, {"vda": RESTORED}, IMAGE)
    made.fill = held.set  # type: ignore[attr-defined]
    yield made
    held.set()
    made.clean_up()


def test_a_restored_disk_is_served_at_once_and_filled_behind(restored: disks.Rig) -> None:
    expected = bytearray(IMAGE.ljust(RESTORED, b"\0"))
    assert restored.read() == expected
    put(restored, "vda", b"guest" * 100, 65536 + 77)
    expected[65536 + 77 : 65536 + 577] = b"guest" * 100
    assert restored.read() == expected
    kinds = [kind for _, _, kind in restored.group.disks["vda"].extents(RESTORED, 0)]
    assert 3 in kinds and 0 in kinds
    restored.fill()  # type: ignore[attr-defined]
    until(lambda: restored.group.status().disks[0].source is None)
    assert restored.read() == expected
    until(lambda: not restored.layer_files())
    assert base(restored) == expected, "the store is not needed any more"
    restored.image = None
    restored.stop()
    assert restored.read() == expected


def test_a_restored_disk_can_be_checkpointed_while_it_is_filled(
    restored: disks.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def look(frozen: copier.FrozenDisk, parent: str | None) -> str:
        data = bytearray(RESTORED)
        chain.read(frozen.view, data, 0)
        seen.append(bytes(data))
        assert frozen.source == disks.IMAGE and frozen.changed is not None
        assert list(frozen.changed.set_runs(0, 256)) == [(2, 3)], "relative to the image it was restored from"
        return "image-1"

    disks.stub_copies(monkeypatch, look)
    put(restored, "vda", b"g", 2 * 4096)
    expected = restored.read()
    restored.group.prepare("c1")
    restored.group.switch()
    put(restored, "vda", b"later" * 1000, 5000)
    now = restored.read()
    disks.finish(restored.group.start_copy("/store", {"vda": "image-0"}))
    assert seen == [expected]
    disks.finish(restored.group.commit())
    assert restored.read() == now
    restored.kill()
    assert restored.read() == now


def test_the_fill_yields_to_the_guest(restored: disks.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the guest does something the fill rests, so many times as long as it worked, but it keeps to its floor.

    A guest that did nothing while the fill worked may have waited for the processor that the fill had.
    """
    now, rests, idle = 0.0, [], jobs.Pace.IDLE

    def rest(seconds: float) -> bool:
        rests.append(seconds)
        return False

    pace = jobs.Pace(threading.Event(), lambda: restored.group.disks["vda"].activity, rests=3)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(pace.stop, "wait", rest)
    pace._began = now
    steps = [(0.001, False), (0.01, True), (idle / 2, False), (idle / 2, False), (0.03, True), (0.0001, True)]
    for took, active in (*steps, (0.0002, False), (5.0, False), (5.0, True)):
        now += took
        if active:
            restored.read()
        pace.rest(4 << 20)
    assert rests == pytest.approx([0.03, 1.5 * idle, 0.09, 0.0009, (4 << 20) / jobs.Pace.FLOOR])


def test_the_job_line_of_a_restored_disk(tmp_path: Path, restored: disks.Rig) -> None:
    body = 'print(json.dumps({"result": {"image": "x", "job": job}}))'
    restored.group.prepare("c1")
    restored.group.switch()
    job = disks.finish(restored.group.start_copy("/store", {"vda": "image-0"}, rate=5, command=child(body)))
    line = job["disks"]["vda"]["job"]
    assert [layer["kind"] for layer in line["layers"]] == ["overlay", "image"]
    assert line["layers"][1] == {"kind": "image", "store": "/nowhere", "image": "image-0"}
    assert line["changed"] is not None and line["rate"] == 5 and line["parent"] == "image-0"
    assert json.dumps(line)

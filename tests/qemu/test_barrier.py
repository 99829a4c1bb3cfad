"""What a real QEMU shows in the armed window, and that anything else is caught.

The guest is firmware alone: it runs, has memory and devices, and starts in less than a second.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.agent import guard, machine, rescue
from blkckpt.disk.barrier import BarrierState
from blkckpt.vm import qmp, writeprotect

WAITING, PASSED, VIOLATED = BarrierState.WAITING, BarrierState.PASSED, BarrierState.VIOLATED


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A firmware guest with two QMP sockets: ours, and somebody else's."""
    ours, other = tmp_path / "q1", tmp_path / "q2"
    command = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
    monitors = [word for path in (ours, other) for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    process = subprocess.Popen([*command, *monitors], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not other.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        yield ours, other
    finally:
        process.kill()
        process.wait()


class Armed:
    """A guest ready for a background snapshot, its QMP socket unread."""

    def __init__(self, session: qmp.QmpSession) -> None:
        self.guest = machine.Machine(session)
        self.guest.check()
        self.guest.set_up(background=True)
        self.stream, write = os.pipe()
        self.guest.hand_stream(write)
        os.close(write)
        self.received, self.limit = 0, 1 << 40
        self.slow = False
        self._drain = threading.Thread(target=self._absorb, daemon=True)
        self._drain.start()
        self.guest.leave_unread()

    def _absorb(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.stream, 4096 if self.slow else 1 << 20):
                self.received += len(data)
                time.sleep(0.002 if self.slow else 0)
                if self.received > self.limit:
                    os.close(self.stream)
                    return

    def settle(self, timeout: float = 20) -> BarrierState:
        deadline = time.monotonic() + timeout
        while self.guest.watch.poll() is WAITING and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.guest.watch.poll()

    def close(self) -> None:
        os.close(self.stream)


@pytest.fixture
def session(sockets: tuple[Path, Path]) -> Iterator[qmp.QmpSession]:
    with connect(sockets[0]) as session:
        yield session


def connect(path: Path) -> qmp.QmpSession:
    deadline = time.monotonic() + 20
    while True:
        try:
            return qmp.QmpSession(path)
        except errors.HypervisorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def armed(session: qmp.QmpSession) -> Iterator[Armed]:
    armed = Armed(session)
    yield armed
    armed.close()


def test_the_window_is_exactly_as_expected(session: qmp.QmpSession, armed: Armed) -> None:
    assert armed.guest.watch.poll() is WAITING
    reply = armed.guest.migrate()
    assert armed.settle() is PASSED, armed.guest.watch.reason
    times = armed.guest.watch.times
    armed.guest.read_again()
    assert reply.result(5) == {}
    armed.guest.check_completed(background=True)
    assert [event.name for event in session.events() if event.name != "MIGRATION"] == ["STOP", "RESUME"]
    statuses = [event.data["status"] for event in session.events() if event.name == "MIGRATION"]
    assert statuses == ["setup", "active", "completed"]
    assert times.stopped_seconds is not None
    assert 0 < times.stopped_seconds < 2
    assert armed.received > 64 * 1024
    assert session.execute("query-status")["status"] == "running"


def test_the_settings_are_put_back(session: qmp.QmpSession, armed: Armed) -> None:
    armed.guest.migrate()
    armed.settle()
    armed.guest.read_again()
    armed.guest.check_completed(background=True)
    armed.guest.restore_settings()
    states = {entry["capability"]: entry["state"] for entry in session.execute("query-migrate-capabilities")}
    assert not states["background-snapshot"]
    assert not states["events"]
    assert session.execute("query-migrate-parameters")["max-bandwidth"] == 128 << 20


@pytest.mark.parametrize("commands", [["stop"], ["stop", "cont"]], ids=" ".join)
def test_somebody_else_stops_the_guest(sockets: tuple[Path, Path], armed: Armed, commands: list[str]) -> None:
    """A second monitor's STOP and RESUME are not ours: the instant is lost, at once."""
    with connect(sockets[1]) as other:
        for command in commands:
            other.execute(command)
        assert armed.settle(5) is VIOLATED
        assert "somebody else stopped or continued the guest" in armed.guest.watch.reason
        armed.guest.read_again()
        armed.guest.end_migration(None, background=False)
        armed.guest.continue_guest()
        status = other.execute("query-status")["status"]
    assert status == ("paused" if commands == ["stop"] else "running"), "what others stopped is not ours to continue"


def test_somebody_else_continues_a_running_guest(sockets: tuple[Path, Path], armed: Armed) -> None:
    """Then QEMU does nothing and says nothing: the window is as it was."""
    with connect(sockets[1]) as other:
        other.execute("cont")
    assert armed.guest.watch.poll() is WAITING
    armed.guest.migrate()
    assert armed.settle() is PASSED
    armed.guest.read_again()
    armed.guest.check_completed(background=True)


def test_somebody_else_continues_while_memory_is_saved(sockets: tuple[Path, Path], armed: Armed) -> None:
    """A second RESUME before the end: the first may not have been QEMU's own, so the checkpoint is refused."""
    with connect(sockets[1]) as other:
        armed.slow = True  # so that the migration does not end before
        armed.guest.migrate()
        assert armed.settle() is PASSED
        other.execute("stop")
        other.execute("cont")
    armed.slow = False
    armed.guest.read_again()
    with pytest.raises(errors.HypervisorError, match="somebody stopped and continued"):
        armed.guest.check_completed(background=True)


def test_a_stopped_guest_is_seen_by_the_barrier(sockets: tuple[Path, Path], session: qmp.QmpSession) -> None:
    """QEMU 7.2 shows no STOP for a guest that is stopped already, and resumes it: VIOLATED."""
    armed = Armed(session)
    armed.guest.read_again()
    session.execute("stop")
    time.sleep(0.1)
    armed.guest.leave_unread()
    armed.guest.migrate()
    assert armed.settle() is VIOLATED
    armed.guest.read_again()
    armed.close()


def test_a_refused_migration(session: qmp.QmpSession, armed: Armed) -> None:
    reply = session.submit("migrate", {"uri": "fd:nonsense"})
    assert armed.settle() is VIOLATED
    armed.guest.read_again()  # QEMU says "failed" first and why in its reply
    with pytest.raises(qmp.RefusedError, match="nonsense"):
        reply.result(5)
    assert session.execute("query-status")["status"] == "running"


def test_qemu_dies_while_armed(session: qmp.QmpSession, armed: Armed) -> None:
    os.kill(session.peer_pid, 9)
    assert armed.settle(10) is VIOLATED
    assert "closed" in armed.guest.watch.reason


def alive(session: qmp.QmpSession) -> bool:
    """No page of the guest waits for a snapshot that has ended, and the monitor answers."""
    assert session.execute("query-status")["status"] == "running"
    return not writeprotect.is_protected(session.peer_pid)


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.1])
def test_a1_a_snapshot_nobody_wants_is_let_to_its_end(session: qmp.QmpSession, delay: float) -> None:
    """Given up at any moment, with a receiver that has stopped reading: the guest runs, nothing stays protected."""
    armed = Armed(session)
    armed.guest.read_again()
    armed.slow = True
    armed.guest.migrate().result()
    time.sleep(delay)
    armed.guest.end_migration(armed.stream, background=True)
    armed.guest.continue_guest()
    assert session.execute("query-migrate")["status"] == "completed"
    assert not armed.guest.migrating
    assert alive(session)
    armed.close()


def test_a1_a_snapshot_that_breaks_off_is_freed(session: qmp.QmpSession) -> None:
    """The negative control of the above: a broken stream leaves the memory protected (QEMU 7.2), until we free it."""
    armed = broken_off(session)
    if session.version.startswith("7.2"):
        assert writeprotect.is_protected(session.peer_pid)
    armed.guest.end_migration(None, background=True)
    armed.guest.continue_guest()
    assert alive(session)


def broken_off(session: qmp.QmpSession) -> Armed:
    """A guest whose snapshot failed early: nearly all of its memory was not saved yet."""
    armed = Armed(session)
    armed.guest.read_again()
    armed.limit = 20_000
    armed.guest.migrate().result()
    with pytest.raises(errors.HypervisorError, match="could not save the guest"):
        armed.guest.check_completed(background=True)
    return armed


def block_monitor(session: qmp.QmpSession) -> None:
    """Let a device write to protected memory in QEMU's main loop: the DMA of fw_cfg answers at the given address.

    (QEMU docs/specs/fw_cfg.rst: I/O ports 0x514 and 0x518 take the address, big-endian; the second starts it.)
    """
    for command in ("o/w 0x514 0", "o/w 0x518 0xc003"):  # 0x3c00000, 60 MiB
        session.submit("human-monitor-command", {"command-line": command})
    with pytest.raises(errors.DeadlineError):
        session.execute("query-status", timeout=1)


def test_a1_a_monitor_that_waits_for_a_page_is_freed(session: qmp.QmpSession) -> None:
    """It answers no question, so whether the guest is protected must not be one."""
    armed = broken_off(session)
    if not writeprotect.is_protected(session.peer_pid):
        pytest.skip(f"QEMU {session.version} frees the guest itself")
    block_monitor(session)
    armed.guest.end_migration(None, background=True)
    armed.guest.continue_guest()
    assert alive(session)


def test_a1_the_guard_frees_a_monitor_that_waits_for_a_page(
    sockets: tuple[Path, Path], session: qmp.QmpSession
) -> None:
    broken_off(session)
    if not writeprotect.is_protected(session.peer_pid):
        pytest.skip(f"QEMU {session.version} frees the guest itself")
    block_monitor(session)
    read, write = os.pipe()  # QEMU, in its main loop, has not closed its end
    try:
        assert rescue.rescue(guard.QMP, str(sockets[1]), read, patience=20)
    finally:
        os.close(write)
        os.close(read)
    assert alive(session)


def test_a1_the_guard_takes_an_abandoned_stream_to_its_end(sockets: tuple[Path, Path]) -> None:
    """The agent is gone in the middle of saving: the guard holds the pipe, drains it, and the guest is well."""
    session = connect(sockets[0])
    guest = machine.Machine(session)
    guest.set_up(background=True)
    read, write = os.pipe()
    guest.hand_stream(write)
    os.close(write)
    watch = guard.Guard(guard.QMP, str(sockets[0]), read)
    watch.take_charge()
    guest.migrate().result()
    session.wait_event(lambda event: event.name == "RESUME", since=0, timeout=20)
    os.close(read)
    session.close()
    watch.abandon()
    assert watch._process.wait(30) == 0
    with connect(sockets[1]) as other:
        assert other.execute("query-migrate")["status"] == "completed"
        assert alive(other)


@pytest.mark.parametrize("background", [True, False])
def test_explicit_stop(session: qmp.QmpSession, background: bool) -> None:
    """Stopped by us: resumed by QEMU with a background snapshot, by us after a plain migration; running in the end."""
    guest = machine.Machine(session)
    guest.set_up(background=background)
    read, write = os.pipe()
    guest.hand_stream(write)
    os.close(write)
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(read, 1 << 20), b"")], daemon=True)
    drain.start()
    guest.stop()
    assert session.execute("query-status")["status"] == "paused"
    assert guest.may_be_stopped
    guest.migrate().result()
    if background:
        guest.await_running(20)
        guest.check_completed(background=True)
    else:
        guest.check_completed(background=False)
        guest.continue_guest()
    assert session.execute("query-status")["status"] == "running"
    assert not guest.may_be_stopped
    stop, resume = guest.stop_and_resume()
    assert stop is not None
    assert resume is not None
    assert stop < resume
    drain.join(10)
    os.close(read)


def test_what_is_recorded(session: qmp.QmpSession) -> None:
    info = machine.Machine(session).info()
    assert info.machine_type.startswith("pc-q35-")
    assert (info.accel, info.ram_size) == ("tcg", 64 << 20)
    assert info.argv[0] == "qemu-system-x86_64"
    assert "q35" in info.argv
    assert info.qemu_version == session.version


def test_a_poll_costs_little(armed: Armed) -> None:
    """It stands before every write of an armed disk."""
    begin = time.perf_counter()
    for _ in range(1000):
        assert armed.guest.watch.poll() is WAITING
    assert (time.perf_counter() - begin) / 1000 < 300e-6


def test_memory_shared_with_a_file_cannot_be_snapshot(tmp_path: Path) -> None:
    """A private mapping of a file on disk: QEMU refuses the capability, and says so before anything has changed."""
    image = tmp_path / "ram"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    words = ["-machine", "q35,memory-backend=m", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
    backend = f"memory-backend-file,id=m,size=64M,mem-path={image},share=off"
    command = ["qemu-system-x86_64", *words, "-object", backend, "-qmp", f"unix:{tmp_path}/q,server=on,wait=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        with connect(tmp_path / "q") as session:
            guest = machine.Machine(session)
            assert guest.try_background() is not None
            states = {entry["capability"]: entry["state"] for entry in session.execute("query-migrate-capabilities")}
            assert not states["background-snapshot"]
    finally:
        process.kill()
        process.wait()

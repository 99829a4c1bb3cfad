"""The QMP session against a fake server: every failure is one of our errors, every wait ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.disk.barrier import BarrierState
from blkckpt.vm import barrier, qmp
from tests.support import fake_qmp


@pytest.fixture
def server(tmp_path: Path) -> Iterator[fake_qmp.FakeQmp]:
    server = fake_qmp.FakeQmp(tmp_path / "q")
    yield server
    server.close()


@pytest.fixture
def session(server: fake_qmp.FakeQmp, tmp_path: Path) -> Iterator[qmp.QmpSession]:
    with qmp.QmpSession(tmp_path / "q", timeout=5) as session:
        yield session


def soon(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    return what()


def test_greeting(session: qmp.QmpSession) -> None:
    assert session.version == "7.2.9 (fake)"
    assert session.peer_pid == os.getpid()
    assert not session.lost


def test_execute(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    server.answers["query-status"] = {"status": "running", "running": True}
    server.answers["echo"] = lambda arguments: arguments
    assert session.execute("query-status") == {"status": "running", "running": True}
    assert session.execute("echo", {"a": [1]}) == {"a": [1]}


def test_refusal_keeps_the_words(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    with pytest.raises(qmp.RefusedError, match="QEMU refused nonsense: The command nonsense") as info:
        session.execute("nonsense")
    assert info.value.error_class == "GenericError"
    assert info.value.exit_code == 7


def test_a2_a_silent_command_has_a_deadline(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    server.answers |= {"slow": lambda arguments: None, "quick": {}}
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError, match="slow within"):
        session.execute("slow", timeout=0.2)
    assert time.monotonic() - start < 2
    assert session.execute("quick") == {}


def test_qemu_goes_away_during_a_command(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    server.answers["quit"] = lambda arguments: server.drop()
    with pytest.raises(errors.HypervisorError, match="went away during quit"):
        session.execute("quit")
    assert soon(lambda: session.lost)
    with pytest.raises(errors.HypervisorError, match="went away"):
        session.execute("query-status")


def test_events_carry_both_times(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    since = session.mark()
    before = time.monotonic()
    server.event("STOP", 12, 345678)
    server.event("MIGRATION", 12, 400000, status="completed")
    event = session.wait_event(lambda e: e.name == "MIGRATION", since=since, timeout=5)
    assert event.data == {"status": "completed"}
    stop, _ = session.events(since)
    assert (stop.name, stop.stamp_us) == ("STOP", 12_345_678)
    assert before <= stop.received <= time.monotonic()
    assert session.events(session.mark()) == []


def test_a2_waiting_for_an_event_ends(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    with pytest.raises(errors.DeadlineError):
        session.wait_event(lambda e: True, since=0, timeout=0.1)
    threading.Timer(0.1, server.drop).start()
    with pytest.raises(errors.HypervisorError, match="closed"):
        session.wait_event(lambda e: True, since=0, timeout=20)


def test_many_events_are_bounded(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    for number in range(qmp.MAX_EVENTS + 10):
        server.event("RTC_CHANGE", number)
    assert soon(lambda: session.mark() == qmp.MAX_EVENTS + 10)
    assert len(session.events()) <= qmp.MAX_EVENTS
    assert session.events()[-1].stamp_us == (qmp.MAX_EVENTS + 9) * 1_000_000
    assert [e.stamp_us for e in session.events(qmp.MAX_EVENTS + 9)] == [(qmp.MAX_EVENTS + 9) * 1_000_000]


def test_a_descriptor_arrives(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    server.answers["getfd"] = {}
    read, write = os.pipe()
    session.send_fd("blkckpt", write)
    os.close(write)
    assert ("getfd", {"fdname": "blkckpt"}) in server.seen
    os.write(server.descriptors[0], b"through")
    assert os.read(read, 20) == b"through"
    os.close(read)


def test_unread_bytes_stay_in_the_socket(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    """While reading is paused everything QEMU says is visible to a peek on a duplicate, in full; later it is read."""
    server.answers["migrate"] = {}
    duplicate = session.duplicate()
    watch = barrier.ResumeBarrier(duplicate)
    since = session.mark()
    session.pause_reading()
    assert watch.poll() is BarrierState.WAITING
    reply = session.submit("migrate", {"uri": "fd:x"})
    assert soon(lambda: "migrate" in server.commands())
    server.event("MIGRATION", status="setup")
    server.event("MIGRATION", status="active")
    server.event("STOP", 5, 0)
    time.sleep(0.1)
    assert watch.poll() is BarrierState.WAITING
    assert session.events(since) == []
    server.event("RESUME", 5, 2500)
    assert watch.poll() is BarrierState.PASSED
    assert session.events(since) == []
    session.resume_reading()
    assert reply.result(5) == {}
    session.wait_event(lambda e: e.name == "RESUME", since=since, timeout=5)
    assert [event.name for event in session.events(since)] == ["MIGRATION", "MIGRATION", "STOP", "RESUME"]
    assert watch.times.stopped_seconds == pytest.approx(0.0025)
    watch.close()


def test_pause_drains_first(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    """What came before the pause, half a message included, is read before it: the window starts at a border."""
    assert server.connection is not None
    server.event("RESUME")
    server.connection.sendall(b'{"event": "ST')
    threading.Timer(0.1, server.connection.sendall, [b'OP"}\r\n']).start()
    session.pause_reading()
    assert [event.name for event in session.events()] == ["RESUME", "STOP"]
    with socket.socket(fileno=session.duplicate()) as other, pytest.raises(BlockingIOError):
        other.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    server.event("RTC_CHANGE")
    time.sleep(0.05)
    assert len(session.events()) == 2
    session.resume_reading()
    session.resume_reading()
    assert soon(lambda: len(session.events()) == 3)


def test_a2_a_chattering_socket_cannot_be_paused(server: fake_qmp.FakeQmp, session: qmp.QmpSession) -> None:
    assert server.connection is not None
    server.connection.sendall(b'{"event": "half')
    with pytest.raises(errors.DeadlineError, match="silent"):
        session.pause_reading(timeout=0.2)


def test_close_while_paused(server: fake_qmp.FakeQmp, tmp_path: Path) -> None:
    threads = threading.active_count()
    session = qmp.QmpSession(tmp_path / "q")
    session.pause_reading()
    session.close()
    session.close()
    assert threading.active_count() == threads


# --- sockets of something else ---


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(errors.HypervisorError, match="no QEMU behind it"):
        qmp.QmpSession(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(errors.HypervisorError, match="is no socket"):
        qmp.QmpSession(tmp_path / "file")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(errors.HypervisorError, match="no QEMU behind it"):
        qmp.QmpSession(tmp_path / "stale")


def test_path_too_long(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="107 bytes"):
        qmp.QmpSession(tmp_path / ("x" * 108))


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"QMP": 1}\r\n', b'{"jsonrpc": "2.0"}\r\n', b"[]\r\n", b"\xff\xfe\r\n"]
)
def test_socket_of_something_else(tmp_path: Path, greeting: bytes) -> None:
    server = fake_qmp.FakeQmp(tmp_path / "q", greeting)
    with pytest.raises(errors.ProtocolError, match="is not a QMP socket") as info:
        qmp.QmpSession(tmp_path / "q", timeout=5)
    assert "\n" not in str(info.value)
    server.close()


def test_negotiation_refused(server: fake_qmp.FakeQmp, tmp_path: Path) -> None:
    server.answers["qmp_capabilities"] = fake_qmp.Refusal("no")
    with pytest.raises(errors.ProtocolError, match="is not a QMP socket"):
        qmp.QmpSession(tmp_path / "q", timeout=5)


def test_a2_silence(tmp_path: Path) -> None:
    """An NBD server, or a QMP socket that somebody else is connected to."""
    server = fake_qmp.FakeQmp(tmp_path / "q", b"NBDMAGICIHAVEOPT")
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError, match="another program is connected"):
        qmp.QmpSession(tmp_path / "q", timeout=0.3)
    assert time.monotonic() - start < 3
    server.close()


def test_hangs_up_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(errors.ProtocolError, match="is not a QMP socket"):
            qmp.QmpSession(tmp_path / "q", timeout=5)

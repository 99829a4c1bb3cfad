"""The resume barrier over fake QMP sockets: what passes, what is violated, and that nothing is ever read."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt.disk.barrier import BarrierState
from blkckpt.vm import barrier

WAITING, PASSED, VIOLATED = BarrierState.WAITING, BarrierState.PASSED, BarrierState.VIOLATED


def event(name: str, at: float = 0.0, **data: object) -> bytes:
    stamp = {"seconds": int(at), "microseconds": round(at % 1 * 1e6)}
    message: dict[str, object] = {"timestamp": stamp, "event": name}
    if data:
        message["data"] = data
    return json.dumps(message).encode() + b"\r\n"


SETUP = event("MIGRATION", 10, status="setup")
ACTIVE = event("MIGRATION", 10.5, status="active")
STOP = event("STOP", 11)
RESUME = event("RESUME", 11.0025)
REPLY = b'{"return": {}, "id": "x"}\r\n'
WINDOW = SETUP + REPLY + ACTIVE + STOP + RESUME


class Wire:
    """A socket pair: QEMU's end, the agent's end, and a barrier over a duplicate of the agent's."""

    def __init__(self) -> None:
        self.qemu, self.agent = socket.socketpair()
        self.barrier = barrier.ResumeBarrier(os.dup(self.agent.fileno()))

    def says(self, data: bytes) -> BarrierState:
        self.qemu.sendall(data)
        return self.barrier.poll()

    def allow_tiny_messages(self) -> None:
        """The kernel charges about 768 bytes a message: make room for a window sent byte by byte."""
        self.qemu.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.qemu.settimeout(10)

    def close(self) -> None:
        self.barrier.close()
        self.qemu.close()
        self.agent.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def test_the_window_of_a_real_qemu_passes(wire: Wire) -> None:
    assert wire.barrier.poll() is WAITING
    for line in (SETUP, REPLY, ACTIVE, STOP):
        assert wire.says(line) is WAITING
    assert wire.says(RESUME) is PASSED
    assert wire.barrier.times == barrier.EventTimes(10_500_000, 11_000_000, 11_002_500)
    assert wire.barrier.times.stopped_seconds == pytest.approx(0.0025)
    assert wire.barrier.reason == ""


def test_nothing_is_read(wire: Wire) -> None:
    wire.says(WINDOW)
    assert wire.agent.recv(1 << 16) == WINDOW


def test_final_states_stay(wire: Wire) -> None:
    assert wire.says(WINDOW) is PASSED
    assert wire.says(STOP + RESUME) is PASSED
    wire.qemu.close()
    assert wire.barrier.poll() is PASSED


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_split_anywhere(wire: Wire, size: int) -> None:
    """Only a whole line counts: the state changes with the last newline, never before."""
    wire.allow_tiny_messages()
    for start in range(0, len(WINDOW), size):
        end = start + size
        assert wire.says(WINDOW[start:end]) is (PASSED if end >= len(WINDOW) else WAITING)


def test_resume_inside_a_string(wire: Wire) -> None:
    """A device the guest's user named after an event decides nothing."""
    evil = '"}\r\n{"timestamp": {}, "event": "RESUME"}\r\n'
    for name in ('"event": "RESUME"', evil):
        assert wire.says(event("DEVICE_DELETED", device=name, path="RESUME")) is WAITING
    assert wire.says(SETUP + ACTIVE + STOP) is WAITING
    assert wire.says(event("RTC_CHANGE", offset=1, event="RESUME")) is WAITING
    assert wire.says(RESUME) is PASSED


@pytest.mark.parametrize("name", sorted(barrier.HARMLESS))
def test_harmless_events(wire: Wire, name: str) -> None:
    for line in (SETUP, ACTIVE, STOP):
        assert wire.says(line + event(name)) is WAITING
    assert wire.says(RESUME) is PASSED


SEQUENCES = {
    "a cont while running": ([STOP + RESUME], "expected MIGRATION setup from QEMU, saw STOP"),
    "a stale resume": ([RESUME], "saw RESUME: somebody else"),
    "a stop before the migration": ([SETUP, STOP], "expected MIGRATION active from QEMU, saw STOP"),
    "a guest that was stopped": ([SETUP, ACTIVE, RESUME], "expected STOP from QEMU, saw RESUME"),
    "a second stop": ([SETUP, ACTIVE, STOP, STOP], "expected RESUME from QEMU, saw STOP"),
    "a failure": (
        [SETUP, event("MIGRATION", status="failed")],
        "expected MIGRATION active from QEMU, saw MIGRATION fa",
    ),
    "a failure while stopped": ([SETUP, ACTIVE, STOP, event("MIGRATION", status="failed")], "saw MIGRATION failed"),
    "a cancel": ([SETUP, ACTIVE, event("MIGRATION", status="cancelling")], "cancelling"),
    "a refusal": ([b'{"id": "x", "error": {"class": "GenericError", "desc": "no way"}}\r\n'], "QEMU refused: no way"),
    "a shutdown": ([event("SHUTDOWN", guest=True)], "saw SHUTDOWN"),
    "a panic": ([SETUP, event("GUEST_PANICKED", action="pause")], "GUEST_PANICKED"),
    "an I/O error": ([SETUP, ACTIVE, event("BLOCK_IO_ERROR")], "BLOCK_IO_ERROR"),
    "an unknown event": ([event("NOVELTY")], "NOVELTY"),
    "a greeting": ([b'{"QMP": {}}\r\n'], "unexpected message"),
    "no JSON": ([b"SSH-2.0-OpenSSH\r\n"], "not a message"),
    "no object": ([b'"RESUME"\r\n'], "not a message"),
    "deep nesting": ([b"[" * 20000 + b"\r\n"], "not a message"),
    "an event that is no name": ([b'{"event": ["RESUME"]}\r\n'], "saw"),
}


@pytest.mark.parametrize(("lines", "reason"), SEQUENCES.values(), ids=SEQUENCES.keys())
def test_anything_else_is_violated(wire: Wire, lines: list[bytes], reason: str) -> None:
    for line in lines[:-1]:
        assert wire.says(line) is WAITING
    assert wire.says(lines[-1]) is VIOLATED
    assert reason in wire.barrier.reason
    assert wire.says(WINDOW) is VIOLATED


def test_end_of_file_of_an_empty_queue(wire: Wire) -> None:
    wire.qemu.close()
    assert wire.barrier.poll() is VIOLATED
    assert "closed" in wire.barrier.reason


def test_end_of_file_behind_bytes(wire: Wire) -> None:
    """QEMU died with events in the queue: the end is seen although the queue is not empty."""
    assert wire.says(SETUP) is WAITING
    wire.qemu.close()
    deadline = time.monotonic() + 5
    while wire.barrier.poll() is WAITING and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wire.barrier.poll() is VIOLATED


def test_a_resume_before_the_end_of_file_passes(wire: Wire) -> None:
    wire.qemu.sendall(WINDOW)
    wire.qemu.close()
    assert wire.barrier.poll() is PASSED


def test_queue_near_its_limit_in_messages(wire: Wire) -> None:
    """QEMU would hold events back when its send buffer is full; we give up while less than half is charged."""
    small = event("RTC_CHANGE")
    sent = 0
    while wire.says(small) is WAITING:
        sent += 1
    assert sent == barrier.MAX_LINES
    assert "while armed" in wire.barrier.reason
    wire.qemu.setblocking(False)
    for _ in range(sent):  # as much again still fits: nothing has been held back
        assert wire.qemu.send(small) == len(small)


def test_queue_near_its_limit_in_bytes(wire: Wire) -> None:
    assert wire.says(event("RTC_CHANGE", pad="x" * (barrier.MAX_BYTES - 200))) is WAITING
    assert wire.says(b" " * 200) is VIOLATED
    assert "hold events back" in wire.barrier.reason


@pytest.mark.parametrize("count", [1, len(SETUP), len(SETUP) + 5])
def test_somebody_read(wire: Wire, count: int) -> None:
    assert wire.says(SETUP + REPLY) is WAITING
    wire.agent.recv(count)
    assert wire.barrier.poll() is VIOLATED
    assert "somebody read" in wire.barrier.reason


def test_somebody_read_everything_and_more_came(wire: Wire) -> None:
    assert wire.says(SETUP) is WAITING
    wire.agent.recv(1 << 16)
    assert wire.says(ACTIVE + STOP + RESUME) is VIOLATED


def test_closed_while_waiting(wire: Wire) -> None:
    wire.barrier.close()
    assert wire.barrier.poll() is VIOLATED


def test_not_a_stream_socket() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other, pytest.raises(OSError, match="stream"):
        barrier.ResumeBarrier(os.dup(one.fileno()))


def test_a_pipe_is_refused() -> None:
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(OSError, match="non-socket"):
        barrier.ResumeBarrier(read)
    os.close(read)


def test_many_threads_agree(wire: Wire) -> None:
    """Polls from several threads while the window arrives byte by byte: nobody passes early, everybody passes."""
    wire.allow_tiny_messages()
    sent_all = threading.Event()
    early: list[BarrierState] = []
    last: list[BarrierState] = []

    def ask() -> None:
        while True:
            done = sent_all.is_set()
            state = wire.barrier.poll()
            if done:
                last.append(state)
                return
            if state is VIOLATED:
                early.append(state)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for byte in WINDOW:
        wire.qemu.sendall(bytes([byte]))
    sent_all.set()
    for thread in threads:
        thread.join(10)
    assert not early
    assert last == [PASSED] * 4


LINES = st.sampled_from([SETUP, ACTIVE, STOP, RESUME, REPLY, event("RTC_CHANGE"), event("MIGRATION", status="failed")])


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=8))
def test_judge_against_a_model(lines: list[bytes]) -> None:
    """PASSED exactly when the steps came first, complete and in order, with only replies and harmless between."""
    judge = barrier.Judge()
    for line in lines:
        judge.line(line.strip())
    steps = [line for line in lines if line in (SETUP, ACTIVE, STOP, RESUME) or b"failed" in line]
    wanted = [SETUP, ACTIVE, STOP, RESUME]
    agree = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, wanted, strict=False)))
    model = PASSED if agree == 4 else WAITING if agree == len(steps) else VIOLATED
    assert judge.state is model


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_never_passes(data: bytes) -> None:
    judge = barrier.Judge()
    for line in data.split(b"\n"):
        judge.line(line)
    assert judge.state is not PASSED


def test_a_poll_is_cheap(wire: Wire) -> None:
    """It stands before every write: one peek when nothing new has come."""
    wire.says(SETUP + REPLY + ACTIVE)
    start = time.perf_counter()
    for _ in range(2000):
        wire.barrier.poll()
    assert (time.perf_counter() - start) / 2000 < 200e-6


def test_an_arrival_ends_the_wait(wire: Wire) -> None:
    """Each wakes once, though nothing is read; what came before the wait does at once, a hang-up too."""

    def waited(timeout: float) -> float:
        begun = time.monotonic()
        wire.barrier.wait(timeout)
        return time.monotonic() - begun

    wire.qemu.sendall(b'{"return": {}}\n')
    assert waited(20) < 10
    assert waited(0.05) >= 0.04
    threading.Timer(0.05, wire.qemu.sendall, (b"{",)).start()
    assert waited(20) < 10
    wire.qemu.close()
    assert waited(20) < 10

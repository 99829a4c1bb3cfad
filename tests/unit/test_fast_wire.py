"""The rules F10 to F14 of the fast path's sockets (``plugins/fastpath/wire.c``), each with defects that it finds.

Time stands still for what is held, except where that is the matter: ``PATIENT`` is part of every build.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt.agent import fastfilter
from tests.support import fastcore, fastwire

HELD, BRIEF = 64 << 10, 16 << 10
MORE = socket.MSG_MORE


Scenario = Callable[[fastwire.Pair], None]


def f10_in_order(pair: fastwire.Pair) -> None:
    """F10."""
    pair.client.sendall(b"abcdefgh")
    before = pair.wire.counters
    assert [pair.read(3), pair.read(3), pair.read(3)] == [b"abc", b"def", b"gh"]
    after = pair.wire.counters
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1), "three reads, one of them the kernel's"
    pair.client.sendall(b"i")
    assert pair.read(10) == b"i"
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.read(10) == b""


def f10_after_a_large_one(pair: fastwire.Pair) -> None:
    """Nothing is read ahead where a large payload may follow, which would be copied twice."""
    pair.client.sendall(b"L" * (BRIEF + 1))
    assert pair.read(BRIEF + 1) == b"L" * (BRIEF + 1)
    pair.client.sendall(b"abcdefghi")
    before = pair.wire.counters[1]
    assert pair.read(3) == b"abc" and pair.wire.counters[1] - before == 1
    assert pair.read(3) == b"def" and pair.wire.counters[1] - before == 2, "it was read ahead"
    assert pair.read(3) == b"ghi" and pair.wire.counters[1] - before == 2, "it was not"


def f10_dies_with_its_socket(pair: fastwire.Pair) -> None:
    """F10: a socket that gets the same number does not read what another one read ahead."""
    pair.client.sendall(b"old old")
    assert pair.read(1) == b"o"
    with contextlib.ExitStack() as stack:
        client, server = (stack.enter_context(end) for end in socket.socketpair())
        pair.wire.close(pair.fd)
        assert os.dup2(server.fileno(), pair.fd) == pair.fd
        client.sendall(b"new")
        assert pair.read(10) == b"new"
        pair.send(b"x", MORE)
        pair.send(b"y")
        assert client.recv(10) == b"xy"
        client.sendall(b"newer")
        assert pair.read(10) == b"newer"


def f10_not_in_a_child(pair: fastwire.Pair) -> None:
    """F10: a child between vfork() and exec(), which has this memory, closes the socket: ours is as it was."""
    pair.hold()
    assert pair.wire.c.close_in_child(pair.fd) == 0
    assert pair.arrived() == b"", "the child has sent what is not its own"
    assert pair.read(1) == b"b"


def f11_parts_go_together(pair: fastwire.Pair) -> None:
    """The parts of a reply arrive in one piece, which is what a unix socket does not do by itself."""
    before = pair.wire.counters
    for part in (b"head", b"more"):
        pair.send(part, MORE)
        assert pair.arrived() == b""
    pair.send(b"body")
    assert pair.arrived() == b"headmorebody"
    after = pair.wire.counters
    assert (after[2] - before[2], after[3] - before[3]) == (3, 1)


def f11_read(pair: fastwire.Pair) -> None:
    """F11: before a read that may wait for the client, which may be waiting for this reply."""
    pair.hold()
    assert pair.read(1) == b"b" and pair.arrived() == b"", "it was there"

    def wait_and_go_on() -> bytes:
        reply = pair.client.recv(1)
        pair.client.sendall(b"c")
        return reply

    done, result = fastcore.later(wait_and_go_on)
    assert pair.read(1) == b"c"
    assert done.wait(fastcore.WAIT) and result == [b"r"]


def f11_with_the_last(pair: fastwire.Pair) -> None:
    """What is held goes out with the reply to the last request that is there, in one call."""
    pair.hold()
    assert pair.read(1) == b"b"
    before = pair.wire.counters
    pair.send(b"s")
    assert pair.arrived() == b"rs" and pair.wire.counters[3] - before[3] == 1


def f11_asked(pair: fastwire.Pair) -> None:
    pair.hold()
    pair.wire.c.fp_wire_release()
    assert pair.arrived() == b"r"


def f11_shutdown(pair: fastwire.Pair) -> None:
    pair.hold()
    assert pair.wire.c.fp_wire_shutdown(pair.fd, socket.SHUT_WR) == 0
    assert pair.arrived() == b"r" and pair.client.recv(1) == b""


def f11_close(pair: fastwire.Pair) -> None:
    pair.hold()
    pair.wire.close(pair.fd)
    assert pair.arrived() == b"r"
    pair.fd = os.open(os.devnull, os.O_RDONLY)  # for the end of the test


def f12_no_more_than_fits(pair: fastwire.Pair) -> None:
    """F12."""
    pair.hold(b"0" * BRIEF)
    for _ in range(HELD // BRIEF - 1):
        pair.send(b"1" * BRIEF)
    assert pair.arrived() == b""
    pair.send(b"2")
    assert pair.arrived() == b"0" * BRIEF + b"1" * (HELD - BRIEF) + b"2"
    pair.send(b"3" * (BRIEF + 1))
    assert pair.arrived() == b"3" * (BRIEF + 1), "a large one is not copied"


def f13_another_reader_first(pair: fastwire.Pair) -> None:
    """F13: once two threads read, nothing is held, for the one that would send it may be busy with the other."""
    pair.client.sendall(b"abc")
    assert pair.read(1) == b"a"
    assert fastcore.later(lambda: pair.read(1))[0].wait(fastcore.WAIT)
    pair.send(b"r")
    assert pair.arrived() == b"r"


def f13_another_reader_later(pair: fastwire.Pair) -> None:
    """F13: what was held when the second one came leaves with its coming."""
    pair.hold()
    done, result = fastcore.later(lambda: pair.read(1))
    assert done.wait(fastcore.WAIT) and result == [b"b"]
    assert pair.arrived() == b"r"


def f14_gone(pair: fastwire.Pair) -> None:
    """F14: who has gone away is found by a send, not by a read, and kills nobody."""
    pair.hold()
    assert pair.read(1) == b"b"
    pair.client.close()
    assert pair.read(1) == b"", "the end of what the client sent"
    with pytest.raises(BrokenPipeError):
        pair.send(b"s")


def f14_told_later(pair: fastwire.Pair) -> None:
    """F14: once something of the stream is lost, nothing more of it is sent."""
    pair.hold()
    kept = os.dup(pair.fd)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), pair.fd)
        pair.wire.c.fp_wire_release()
        os.dup2(kept, pair.fd)
    os.close(kept)
    for flags in (MORE, 0):
        with pytest.raises(OSError) as caught:
            pair.send(b"s", flags)
        assert caught.value.errno == errno.ENOTSOCK
    assert pair.arrived() == b""


def f14_told_at_once(pair: fastwire.Pair) -> None:
    pair.client.close()
    pair.send(b"s", MORE)
    with pytest.raises(BrokenPipeError):
        pair.send(b"t")


SCENARIOS: tuple[Scenario, ...] = (
    f10_in_order, f10_after_a_large_one, f10_dies_with_its_socket, f10_not_in_a_child, f11_parts_go_together, f11_read,
    f11_with_the_last,
    f11_asked, f11_shutdown, f11_close, f12_no_more_than_fits, f13_another_reader_first, f13_another_reader_later,
    f14_gone, f14_told_later, f14_told_at_once,
)  # fmt: skip

_IN_PUSH = "        if (sent < 0)\n            return false;"
_IN_SHUTDOWN = "        release(wire, fd);\n    return (int)syscall(SYS_shutdown"
_IN_CLOSE = "        release(wire, fd);\n        atomic_store(&wire->marked, false);"
DEFECTS: tuple[tuple[Scenario, tuple[str, str]], ...] = (
    (f10_in_order, ("        wire->at += taken;\n", "")),
    (f10_in_order, ("atomic_store(&wire->ahead, ahead - taken)", "atomic_store(&wire->ahead, 0)")),
    (f10_after_a_large_one, ("wire->large ? 0 : AHEAD", "AHEAD")),
    (f10_after_a_large_one, ("wire->large = length > FP_WIRE_BRIEF;", "wire->large = true;")),
    (f10_dies_with_its_socket, ("        atomic_store(&wire->marked, false);\n", "")),
    (f10_dies_with_its_socket, ("    atomic_store(&wire->ahead, 0);\n", "")),
    (f10_not_in_a_child, ("wire && wire->owner == getpid() ? wire", "wire ? wire")),
    (f11_parts_go_together, ("fits && (more || may_wait(wire))", "fits && may_wait(wire)")),
    (f11_read, ("    release(wire, fd);\n    tally(&raw_reads);", "    tally(&raw_reads);")),
    (f11_with_the_last, ("atomic_load(&wire->ahead) != 0 && ", "")),
    (f11_asked, ("    if (wire)\n        release(wire, current);", "")),
    (f11_shutdown, (_IN_SHUTDOWN, _IN_SHUTDOWN.replace("release(wire, fd)", ""))),
    (f11_close, (_IN_CLOSE, _IN_CLOSE.partition("\n")[2])),
    (f12_no_more_than_fits, ("length <= HELD - held && ", "")),
    (f13_another_reader_first, ("!atomic_load(&wire->shared) && ", "")),
    (f13_another_reader_later, ("        drain(wire, fd); /*", "        ; /*")),
    (f14_told_later, ("        wire->failed = errno;\n", "        ;\n")),
    (f14_told_at_once, (_IN_PUSH, _IN_PUSH.replace("false", "true"))),
)  # fmt: skip


def build(directory: Path, *defects: tuple[str, str]) -> fastwire.Wire:
    library = directory / "wire.so"
    fastcore.compile_wire(library, fastfilter.FLAGS, defects, "vforked.c")
    return fastwire.Wire(library)


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> fastwire.Wire:
    return build(tmp_path_factory.mktemp("wire"), fastcore.PATIENT)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_rule(scenario: Scenario, wire: fastwire.Wire) -> None:
    with fastwire.paired(wire) as pair:
        scenario(pair)


@pytest.mark.parametrize(("scenario", "defect"), DEFECTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_defect_is_found(scenario: Scenario, defect: tuple[str, str], tmp_path: Path) -> None:
    """In a process of its own: what is not sent, some wait for, and what is not bounded, overruns."""
    build(tmp_path, fastcore.PATIENT, defect)
    script = f"import sys; from tests.unit import test_fast_wire as t; t.alone({scenario.__name__!r}, sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "wire.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, "the defect was not found"
    assert "Error" in done.stderr or done.returncode < 0, done.stderr


def alone(scenario: str, library: str) -> None:
    """*scenario* with *library*, until the alarm: what does not come is waited for in vain."""
    signal.alarm(5)
    with fastwire.paired(fastwire.Wire(Path(library))) as pair:
        globals()[scenario](pair)


def test_f12_nothing_waits_for_long(tmp_path: Path) -> None:
    """F12: as built, with its own limit; time is the matter here."""
    with fastwire.paired(build(tmp_path)) as pair:
        pair.client.sendall(b"abc")
        assert pair.read(1) == b"a"
        pair.send(b"r")
        time.sleep(0.001)  # ten times as long as anything is held
        assert pair.read(1) == b"b"
        pair.send(b"s")
        assert pair.arrived() == b"rs"


def test_f12_a_defect_is_found(wire: fastwire.Wire) -> None:
    """Its negative control: without the limit it would still be here."""
    with fastwire.paired(wire) as pair:
        pair.client.sendall(b"abc")
        assert pair.read(1) == b"a"
        pair.send(b"r")
        time.sleep(0.001)
        assert pair.read(1) == b"b"
        pair.send(b"s")
        assert pair.arrived() == b""


def test_what_is_no_client_of_nbdkit_is_left_alone(wire: fastwire.Wire) -> None:
    before = wire.counters
    with contextlib.ExitStack() as stack:
        plain, other = (stack.enter_context(end) for end in socket.socketpair())
        assert wire.send(plain.fileno(), b"ab") == 2 and other.recv(2) == b"ab"
        other.sendall(b"cdef")
        assert wire.read(plain.fileno(), 2) == b"cd" and plain.recv(4) == b"ef", "no MSG_MORE was ever used"
        packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        left, right = (stack.enter_context(end) for end in packets)
        assert wire.send(left.fileno(), b"gh", MORE) == 2 and right.recv(2) == b"gh", "it has borders of its own"
    out, into = os.pipe()
    os.write(into, b"ijk")
    assert wire.read(out, 2) == b"ij" and os.read(out, 2) == b"k"
    wire.close(out)
    wire.close(into)
    for call in (lambda: wire.read(out, 1), lambda: wire.send(-1, b"x"), lambda: wire.close(into)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    assert wire.counters == before


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["client", "read", "part", "reply", "release"]), st.integers(1, 20_000)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_both_streams_stay_as_they_are(wire: fastwire.Wire, steps: list[Step]) -> None:
    """Whatever is asked for in whatever order, every byte arrives, once and in order (F10, F11)."""
    sent, read, replied, got = bytearray(), bytearray(), bytearray(), bytearray()
    with fastwire.paired(wire) as pair:
        for number, (step, length) in enumerate(steps):
            data = bytes([number % 251]) * length
            if step == "client" and len(sent) - len(read) + length < 40_000:
                pair.client.sendall(data)
                sent += data
            elif step == "read" and len(read) < len(sent):
                read += pair.read(length)
            elif step in ("part", "reply"):
                pair.send(data, MORE if step == "part" else 0)
                replied += data
            elif step == "release" and read:
                pair.wire.c.fp_wire_release()
            got += pair.arrived()
        pair.client.shutdown(socket.SHUT_WR)
        while part := pair.read(100_000):
            read += part
        got += pair.arrived()
        assert (read, got) == (sent, replied)


def test_no_reply_is_held_while_the_plugin_works(tmp_path: Path) -> None:
    """F11: of every request that the filter passes on.  See ``tests/support/fastpath/passing.c``."""
    program = fastcore.build_passing(tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for call in ("pread", "pwrite", "trim", "zero", "cache", "flush", "extents"):
        program = fastcore.build_passing(tmp_path, (f"pass(next)->{call}(", f"next->{call}("))
        done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
        assert "finds a reply held" in done.stderr, f"{call}: {done.stderr}"


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(sanitizer: str, servers: int, tmp_path: Path) -> None:
    """See ``tests/support/fastpath/wirestress.c``."""
    result = _stress(tmp_path, sanitizer, servers)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr


def test_stress_finds_a_reply_that_nobody_sends(tmp_path: Path) -> None:
    """F13: with several readers a reply that is held may be forgotten, and the client waits for ever."""
    defect = ("!atomic_load(&wire->shared) && atomic_load(&wire->ahead) != 0 && ", "")
    assert _stress(tmp_path, "thread", 3, fastcore.PATIENT, defect).returncode != 0


def _stress(
    directory: Path, sanitizer: str, servers: int, *defects: tuple[str, str]
) -> subprocess.CompletedProcess[str]:
    program = directory / "wirestress"
    fastcore.compile_wire(program, fastcore.sanitized(sanitizer), defects, "wirestress.c")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), "3", str(servers)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

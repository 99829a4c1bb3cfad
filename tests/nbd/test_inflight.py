"""Step 812 and rules D4, D5: asynchronous requests held in flight on several connections while the disks switch.

The referee holds single system calls of the server; what must not wait is shown to be answered meanwhile, what must
wait is shown not to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nbd

from tests.nbd.conftest import MIB, SIZES
from tests.support import referee, server

Refereed = tuple[server.Stand, referee.Referee]
BLOCK = 4096
A_WHILE = 0.3
"""Long enough for a request that wrongly does not wait: an answer takes less than a millisecond."""


class Request:
    """One asynchronous request on a connection of its own."""

    def __init__(self, handle: Any, send: Callable[[Any], int]) -> None:
        self._handle = handle
        self._cookie = send(handle)
        self._done = False

    def done(self, seconds: float = 0) -> bool:
        """Whether the answer is there within *seconds*; raises its error."""
        end = time.monotonic() + seconds
        while not self._done:
            self._done = self._handle.aio_command_completed(self._cookie)  # says so only once
            if self._done:
                break
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._handle.poll(max(1, int(left * 1000)))
        return True


def write(data: bytes, offset: int) -> Callable[[Any], int]:
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    return lambda handle: int(handle.aio_pwrite(buffer, offset))


@contextmanager
def connections(stand: server.Stand, count: int) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(stand.disk()) for _ in range(count)]


def writes_to(path: object, offset: int) -> Callable[[referee.Operation], bool]:
    return lambda seen: seen.kind == "write" and seen.path == str(path) and seen.offset == offset


def layer_writes(block: int) -> Callable[[referee.Operation], bool]:
    """Of data to *block* in an overlay, however much of it."""
    return lambda seen: seen.kind == "write" and seen.is_layer_data and seen.offset // BLOCK == block


def test_the_switch_waits_for_nobody_and_the_copy_for_the_old_writes(refereed: Refereed) -> None:
    """810, 812, 830: `advance` is O(1); writes in flight finish in the old layer and are in the checkpoint."""
    stand, judge = refereed
    base = stand.base("vda")
    with connections(stand, 6) as handles, stand.control() as peer, ExitStack() as holds:
        handles[0].pwrite(server.pattern(SIZES["vda"], 1), 0)
        peer.prepare("x")
        blocks = [3, 50, 51, 300]
        held, requests = [], []
        for handle, block in zip(handles, blocks, strict=False):
            held.append(holds.enter_context(judge.hold(writes_to(base, block * BLOCK))))
            requests.append(Request(handle, write(b"%04d" % block * 1024, block * BLOCK)))
            requests[-1].done(0.01)
            held[-1].wait()
        before = time.monotonic()
        assert peer.switch().switched
        assert time.monotonic() - before < 1
        expected = bytearray(server.pattern(SIZES["vda"], 1))
        for block in blocks:
            expected[block * BLOCK : (block + 1) * BLOCK] = b"%04d" % block * 1024

        # New requests on untouched blocks are served while the old ones hang, and are not in the checkpoint.
        handles[4].pwrite(b"new side" * 512, 7 * BLOCK)
        handles[4].pwrite(b"part", 9 * BLOCK + 5)
        assert handles[4].pread(8, 7 * BLOCK) == b"new side"
        handles[4].flush()

        job = peer.copy(stand.store_path, dict.fromkeys(SIZES))
        assert peer.wait(job, A_WHILE).state == "running"
        assert not any(request.done() for request in requests)
        for one in held[:-1]:
            one.released.set()
        assert all(request.done(10) for request in requests[:-1])
        assert peer.wait(job, A_WHILE).done == 0  # one old write is enough to wait for
        held[-1].released.set()
        assert requests[-1].done(10)
        images = peer.finish(job, 60).result["disks"]
        assert stand.image(images["vda"]["image"]) == expected
        peer.finish(peer.commit(), 60)
        expected[7 * BLOCK : 8 * BLOCK] = b"new side" * 512
        expected[9 * BLOCK + 5 : 9 * BLOCK + 9] = b"part"
        assert handles[5].pread(SIZES["vda"], 0) == expected


def test_a_partial_write_waits_for_the_old_write_of_its_block(refereed: Refereed) -> None:
    """812, D4: it would copy up a block that is still changing.  A whole-block write need not wait."""
    stand, judge = refereed
    with connections(stand, 4) as (one, two, three, reader), stand.control() as peer:
        one.pwrite(b"." * (64 << 10), 0)
        peer.prepare("x")
        with judge.hold(writes_to(stand.base("vda"), 0)) as held:
            old = Request(one, write(b"O" * 2 * BLOCK, 0))
            old.done(0.01)
            held.wait()
            peer.switch()
            partial = Request(two, write(b"pp", 100))
            whole = Request(three, write(b"W" * BLOCK, BLOCK))
            assert whole.done(10)
            assert not partial.done(A_WHILE)
            assert not old.done()
            assert reader.pread(4, 3 * BLOCK) == b"...."  # reads wait for nobody
            assert reader.pread(4, BLOCK) == b"WWWW"
        assert old.done(10)
        assert partial.done(10)
        assert reader.pread(BLOCK, 0) == b"O" * 100 + b"pp" + b"O" * (BLOCK - 102)
        assert reader.pread(BLOCK, BLOCK) == b"W" * BLOCK
        image = stand.image(stand.copy(peer)["vda"]["image"])
        assert image[: 2 * BLOCK] == b"O" * 2 * BLOCK
        peer.finish(peer.abort(), 60)


def two_partial_writes(stand: server.Stand, judge: referee.Referee, wait: float) -> tuple[bool, bytes]:
    """Hold the first of two partial writes of one block: was the second answered meanwhile, what is in the block?"""
    with connections(stand, 3) as (one, two, three), stand.control() as peer:
        one.pwrite(b"." * (64 << 10), 0)
        peer.prepare("x")
        peer.switch()
        with judge.hold(layer_writes(5)) as held:
            first = Request(one, write(b"11", 5 * BLOCK + 10))
            first.done(0.01)
            held.wait()
            second = Request(two, write(b"22", 5 * BLOCK + 20))
            overtook = second.done(wait)
            three.pwrite(b"33", 6 * BLOCK + 1)  # another block
            assert not first.done()
        assert first.done(10)
        assert second.done(10)
        return overtook, bytes(three.pread(BLOCK, 5 * BLOCK))


BOTH = b"." * 10 + b"11" + b"." * 8 + b"22" + b"." * (BLOCK - 22)


def test_partial_writes_of_one_block_exclude_each_other(refereed: Refereed) -> None:
    """D4 across connections."""
    assert two_partial_writes(*refereed, A_WHILE) == (False, BOTH)


def test_without_exclusion_an_acknowledged_write_is_lost(tmp_path: Path) -> None:
    """Negative control: the same requests against a server whose tickets do not exclude each other."""
    with server.refereed(tmp_path, SIZES, "tests.support.no_exclusion") as (stand, judge):
        overtook, content = two_partial_writes(stand, judge, 10)
        assert overtook
        assert content != BOTH


def test_nobody_waits_for_the_commits_window(refereed: Refereed) -> None:
    """D8: a write to a block that is being moved down goes on; the block stays above for another pass."""
    stand, judge = refereed
    with connections(stand, 3) as (one, two, reader), stand.control() as peer:
        one.pwrite(b"." * SIZES["vda"], 0)
        peer.prepare("x")
        peer.switch()
        one.pwrite(b"V" * 2 * BLOCK, 0)
        stand.copy(peer)
        base = str(stand.base("vda"))
        with judge.hold(lambda seen: seen.kind == "write" and seen.path == base and seen.offset == 0) as held:
            job = peer.commit()
            held.wait()
            one.pwrite(b"in", 10)
            two.pwrite(b"outside", 2 * MIB)
            assert reader.pread(4, 0) == b"VVVV"
            assert reader.pread(14, 0) == b"V" * 10 + b"inVV"
        peer.finish(job, 60)
        assert reader.pread(14, 0) == b"V" * 10 + b"inVV"
        assert reader.pread(7, 2 * MIB) == b"outside"
    stand.wait_for_rest()
    stand.stop()
    assert stand.base("vda").read_bytes()[:14] == b"V" * 10 + b"inVV"


def test_a_flush_does_not_wait_for_writes_nobody_was_answered(refereed: Refereed) -> None:
    stand, judge = refereed
    with connections(stand, 2) as (one, two):
        two.pwrite(b"x", 0)
        with judge.hold(writes_to(stand.base("vda"), MIB)) as held:
            hanging = Request(one, write(b"h" * BLOCK, MIB))
            hanging.done(0.01)
            held.wait()
            two.flush()
            assert not hanging.done()
        assert hanging.done(10)


def test_a_read_in_flight_finishes_in_the_old_layer(refereed: Refereed) -> None:
    """818: it was issued before the switch; what it returns is the old side, whole."""
    stand, judge = refereed
    with connections(stand, 2) as (one, two), stand.control() as peer:
        one.pwrite(b"o" * BLOCK, 0)
        peer.prepare("x")
        buffer = nbd.Buffer(BLOCK)
        with judge.hold(lambda seen: seen.kind == "read" and seen.offset == 0) as held:
            old = Request(one, lambda handle: int(handle.aio_pread(buffer, 0)))
            old.done(0.01)
            held.wait()
            peer.switch()
            two.pwrite(b"n" * BLOCK, 0)
            assert not old.done(0.05)
        assert old.done(10)
        assert buffer.to_bytearray() == b"o" * BLOCK
        assert two.pread(BLOCK, 0) == b"n" * BLOCK

"""NBD requests through a real nbdkit, compared with a bytearray."""

from __future__ import annotations

import errno
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from blkckpt import errors
from tests.nbd.conftest import MIB, SIZES
from tests.support import referee, server

HOLE, ZERO = 1, 2
Refereed = tuple[server.Stand, referee.Referee]


def extents_of(handle: Any, length: int, offset: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of base:allocation, asked until the range is covered."""
    found: list[tuple[int, int]] = []
    done = 0
    while done < length:
        answer = _block_status(handle, length - done, offset + done)
        for size, flags in zip(answer[::2], answer[1::2], strict=True):
            size = min(size, length - done)
            found.append((size, flags))
            done += size
    return found


def _block_status(handle: Any, length: int, offset: int) -> list[int]:
    answer: list[int] = []
    handle.block_status(length, offset, lambda context, at, entries, error: answer.extend(entries))
    assert answer
    return answer


def errno_of(call: Callable[[], object]) -> int:
    """The errno that *call* fails with at the client."""
    with pytest.raises(nbd.Error) as caught:
        call()
    number: int = caught.value.errnum
    return number


def test_what_the_server_offers(stand: server.Stand) -> None:
    with stand.disk() as handle:
        assert handle.get_size() == SIZES["vda"]
        assert [handle.get_block_size(kind) for kind in range(3)] == [1, 4096, 32 * MIB]
        for name in ("multi_conn", "fua", "flush", "trim", "zero", "fast_zero", "cache", "meta_context"):
            arguments = ("base:allocation",) if name == "meta_context" else ()
            assert getattr(handle, f"can_{name}")(*arguments), name
        assert not handle.is_read_only()
        assert not handle.is_rotational()
        handle.cache(65536, 0)


def test_a_connection_keeps_its_python_state(stand: server.Stand) -> None:
    """Made anew for each request, it maps, faults in and unmaps a stack each time: as costly as the rest together."""
    requests = 500

    def faults() -> int:
        return int(Path(f"/proc/{stand.server.pid}/stat").read_text().rpartition(")")[2].split()[7])

    for _ in range(3):  # connections that come and go
        with stand.disk() as handle:
            handle.pread(4096, 0)
            before = faults()
            for _ in range(requests):
                handle.pread(4096, 0)
            assert faults() - before < requests / 4


@pytest.mark.parametrize("overlay", [False, True], ids=["base", "overlay"])
def test_any_alignment_and_length(stand: server.Stand, overlay: bool) -> None:
    """D11, on the base alone and with an overlay that starts empty."""
    rng = random.Random(7)
    size = SIZES["vdb"]
    model = bytearray(size)
    with stand.control() as peer, stand.disk("vdb") as handle:
        start = rng.randbytes(size)
        handle.pwrite(start, 0)
        model[:] = start
        if overlay:
            peer.prepare("x")
            assert peer.switch().switched
        borders = [0, 1, 511, 512, 4095, 4096, 4097, 8192, size - 4097, size - 1234, size - 1]
        for _ in range(400):
            offset = min(size - 1, max(0, rng.choice(borders) + rng.randrange(-3, 4)))
            length = min(rng.choice([1, 2, 511, 512, 4095, 4096, 4097, 8192, 70000]), size - offset)
            kind = rng.choice(["write", "write", "zero", "trim", "read"])
            if kind == "write":
                data = rng.randbytes(length)
                handle.pwrite(data, offset, rng.choice([0, 0, 0, nbd.CMD_FLAG_FUA]))
                model[offset : offset + length] = data
            elif kind == "zero":
                handle.zero(length, offset, rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
                model[offset : offset + length] = bytes(length)
            elif kind == "trim":
                handle.trim(length, offset)
                model[offset : offset + length] = bytes(length)
            assert handle.pread(length, offset) == model[offset : offset + length]
        assert handle.pread(size, 0) == model
        if overlay:
            peer.finish(peer.abort(), 60)
            assert handle.pread(size, 0) == model
    stand.restart(clean=True)
    with stand.disk("vdb") as handle:
        assert handle.pread(size, 0) == model
    stand.stop()
    assert stand.base("vdb").read_bytes() == model


def test_requests_outside_the_disk_are_the_clients_mistake(stand: server.Stand) -> None:
    size = SIZES["vdb"]
    with stand.disk("vdb") as handle:
        assert errno_of(lambda: handle.pread(1, size)) == errno.EINVAL
        assert errno_of(lambda: handle.pread(4096, size - 1)) == errno.EINVAL
        assert errno_of(lambda: handle.trim(4096, size)) == errno.EINVAL
        assert errno_of(lambda: handle.pwrite(b"xx", size - 1)) in (errno.ENOSPC, errno.EINVAL)
        assert handle.pread(size, 0) == bytes(size)


def test_sparse_answers(stand: server.Stand) -> None:
    """Holes are told, explicit zeros in an overlay mask the data below them, and what is told covers the range."""
    with stand.disk() as handle, stand.control() as peer:
        handle.pwrite(b"x" * (64 << 10), MIB)
        assert extents_of(handle, 4 * MIB) == [(MIB, HOLE | ZERO), (64 << 10, 0), (3 * MIB - (64 << 10), HOLE | ZERO)]
        peer.prepare("x")
        assert peer.switch().switched
        handle.trim(4096, MIB)
        handle.pwrite(b"y" * 4096, 2 * MIB)
        told = extents_of(handle, 4 * MIB)
        position = 0
        content = handle.pread(4 * MIB, 0)
        for length, flags in told:
            if flags & ZERO:
                assert content[position : position + length] == bytes(length)
            position += length
        zeros = sum(length for length, flags in told if flags & ZERO)
        assert zeros == 4 * MIB - (64 << 10) + 4096 - 4096
        assert extents_of(handle, 4096, MIB)[0][1] & ZERO
        assert sum(length for length, _ in extents_of(handle, 3 * MIB + 5, 12345)) == 3 * MIB + 5


def test_connections_see_each_others_writes(stand: server.Stand) -> None:
    with stand.disk() as one, stand.disk() as two, stand.disk("vdb") as other:
        one.pwrite(b"a" * 5000, 100)
        assert two.pread(5000, 100) == b"a" * 5000
        two.pwrite(b"b" * 10, 100)
        assert one.pread(11, 100) == b"b" * 10 + b"a"
        assert other.pread(5000, 100) == bytes(5000)


def test_a_flush_covers_every_connection(refereed: Refereed) -> None:
    """D3, and why multi-conn may be offered: the flush of one connection syncs what another one wrote."""
    stand, judge = refereed
    with stand.disk() as one, stand.disk() as two:
        one.pwrite(b"a" * 4096, 0)
        judge.seen.clear()
        two.flush()
        assert ("sync", str(stand.base("vda"))) in [(seen.kind, seen.path) for seen in judge.seen]


def test_fua_is_durable_before_its_answer(refereed: Refereed) -> None:
    """D3: data, then its sync, then the answer; held there, no answer comes."""
    stand, judge = refereed
    with stand.disk() as handle:
        handle.pwrite(b"warm" * 1024, 0)
        with judge.hold(lambda seen: seen.kind == "sync" and seen.path == str(stand.base("vda"))) as held:
            buffer = nbd.Buffer.from_bytearray(bytearray(b"f" * 4096))
            cookie = handle.aio_pwrite(buffer, 4096, flags=nbd.CMD_FLAG_FUA)
            handle.poll(100)
            held.wait()
            handle.poll(200)
            assert not handle.aio_command_completed(cookie)
        while not handle.aio_command_completed(cookie):
            assert handle.poll(60_000) > 0
        kinds = [seen.kind for seen in judge.seen if seen.path == str(stand.base("vda"))]
        assert kinds[-2:] == ["write", "sync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ETXTBSY])
def test_the_true_errno_reaches_the_client(refereed: Refereed, number: int) -> None:
    """D10, and acknowledged data is untouched by a write that failed."""
    seen_as = {errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC, errno.ETXTBSY: errno.EIO}
    stand, judge = refereed
    with stand.disk() as handle:
        handle.pwrite(b"kept" * 2048, 0)
        with judge.fail(lambda operation: operation.kind == "write", number):
            assert errno_of(lambda: handle.pwrite(b"lost" * 1024, 0)) == seen_as.get(number, number)
            assert errno_of(lambda: handle.pwrite(b"lost", 6000)) == seen_as.get(number, number)
        assert handle.pread(8192, 0) == b"kept" * 2048
        handle.pwrite(b"more", 1)
        assert handle.pread(6, 0) == b"kmoree"


def test_a_full_overlay_is_enospc_and_loses_nothing(refereed: Refereed) -> None:
    """D10 in an overlay: the write that finds no space fails, everything acknowledged before is there."""
    stand, judge = refereed
    before = server.pattern(SIZES["vda"], 1)
    with stand.disk() as handle, stand.control() as peer:
        handle.pwrite(before, 0)
        peer.prepare("x")
        assert peer.switch().switched
        handle.pwrite(b"n" * 4096, 8192)
        with judge.fail(lambda operation: operation.is_layer_data and operation.kind == "write", errno.ENOSPC):
            for offset in (0, 8192, 12288, 16385):
                assert errno_of(functools.partial(handle.pwrite, b"lost" * 1024, offset)) == errno.ENOSPC
        expected = bytearray(before)
        expected[8192:12288] = b"n" * 4096
        assert handle.pread(len(expected), 0) == expected
        peer.finish(peer.abort(), 60)
        assert handle.pread(len(expected), 0) == expected


def test_a_failed_fsync_is_final(refereed: Refereed) -> None:
    """D9: a second fsync that would succeed proves nothing; reads go on, until the server is restarted."""
    stand, judge = refereed
    with stand.disk() as handle:
        handle.pwrite(b"x" * 4096, 0)
        with judge.fail(lambda operation: operation.kind == "sync", errno.EIO, times=1), pytest.raises(nbd.Error):
            handle.flush()
        assert errno_of(handle.flush) == errno.EIO
        assert errno_of(lambda: handle.pwrite(b"y", 0)) == errno.EIO
        assert errno_of(lambda: handle.zero(4096, 0)) == errno.EIO
        assert handle.pread(4096, 0) == b"x" * 4096
    with stand.control() as peer:
        assert "fail" in str(peer.status()["disks"][0]["error"])
        with pytest.raises(errors.BlkckptError, match=r"sync"):
            peer.prepare("x")
    stand.restart(clean=False)
    with stand.disk() as handle:
        handle.pwrite(b"z", 0)
        handle.flush()
        assert handle.pread(2, 0) == b"zx"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "vdc", "", "%s%n", "vda\n", "/dev/sda", "VDA", "é" * 100, "x" * 4000]
)
def test_unknown_exports_are_refused(stand: server.Stand, name: str) -> None:
    """Names are looked up, never joined to a path; the empty one means nothing when there are two disks."""
    with pytest.raises(nbd.Error, match="no export"):
        stand.nbd(name)
    with stand.disk() as handle:
        handle.pread(1, 0)


def test_exports_are_listed(stand: server.Stand) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(stand.vm.nbd_socket))
    names = []
    handle.opt_list(lambda name, description: names.append((name, description)))
    handle.opt_abort()
    assert names == [("vda", "disk vda of VM test"), ("vdb", "disk vdb of VM test")]


def test_the_only_disk_is_the_default(tmp_path: Path) -> None:
    with server.Stand(tmp_path, {"root": 5000}) as made:
        made.start()
        with made.disk("") as handle:
            assert handle.get_size() == 5000


def test_a_client_that_vanishes_with_requests_in_flight_takes_nobody_along(refereed: Refereed) -> None:
    """nbdkit before 1.33.10 would abort with more than one thread a connection."""
    stand, judge = refereed
    with stand.disk() as other:
        for _ in range(3):
            handle = stand.nbd()
            buffers = [nbd.Buffer.from_bytearray(bytearray(b"v" * 4096)) for _ in range(16)]
            with judge.hold(lambda operation: operation.kind == "write") as held:
                for number, buffer in enumerate(buffers):
                    handle.aio_pwrite(buffer, number * 4096)
                while handle.aio_in_flight() and handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                    handle.poll(100)
                held.wait()
                server.vanish(handle)
            other.pwrite(b"o" * 100, MIB)
            assert other.pread(100, MIB) == b"o" * 100
        assert stand.server.running
        assert stand.state() == "rest"

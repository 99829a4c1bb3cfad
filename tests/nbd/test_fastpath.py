"""The fast path through a real nbdkit: it is there, serves what it should, is counted, and can be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbd

from tests.nbd.conftest import MIB, SIZES
from tests.support import server


def status(stand: server.Stand, name: str = "vda") -> dict[str, Any]:
    with stand.control() as peer:
        return next(disk for disk in peer.status()["disks"] if disk["name"] == name)


def test_it_serves_and_is_counted(stand: server.Stand) -> None:
    """Every request after the first, which finds the map's page missing; flushes and FUA are the plugin's."""
    with stand.disk() as handle:
        handle.pwrite(b"a" * 4096, 0)
        before = status(stand)
        assert before["fast_requests"] == 0 and before["writes"] == 1, "tools/setup builds it; see `blkckpt doctor`"
        handle.pwrite(b"b" * 8192, 4096)
        handle.pwrite(b"odd", 70_001)
        handle.zero(4096, 8192)
        handle.trim(MIB, 2 * MIB)
        assert handle.pread(4096 * 3, 0) == b"a" * 4096 + b"b" * 4096 + bytes(4096)
        handle.flush()
    after = status(stand)
    assert (after["fast_requests"], after["writes"], after["reads"]) == (5, 5, 1)
    assert after["written_bytes"] == 4096 + 8192 + 3 and after["read_bytes"] == 3 * 4096
    assert after["flushes"] == 1


def reads(pid: int) -> int:
    """Reads that process *pid* has asked the kernel for (``syscr`` of ``proc_pid_io(5)``)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("syscr"))


def test_requests_are_read_many_at_a_time(stand: server.Stand) -> None:
    """F10 with a real nbdkit, which by itself asks for every header and every payload."""
    requests, data = 64, b"q" * 4096
    with stand.disk() as handle:
        handle.pwrite(data, 0)
        before = reads(stand.server.pid)
        for _ in range(20):
            cookies = [
                handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at * 4096) for at in range(requests)
            ]
            while handle.aio_in_flight():
                handle.poll(-1)
            assert all(handle.aio_command_completed(cookie) for cookie in cookies)
        assert reads(stand.server.pid) - before < 20 * requests
        assert handle.pread(4096 * requests, 0) == data * requests


def test_each_connection_has_the_disk_of_its_name(stand: server.Stand) -> None:
    end = SIZES["vdb"] - 1234
    with stand.disk("vda") as a, stand.disk("vdb") as b:
        for handle, data in ((a, b"a" * 4096), (b, b"b" * 4096)):
            handle.pwrite(data, 0)
            handle.pwrite(data, 4096)
        b.pwrite(b"e" * 1234, end)
        assert a.pread(4096, 4096) == b"a" * 4096 and b.pread(4096, 4096) == b"b" * 4096
        assert b.pread(1234, end) == b"e" * 1234
    assert status(stand)["fast_requests"] == 2 and status(stand, "vdb")["fast_requests"] == 4
    for _ in range(3):
        with stand.disk() as handle:
            assert handle.pread(1, 0) == b"a"


def test_first_writes_after_a_switch(stand: server.Stand) -> None:
    """Bits are set from C; the image is the disk at the switch, and what came after it is committed back."""
    model = bytearray(server.pattern(SIZES["vda"], 1))
    with stand.disk() as handle, stand.control() as peer:
        handle.pwrite(model, 0)
        peer.prepare("one")
        assert peer.switch().switched
        handle.pwrite(b"x" * 4096, 0)
        before = status(stand)["fast_requests"]
        for block in range(1, 600):
            handle.pwrite(b"y" * 4096, block * 4096)
        assert status(stand)["fast_requests"] == before + 599
        images = stand.copy(peer)
        assert stand.image(images["vda"]["image"]) == model
        peer.finish(peer.commit(), server.SECONDS)
        stand.wait_for_rest()
        model[: 600 * 4096] = b"x" * 4096 + b"y" * (599 * 4096)
        assert handle.pread(SIZES["vda"], 0) == model
    stand.stop()
    assert stand.base("vda").read_bytes() == model


def test_without_it(stand: server.Stand) -> None:
    stand.stop()
    stand.fast = False
    stand.start()
    with stand.disk() as handle:
        handle.pwrite(b"a" * 4096, 0)
        handle.pwrite(b"a" * 4096, 0)
    assert status(stand)["fast_requests"] is None and status(stand)["writes"] == 2

"""The test guest itself: it must see a wrong byte, or every test that trusts it is worthless."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest


@pytest.fixture
def serial(tmp_path: Path) -> Iterator[guest.Serial]:
    serial = guest.Serial(Path(f"/tmp/bt-{os.getpid()}.serial"))
    yield serial
    serial.close()


def flip_one_byte(disk: Path) -> int:
    """Change one byte of a sector that holds data, beneath the guest; returns its offset."""
    descriptor = os.open(disk, os.O_RDWR)
    try:
        for offset in range(0, 64 << 20, 4096):
            place = offset + 100
            if (byte := os.pread(descriptor, 1, place)) != b"\0":
                os.pwrite(descriptor, bytes([byte[0] ^ 1]), place)
                return place
    finally:
        os.close(descriptor)
    raise AssertionError("the guest has written nothing")


def test_guest_sees_one_flipped_bit(tmp_path: Path, serial: guest.Serial) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    command = guest.machine(serial.path, "writer", rate=2000, discard=2) + guest.disk_arguments([disk])
    with guest.PlainMachine(tmp_path, command, serial) as machine:
        console = machine.console
        token = console.wait_ready()
        first = console.beat()
        assert first.token == token
        console.send("pause")
        assert console.sweep() == 0
        flip_one_byte(disk)
        assert console.sweep() == 1
        assert [line for line in console.complaints() if line.startswith("MISMATCH disk")]
        console.send("go")
        assert console.beat().seq > first.seq

"""Partition tables: as sfdisk writes them, and as nobody should."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt.store import contents, manifest
from blkckpt.view import partitions
from tests.support import guestdisks

MIB = guestdisks.MIB

GPT = """label: gpt
start=2048, size=20480, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI system"
start=24576, size=40960, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="root ü"
"""

MBR = """label: dos
start=2048, size=20480, type=83
start=24576, size=100000, type=5
start=26624, size=2048, type=82
start=30720, size=4096, type=83
"""


def table(path: Path, script: str) -> bytearray:
    return bytearray(guestdisks.disk(path / "disk.img", script, size=64 * MIB).read_bytes())


def found(data: bytes | bytearray) -> list[partitions.Partition]:
    return partitions.partitions(guestdisks.BytesSource(data))


EXPECTED = [
    partitions.Partition(1, MIB, 10 * MIB, "efi", "EFI system"),
    partitions.Partition(2, 12 * MIB, 20 * MIB, "linux", "root ü"),
]


def test_gpt(tmp_path: Path) -> None:
    assert found(table(tmp_path, GPT)) == EXPECTED


def test_gpt_with_a_damaged_first_header_is_read_from_its_backup(tmp_path: Path) -> None:
    data = table(tmp_path, GPT)
    data[512:1024] = bytes(512)
    assert found(data) == EXPECTED


def test_gpt_with_damaged_entries_is_read_from_its_backup(tmp_path: Path) -> None:
    data = table(tmp_path, GPT)
    data[1024 + 40] ^= 1
    assert found(data) == EXPECTED


def test_gpt_with_blocks_of_4096(tmp_path: Path) -> None:
    data = table(tmp_path, GPT)
    moved = bytearray(len(data))
    moved[:512] = data[:512]
    header, entries = bytearray(data[512:604]), data[1024 : 1024 + 16384]
    for number, (first, last) in enumerate(((256, 511), (512, 1023))):
        struct.pack_into("<QQ", entries, number * 128 + 32, first, last)
    struct.pack_into("<Q", header, 72, 2)
    struct.pack_into("<I", header, 88, zlib.crc32(entries))
    struct.pack_into("<I", header, 16, 0)
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    moved[4096 : 4096 + 92], moved[8192 : 8192 + 16384] = header, entries
    assert [(one.offset, one.length) for one in found(moved)] == [(MIB, MIB), (2 * MIB, 2 * MIB)]


def test_mbr_with_logical_partitions(tmp_path: Path) -> None:
    shown = [(one.number, one.offset, one.length, one.kind) for one in found(table(tmp_path, MBR))]
    assert shown == [
        (1, MIB, 10 * MIB, "linux"),
        (2, 12 * MIB, 100000 * 512, "extended"),
        (5, 13 * MIB, MIB, "swap"),
        (6, 15 * MIB, 2 * MIB, "linux"),
    ]


def test_a_chain_of_logical_partitions_that_leads_back_ends(tmp_path: Path) -> None:
    data = table(tmp_path, MBR)
    extended = 24576 * 512
    data[extended + 446 + 16 + 4] = 5
    struct.pack_into("<I", data, extended + 446 + 16 + 8, 0)  # the link leads to itself
    assert [one.number for one in found(data)] == [1, 2, 5]


@pytest.mark.parametrize("start", [0, 1 << 31])
def test_partitions_outside_of_the_disk_are_left_out(tmp_path: Path, start: int) -> None:
    data = table(tmp_path, MBR)
    struct.pack_into("<I", data, 446 + 8, start)
    assert 1 not in [one.number for one in found(data)]


def test_no_table() -> None:
    assert found(bytes(4 * MIB)) == []
    assert found(b"") == []


@given(st.binary(max_size=4096), st.integers(0, 1024))
def test_any_bytes_are_a_list_within_the_disk(head: bytes, at: int) -> None:
    data = bytearray(64 << 10)
    data[at : at + len(head)] = head
    data[510:512] = b"\x55\xaa"
    for one in found(data):
        assert one.offset > 0 and one.length > 0 and one.offset + one.length <= len(data)
    check_published(data)


def check_published(data: bytes | bytearray) -> manifest.DiskContents:
    """What is on the disk comes out of a manifest as it went in: nothing that a guest writes stops its checkpoint."""
    told = contents.of_disk(guestdisks.BytesSource(data))
    disk = manifest.DiskImage("vda", "a" * 32, len(data), contents=told)
    made = manifest.Manifest("web", "one", "b" * 32, 5, (disk,))
    assert manifest.decode(manifest.encode(made), "it").disks[0].contents == told
    return told


def test_the_longest_table_fits_into_a_manifest() -> None:
    kind = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
    entries = struct.pack("<16s16sQQQ72s", kind, kind, 300, 301, 0, b"") * partitions.MAX_ENTRIES
    fields = (92, 0, 0, 1, 0, 300, 301, kind, 2, partitions.MAX_ENTRIES, 128, zlib.crc32(entries))
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, *fields)
    crc = zlib.crc32(header)
    data = bytearray(MIB)
    data[512 : 512 + 92] = header[:16] + struct.pack("<I", crc) + header[20:]
    data[1024 : 1024 + len(entries)] = entries
    assert len(check_published(data).partitions) == partitions.MAX_ENTRIES

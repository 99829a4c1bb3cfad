"""Partition tables: GPT (its backup too) and MBR with logical partitions.  Own code: needs no library.

A table is written by the guest and believed in nothing: its sizes are bounded, chains end, and a partition that does
not lie within the disk is left out.

GPT (UEFI specification 2.10, chapter 5.3), little-endian, at block 1 and again at the last block::

    0   8  "EFI PART"               24  8  this header's block         80  4  number of entries
    12  4  size of the header       32  8  the other header's block    84  4  bytes an entry
    16  4  crc32 of the header      72  8  first block of the entries  88  4  crc32 of the entries

    entry: 0 16 type · 16 16 id · 32 8 first block · 40 8 last block (inclusive) · 48 8 flags · 56 72 name (UTF-16)

MBR: four entries of 16 bytes at 446, ``55 AA`` at 510; entry: 0 1 status · 4 1 type · 8 4 first sector · 12 4 sectors.
An extended partition is a chain of such sectors, each with a logical partition and a link.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from blkckpt.view import source as sources

SECTOR_SIZES = (512, 4096)
MAX_ENTRIES = 1024
"""Entries of a GPT that are looked at; everybody writes 128."""

MAX_ENTRY = 4096
MAX_LOGICAL = 128

_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3xB3xII")

_EXTENDED = {0x05, 0x0F, 0x85}
_PROTECTIVE = 0xEE

MBR_KINDS = {
    0x01: "fat12", 0x04: "fat16", 0x05: "extended", 0x06: "fat16", 0x07: "ntfs", 0x0B: "fat32", 0x0C: "fat32",
    0x0E: "fat16", 0x0F: "extended", 0x82: "swap", 0x83: "linux", 0x85: "extended", 0x8E: "lvm", 0xA5: "freebsd",
    0xEF: "efi", 0xFD: "raid",
}  # fmt: skip

GPT_KINDS = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "efi",
    "21686148-6449-6e6f-744e-656564454649": "bios-boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "linux",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "linux-root",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "linux-boot",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "linux-home",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "lvm",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "raid",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc": "luks",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "windows-data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "windows-reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "windows-recovery",
}


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: its *number* as the guest's kernel counts, and where it lies, in bytes.

    *kind* is the type in words (``linux``, ``efi``), else the type as it stands (``0x9f``, a GUID); *label* is the
    name that a GPT gives it.  Both were written by the guest.
    """

    number: int
    offset: int
    length: int
    kind: str
    label: str


def partitions(source: sources.Source) -> list[Partition]:
    """The partitions of a disk, by number; none when there is no table, or none that can be believed."""
    table = source.read(0, 512)
    if len(table) < 512 or table[510:512] != b"\x55\xaa" or _is_boot_sector(table):
        return list(_gpt(source))
    entries = [_MBR_ENTRY.unpack_from(table, 446 + 16 * number) for number in range(4)]
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return list(_gpt(source))
    if any(status not in (0, 0x80) for status, _, _, _ in entries):
        return []
    return list(_mbr(source, entries))


def _is_boot_sector(sector: bytes) -> bool:
    """A FAT, exFAT or NTFS volume without a table also ends its first sector with 55 AA."""
    return sector[0] in (0xEB, 0xE9) and (
        sector[3:11] in (b"NTFS    ", b"EXFAT   ") or sector[54:57] == b"FAT" or sector[82:85] == b"FAT"
    )


def _gpt(source: sources.Source) -> Iterator[Partition]:
    for sector in SECTOR_SIZES:
        for block in (1, source.size // sector - 1):
            found = _gpt_table(source, sector, block)
            if found is not None:
                yield from _gpt_partitions(source, sector, *found)
                return


def _gpt_table(source: sources.Source, sector: int, block: int) -> tuple[bytes, int] | None:
    """The entries and the size of one, if a whole header is at *block*."""
    header = source.read(block * sector, sector) if block > 0 else b""
    if len(header) < 512 or header[:8] != b"EFI PART":
        return None
    _, _, length, crc, _, own, _, _, _, _, first, count, size, entries_crc = _GPT.unpack_from(header)
    if not _GPT.size <= length <= sector or own != block:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != crc:
        return None
    if not _GPT_ENTRY.size <= size <= MAX_ENTRY or not 0 < count <= MAX_ENTRIES or first * sector >= source.size:
        return None
    entries = source.read(first * sector, count * size)
    return (entries, size) if len(entries) == count * size and zlib.crc32(entries) == entries_crc else None


def _gpt_partitions(source: sources.Source, sector: int, entries: bytes, size: int) -> Iterator[Partition]:
    for index in range(len(entries) // size):
        kind, _, first, last, _, name = _GPT_ENTRY.unpack_from(entries, index * size)
        offset, length = first * sector, (last - first + 1) * sector
        if any(kind) and first > 0 and length > 0 and offset + length <= source.size:
            guid = str(uuid.UUID(bytes_le=kind))
            label = name.decode("utf-16-le", "replace").partition("\0")[0]
            yield Partition(index + 1, offset, length, GPT_KINDS.get(guid, guid), label)


def _mbr(source: sources.Source, entries: list[tuple[int, int, int, int]]) -> Iterator[Partition]:
    logical: list[Partition] = []
    for index, (_, kind, first, count) in enumerate(entries):
        found = _mbr_partition(source, index + 1, kind, first, count)
        if found is None:
            continue
        yield found
        if kind in _EXTENDED and not logical:
            logical = list(_logical(source, first, count))
    yield from logical


def _mbr_partition(source: sources.Source, number: int, kind: int, first: int, count: int) -> Partition | None:
    offset, length = first * 512, count * 512
    if not kind or not first or not length or offset + length > source.size:
        return None
    return Partition(number, offset, length, MBR_KINDS.get(kind, f"{kind:#04x}"), "")


def _logical(source: sources.Source, start: int, length: int) -> Iterator[Partition]:
    """The chain of logical partitions; a link that leads back, or out of the extended partition, ends it."""
    sector, number, seen = start, 5, set[int]()
    while sector not in seen and start <= sector < start + length and number < 5 + MAX_LOGICAL:
        seen.add(sector)
        table = source.read(sector * 512, 512)
        if len(table) < 512 or table[510:512] != b"\x55\xaa":
            return
        _, kind, first, count = _MBR_ENTRY.unpack_from(table, 446)
        found = _mbr_partition(source, number, kind, sector + first, count)
        if found is not None and first and kind not in _EXTENDED:
            yield found
            number += 1
        _, kind, link, _ = _MBR_ENTRY.unpack_from(table, 462)
        if kind not in _EXTENDED:
            return
        sector = start + link

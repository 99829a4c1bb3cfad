"""The skeleton: all of a migration stream but the pages of its main RAM blocks, in one file.

With the main blocks' images it gives back a stream that QEMU loads (:mod:`blkckpt.memory.generate`).  Small blocks
(ROMs, ACPI tables, a VGA's frame buffer) have no image of their own: their whole contents are in here, at offsets that
do not move from one checkpoint to the next, so that a store finds their chunks again.

Format, version 1, little-endian::

    offset  size  what
         0     8  magic "BLKCSKEL"
         8     4  version
        12     4  incompatible feature bits: a reader that does not know one refuses
        16     4  compatible feature bits: may be ignored
        20     4  length of the table in bytes
        24     8  length of the whole file
        32     4  the RAM section's id
        36     4  page size
        40     4  number of RAM blocks
        44     4  0
        48     8  offset of the head          56     8  its length
        64     8  offset of the live part     72     8  its length
        80     8  offset of the tail          88     8  its length
        96    32  SHA-256 of the whole file with these 32 bytes zero
       128        the table, one entry for each RAM block in the stream's order:
                      u64 size, u64 offset of its contents here (0: it has an image of its own),
                      u16 length of the name, name in UTF-8
         …        zeros up to a multiple of 64 KiB, then the contents, each block at a multiple of 64 KiB
         …        head, live, tail (:class:`blkckpt.memory.stream.Parts` says what they are)

Nothing in it is trusted: every offset and length is checked against the file before it is used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from blkckpt import errors
from blkckpt.memory import records

MAGIC = b"BLKCSKEL"
VERSION = 1
ALIGNMENT = 64 << 10
"""The store's chunk."""

SMALL_BLOCK = 16 << 20
"""Blocks up to this size live in the skeleton: ROMs, ACPI tables, the default VGA's memory (16 MiB)."""

SMALL_TOTAL = 64 << 20
"""No more than this much of them; the smallest first."""

MAX_SIZE = 1 << 30
MAX_TABLE = records.MAX_BLOCKS * 512

_FIXED = struct.Struct("<8s4IQ4I6Q32s")
_ENTRY = struct.Struct("<QQH")
_SUM_AT = 96


@dataclass(frozen=True, slots=True)
class Skeleton:
    """*small* maps the names of the blocks whose contents are in here to those contents (whole blocks)."""

    section: int
    page_size: int
    blocks: tuple[records.Block, ...]
    head: bytes
    live: bytes
    tail: bytes
    small: Mapping[str, bytes | bytearray | memoryview] = field(default_factory=dict)

    @property
    def main(self) -> tuple[records.Block, ...]:
        """The blocks that have an image of their own."""
        return tuple(block for block in self.blocks if block.name not in self.small)


@dataclass(frozen=True, slots=True)
class Description:
    """What can be said of a skeleton's machine without QEMU."""

    machine: str
    uuid: str | None
    capabilities: tuple[str, ...]
    blocks: tuple[records.Block, ...]
    devices: Mapping[str, Any] | None
    """QEMU's own JSON description of the device sections; absent with ``suppress-vmdesc``."""


class Source(Protocol):
    """Where a skeleton can be read from a piece at a time (an image of the store)."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Index:
    """Where the parts of a skeleton lie in it: ``(offset, length)``, *small* by block."""

    blocks: tuple[records.Block, ...]
    small: Mapping[str, tuple[int, int]]
    head: tuple[int, int]
    live: tuple[int, int]
    tail: tuple[int, int]


def choose_small(blocks: tuple[records.Block, ...]) -> frozenset[str]:
    """The names of the blocks that go into the skeleton."""
    chosen: set[str] = set()
    left = SMALL_TOTAL
    for block in sorted(blocks, key=lambda block: block.size):
        if block.size > min(SMALL_BLOCK, left):
            break
        chosen.add(block.name)
        left -= block.size
    return frozenset(chosen)


def encode(skeleton: Skeleton) -> bytes:
    """The file.  Raises :class:`errors.InputError` if a small block's contents are not its size."""
    table_length = sum(_ENTRY.size + len(block.name.encode()) for block in skeleton.blocks)
    offset = _align(_FIXED.size + table_length)
    table, contents = bytearray(), []
    for block in skeleton.blocks:
        name = block.name.encode()
        data = skeleton.small.get(block.name)
        table += _ENTRY.pack(block.size, 0 if data is None else offset, len(name)) + name
        if data is not None:
            if len(data) != block.size:
                raise errors.InputError(f"the contents of RAM block {block.name!r} are {len(data)} bytes long")
            contents.append((offset, data))
            offset = _align(offset + block.size)
    places = []
    for part in (skeleton.head, skeleton.live, skeleton.tail):
        places += [offset, len(part)]
        contents.append((offset, part))
        offset += len(part)
    file = bytearray(offset)
    for place, data in [(_FIXED.size, table), *contents]:
        file[place : place + len(data)] = data
    _FIXED.pack_into(
        file, 0, MAGIC, VERSION, 0, 0, len(table), offset, skeleton.section, skeleton.page_size,
        len(skeleton.blocks), 0, *places, bytes(32),
    )  # fmt: skip
    file[_SUM_AT : _SUM_AT + 32] = hashlib.sha256(file).digest()
    return bytes(file)


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class _Header:
    """The fixed part, checked but for the checksum."""

    table: int
    section: int
    page_size: int
    count: int
    places: tuple[tuple[int, int], ...]
    digest: bytes


def _header(data: bytes, size: int) -> _Header:
    """Read the fixed part of a skeleton of *size* bytes."""
    if len(data) < _FIXED.size or data[:8] != MAGIC:
        raise errors.CorruptError("memory skeleton: it is not one (no magic)")
    (_, version, incompatible, _, table, length, section, page_size, count, _, *places, digest) = _FIXED.unpack(
        data[: _FIXED.size]
    )
    if version != VERSION or incompatible:
        raise errors.CorruptError(
            f"memory skeleton: version {version}, features {incompatible:#x}; written by a newer blkckpt"
        )
    if length != size or length > MAX_SIZE:
        raise errors.CorruptError(f"memory skeleton: {size} bytes where {length} should be")
    return _Header(table, section, page_size, count, tuple(zip(places[::2], places[1::2], strict=True)), digest)


def decode(data: bytes) -> Skeleton:
    """Read a skeleton back; raises :class:`errors.CorruptError` for anything that is not a whole one."""
    header = _header(data, len(data))
    hasher = hashlib.sha256(data[:_SUM_AT])
    hasher.update(bytes(32))
    hasher.update(memoryview(data)[_FIXED.size :])
    if hasher.digest() != header.digest:
        raise errors.CorruptError("memory skeleton: the checksum is wrong, the file is damaged")
    blocks, places = _decode_table(_slice(data, _FIXED.size, header.table), header, len(data))
    small = {name: _slice(data, *place) for name, place in places.items()}
    head, live, tail = (bytes(_slice(data, *place)) for place in header.places)
    return Skeleton(header.section, header.page_size, blocks, head, live, tail, small)


def read_index(source: Source) -> Index:
    """Where the parts lie, without reading them; the source must check what it gives (there is no checksum then)."""
    header = _header(source.read(0, min(_FIXED.size, source.size)), source.size)
    _check_place(_FIXED.size, header.table, source.size)
    if header.table > MAX_TABLE:
        raise errors.CorruptError(f"memory skeleton: a block table of {header.table} bytes cannot be")
    table = source.read(_FIXED.size, header.table)
    blocks, small = _decode_table(memoryview(table), header, source.size)
    for place in header.places:
        _check_place(*place, source.size)
    return Index(blocks, small, *header.places)


def _check_place(offset: int, length: int, size: int) -> None:
    if offset > size or length > size - offset:
        raise errors.CorruptError(f"memory skeleton: a part at {offset}+{length} is outside the file")


def _slice(data: bytes, offset: int, length: int) -> memoryview:
    _check_place(offset, length, len(data))
    return memoryview(data)[offset : offset + length]


def _decode_table(
    table: memoryview, header: _Header, length: int
) -> tuple[tuple[records.Block, ...], dict[str, tuple[int, int]]]:
    """The blocks, and where those that are in a file of *length* bytes lie."""
    count, page_size = header.count, header.page_size
    if not 1 <= count <= records.MAX_BLOCKS or page_size not in (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16):
        raise errors.CorruptError(f"memory skeleton: {count} blocks, pages of {page_size} bytes")
    blocks: dict[str, records.Block] = {}
    small: dict[str, tuple[int, int]] = {}
    pos = 0
    for _ in range(count):
        try:
            size, offset, length_of_name = _ENTRY.unpack_from(table, pos)
            name = bytes(table[pos + _ENTRY.size : pos + _ENTRY.size + length_of_name]).decode()
        except (struct.error, UnicodeDecodeError) as error:
            raise errors.CorruptError("memory skeleton: the block table is damaged") from error
        pos += _ENTRY.size + length_of_name
        if (
            not 0 < size <= records.MAX_RAM
            or size % page_size
            or name in blocks
            or not 0 < length_of_name < 256
            or offset % ALIGNMENT
        ):
            raise errors.CorruptError(f"memory skeleton: RAM block {name!r} of {size} bytes cannot be")
        blocks[name] = records.Block(name, size, page_size)
        if offset:
            _check_place(offset, size, length)
            small[name] = (offset, size)
    if pos != len(table):
        raise errors.CorruptError("memory skeleton: the block table has another length than stated")
    return tuple(blocks.values()), small


def describe(skeleton: Skeleton) -> Description:
    """What the stream's configuration and device description say."""
    cursor = records.Cursor(skeleton.head)
    configuration = records.Configuration()
    try:
        records.check_header(cursor)
        if cursor.u8() == records.CONFIGURATION:
            configuration = records.read_configuration(cursor)
    except records.ShortError as error:
        raise errors.CorruptError("memory skeleton: the stream's head is cut off") from error
    text = records.find_description(skeleton.tail)
    uuid = configuration.uuid.hex() if configuration.uuid else None
    devices = json.loads(text) if text else None
    return Description(configuration.machine, uuid, configuration.capabilities, skeleton.blocks, devices)

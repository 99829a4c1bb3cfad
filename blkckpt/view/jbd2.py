"""The journal of ext3 and ext4, replayed in memory: what a mount would have made of the disk of a running guest.

A kernel writes metadata to the journal first and to its place later, up to minutes later.  A checkpoint of a mounted
file system therefore has its newest directories and inodes in the journal only.  ``replay`` says which blocks a
mount would take from there; nothing is written.

Format (all big-endian; a block begins with magic ``C0 3B 39 98``, type, sequence)::

    superblock, block 0        descriptor (type 1), after the 12 bytes: tags
    12 4  block size           version 3   0 4 block · 4 4 flags · 8 4 high half · 12 4 checksum
    16 4  length in blocks     else        0 4 block · 4 2 checksum · 6 2 flags · [8 4 high half, with 64BIT]
    20 4  first block of log   flags: 1 escaped, 2 no UUID follows (else 16 bytes), 8 the last tag
    24 4  first sequence       its data blocks follow, one a tag; then more, then a commit (type 2)
    28 4  where it is, 0 empty
    40 4  features             revoke (type 5): 12 4 bytes used, then block numbers (8 bytes each with 64BIT)

A transaction counts when its commit is there.  A revoked block is not taken from that transaction and those before.
The log is a ring.  Not replayed: external journals, asynchronous commits (only a checksum tells whether one is
whole), and fast commits that follow the last full one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

MAGIC = 0xC03B3998
MAX_BLOCKS = 1 << 22
"""Blocks of a log: 16 GiB.  mke2fs makes 1 GiB at most."""

_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_BIT64, _ASYNC, _CSUM2, _CSUM3 = 2, 4, 8, 16
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_HEADER = struct.Struct(">III")
_SUPER = struct.Struct(">IIIII8xI")


class Journal(Protocol):
    """The journal's file."""

    def seek(self, position: int, /) -> int: ...
    def read(self, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Block:
    """A block's newest contents: in which block of the journal, and whether its first four bytes were escaped."""

    place: int
    escaped: bool


@dataclass(slots=True)
class _Transaction:
    """Blocks and revocations up to a commit."""

    blocks: dict[int, Block] = field(default_factory=dict)
    revoked: set[int] = field(default_factory=set)


def replay(journal: Journal) -> tuple[int, dict[int, Block]]:
    """``(block size, blocks to be taken from the journal)``; empty for a log that is empty or is none."""
    journal.seek(0)
    head = journal.read(1024)
    if len(head) < 1024 or _HEADER.unpack_from(head)[:2] not in ((MAGIC, 3), (MAGIC, 4)):
        return 0, {}
    size, length, first, sequence, start, features = _SUPER.unpack_from(head, 12)
    if not start or features & _ASYNC or size not in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        return size, {}
    if not 0 < first < length <= MAX_BLOCKS or not first <= start < length:
        return size, {}
    result: dict[int, Block] = {}
    for one in _transactions(_Log(journal, size, length, first, start), sequence, features):
        for block in one.revoked:  # of this and all before: what is written again comes later
            result.pop(block, None)
        result |= {block: place for block, place in one.blocks.items() if block not in one.revoked}
    return size, result


class _Log:
    """The ring of blocks, from its beginning, each at most once."""

    def __init__(self, journal: Journal, size: int, length: int, first: int, start: int) -> None:
        self.size = size
        self._journal, self._length, self._first, self._next = journal, length, first, start
        self._left = length - first

    def skip(self) -> int | None:
        """The number of the next block, which is passed by; None at the end."""
        if not self._left:
            return None
        self._left -= 1
        place = self._next
        self._next = place + 1 if place + 1 < self._length else self._first
        return place

    def read(self) -> bytes:
        place = self.skip()
        if place is None:
            return b""
        self._journal.seek(place * self.size)
        return self._journal.read(self.size)


def _transactions(log: _Log, sequence: int, features: int) -> Iterator[_Transaction]:
    """What was committed, in order."""
    one = _Transaction()
    while len(block := log.read()) == log.size:
        magic, kind, number = _HEADER.unpack_from(block)
        if magic != MAGIC or number != sequence:
            return
        if kind == _DESCRIPTOR:
            for target, escaped in _tags(block, features):
                place = log.skip()
                if place is None:
                    return
                one.blocks[target] = Block(place, escaped)
        elif kind == _REVOKE:
            one.revoked |= set(_revoked(block, features))
        elif kind == _COMMIT:
            yield one
            one, sequence = _Transaction(), (sequence + 1) & 0xFFFFFFFF
        else:
            return


def _tags(block: bytes, features: int) -> Iterator[tuple[int, bool]]:
    """``(block of the file system, escaped)`` for each data block that follows."""
    at, end = _HEADER.size, len(block) - (4 if features & (_CSUM2 | _CSUM3) else 0)
    while at + _tag_size(features) <= end:
        if features & _CSUM3:
            target, flags, high = struct.unpack_from(">III", block, at)
        else:
            target, _, flags = struct.unpack_from(">IHH", block, at)
            high = struct.unpack_from(">I", block, at + 8)[0] if features & _BIT64 else 0
        yield target | (high << 32 if features & _BIT64 else 0), bool(flags & _ESCAPED)
        at += _tag_size(features) + (0 if flags & _SAME_UUID else 16)
        if flags & _LAST:
            return


def _tag_size(features: int) -> int:
    if features & _CSUM3:
        return 16
    return 8 + (4 if features & _BIT64 else 0) + (2 if features & _CSUM2 else 0)


def _revoked(block: bytes, features: int) -> Iterator[int]:
    used = min(int.from_bytes(block[12:16], "big"), len(block))
    step = 8 if features & _BIT64 else 4
    for at in range(16, used - step + 1, step):
        yield int.from_bytes(block[at : at + step], "big")


class Overlaid:
    """A volume with blocks taken from its journal: a binary file (seek, tell, read).

    *runs* are where the journal's file lies on the volume, ``(position, length)``.  ``moved`` says, for each block
    that is taken from the journal, where on the volume it is.
    """

    def __init__(
        self, volume: Journal, size: int, blocks: dict[int, Block], runs: list[tuple[int | None, int]]
    ) -> None:
        self.block = size
        self._volume, self._position = volume, 0
        self.moved = {target: (_on_volume(one.place * size, size, runs), one.escaped) for target, one in blocks.items()}

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < 0:
            raise ValueError("only absolute positions")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, length: int = -1) -> bytes:
        if length is None or length < 0:
            raise ValueError("only bounded reads")
        parts, end = [], self._position + length
        while self._position < end:
            number, skip = divmod(self._position, self.block)
            part = self._part(number, skip, end - self._position)
            if not part:
                break
            parts.append(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, number: int, skip: int, length: int) -> bytes:
        """Bytes of one block that was moved, or of all that follow up to the next one."""
        if number in self.moved:
            place, escaped = self.moved[number]
            self._volume.seek(place)
            data = self._volume.read(self.block)
            return (MAGIC.to_bytes(4, "big") + data[4:] if escaped else data)[skip : skip + length]
        last = number
        while (last + 1) * self.block < number * self.block + skip + length and last + 1 not in self.moved:
            last += 1
        self._volume.seek(number * self.block + skip)
        return self._volume.read(min(length, (last + 1 - number) * self.block - skip))

    def redirected(self, runs: list[tuple[int | None, int]]) -> list[tuple[int | None, int]] | None:
        """A file's runs, those in moved blocks from where they are now; None if one has to be unescaped."""
        found: list[tuple[int | None, int]] = []
        for place, length in runs:
            if place is None:
                found.append((place, length))
                continue
            first, last = place // self.block, (place + length - 1) // self.block
            hit = (
                [n for n in range(first, last + 1) if n in self.moved]
                if last - first < len(self.moved)
                else sorted(n for n in self.moved if first <= n <= last)
            )
            if any(self.moved[number][1] for number in hit):
                return None
            at = first
            for number in hit:
                found += [(at * self.block, (number - at) * self.block), (self.moved[number][0], self.block)]
                at = number + 1
            found.append((at * self.block, (last + 1 - at) * self.block))
        return found


def _on_volume(position: int, size: int, runs: list[tuple[int | None, int]]) -> int:
    """Where *size* bytes at *position* of the journal's file lie; ValueError if they are nowhere, or torn."""
    for place, length in runs:
        if position < length:
            if place is None or position + size > length:
                break
            return place + position
        position -= length
    raise ValueError("the journal's file has holes")

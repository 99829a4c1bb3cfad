"""Packs: large append-only files of chunks (the format is in :mod:`blkckpt.store.layout`).

A :class:`PackWriter` belongs to one thread.  ``append`` gives each payload its place at once; nobody else sees the
pack before ``seal``, which writes index and trailer, makes the data durable and then the name.  A sealed pack never
changes.

:class:`Packs` reads sealed packs, from any thread, without locks: the place of a chunk comes from an image table,
the bytes are judged by their hash.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import backend, codec, layout

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")

_SCAN_READ = 8 << 20
MAX_READ = 4 << 20
"""Neighbouring chunks are read together up to this length."""

_PIECE = 1 << 20
"""Pieces that are smaller on average are announced to the disk."""

_GAP = 4 * layout.ENTRY_HEADER.size + 8192
"""… and over gaps up to this one: reading 8 KiB costs less than another call."""


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to be appended."""

    hash: bytes
    payload: bytes | memoryview
    raw: int
    kind: int = layout.DATA_KIND


@dataclass(frozen=True, slots=True)
class SealedPack:
    """A pack that is durable."""

    pack: int
    size: int
    records: layout.Array


class MissingPackError(errors.CorruptError):
    """A pack that a table names is not in the store.  Who has an old table may find the chunk by the present one."""


class PackWriter:
    """One pack being written.  Call ``seal`` or ``abort``."""

    def __init__(self, packs: Packs) -> None:
        self._packs = packs
        self.pack = 0
        while not self.pack:
            self.pack = secrets.randbits(64)
        self._file = packs.backend.create(layout.pack_key(self.pack))
        self._records = bytearray()
        self._file.append([layout.encode_pack_header(self.pack, packs.store_id)])

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def count(self) -> int:
        return len(self._records) // layout.RECORD.size

    def append(self, chunks: Sequence[NewChunk]) -> list[layout.Entry]:
        """Append *chunks* in one go; returns their entries, in order."""
        buffers: list[bytes | memoryview] = []
        entries = []
        position = self._file.size
        for chunk in chunks:
            stored = len(chunk.payload)
            buffers += (layout.encode_entry_header(chunk.kind, stored, chunk.raw, chunk.hash), chunk.payload)
            place = position + layout.ENTRY_HEADER.size
            entries.append(layout.Entry(chunk.hash, self.pack, place, stored, chunk.raw))
            position = place + stored
        self._file.append(buffers)
        for e in entries:
            self._records += layout.RECORD.pack(e.hash, e.offset, e.stored, e.raw)
        return entries

    def seal(self) -> SealedPack:
        """Write the index, make the pack durable and visible."""
        sealed = self.complete()
        self.commit()
        return sealed

    def complete(self) -> SealedPack:
        """Write the index, after which only :meth:`commit` is left; the pack as it will be then."""
        records = np.frombuffer(self._records, layout.RECORD_TYPE)
        self._file.append([layout.encode_index(self.pack, records, self._file.size, self._packs.codec.digest)])
        return SealedPack(self.pack, self._file.size, records)

    def commit(self) -> None:
        """Make a complete pack durable and visible."""
        self._file.commit()

    def abort(self) -> None:
        self._file.abort()


class Packs:
    """The sealed packs of a store.  Thread-safe."""

    def __init__(self, where: backend.Backend, coding: codec.Codec, store_id: bytes) -> None:
        self.backend, self.codec, self.store_id = where, coding, store_id

    def ids(self) -> Iterator[tuple[int, int]]:
        """``(pack, size of its file)`` of every sealed pack."""
        for key, size in self.backend.list("packs"):
            pack = _pack_of(key)
            if pack is not None:
                yield pack, size

    def exists(self, pack: int) -> bool:
        return self.backend.exists(layout.pack_key(pack))

    def delete(self, pack: int) -> None:
        self.backend.delete(layout.pack_key(pack))

    def read(self, entry: layout.Entry, what: str) -> bytes:
        """The raw bytes of one chunk, its hash checked."""
        payload = self._get(entry.pack, entry.offset, entry.stored, what)
        return self.codec.decode(payload, entry.raw, entry.hash, f"{what} in pack {entry.pack:016x} at {entry.offset}")

    def payloads(self, entries: Sequence[layout.Entry], what: str) -> Iterator[tuple[layout.Entry, memoryview]]:
        """The stored bytes of non-zero *entries*, unchecked, in their order; neighbours are read together."""
        for run in _runs(entries):
            first, last = run[0], run[-1]
            data = memoryview(self._get(first.pack, first.offset, last.offset + last.stored - first.offset, what))
            for entry in run:
                start = entry.offset - first.offset
                yield entry, data[start : start + entry.stored]

    def hint(self, entries: Sequence[layout.Entry], *, scattered: bool = False) -> None:
        """Non-zero *entries* will be read soon: if they lie in small pieces, the disk works on all of them at once.

        In large pieces the kernel reads ahead by itself, and better, if they are read one after the other; not so if
        *scattered*.
        """
        runs = list(_runs(entries))
        if not scattered and len(runs) <= 2 + sum(entry.stored for entry in entries) // _PIECE:
            return
        ranges: dict[int, list[tuple[int, int]]] = {}
        for run in runs:
            first, last = run[0], run[-1]
            ranges.setdefault(first.pack, []).append((first.offset, last.offset + last.stored - first.offset))
        for pack, its in ranges.items():
            self.backend.hint(layout.pack_key(pack), its)

    def index(self, pack: int) -> layout.Array:
        """The checked index of a sealed pack."""
        key = layout.pack_key(pack)
        size = self.backend.size(key)
        smallest = layout.PACK_HEADER.size + layout.TRAILER_SIZE
        if not smallest <= size <= layout.MAX_PACK_FILE:
            raise errors.CorruptError(f"pack {pack:016x} has the impossible size {size}")
        layout.decode_pack_header(self.backend.get(key, 0, layout.PACK_HEADER.size), pack, self.store_id)
        trailer = self.backend.get(key, size - layout.TRAILER_SIZE, layout.TRAILER_SIZE)
        end, _ = layout.decode_trailer(trailer, pack, size)
        return layout.decode_index(self.backend.get(key, end, size - end), pack, end, self.codec.digest)

    def scan(self, pack: int) -> Iterator[tuple[layout.Entry, int, bytes]]:
        """``(entry, kind, payload)`` of a pack by its entry headers alone, for a pack whose index is damaged.

        Raises CorruptError at the first thing that is neither an entry nor the index.
        """
        key = layout.pack_key(pack)
        size = self.backend.size(key)
        layout.decode_pack_header(self.backend.get(key, 0, layout.PACK_HEADER.size), pack, self.store_id)
        position = layout.PACK_HEADER.size
        window = _Window(self.backend, key, size)
        while position + layout.ENTRY_HEADER.size <= size:
            header = window.get(position, layout.ENTRY_HEADER.size)
            what = f"pack {pack:016x} at {position}"
            if header[:4] != layout.ENTRY_MAGIC:
                return
            kind, stored, raw, digest = layout.decode_entry_header(header, what)
            place = position + layout.ENTRY_HEADER.size
            if place + stored > size:
                raise errors.CorruptError(f"{what}: the pack is truncated")
            yield layout.Entry(digest, pack, place, stored, raw), kind, window.get(place, stored)
            position = place + stored

    def _get(self, pack: int, offset: int, length: int, what: str) -> bytes:
        try:
            return self.backend.get(layout.pack_key(pack), offset, length)
        except errors.NotFoundError as error:
            raise MissingPackError(f"{what}: pack {pack:016x} is missing from the store") from error
        except errors.CorruptError as error:
            raise errors.CorruptError(f"{what}: {error}") from error


class _Window:
    """Sequential small reads of an object through large ones."""

    def __init__(self, where: backend.Backend, key: str, size: int) -> None:
        self._backend, self._key, self._size = where, key, size
        self._start, self._data = 0, b""

    def get(self, offset: int, length: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._data):
            want = min(max(length, _SCAN_READ), self._size - offset)
            self._start, self._data, begin = offset, self._backend.get(self._key, offset, want), 0
        return self._data[begin : begin + length]


def _runs(entries: Sequence[layout.Entry]) -> Iterator[Sequence[layout.Entry]]:
    """Group *entries* that lie close together, in order, in one pack."""
    begin = first = end = 0
    pack = -1
    for index, (_, its, offset, stored, _) in enumerate(entries):
        if its != pack or not 0 <= offset - end <= _GAP or offset + stored - first > MAX_READ:
            if index:
                yield entries[begin:index]
            begin, pack, first = index, its, offset
        end = offset + stored
    if entries:
        yield entries[begin:]


def _pack_of(key: str) -> int | None:
    name = key.rpartition("/")[2]
    if not name.endswith(".pack") or len(name) != 21:
        return None
    try:
        pack = int(name[:16], 16)
    except ValueError:
        return None
    return pack if layout.pack_key(pack) == key else None

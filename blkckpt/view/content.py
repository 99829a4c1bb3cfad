"""What the files of a view are made of: bytes at offsets, and where there are only zeros.

===========  ================================================================================================
Bytes        something small that was made in memory
Image        an image of the store
Slice        a range of another content (a partition, a small RAM block in the skeleton)
Pieces       other contents at offsets, zeros between them (guest-physical memory, an ELF core)
===========  ================================================================================================

A content is immutable and may be read from any thread.  ``pieces`` gives exactly the range asked for (the caller stays
inside of ``size``) without joining what comes from several chunks.  Holes are found by whole chunks, as they are
stored: data that happens to be zero inside of a chunk is data.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from blkckpt import errors
from blkckpt.store import images, layout, packs
from blkckpt.view import chunks

_T = TypeVar("_T")
_SPAN = layout.CHUNK * layout.LEAF
_ZEROS = bytes(1 << 20)

_DIGESTS = 8192
"""Hashes an image remembers by chunk number, for small reads: 3 µs less each."""

AHEAD = 4 << 20
"""How far a reader that goes through in order is read ahead of."""


class Content(Protocol):
    """The bytes of one file."""

    @property
    def size(self) -> int: ...
    @property
    def images(self) -> frozenset[str]:
        """The images of the store that it is read from."""
        ...

    def pieces(self, offset: int, length: int) -> list[bytes]:
        """The range [offset, offset + length), which lies inside, as consecutive pieces."""
        ...

    def used(self) -> int:
        """Bytes that are not in a hole."""
        ...

    def data_at(self, offset: int) -> int | None:
        """The first offset from *offset* on that is not in a hole; None if there is none."""
        ...

    def hole_at(self, offset: int) -> int:
        """The first offset from *offset* on that is in a hole; the end of a file counts as one."""
        ...

    def ahead(self, offset: int, length: int) -> None:
        """This range will be read soon."""
        ...


def read(content: Content, offset: int, length: int) -> bytes:
    """*length* bytes at *offset*, fewer at the end."""
    length = max(min(length, content.size - offset), 0)
    return b"".join(content.pieces(offset, length)) if length else b""


def zeros(length: int) -> list[bytes]:
    """*length* zeros, as pieces."""
    whole, rest = divmod(length, len(_ZEROS))
    return [_ZEROS] * whole + ([_ZEROS[:rest]] if rest else [])


@dataclass(frozen=True, slots=True)
class Bytes:
    """Something small, in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def images(self) -> frozenset[str]:
        return frozenset()

    def pieces(self, offset: int, length: int) -> list[bytes]:
        return [self.data[offset : offset + length]]

    def used(self) -> int:
        return len(self.data)

    def data_at(self, offset: int) -> int | None:
        return offset if offset < len(self.data) else None

    def hole_at(self, offset: int) -> int:
        return len(self.data)

    def ahead(self, offset: int, length: int) -> None:
        return


class Image:
    """An image of the store, through the shared cache.

    When its packs are rewritten, the image gets other places under the same id and the old packs go: what cannot be
    read is therefore read once more by the table that is there now, if that is another one.
    """

    def __init__(self, store: packs.Packs, table: layout.Table, cache: chunks.Chunks) -> None:
        self._store, self._table, self._cache = store, table, cache
        self.size = table.size
        self.images = frozenset((table.image_id,))
        self._digests: dict[int, bytes] = {}

    def pieces(self, offset: int, length: int) -> list[bytes]:
        first, begin = divmod(offset, layout.CHUNK)
        end = offset + length
        if begin + length <= layout.CHUNK:  # inside of one chunk: the common case of small reads
            digest = self._digests.get(first)
            data = self._cache.peek(digest) if digest is not None else None
            if data is None:
                data = self._follow(lambda: self._chunk(first))
            return zeros(length) if data is None else [data[begin : begin + length] if length < len(data) else data]
        last = (end - 1) // layout.CHUNK
        passing = range(first + bool(begin), end // layout.CHUNK if end < self.size else last + 1)
        found = self._follow(lambda: self._chunks(first, last + 1, passing))
        if begin:
            found[0] = found[0][begin:]
        found[-1] = found[-1][: end - last * layout.CHUNK]
        return found

    def _follow(self, read: Callable[[], _T]) -> _T:
        before = self._table
        try:
            return read()
        except errors.CorruptError:
            if self._table is before:
                fresh = images.load_table(self._store, before.image_id)
                if fresh.size != before.size or fresh.directory == before.directory:
                    raise
                self._table = fresh
        return read()

    def _chunk(self, number: int) -> bytes | None:
        """Chunk *number*; None for zeros."""
        entry = self._entry(number)
        if entry is None:
            return None
        if len(self._digests) >= _DIGESTS:
            self._digests.clear()
        self._digests[number] = entry.hash  # what a chunk holds never changes, where it lies may
        data = self._cache.peek(entry.hash)
        return data if data is not None else self._cache.get(self._store, [(entry, self._name(number))])[0]

    def _chunks(self, first: int, end: int, passing: range) -> list[bytes]:
        """Chunks [first, end); those of *passing* are given whole, and whoever asked keeps them (the page cache)."""
        entries = self._entries(first, end)
        wanted = [(entry, self._name(first + index)) for index, entry in enumerate(entries) if entry is not None]
        found = iter(self._cache.get(self._store, wanted) if wanted else ())
        self._cache.drop(entry.hash for number in passing if (entry := entries[number - first]) is not None)
        return [
            next(found) if entry is not None else _ZEROS[: layout.chunk_length(self.size, first + index)]
            for index, entry in enumerate(entries)
        ]

    def _entry(self, number: int) -> layout.Entry | None:
        return self._entries(number, number + 1)[0]

    def _entries(self, first: int, end: int) -> list[layout.Entry | None]:
        """Where chunks [first, end) are; None for zeros."""
        found: list[layout.Entry | None] = []
        table = self._table
        while first < end:
            leaf = first // layout.LEAF
            base, stop = leaf * layout.LEAF, min(end, (leaf + 1) * layout.LEAF)
            if table.filled(leaf):
                packed = self._cache.leaf(self._store, table, leaf)
                for number in range(first, stop):
                    length = layout.chunk_length(self.size, number)
                    found.append(layout.checked_entry(packed, number - base, length, self._name(number)))
            else:
                found += [None] * (stop - first)
            first = stop
        return found

    def holds(self, digests: Mapping[int, bytes | None]) -> bool:
        """Whether each of these chunks has this hash; None for zeros."""
        return self._follow(lambda: all(self._digest(number) == digest for number, digest in digests.items()))

    def _digest(self, number: int) -> bytes | None:
        leaf, index = divmod(number, layout.LEAF)
        table = self._table
        if not table.filled(leaf):
            return None
        place = index * layout.ENTRY.size
        digest = self._cache.leaf(self._store, table, leaf)[place : place + layout.HASH]
        return digest if digest != layout.ZERO.hash else None

    def once(self, number: int) -> tuple[bytes | None, bytes]:
        """The hash and the bytes of chunk *number*, which is kept no longer than it is if nobody else needs it."""
        return self._follow(lambda: self._once(number))

    def _once(self, number: int) -> tuple[bytes | None, bytes]:
        entry = self._entry(number)
        if entry is None:
            return None, _ZEROS[: layout.chunk_length(self.size, number)]
        data = self._cache.peek(entry.hash)
        return entry.hash, data if data is not None else self._store.read(entry, self._name(number))

    def _name(self, number: int) -> str:
        return f"image {self._table.image_id} chunk {number}"

    def ahead(self, offset: int, length: int) -> None:
        with contextlib.suppress(errors.BlkckptError):  # whoever reads it gets the error
            self._read_ahead(offset, length)

    def _read_ahead(self, offset: int, length: int) -> None:
        first, end = offset // layout.CHUNK, -(-min(offset + length, self.size) // layout.CHUNK)
        numbered = enumerate(self._entries(first, end), first)
        self._cache.ahead(self._store, [(entry, self._name(number)) for number, entry in numbered if entry is not None])

    def ahead_of(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These ranges, ``(offset, length)``, will be read soon, in this order: as many as the cache has room for."""
        wanted: dict[bytes, chunks.Wanted] = {}
        room = self._cache.limit * 3 // 4
        for offset, length in ranges:
            for number in range(offset // layout.CHUNK, -(-min(offset + length, self.size) // layout.CHUNK)):
                entry = self._entry(number)
                if entry is not None and entry.hash not in wanted:
                    wanted[entry.hash] = (entry, self._name(number))
                    room -= entry.raw
            if room < 0:
                break
        self._cache.ahead(self._store, list(wanted.values()))

    def used(self) -> int:
        def count() -> int:
            table = self._table
            if table.used is not None:
                return table.used
            return self._cache.used(self._store, table, filter(table.filled, range(layout.leaf_count(table.size))))

        return self._follow(count)

    def data_at(self, offset: int) -> int | None:
        return self._follow(lambda: self._find(offset, data=True))

    def hole_at(self, offset: int) -> int:
        found = self._follow(lambda: self._find(offset, data=False))
        return self.size if found is None else found

    def _find(self, offset: int, *, data: bool) -> int | None:
        """The first offset from *offset* on whose chunk has data, or has none; None if there is none."""
        if offset >= self.size:
            return None
        table = self._table
        if table.used == self.size:  # no chunk is zero: said wrongly, zeros would be read as data
            return offset if data else None
        for number in range(offset // _SPAN, layout.leaf_count(self.size)):
            base = number * _SPAN
            low = max(offset - base, 0) // layout.CHUNK
            if not table.filled(number):
                if not data:
                    return max(base, offset)
                continue
            entries = self._cache.leaf(self._store, table, number)
            for index, (raw,) in enumerate(chunks.RAW.iter_unpack(entries[low * layout.ENTRY.size :]), low):
                if (raw != 0) == data:
                    return max(base + index * layout.CHUNK, offset)
        return None


@dataclass(frozen=True, slots=True)
class Slice:
    """[start, start + size) of another content."""

    inner: Content
    start: int
    size: int

    @property
    def images(self) -> frozenset[str]:
        return self.inner.images

    def pieces(self, offset: int, length: int) -> list[bytes]:
        return self.inner.pieces(self.start + offset, length)

    def used(self) -> int:
        return used(self)

    def data_at(self, offset: int) -> int | None:
        found = self.inner.data_at(self.start + offset)
        return None if found is None or found >= self.start + self.size else found - self.start

    def hole_at(self, offset: int) -> int:
        return min(self.inner.hole_at(self.start + offset) - self.start, self.size)

    def ahead(self, offset: int, length: int) -> None:
        self.inner.ahead(self.start + offset, min(length, self.size - offset))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Contents at ascending offsets that do not overlap, zeros in between and up to *size*."""

    size: int
    parts: Sequence[tuple[int, Content]]
    _starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [start for start, _ in self.parts])

    @property
    def images(self) -> frozenset[str]:
        return frozenset().union(*(part.images for _, part in self.parts))

    def _from(self, offset: int) -> Sequence[tuple[int, Content]]:
        """The parts that end after *offset*, but for empty ones."""
        first = max(bisect.bisect_right(self._starts, offset) - 1, 0)
        return [(start, part) for start, part in self.parts[first:] if start + part.size > offset]

    def pieces(self, offset: int, length: int) -> list[bytes]:
        found: list[bytes] = []
        end = offset + length
        for start, part in self._from(offset):
            if start >= end:
                break
            found += zeros(start - offset) if start > offset else []
            offset = max(offset, start)
            stop = min(end, start + part.size)
            found += part.pieces(offset - start, stop - offset)
            offset = stop
        return found + zeros(end - offset)

    def used(self) -> int:
        return sum(part.used() for _, part in self.parts)

    def data_at(self, offset: int) -> int | None:
        for start, part in self._from(offset):
            found = part.data_at(max(offset - start, 0))
            if found is not None:
                return start + found
        return None

    def hole_at(self, offset: int) -> int:
        for start, part in self._from(offset):
            if start > offset:
                break
            hole = start + part.hole_at(offset - start)
            if hole < start + part.size:
                return hole
            offset = hole  # its end: a hole too, unless the next part begins there
        return min(offset, self.size)

    def ahead(self, offset: int, length: int) -> None:
        end = offset + length
        for start, part in self._from(offset):
            if start >= end:
                break
            low = max(offset - start, 0)
            part.ahead(low, min(end - start, part.size) - low)


def used(content: Content) -> int:
    """Bytes outside of holes, by looking for them one after the other."""
    total, offset = 0, 0
    while (start := content.data_at(offset)) is not None:
        offset = content.hole_at(start)
        total += offset - start
    return total


class Cursor:
    """How one open file is being read: whether in order, and how far it has been read ahead of.

    Two requests of a kernel that reads ahead may arrive in either order, so a step of up to ``AHEAD`` either way
    counts as in order.  Races between threads cost a superfluous or a missing read-ahead, nothing else.
    """

    __slots__ = ("_ahead", "_content", "_next", "_run")

    def __init__(self, content: Content) -> None:
        self._content = content
        self._next = 0
        self._run = 0
        self._ahead = 0

    def note(self, offset: int, length: int) -> None:
        """A read of this range is about to be answered."""
        end = offset + length
        if not self._next - AHEAD <= offset <= self._next + AHEAD or length < 32 << 10:
            self._next, self._run, self._ahead = end, 0, end
            return
        self._next, self._run = max(end, self._next), self._run + 1
        if self._run < 2:
            return
        begin, stop = max(self._ahead, end), min(end + AHEAD, self._content.size)
        if stop - begin >= AHEAD // 2 or (stop == self._content.size and stop > begin):
            self._ahead = stop
            self._content.ahead(begin, stop - begin)


@dataclass(frozen=True, slots=True)
class Reader:
    """A content as something to read from, for those that parse it."""

    content: Content

    @property
    def size(self) -> int:
        return self.content.size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes, fewer at the end."""
        return read(self.content, offset, length)


class Glance:
    """A source for those that read little of an image, once, mostly in one place: the cache stays as it is.

    *seen* has the hash of each chunk that was needed (None for zeros): another image with the same chunks there
    has the same to say.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.size = image.size
        self.seen: dict[int, bytes | None] = {}
        self._number, self._data = -1, b""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes, fewer at the end."""
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            number, begin = divmod(offset, layout.CHUNK)
            if number != self._number:
                self.seen[number], self._data = self._image.once(number)
                self._number = number
            parts.append(self._data[begin : begin + end - offset])
            offset += len(parts[-1])
        return b"".join(parts)

    def holds_for(self, image: Image) -> bool:
        """Whether *image* is the same in every chunk that was needed."""
        return image.size == self.size and image.holds(self.seen)

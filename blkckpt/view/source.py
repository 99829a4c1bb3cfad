"""Bytes that can be read at any offset: an image of the store, a partition of it, a file of the guest in that.

Everything here is immutable and may be read from any thread.  A read that reaches beyond the end is cut there, so
that reading what a hostile guest describes needs no further check; it never returns more than was asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Protocol

from blkckpt import errors

MAX_RUNS = 1 << 22
"""Runs of one file: four million, 16 GiB of file in scattered 4 KiB blocks.  More is a made-up table."""


MAX_SHARED = 64
"""How often a file may name a byte of its volume: parts of it may be shared (reflinks), but not without end."""


class Source(Protocol):
    """*size* bytes; reads are exact within them."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class Bytes:
    """A few bytes that are at hand (a file that lies in its own inode)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class Window:
    """*length* bytes of another source from *offset* on: a partition."""

    def __init__(self, inner: Source, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > inner.size:
            raise errors.InputError(f"{length} bytes at {offset} are outside of {inner.size}")
        self.inner, self.offset, self.size = inner, offset, length

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        return self.inner.read(self.offset + offset, length) if length > 0 else b""


class Runs:
    """A source in pieces: ``(position in inner or None for zeros, length)``, in bytes, one after the other.

    What is beyond the runs up to *size* reads as zeros.  CorruptError for runs that cannot be: outside of *inner*, or
    so many that they name each of its bytes more than :data:`MAX_SHARED` times.
    """

    def __init__(self, inner: Source, runs: Iterable[tuple[int | None, int]], size: int) -> None:
        self.inner, self.size = inner, size
        self._starts: list[int] = []
        self._places: list[int | None] = []
        self.covered = named = 0
        for place, claimed in runs:
            length = min(claimed, size - self.covered)
            named += 0 if place is None else length
            if claimed < 0 or not self._possible(place, length) or named > MAX_SHARED * inner.size:
                raise errors.CorruptError(f"a file's block table is impossible ({claimed} bytes at {place})")
            if length:
                if not self._continues(place):
                    self._starts.append(self.covered)
                    self._places.append(place)
                self.covered += length

    def _possible(self, place: int | None, length: int) -> bool:
        return len(self._starts) < MAX_RUNS and (place is None or 0 <= place <= self.inner.size - length)

    def _continues(self, place: int | None) -> bool:
        """Whether a run at *place* goes on where the last one ends."""
        if not self._starts:
            return False
        last = self._places[-1]
        return place is None if last is None else place == last + self.covered - self._starts[-1]

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        parts = [_piece(self.inner, place, count) for place, count in self.pieces(offset, length)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int | None, int]]:
        """``(position in inner or None, length)`` of every piece of the range, in order."""
        end = min(offset + length, self.size)
        index = bisect_right(self._starts, offset) - 1
        while offset < end:
            if offset >= self.covered:
                yield None, end - offset
                return
            stop = min(self._starts[index + 1] if index + 1 < len(self._starts) else self.covered, end)
            place = self._places[index]
            yield None if place is None else place + offset - self._starts[index], stop - offset
            offset, index = stop, index + 1

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """``(offset, length, is hole)`` over the range: what a copy may leave out."""
        for place, count in self.pieces(offset, length):
            yield offset, count, place is None
            offset += count


def _piece(inner: Source, place: int | None, length: int) -> bytes:
    return bytes(length) if place is None else inner.read(place, length)


def ranges(source: Source, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Where a range of *source* lies in the source at the very bottom (a disk): ``(offset, length)``, without holes."""
    if isinstance(source, Window):
        yield from ranges(source.inner, source.offset + offset, min(length, source.size - offset))
    elif isinstance(source, Runs):
        for place, count in source.pieces(offset, length):
            if place is not None:
                yield from ranges(source.inner, place, count)
    else:
        yield offset, length

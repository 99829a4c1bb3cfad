"""One bit per block over any byte buffer, with bulk operations.

Bit *i* is byte ``i >> 3``, mask ``1 << (i & 7)``: the layout of the live map file, shared with the copy child and
with the C fast path.  Nothing here loops over single blocks: requests are tested as one integer of their bits,
long ranges by comparing and filling bytes, and scans skip everything that was never written.

*Backing.*  A map of a 4 TiB disk is 128 MiB, nearly all of it zeros.  ``backed`` has one byte per 4 KiB of bits and
says whether that page of bits was ever written.  An unbacked page reads as clear bits without being touched
(touching a hole of a tmpfs mapping allocates it, or kills the process with SIGBUS when there is no space), and is
backed by the ``back`` callback, which may raise ENOSPC, before its first bit is set.

Not locked: setting and clearing are read-modify-write on the edge bytes, so callers exclude each other.  Testing
beside a writer sees each byte before or after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT
PAGE_BLOCKS_SHIFT = PAGE_SHIFT + 3
PAGE_BLOCKS = 1 << PAGE_BLOCKS_SHIFT
"""Bits are backed and skipped in pages of 4096 bytes: 32768 blocks, 128 MiB of disk."""

CHUNK_BLOCKS = 1024
"""Mixed pages are scanned as integers of this many bits: larger ones make each run cost more (the arithmetic is
linear in the width: 4 us a run at 32768 bits, 0.5 us at 1024), smaller ones make empty stretches cost more."""

_CHUNK = CHUNK_BLOCKS >> 3
_ZEROS = bytes(PAGE)
_ONES = b"\xff" * PAGE


def byte_count(blocks: int) -> int:
    """Bytes of bits for *blocks*, rounded up to whole pages."""
    return ((blocks + PAGE_BLOCKS - 1) >> PAGE_BLOCKS_SHIFT) << PAGE_SHIFT


class BlockMap:
    """A map of *blocks* bits in *bits*, a writable buffer of ``byte_count(blocks)`` bytes."""

    __slots__ = ("_back", "backed", "bits", "blocks")

    def __init__(
        self, bits: Any, blocks: int, *, backed: bytearray | None = None, back: Callable[[int], None] | None = None
    ) -> None:
        self.bits = bits
        self.blocks = blocks
        pages = byte_count(blocks) >> PAGE_SHIFT
        self.backed = backed if backed is not None else bytearray(b"\1") * pages
        self._back = back

    @classmethod
    def empty(cls, blocks: int) -> BlockMap:
        """A map in private memory, all clear."""
        return cls(bytearray(byte_count(blocks)), blocks)

    @classmethod
    def sparse(cls, blocks: int) -> BlockMap:
        """The same; of a large map only what is set takes memory."""
        size = byte_count(blocks)
        return cls(bytearray(size), blocks, backed=bytearray(size >> PAGE_SHIFT))

    # ---- tests ----

    def test(self, block: int) -> bool:
        return (self.backed[block >> 15] and self.bits[block >> 3] >> (block & 7) & 1) == 1

    def all_set(self, first: int, end: int) -> bool:
        """Whether every block of the non-empty range is set."""
        if end - first == 1:
            return (self.backed[first >> 15] and self.bits[first >> 3] >> (first & 7) & 1) == 1
        for low, high in _by_page(first, end):
            if not self.backed[low >> 15]:
                return False
            length = high - low
            if length == PAGE_BLOCKS:
                if self.bits[low >> 3 : high >> 3] != _ONES:
                    return False
            elif self._number(low, high) != (1 << length) - 1:
                return False
        return True

    def none_set(self, first: int, end: int) -> bool:
        """Whether every block of the non-empty range is clear."""
        if end - first == 1:
            return not (self.backed[first >> 15] and self.bits[first >> 3] >> (first & 7) & 1)
        backed = self.backed
        return not any(backed[low >> 15] and self._number(low, high) for low, high in _by_page(first, end))

    def count(self) -> int:
        """How many bits are set."""
        return sum(int.from_bytes(data, "little").bit_count() for _, data in self.pages())

    # ---- scans ----

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cover ``[first, end)`` by maximal runs ``(first, end, is_set)``."""
        position = first
        for low, high in self.set_runs(first, end):
            if position < low:
                yield position, low, False
            yield low, high, True
            position = high
        if position < end:
            yield position, end, False

    def set_runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The maximal runs of set bits in ``[first, end)``, ascending.  Costs nothing for unbacked pages."""
        start = until = first
        for low, high in self._fragments(first, end):
            if low == until and start < until:
                until = high
                continue
            if start < until:
                yield start, until
            start, until = low, high
        if start < until:
            yield start, until

    def next_set(self, first: int, end: int) -> int | None:
        """The first set block in the range."""
        for low, _ in self._fragments(first, end):
            return low
        return None

    def _fragments(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of set bits, not merged across chunks."""
        backed = self.backed
        while first < end:
            page = backed.find(1, first >> 15)
            if page < 0:
                return
            first = max(first, page << 15)
            stop = min(end, (page + 1) << 15)
            if first < stop:
                yield from self._page_fragments(first, stop)
            first = (page + 1) << 15

    def _page_fragments(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        if end - first == PAGE_BLOCKS:
            data = bytes(self.bits[first >> 3 : end >> 3])
            if data == _ZEROS:
                return
            if data == _ONES:
                yield first, end
                return
        while first < end:
            stop = min(end, (first // CHUNK_BLOCKS + 1) * CHUNK_BLOCKS)
            number = self._number(first, stop)
            if number:
                for low, high in number_runs(number):
                    yield first + low, first + high
            first = stop

    def _number(self, first: int, end: int) -> int:
        """The bits of ``[first, end)`` (inside one page) as an integer, lowest block lowest."""
        start = first >> 3
        number = int.from_bytes(self.bits[start : (end + 7) >> 3], "little")
        return number >> (first & 7) & ((1 << (end - first)) - 1)

    # ---- changes ----

    def set_range(self, first: int, end: int) -> None:
        """Set the non-empty range; ENOSPC from backing is raised before any bit changes."""
        self.back(first, end)
        self._fill(first, end, 0xFF)

    def clear_range(self, first: int, end: int) -> None:
        """Clear the non-empty range; unbacked pages stay so."""
        for low, high in _by_page(first, end):
            if self.backed[low >> 15]:
                self._fill(low, high, 0)

    def back(self, first: int, end: int) -> None:
        """Make the range's pages writable."""
        backed = self.backed
        for page in range(first >> 15, ((end - 1) >> 15) + 1):
            if not backed[page]:
                if self._back is not None:
                    self._back(page)
                backed[page] = 1

    def _fill(self, first: int, end: int, value: int) -> None:
        bits = self.bits
        head, tail = first >> 3, (end - 1) >> 3
        head_mask = 0xFF << (first & 7) & 0xFF
        tail_mask = 0xFF >> (7 - (end - 1 & 7))
        if head == tail:
            head_mask &= tail_mask
        bits[head] = bits[head] & ~head_mask | value & head_mask
        if head == tail:
            return
        if tail - head > 1:
            bits[head + 1 : tail] = bytes((value,)) * (tail - head - 1)
        bits[tail] = bits[tail] & ~tail_mask | value & tail_mask

    # ---- whole maps ----

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """``(page number, its 4096 bytes)`` of every backed page that has a set bit."""
        page = self.backed.find(1)
        while page >= 0:
            data = bytes(self.bits[page << PAGE_SHIFT : (page + 1) << PAGE_SHIFT])
            if data != _ZEROS:
                yield page, data
            page = self.backed.find(1, page + 1)

    def merge(self, other: BlockMap) -> None:
        """Set every bit that is set in *other*, a map of the same disk."""
        for page, data in other.pages():
            self.back(page << 15, (page << 15) + 1)
            self._join(page, data)

    def _join(self, page: int, data: bytes) -> None:
        place = slice(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT)
        mine = int.from_bytes(self.bits[place], "little") | int.from_bytes(data, "little")
        self.bits[place] = mine.to_bytes(PAGE, "little")

    def read_bytes(self, start: int, length: int) -> bytes:
        """Bytes ``[start, start + length)`` of the bits, zeros past the end; unbacked pages are not touched."""
        parts = []
        position, stop = start, min(start + length, len(self.bits))
        while position < stop:
            until = min(stop, ((position >> PAGE_SHIFT) + 1) << PAGE_SHIFT)
            backed = self.backed[position >> PAGE_SHIFT]
            parts.append(bytes(self.bits[position:until]) if backed else bytes(until - position))
            position = until
        return b"".join(parts).ljust(length, b"\0")

    def write_bytes(self, start: int, data: bytes) -> None:
        """Overwrite bits from byte *start* (cut at the map's end)."""
        data = data[: max(0, len(self.bits) - start)]
        if data:
            self.back(start << 3, (start + len(data)) << 3)
            self.bits[start : start + len(data)] = data


def number_runs(number: int) -> Iterator[tuple[int, int]]:
    """The runs of one bits in *number*, lowest first."""
    position = 0
    while number:
        gap = (number & -number).bit_length() - 1
        number >>= gap
        length = (~number & (number + 1)).bit_length() - 1
        yield position + gap, position + gap + length
        number >>= length
        position += gap + length


def _by_page(first: int, end: int) -> Iterator[tuple[int, int]]:
    while first < end:
        stop = min(end, ((first >> PAGE_BLOCKS_SHIFT) + 1) << PAGE_BLOCKS_SHIFT)
        yield first, stop
        first = stop

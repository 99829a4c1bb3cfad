"""Writing migration streams from a skeleton and RAM readers, in bulk.

``full`` gives every page, for any ``-incoming``; ``lean`` leaves out the pages of chosen blocks, whose contents
QEMU gets another way (a private mapping of a raw image: lazy restore).  Both are: the head, the other live sections,
one part of the RAM section for each block that has pages to send, the tail.  A page of zeros is a zero record: QEMU
writes a page it is told is zero only if it is not, so the memory of the new process stays as sparse as it was.

Pieces of about a mebibyte come out, each with memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from blkckpt import errors, lazy
from blkckpt.memory import records, skeleton

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy.Module("numpy")

PIECE = 1 << 20
"""Bytes of RAM turned into records at once: a few hundred pages, well inside the second-level cache and a pipe."""


class RamReader(Protocol):
    """The contents of one RAM block (an image of the store, a raw file)."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        """(offset, length, is zero) covering the range, in order."""
        ...


def full(skel: skeleton.Skeleton, readers: Mapping[str, RamReader]) -> Iterator[bytes | memoryview]:
    """The whole stream.  *readers* has one reader for each of ``skel.main``."""
    return lean(skel, readers, ())


def lean(
    skel: skeleton.Skeleton, readers: Mapping[str, RamReader], lazy: Collection[str]
) -> Iterator[bytes | memoryview]:
    """The stream without the pages of the blocks named in *lazy*.

    Raises :class:`errors.InputError` at once for a reader that is missing or not of its block's size.
    """
    unknown = set(lazy) - {block.name for block in skel.blocks}
    if unknown:
        raise errors.InputError(f"no RAM block is called {min(unknown)!r} in this checkpoint")
    for block in skel.main:
        if block.name in lazy:
            continue
        if block.name not in readers or readers[block.name].size != block.size:
            raise errors.InputError(f"RAM block {block.name!r} has no image of {block.size} bytes")
    return _pieces(skel, readers, frozenset(lazy))


def _pieces(
    skel: skeleton.Skeleton, readers: Mapping[str, RamReader], lazy: frozenset[str]
) -> Iterator[bytes | memoryview]:
    yield skel.head
    yield skel.live
    for block in skel.blocks:
        if block.name in lazy:
            continue
        yield records.part(skel.section)
        if block.name in skel.small:
            yield from _block(block, _Contents(skel.small[block.name]), few_records)
        else:
            yield from _block(block, readers[block.name], page_records)
        yield records.word(0, records.EOS) + records.footer(skel.section)
    yield skel.tail


class _Contents:
    """A small block's contents as a reader."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._data[offset : offset + length])

    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        return [(offset, length, False)]


Records = Callable[[int, int, bytes], Iterator[bytes | memoryview]]
"""How the pages of a piece become records: :func:`page_records` or :func:`few_records`."""


def _block(block: records.Block, reader: RamReader, make: Records) -> Iterator[bytes | memoryview]:
    """All records of one block; the first names it."""
    size = block.page_size
    first = reader.read(0, size)
    name = records.packed_name(block.name)
    if first.count(0) == size:
        yield records.word(0, records.ZERO) + name + b"\0"
    else:
        yield records.word(0, records.PAGE) + name + first
    for offset, length, zero in _split(reader.extents(size, block.size - size), size, block.size):
        if zero:
            yield _zero_records(np.arange(offset, offset + length, size, dtype=np.uint64))
        else:
            yield from make(size, offset, reader.read(offset, length))


def _split(extents: Iterable[tuple[int, int, bool]], page: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Cut [page, size) into pieces of whole pages, zero ones only where an extent says zero for all of a page.

    Gaps in the extents are errors: a page must never be left out.
    """
    at = expected = page
    for offset, length, zero in extents:
        if offset != expected:
            break
        expected = offset + length
        low, high = -(-offset // page) * page, expected // page * page
        if zero and low < high:
            yield from _cut(at, low, PIECE, False)
            yield from _cut(low, high, PIECE * 64, True)
            at = high
    if expected != size:
        raise errors.CorruptError(f"a RAM image's extents leave out what is at {expected:#x}")
    yield from _cut(at, size, PIECE, False)


def _cut(start: int, stop: int, step: int, zero: bool) -> Iterator[tuple[int, int, bool]]:
    for offset in range(start, stop, step):
        yield offset, min(step, stop - offset), zero


def _zero_records(addresses: NDArray[np.uint64]) -> memoryview:
    """One record for each address, all of them zero pages of the block before."""
    out = np.zeros((len(addresses), 9), np.uint8)
    out[:, :8] = (addresses | np.uint64(records.ZERO | records.SAME)).astype(">u8").view(np.uint8).reshape(-1, 8)
    return out.data.cast("B")


def page_records(page: int, offset: int, data: bytes) -> Iterator[bytes | memoryview]:
    """The records of the pages in *data*: zero pages first (the order is free), then the others."""
    count = _count(page, offset, data)
    rows = np.frombuffer(data, np.uint8).reshape(count, page)
    addresses = np.arange(offset, offset + len(data), page, dtype=np.uint64)
    used = np.frombuffer(data, np.uint64).reshape(count, -1).any(axis=1)
    if not used.all():
        yield _zero_records(addresses[~used])
        rows, addresses = rows[used], addresses[used]
    if len(rows):
        out = np.empty((len(rows), 8 + page), np.uint8)
        words = (addresses | np.uint64(records.PAGE | records.SAME)).astype(">u8")
        out[:, :8] = words.view(np.uint8).reshape(-1, 8)
        out[:, 8:] = rows
        yield out.data.cast("B")


def few_records(page: int, offset: int, data: bytes) -> Iterator[bytes | memoryview]:
    """:func:`page_records` page by page: for the small blocks, which are not worth loading numpy."""
    zeros: list[bytes] = []
    others: list[bytes] = []
    for number in range(_count(page, offset, data)):
        content, address = data[number * page : (number + 1) * page], offset + number * page
        if content.count(0) == page:
            zeros.append(records.word(address, records.ZERO | records.SAME) + b"\0")
        else:
            others += (records.word(address, records.PAGE | records.SAME), content)
    yield b"".join([*zeros, *others])


def _count(page: int, offset: int, data: bytes) -> int:
    count = len(data) // page
    if len(data) % page or not count:
        raise errors.CorruptError(f"a RAM image gave {len(data)} bytes, no whole pages, at {offset:#x}")
    return count

"""From stream records to RAM images: where each page goes, and which chunks are complete.

The :class:`Assembler` is the parser's sink.  Pages of main blocks are written to a raw image at once, straight from
the receive buffer (one ``pwritev`` a run: 190,000 pages in 0.24 s, half of what a shared mapping takes, whose every
first touch is a page fault).  Small blocks are kept in memory.  For every page of a main block one byte says what has
arrived:

====  =========================================================
0     nothing yet (a page that never comes is zero)
1     a zero page
2     data, which is in the raw image
====  =========================================================

A chunk of 64 KiB is *complete* when all its pages have arrived, and is then given out, once.  QEMU's background
snapshot sends every page once.  A plain migration sends pages again that the guest has changed meanwhile: the raw
image always has the newest, but if the chunk had been given out the block is *stale*, and all of it must be read
again at the end.  With *once* (a background snapshot) that is an error instead, found before a chunk given out is
written to, so that whoever has it may look at the image itself instead of a copy.

Used from one thread, except for :meth:`Block.data_chunks`, which may be asked about chunks given out, from any thread
and, through a block over the same state, from another process.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blkckpt import errors
from blkckpt.memory import image, records, skeleton, stream
from blkckpt.store import layout

_VECTORS = 1024
"""IOV_MAX: the pieces of one pwritev."""


class Block:
    """A main block: its raw image and what has arrived of it.

    What has arrived is kept in shared memory.  A second process that holds *raw* and *state* has a block of its own
    over it: there :meth:`given` tells what was given out here, and :meth:`data_chunks` and :meth:`rest` work.
    """

    def __init__(
        self, info: records.Block, raw: image.RawWriter, *, once: bool = False, state: int | None = None
    ) -> None:
        """*state* is another process's, of the same block, and becomes ours."""
        self.info = info
        self.raw = raw
        self.once = once
        self._per_chunk = max(layout.CHUNK // info.page_size, 1)
        self._pages = info.size // info.page_size
        self.chunks = layout.chunk_count(info.size)
        length = self.chunks * self._per_chunk
        self.state = _shared(length + 1) if state is None else state
        self._map = mmap.mmap(self.state, length + 1)
        self._seen = np.frombuffer(self._map, np.uint8, length)
        if state is None:
            self._seen[self._pages :] = 1  # beyond the end of a block that is no multiple of a chunk
        self._given = np.zeros(self.chunks, np.bool_)
        self._touched: list[list[int]] = []

    @property
    def stale(self) -> bool:
        """Whether a page came again after its chunk had been given out."""
        return self._map[-1] != 0

    @property
    def empty(self) -> bool:
        """Whether nothing at all has arrived."""
        return not self._seen[: self._pages].any()

    def pages(self, first: int, count: int, data: memoryview, offset: int, stride: int) -> None:
        """Write a run of pages and note it."""
        self._refuse_again(first, first + count)
        size = self.info.page_size
        for at in range(0, count, _VECTORS):
            number = min(_VECTORS, count - at)
            start = offset + at * stride
            rows = [data[begin : begin + size] for begin in range(start, start + number * stride, stride)]
            self.raw.writev((first + at) * size, rows, number * size)
        self._note(first, count, 2)

    def zeros(self, first: int, count: int) -> None:
        """Note a run of zero pages; where data had arrived before, zeros are written over it."""
        self._refuse_again(first, first + count)
        seen = self._seen[first : first + count]
        if seen.any():
            size = self.info.page_size
            for page in np.flatnonzero(seen == 2).tolist():
                self.raw.write((first + page) * size, bytes(size))
        self._note(first, count, 1)

    def _refuse_again(self, first: int, stop: int) -> None:
        """Before anything is written: what was given out once is being read, and must stay as it is."""
        if self.once and self._given_any(first, stop):
            raise errors.ProtocolError(
                f"memory stream: pages of RAM block {self.info.name!r} came twice, which a background snapshot never "
                "sends; was 'background-snapshot' switched off meanwhile?"
            )

    def _given_any(self, first: int, stop: int) -> bool:
        return bool(self._given[first // self._per_chunk : -(-stop // self._per_chunk)].any())

    def _note(self, first: int, count: int, what: int) -> None:
        stop = first + count
        seen = self._seen[first:stop]
        if seen.any() and self._given_any(first, stop):
            self._map[-1] = 1
        seen[:] = what
        if self._touched and self._touched[-1][1] == first:
            self._touched[-1][1] = stop
        else:
            self._touched.append([first, stop])

    def complete(self) -> Iterator[tuple[int, int]]:
        """Give out the chunks completed since the last call: (first chunk, past the last)."""
        touched, self._touched = self._touched, []
        for first, stop in touched:
            yield from self._give(first // self._per_chunk, -(-stop // self._per_chunk), all_pages=True)

    def given(self, low: int, high: int) -> None:
        """The chunks have been given out by the block's other process."""
        self._given[low:high] = True

    def rest(self) -> Iterator[tuple[int, int]]:
        """Give out every chunk that has not been (the stream has ended); all of them again if the block is stale."""
        if self.stale:
            self._given[:] = False
        yield from self._give(0, self.chunks, all_pages=False)

    def _give(self, low: int, high: int, *, all_pages: bool) -> Iterator[tuple[int, int]]:
        given = self._given[low:high]
        ready = ~given
        if all_pages:
            ready &= self._by_chunk(low, high).all(axis=1)
        for start, stop in runs(ready):
            given[start:stop] = True
            yield low + start, low + stop

    def data_chunks(self, low: int, high: int) -> NDArray[np.bool_]:
        """Which of the chunks have any data (the others are zeros)."""
        mask: NDArray[np.bool_] = (self._by_chunk(low, high) == 2).any(axis=1)
        return mask

    def close(self) -> None:
        """Let go; a raw image that was not published is gone."""
        self.raw.close()
        if self.state >= 0:
            os.close(self.state)
            self.state = -1

    def _by_chunk(self, low: int, high: int) -> NDArray[np.uint8]:
        return self._seen[low * self._per_chunk : high * self._per_chunk].reshape(high - low, self._per_chunk)


def _shared(length: int) -> int:
    descriptor = os.memfd_create("pages", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, length)
    return descriptor


def runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) of the runs of true.  (``np.diff`` with its ends took a tenth of the intake's time.)"""
    if not len(mask):
        return []
    edges: list[int] = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
    if mask[0]:
        edges.insert(0, 0)
    if mask[-1]:
        edges.append(len(mask))
    return list(zip(edges[::2], edges[1::2], strict=True))


class Assembler:
    """The sink; *directory* is where raw images are made (without a name: see :mod:`blkckpt.memory.image`).

    ``made`` is called when the main blocks are there, before the first page.
    """

    def __init__(self, directory: Path, *, once: bool = False) -> None:
        self._directory, self._once = directory, once
        self._blocks: list[Block | NDArray[np.uint8]] = []
        self.main: list[Block] = []
        self.ram: stream.Layout | None = None
        self.made: Callable[[], None] = lambda: None

    @property
    def total(self) -> int:
        """Bytes of RAM, once the block list is read."""
        return sum(block.size for block in self.ram.blocks) if self.ram else 0

    def layout(self, layout: stream.Layout) -> None:
        if "x-ignore-shared" in layout.configuration.capabilities:
            raise errors.ProtocolError(
                "memory stream: capability 'x-ignore-shared' must be off, or shared memory would be missing"
            )
        self.ram = layout
        small = skeleton.choose_small(layout.blocks)
        for info in layout.blocks:
            if info.name in small:
                self._blocks.append(np.zeros((info.size // info.page_size, info.page_size), np.uint8))
            else:
                block = Block(info, image.RawWriter(self._directory, info.size), once=self._once)
                self._blocks.append(block)
                self.main.append(block)
        self.made()

    def pages(self, block: int, first: int, count: int, data: memoryview, offset: int, stride: int) -> None:
        target = self._blocks[block]
        if isinstance(target, Block):
            target.pages(first, count, data, offset, stride)
        else:
            rows = np.ndarray((count, target.shape[1]), np.uint8, data, offset, (stride, 1))
            target[first : first + count] = rows

    def zeros(self, block: int, first: int, count: int, fill: int) -> None:
        target = self._blocks[block]
        if not isinstance(target, Block):
            target[first : first + count] = fill
        elif fill:
            page = memoryview(bytes([fill]) * target.info.page_size)
            for number in range(first, first + count):
                target.pages(number, 1, page, 0, len(page))
        else:
            target.zeros(first, count)

    def check(self) -> None:
        """The stream has ended: one without any page of a main block is an error (rule M5)."""
        if self.main and all(block.empty for block in self.main):
            raise errors.ProtocolError(
                f"memory stream: it has no page of RAM block {self.main[0].info.name!r}; capabilities 'multifd', "
                "'postcopy-ram' and 'x-ignore-shared' must be off"
            )

    def small(self) -> Mapping[str, memoryview]:
        """The contents of the small blocks."""
        assert self.ram is not None
        return {
            info.name: block.data.cast("B")
            for info, block in zip(self.ram.blocks, self._blocks, strict=True)
            if not isinstance(block, Block)
        }

    def close(self) -> None:
        """Drop every raw image that was not published."""
        for block in self.main:
            block.close()

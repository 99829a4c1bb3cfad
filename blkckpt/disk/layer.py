"""Layers: what a chain is made of.

==================  ===========================================================================================
:class:`Overlay`    a sparse file of the disk's size, data at its own offset, and a map of the blocks present.
                    A block that is present and a hole reads as zeros: it masks what is below (rule D11)
:class:`RawFloor`   the raw base: every block is here
:class:`ImageFloor` an immutable image below a restored disk
==================  ===========================================================================================

Write order of an overlay: data, then the live bit (acknowledged), and at flush :meth:`Overlay.flush`: take the dirty
map pages, sync the data, write the pages, sync the map.  An acknowledged block is thus in the live map (kill -9), a
flushed one in the durable map (power loss), and no bit is durable before its block (D2).

*Cleared bits* need the layer below to be durable first.  :func:`chain.flush` takes the dirty pages of every layer from
the top down, and then makes the layers durable from the bottom up: a bit that the commit cleared in a page that was
taken has its block below already, and there it is synced before the page is written.  If that sync fails the block's
newest durable version is the one above: :meth:`Overlay.take_back`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from blkckpt.disk import api, blockmap, fileio, maps

Buffer = fileio.Buffer
SOURCE_STEP = 1 << 20
"""Most that is asked of an image at once: the pieces are decompressed into memory."""


class Overlay:
    """A copy-on-write layer.  Thread-safe, given the tickets of :mod:`blkckpt.disk.epoch`."""

    __slots__ = (
        "_flush", "_handed", "_handing", "bits", "changes", "copy_ups", "durable", "file", "id", "number", "retained",
    )  # fmt: skip

    def __init__(
        self, layer: str, file: fileio.File, bits: maps.LiveMap, durable: maps.DurableMap, *, retained: bool = False
    ) -> None:
        self.id = layer
        self.file = file
        self.bits = bits
        self.durable = durable
        self.retained = retained  # what is below it is kept as a checkpoint's disk
        self.copy_ups = 0
        self.changes: maps.Marks = maps.UNMARKED  # the map of its period (:mod:`blkckpt.disk.member`)
        self.number = 0  # of the checkpoint that it was made for; 0 when an earlier server made it
        self._flush = threading.Lock()
        self._handing = threading.Lock()
        self._handed: blockmap.BlockMap | None = None  # below, and not known to be durable there
        bits.attach(durable)

    @contextlib.contextmanager
    def flushing(self) -> Iterator[Callable[[], None]]:
        """Take the dirty map pages; what is given makes every present block durable, then the map (D2, D3).

        To be called when the layers below are durable, as of a moment after the taking.  Costs nothing when nothing
        changed.  A failed sync of the map poisons the data file too (D9): no write may be acknowledged whose bit can
        no longer be made durable.
        """
        with self._flush:
            pages, handed = self.bits.take_dirty(), self._take_handed()
            finished = False

            def finish() -> None:
                nonlocal finished
                if any(bits.strip(b"\0") for bits in pages.values()) or not self.empty:
                    self.file.datasync()  # else nothing will be read from here: all has been handed down
                self.durable.write(pages)
                finished = True

            try:
                yield finish
            except BaseException:
                if not finished:
                    self.bits.give_back(pages)
                    self._give_back(handed)
                if self.durable.file.failed is not None:
                    self.file.fail(self.durable.file.failed)
                raise

    @property
    def empty(self) -> bool:
        """Whether no block is present."""
        return self.bits.next_set(0, self.bits.blocks) is None

    def flush(self) -> None:
        """:meth:`flushing` of this layer alone; only while no bit of it is ever cleared."""
        with self.flushing() as finish:
            finish()

    def hand_down(self, runs: Sequence[tuple[int, int]]) -> None:
        """The layer below has these blocks now, not durably: clear their bits."""
        with self._handing:
            if self._handed is None:
                self._handed = blockmap.BlockMap.sparse(self.bits.blocks)
            for first, end in runs:
                self._handed.set_range(first, end)
        for first, end in runs:
            self.bits.unmark(first, end)

    def handed_by_killed(self) -> bool:
        """Whether a server that was killed had handed down blocks that no flush has covered; before the first flush."""
        return self.bits.lacks(self.durable.read())

    def take_back(self) -> None:
        """A layer below has lost writes (D9): what was handed down since the last flush is read from here again.

        Those are the blocks that this server handed down, and of an earlier one those whose bit is durable and no
        longer set.  What was written to them below since then was never flushed, and is lost as by a power cut.
        """
        with self._flush:
            for page, bits in self.durable.read().items():
                self.bits.set_again(page, bits)
            if (handed := self._take_handed()) is not None:
                for first, end in handed.set_runs(0, handed.blocks):
                    self.bits.mark(first, end)

    def _take_handed(self) -> blockmap.BlockMap | None:
        """What was handed down since the last call; after the dirty pages, what they do not know of is durable here."""
        with self._handing:
            handed, self._handed = self._handed, None
        return handed

    def _give_back(self, handed: blockmap.BlockMap | None) -> None:
        with self._handing:
            if handed is not None and self._handed is not None:
                handed.merge(self._handed)
            self._handed = handed or self._handed

    def close(self) -> None:
        """Only when drained."""
        self.file.close()
        self.durable.close()
        self.bits.close()


class Floor(Protocol):
    """What is below the last map."""

    def pread_into(self, buf: Buffer, offset: int) -> None: ...

    def segments(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cover the range by ``(offset, length, reads as zeros)``."""

    def datasync(self) -> None: ...

    def close(self) -> None: ...


RawFloor = fileio.File
"""A raw base is a :class:`fileio.File` as it is: the hot path has no adapter in it."""


class ImageFloor:
    """The image of a checkpoint, read-only.  Bytes past the image's end are zeros."""

    __slots__ = ("source",)

    def __init__(self, source: api.Source) -> None:
        self.source = source

    def pread_into(self, buf: Buffer, offset: int) -> None:
        with memoryview(buf) as view:
            position, until = 0, max(0, min(len(view), self.source.size - offset))
            while position < until:
                step = min(until - position, SOURCE_STEP)
                with view[position : position + step] as part:
                    self.source.read_into(part, offset + position)
                position += step
            if position < len(view):
                view[position:] = bytes(len(view) - position)

    def segments(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        inside = max(0, min(length, self.source.size - offset))
        if inside:
            yield from self.source.extents(offset, inside)
        if inside < length:
            yield offset + inside, length - inside, True

    def datasync(self) -> None:
        """Nothing here changes."""

    def close(self) -> None:
        close = getattr(self.source, "close", None)
        if close is not None:
            close()

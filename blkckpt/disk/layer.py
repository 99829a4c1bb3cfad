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

*Cleared bits* need the layer below to be durable first.  The commit syncs it before it clears a bit in the live map,
so whoever writes the page afterwards has nothing to add; :func:`chain.flush` goes from the bottom up all the same,
because the base may have taken newer writes to those blocks, which the same flush must cover (D3).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from blkckpt.disk import api, fileio, maps

Buffer = fileio.Buffer
SOURCE_STEP = 1 << 20
"""Most that is asked of an image at once: the pieces are decompressed into memory."""


class Overlay:
    """A copy-on-write layer.  Thread-safe, given the tickets of :mod:`blkckpt.disk.epoch`."""

    __slots__ = ("_flush", "bits", "changes", "copy_ups", "durable", "file", "id", "number", "retained")

    def __init__(
        self, layer: str, file: fileio.File, bits: maps.LiveMap, durable: maps.DurableMap, *, retained: bool = False
    ) -> None:
        self.id = layer
        self.file = file
        self.bits = bits
        self.durable = durable
        self.retained = retained
        self.copy_ups = 0
        self.changes: maps.Marks = maps.UNMARKED  # the map of its period (:mod:`blkckpt.disk.member`)
        self.number = 0  # of the checkpoint that it was made for; 0 when an earlier server made it
        self._flush = threading.Lock()
        bits.attach(durable)

    def flush(self) -> None:
        """Make every present block durable, then the map (D2, D3).  Costs nothing when nothing changed.

        A failed sync of the map poisons the data file too (D9): no write may be acknowledged whose bit can no longer
        be made durable.
        """
        with self._flush:
            pages = self.bits.take_dirty()
            try:
                self.file.datasync()
                self.durable.write(pages)
            except BaseException:
                self.bits.give_back(pages)
                if self.durable.file.failed is not None:
                    self.file.fail(self.durable.file.failed)
                raise

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
                view[position : position + step] = self.source.read(offset + position, step)
                position += step
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

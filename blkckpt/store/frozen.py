"""Reading a disk's frozen layers: which chunks are worth reading, and their bytes.

The layers are overlays, newest first, over a floor that is a raw file, a store image, or nothing (zeros).  An overlay
is a sparse file with data at its own offset and a map: bit *i* (byte ``i >> 3``, mask ``1 << (i & 7)``, after a
header of 4096 bytes) says that block *i* of 4 KiB is present, and a hole in a present block reads as zeros.  Bytes
beyond the end of a file read as zeros.

Everything is done by the segment of 1 GiB with array operations.  Maps are read with ``pread``, never mapped: to
touch a hole of a tmpfs mapping would allocate it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blkckpt import errors
from blkckpt.store import images, layout

BLOCK = 4096
MAP_HEADER = 4096
MAP_MAGIC = b"BLKCLIVE"
SEGMENT = 1 << 30
WINDOW = 4 << 20
"""Bytes read and written at once: what an ImageWriter makes one job of."""

_BLOCKS = layout.CHUNK // BLOCK
_SCATTERED = 16
"""With more pieces of the floor than this in a window, the window is read whole and the overlays laid over it."""

Bools = npt.NDArray[np.bool_]


class Floor(Protocol):
    """What lies below the overlays."""

    def read(self, offset: int, length: int) -> bytes: ...
    def chunks_with_data(self, first: int, count: int) -> Bools: ...


class RawFile:
    """A raw file or block device, or the data of an overlay."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes, zeros beyond the end."""
        try:
            data = os.pread(self._descriptor, length, offset)
            while len(data) < length and (more := os.pread(self._descriptor, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise errors.from_os_error(error, f"reading {length} bytes at {offset} of a frozen layer") from error
        return data if len(data) == length else data + bytes(length - len(data))

    def chunks_with_data(self, first: int, count: int) -> Bools:
        """Which of the chunks are not entirely in a hole; all, where holes cannot be asked for."""
        found = np.zeros(count, np.bool_)
        position, end = first * layout.CHUNK, (first + count) * layout.CHUNK
        while position < end:
            try:
                start = os.lseek(self._descriptor, position, os.SEEK_DATA)
                stop = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here on
                    break
                found[:] = True  # a block device, or a file system without holes
                break
            low, high = start // layout.CHUNK - first, -(-stop // layout.CHUNK) - first
            found[min(low, count) : max(high, 0)] = True
            position = max(stop, position + 1)
        return found


class ImageFloor:
    """A store image."""

    def __init__(self, reader: images.ImageReader) -> None:
        self.reader = reader

    def read(self, offset: int, length: int) -> bytes:
        inside = max(min(length, self.reader.size - offset), 0)
        return self.reader.read(offset, inside) + bytes(length - inside) if inside else bytes(length)

    def chunks_with_data(self, first: int, count: int) -> Bools:
        found = np.zeros(count, np.bool_)
        start = first * layout.CHUNK
        length = min(count * layout.CHUNK, self.reader.size - start)
        for offset, extent, zero in self.reader.extents(start, max(length, 0)) if length > 0 else ():
            if not zero:
                low = offset // layout.CHUNK - first
                found[low : low - (-extent // layout.CHUNK)] = True
        return found


class MapFile:
    """The bits of a live map."""

    def __init__(self, descriptor: int, size: int, what: str) -> None:
        self._descriptor = descriptor
        blocks = -(-size // BLOCK)
        found = os.fstat(descriptor).st_size
        if os.pread(descriptor, 8, 0) != MAP_MAGIC:
            raise errors.CorruptError(f"the {what} is not a live map")
        if found < MAP_HEADER + -(-blocks // 8):
            raise errors.CorruptError(f"the {what} has {found} bytes, too few for a disk of {size}")

    def bits(self, segment: int) -> npt.NDArray[np.uint8]:
        """The bytes of one segment, with zeros beyond the end."""
        length = SEGMENT // BLOCK // 8
        data = os.pread(self._descriptor, length, MAP_HEADER + segment * length)
        return np.frombuffer(data + bytes(length - len(data)), np.uint8)


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay's data and map; *inherited*: the parent of the new image has what it holds."""

    data: RawFile
    present: MapFile
    inherited: bool = False


class Frozen:
    """The frozen state of one disk of *size* bytes."""

    def __init__(self, size: int, overlays: Sequence[Overlay], floor: Floor | None) -> None:
        self.size, self._overlays, self._floor = size, overlays, floor
        self._segment = -1
        self._present: list[npt.NDArray[np.uint8]] = []

    @property
    def segments(self) -> int:
        return -(-self.size // SEGMENT)

    def chunk_range(self, segment: int) -> tuple[int, int]:
        """``(first, count)`` of the chunks of a segment."""
        first = segment * (SEGMENT // layout.CHUNK)
        return first, min(SEGMENT // layout.CHUNK, layout.chunk_count(self.size) - first)

    def overlaid(self, segment: int, *, known: bool = False) -> Bools:
        """Which chunks of a segment have a block in an overlay; not of inherited ones, if the changes are *known*.

        An overlay's bits are read before those of what is below it, and all of them before a map of changes: a block
        that is committed meanwhile is marked below, and as changed, before its bit here is cleared.
        """
        _, count = self.chunk_range(segment)
        found = np.zeros(count, np.bool_)
        for overlay, bits in zip(self._overlays, self._bits(segment), strict=True):
            if not (known and overlay.inherited):
                found |= by_chunk(bits)[:count]
        return found

    def with_data(self, segment: int) -> Bools:
        """Which chunks of a segment may be other than zeros."""
        first, count = self.chunk_range(segment)
        found = self.overlaid(segment)
        return found if self._floor is None else found | self._floor.chunks_with_data(first, count)

    def read(self, first: int, count: int) -> bytes | bytearray:
        """The bytes of chunks [first, first + count), which lie in one segment."""
        start = first * layout.CHUNK
        length = min(count * layout.CHUNK, self.size - start)
        pieces, scattered = self._pieces(first, -(-length // BLOCK))
        if len(pieces) == 1 and not scattered:
            layer = pieces[0][0]
            return layer.read(start, length) if layer else bytes(length)
        buffer = bytearray(self._floor.read(start, length) if scattered and self._floor else length)
        for layer, low, high in pieces:
            stop = min(high * BLOCK, length)
            if layer:
                buffer[low * BLOCK : stop] = layer.read(start + low * BLOCK, stop - low * BLOCK)
        return buffer

    def _pieces(self, first: int, blocks: int) -> tuple[list[tuple[Floor | RawFile | None, int, int]], bool]:
        """``(layer, first block, end block)`` relative to the window; and whether the floor is to be read whole."""
        segment, within = divmod(first * layout.CHUNK, SEGMENT)
        low = within // BLOCK // 8
        missing = np.ones(blocks, np.bool_)
        pieces: list[tuple[Floor | RawFile | None, int, int]] = []
        for overlay, bits in zip(self._overlays, self._bits(segment), strict=True):
            part = np.unpackbits(bits[low : low + -(-blocks // 8)], count=blocks, bitorder="little").view(np.bool_)
            mine = part & missing
            pieces += [(overlay.data, *run) for run in runs(mine)]
            missing &= ~part
        below = runs(missing)
        if len(below) > _SCATTERED and self._floor is not None:
            return pieces, True
        return pieces + [(self._floor, *run) for run in below], False

    def _bits(self, segment: int) -> list[npt.NDArray[np.uint8]]:
        if segment != self._segment:
            self._present = [overlay.present.bits(segment) for overlay in self._overlays]
            self._segment = segment
        return self._present


def by_chunk(bits: npt.NDArray[np.uint8]) -> Bools:
    """Which chunks have a set bit: a chunk is 16 blocks, two bytes of the map."""
    assert _BLOCKS == 16
    found: Bools = bits.view(np.uint16) != 0
    return found


def runs(mask: Bools) -> list[tuple[int, int]]:
    """``(first, end)`` of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(low, high) for low, high in edges.reshape(-1, 2).tolist()]


def windows(mask: Bools, first: int) -> Iterator[tuple[int, int]]:
    """``(chunk, count)`` of the chunks *mask* selects, numbered from *first*, at most a window each."""
    step = WINDOW // layout.CHUNK
    for low, high in runs(mask):
        for start in range(low, high, step):
            yield first + start, min(step, high - start)

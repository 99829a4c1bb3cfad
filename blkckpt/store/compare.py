"""What differs between two images: from their tables alone, or to the byte.

``compare`` reads no data.  The directories say which leaves differ, and only those are read; their entries say which
chunks differ, since a chunk is named by the hash of its contents.  So it is exact by the chunk: a chunk that is
named has at least one changed byte, and one that is not named has none.  (The last chunk of an image whose size is no
multiple of the other's is named if its length differs, and what only the longer image has counts as new or gone.)

``refine`` then reads the chunks that differ, of both, and compares them by any smaller unit, down to single bytes.

Cost: two leaves of 28 KiB for each 32 MiB of the image in which anything changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import images, layout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]
else:
    np = lazy.Module("numpy")

Progress = Callable[[int, int], None]

_TOGETHER = 32
"""Leaves looked at together: 0.9 MiB of each image, which a processor's cache holds."""

_THREADS = 2

_READ = 64
"""Chunks of one read while refining: 4 MiB of each image."""


class State(IntEnum):
    """How a chunk differs."""

    CHANGED = 1
    FILLED = 2
    """It was zeros (or beyond the end), and is not now."""
    ZEROED = 3
    """It is zeros now (or beyond the end)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of chunks that differ in one way; *offset* and *length* in bytes."""

    offset: int
    length: int
    state: State


@dataclass(frozen=True, slots=True)
class Difference:
    """Two images compared: the numbers of the chunks that differ, ascending, and how each does.

    ``leaves`` had to be read, of each image.
    """

    old_size: int
    new_size: int
    chunks: Numbers
    states: npt.NDArray[np.uint8]
    leaves: int

    @property
    def size(self) -> int:
        """The size of the longer image."""
        return max(self.old_size, self.new_size)

    @property
    def bytes(self) -> int:
        """The bytes of the chunks that differ."""
        return self.bytes_of(None)

    def bytes_of(self, state: State | None) -> int:
        """The bytes of the chunks that differ in this way (in any for None)."""
        chosen = self.chunks if state is None else self.chunks[self.states == state]
        total = len(chosen) * layout.CHUNK
        if len(chosen) and int(chosen[-1]) == layout.chunk_count(self.size) - 1:
            total -= layout.CHUNK - layout.chunk_length(self.size, int(chosen[-1]))
        return total

    def extents(self) -> Iterator[Extent]:
        """The runs of neighbouring chunks that differ in the same way, in order."""
        if not len(self.chunks):
            return
        breaks = (np.diff(self.chunks) != 1) | (np.diff(self.states) != 0)
        starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        ends = np.concatenate((starts[1:], [len(self.chunks)]))
        for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
            offset = int(self.chunks[low]) * layout.CHUNK
            length = min((high - low) * layout.CHUNK, self.size - offset)
            yield Extent(offset, length, State(int(self.states[low])))

    def touches(self, offset: int, length: int) -> bool:
        """Whether any byte of the range lies in a chunk that differs."""
        if length <= 0:
            return False
        first, last = offset // layout.CHUNK, (offset + length - 1) // layout.CHUNK
        at = int(np.searchsorted(self.chunks, first))
        return at < len(self.chunks) and int(self.chunks[at]) <= last

    def heat(self, cells: int) -> npt.NDArray[np.float64]:
        """The changed part (0 to 1) of *cells* equal stretches of the longer image (of fewer: each has a chunk)."""
        count = layout.chunk_count(self.size)
        cells = min(cells, count)
        if not cells:
            return np.zeros(0, np.float64)
        edges = np.arange(cells + 1, dtype=np.int64) * count // cells
        changed = np.searchsorted(self.chunks, edges)
        return np.diff(changed) / np.diff(edges)


def compare(old: images.ImageReader | None, new: images.ImageReader | None) -> Difference:
    """The chunks in which two images differ; None is an image of no bytes (a disk that is not there).

    CorruptError for a damaged table or leaf; a chunk of data is never read.
    """
    old_size, new_size = (one.size if one else 0 for one in (old, new))
    before, after = _directory(old), _directory(new)
    different = np.union1d(_differ(*_padded(before, after)), _uneven(old_size, new_size)).astype(np.int64)
    batches = [different[at : at + _TOGETHER] for at in range(0, len(different), _TOGETHER)]
    with futures.ThreadPoolExecutor(_THREADS) as pool:  # reading, decoding and numpy let the others run
        found = list(pool.map(lambda batch: _leaves(old, new, batch), batches))
    chunks = np.concatenate([one[0] for one in found]) if found else np.zeros(0, np.int64)
    states = np.concatenate([one[1] for one in found]) if found else np.zeros(0, np.uint8)
    return Difference(old_size, new_size, chunks, states, len(different))


def refine(
    old: images.ImageReader | None,
    new: images.ImageReader | None,
    difference: Difference,
    unit: int,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Mask]]:
    """Read the chunks that differ: ``(offset, mask)``, one bit for each *unit* bytes from *offset* on.

    *unit* divides the chunk (1 and 4096 are of use).  What is beyond the end of an image counts as zeros, so bytes
    that only the longer image has differ where they are not zero.  *progress* is told (done, total) bytes.
    """
    if layout.CHUNK % unit:
        raise errors.InputError(f"{unit} does not divide a chunk of {layout.CHUNK} bytes")
    done, total = 0, difference.bytes
    for first, count in _batches(difference.chunks):
        offset = first * layout.CHUNK
        length = min(count * layout.CHUNK, difference.size - offset)
        left, right = (np.frombuffer(_bytes(one, offset, length), np.uint8) for one in (old, new))
        mask = left != right
        if unit > 1:
            edges = np.arange(0, length, unit)
            mask = np.logical_or.reduceat(mask, edges)
        yield offset, mask
        done += length
        if progress:
            progress(done, total)


def _batches(chunks: Numbers) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of runs of neighbours, none longer than :data:`_READ`."""
    if not len(chunks):
        return
    starts = np.concatenate(([0], np.flatnonzero(np.diff(chunks) != 1) + 1, [len(chunks)])).tolist()
    for low, high in itertools.pairwise(starts):
        for at in range(low, high, _READ):
            yield int(chunks[at]), min(_READ, high - at)


def _bytes(image: images.ImageReader | None, offset: int, length: int) -> bytes:
    there = max(min(image.size - offset, length), 0) if image else 0
    data = image.read(offset, there) if image and there else b""
    return data if there == length else data + bytes(length - there)


def _directory(image: images.ImageReader | None) -> layout.Array:
    return image.table.leaves if image else np.zeros(0, layout.ENTRY_TYPE)


def _padded(left: layout.Array, right: layout.Array) -> tuple[layout.Array, layout.Array]:
    """Both with as many entries as the longer one has; what is added is zeros."""
    count = max(len(left), len(right))
    return _extended(left, count), _extended(right, count)


def _extended(entries: layout.Array, count: int) -> layout.Array:
    if len(entries) == count:
        return entries
    result = np.zeros(count, layout.ENTRY_TYPE)
    result[: len(entries)] = entries
    return result


def _differ(left: layout.Array, right: layout.Array) -> Numbers:
    """Where two arrays of entries name different contents (where a chunk is kept does not matter)."""
    words = layout.ENTRY.size // 8
    flat = (np.frombuffer(side, np.uint64) for side in (left, right))
    candidates = np.unique(np.flatnonzero(np.not_equal(*flat)) // words)
    a, b = left[candidates], right[candidates]
    found: Numbers = candidates[(a["raw"] != b["raw"]) | (a["hash"] != b["hash"]).any(axis=1)]
    return found


def _uneven(old_size: int, new_size: int) -> Numbers:
    """The leaf in which the shorter of two images of different sizes ends: its last chunk may differ in length."""
    if old_size == new_size or not min(old_size, new_size):
        return np.zeros(0, np.int64)
    return np.array([layout.leaf_count(min(old_size, new_size)) - 1], np.int64)


def _leaves(
    old: images.ImageReader | None, new: images.ImageReader | None, numbers: Numbers
) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """The chunks that differ in these leaves, and how."""
    left, right = (_entries(one, numbers) for one in (old, new))
    at = _differ(left, right)
    chunks = numbers[at // layout.LEAF] * layout.LEAF + at % layout.LEAF
    before, after = left[at], right[at]
    for image, entries in ((old, before), (new, after)):
        if image:
            layout.check_chosen(entries, chunks, image.size, f"image {image.image_id}")
    states = np.full(len(at), State.CHANGED, np.uint8)
    states[before["raw"] == 0] = State.FILLED
    states[after["raw"] == 0] = State.ZEROED
    return chunks, states


def _entries(image: images.ImageReader | None, numbers: Numbers) -> layout.Array:
    """The entries of these leaves, 512 for each, zeros beyond the image's end."""
    inside = int(np.searchsorted(numbers, layout.leaf_count(image.size))) if image else 0
    found = image.leaves(numbers[:inside].tolist()) if image else np.zeros(0, layout.ENTRY_TYPE)
    return _extended(found, len(numbers) * layout.LEAF)

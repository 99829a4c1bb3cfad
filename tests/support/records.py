"""The numbered records that guests of ``mode=ordered`` and ``mode=peer`` write, read from a checkpoint's disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blkckpt.store import images

MAGIC = 0x31525754504B4342
RECORD = 4096


@dataclass(frozen=True, slots=True)
class Ring:
    """The records of one stream on one disk: the sequence in each slot."""

    slots: np.ndarray[tuple[int], np.dtype[np.uint64]]

    @property
    def newest(self) -> int:
        return int(self.slots.max())


def read_ring(image: images.ImageReader, stream: int, span: int) -> Ring:
    """What *stream* (0 or 1) of a guest that uses *span* bytes holds in *image*; torn and partial records fail."""
    half = span // 2
    data = np.frombuffer(image.read(stream * half, half), "<u8").reshape(-1, 8, 64)
    used = data[:, :, 0] == MAGIC
    assert (used.all(axis=1) | ~used.any(axis=1)).all(), "a record of which only some sectors were written"
    sums = data[:, :, :63].sum(axis=2, dtype=np.uint64)
    assert (sums == data[:, :, 63]).all(), "a torn sector"
    sequences = data[:, :, 2]
    assert (sequences == sequences[:, :1]).all(), "a torn record"
    return Ring(sequences[:, 0].copy())

"""An image's data, read by several threads: decoding releases the interpreter lock.

At most ``AHEAD`` pieces a thread are under way, so memory is bounded for any image.  The first error ends everything.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, TypeVar

from blkckpt.store import images

PIECE = 4 << 20
"""Neighbouring chunks of this many bytes are read from their pack together (``packs.MAX_READ``)."""

AHEAD = 3
CACHE = 1 << 20
"""A reader that is pumped meets each chunk once: caching them would only cost."""

Progress = Callable[[int, int], None]
"""Called with (bytes of data done, bytes of data in all)."""

T = TypeVar("T")


def data_bytes(reader: images.ImageReader) -> int:
    """The bytes of *reader* that are not in zero chunks."""
    return sum(length for _, length, zero in reader.extents(0, reader.size) if not zero)


def pieces(reader: images.ImageReader) -> Iterator[tuple[int, int, bool]]:
    """``(offset, length, is_zero)`` covering the image; data in pieces of at most ``PIECE``."""
    for offset, length, zero in reader.extents(0, reader.size):
        for start in range(offset, offset + length, length if zero else PIECE):
            yield start, min(offset + length - start, length if zero else PIECE), zero


def scatter(reader: images.ImageReader, write: Callable[[int, bytes], None], progress: Progress) -> None:
    """Call ``write(offset, data)`` for all data, from several threads, in any order."""

    def copy(offset: int, length: int) -> int:
        write(offset, reader.read(offset, length))
        return length

    total, done = data_bytes(reader), 0
    jobs = ((start, length) for start, length, zero in pieces(reader) if not zero)
    for length in ahead(copy, jobs):
        done += length
        progress(done, total)


def in_order(reader: images.ImageReader) -> Iterator[tuple[int, bytes | None]]:
    """``(length, data)`` from front to back; None for zeros."""
    jobs = iter(pieces(reader))

    def read(offset: int, length: int, zero: bool) -> tuple[int, bytes | None]:
        return length, None if zero else reader.read(offset, length)

    yield from ahead(read, jobs)


def ahead(work: Callable[..., T], jobs: Iterator[tuple[Any, ...]]) -> Iterator[T]:
    """The results of *work* on *jobs*, in order, a bounded number ahead of who takes them."""
    threads = min(len(os.sched_getaffinity(0)), 8)
    waiting: collections.deque[futures.Future[T]] = collections.deque()
    with futures.ThreadPoolExecutor(threads, "blkckpt-pump") as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, *job))
                if len(waiting) > threads * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""Reading ahead: chunks that a sequential reader will want next are fetched and decompressed by another thread.

Reading a file, lz4 and the hashes let go of the interpreter, so on a second processor the next chunks are made while
the reader takes the last ones.  Nothing is fetched for readers that jump, nor for those that take whole chunks at a
time, which decode them where they want them (``ImageReader.read_into``).  A reader is *sequential* when it begins
where an earlier read ended (several may be under way: a guest and the fill of its disk).

States of a chunk: unknown → coming (a future) → in the cache of its reader.  Whoever wants a chunk that is coming
waits for it; if that fetch failed the chunk is unknown again, and who wants it fetches it and gets the error.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures

WINDOW = 32
"""Chunks ahead of the reader: 2 MiB, some milliseconds of decompressing."""

BATCH = 8
"""Chunks fetched as one piece: neighbours are one read of the pack."""

_STREAMS = 8

Fetched = Mapping[int, bytes]


class ReadAhead:
    """Of one image.  Thread-safe; its threads start with the first sequential read.

    *fetch* gets chunk numbers and returns their bytes; *keep* puts them where the reader looks first.
    """

    def __init__(self, fetch: Callable[[Sequence[int]], Fetched], keep: Callable[[Fetched], None], chunks: int) -> None:
        self._fetch, self._keep, self._chunks = fetch, keep, chunks
        self._lock = threading.Lock()
        self._coming: dict[int, futures.Future[Fetched]] = {}
        self._ends: OrderedDict[int, None] = OrderedDict()
        self._pool: futures.ThreadPoolExecutor | None = None
        self._announcer: futures.ThreadPoolExecutor | None = None
        self._closed = False

    def announce(self, tell: Callable[[], None]) -> None:
        """Have *tell*, which tells the disk what will be read, called in a thread of its own: the disk may be slow."""
        with self._lock:
            if self._closed:
                return
            if self._announcer is None:
                self._announcer = futures.ThreadPoolExecutor(1, thread_name_prefix="announce")
            self._announcer.submit(tell)

    def coming(self, numbers: Sequence[int]) -> dict[int, futures.Future[Fetched]]:
        """Those of *numbers* that are coming."""
        with self._lock:
            return {number: self._coming[number] for number in numbers if number in self._coming}

    def note(self, numbers: range, known: Callable[[int], bool]) -> None:
        """*numbers* have been read; begin to fetch what follows, unless *known*, if that is sequential."""
        with self._lock:
            if not self._follows(numbers) or self._closed:
                return
            ahead = range(numbers.stop, min(numbers.stop + WINDOW, self._chunks))
            missing = [number for number in ahead if number not in self._coming and not known(number)]
            if len(missing) < min(BATCH, len(ahead)):
                return
            if self._pool is None:
                self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                self._coming |= dict.fromkeys(batch, self._pool.submit(self._make, batch))

    def _follows(self, numbers: range) -> bool:
        """Whether *numbers* go on where an earlier read ended (in the same chunk, or the next)."""
        before = next((end for end in (numbers.start, numbers.start + 1) if end in self._ends), None)
        if before is not None:
            del self._ends[before]
        self._ends[numbers.stop] = None
        if len(self._ends) > _STREAMS:
            self._ends.popitem(last=False)
        return before is not None

    def _make(self, batch: Collection[int]) -> Fetched:
        try:
            fetched = self._fetch(sorted(batch))
            self._keep(fetched)
            return fetched
        finally:
            with self._lock:
                for number in batch:
                    self._coming.pop(number, None)

    def close(self) -> None:
        """End the thread; nothing is fetched ahead any more."""
        with self._lock:
            self._closed = True
            pools = (self._pool, self._announcer)
            self._pool = self._announcer = None
        for pool in pools:
            if pool is not None:
                pool.shutdown(cancel_futures=True)


def arrived(coming: Mapping[int, futures.Future[Fetched]]) -> dict[int, bytes]:
    """The chunks of *coming* once they are there, without those whose fetch failed."""
    return {number: future.result()[number] for number, future in coming.items() if _good(future)}


def _good(future: futures.Future[Fetched]) -> bool:
    try:
        return future.exception() is None
    except futures.CancelledError:
        return False

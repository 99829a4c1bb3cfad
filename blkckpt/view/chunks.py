"""The chunks that are read through a view: decoded once, shared by all images, bounded in bytes.

A chunk is known by its hash, so that the same data in a hundred checkpoints is one entry.  Decoding releases the
interpreter lock (file I/O, lz4, the hash); a chunk that is being decoded by one thread is waited for by the others.
What has been read as a whole is dropped, for the kernel keeps its pages; chunks read in parts stay.

*Read-ahead* is asked for in batches and done by a few threads of its own.  A batch that fails is forgotten: whoever
needs the chunk decodes it again and gets the error itself.

Thread-safe.  Leaves (the entries of 512 chunks) are kept beside the chunks, as bytes, checked.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from blkckpt import errors
from blkckpt.store import layout, leaves, packs

LIMIT = 64 << 20
"""Default bound of the decoded chunks: the read-ahead of a dozen readers."""

LEAVES = 512
"""Leaves kept: 28 KiB each, the entries of 16 GiB."""

COUNTS = 1 << 16
"""Leaves whose number of bytes in use is remembered."""

WORKERS = 2
BATCH = 8
"""Chunks read ahead in one go: they are usually neighbours in the pack, and are then read with one call."""

_WAIT = 60.0

RAW = struct.Struct("<52xI")
"""The raw length in an entry: zero for a chunk of zeros.  (numpy would take longer to load than all of this does.)"""

Wanted = tuple[layout.Entry, str]
"""An entry with data, and what to call it in an error."""

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class _Batch:
    """Chunks being decoded: done when the event is set, whether it went well or not."""

    __slots__ = ("_event", "found")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.found: dict[bytes, bytes] = {}

    def finish(self, found: dict[bytes, bytes]) -> None:
        self.found = found
        self._event.set()

    def wait(self) -> dict[bytes, bytes]:
        self._event.wait(_WAIT)
        return self.found


class Chunks:
    """The cache.  ``close`` ends its threads; what is read afterwards is read without read-ahead."""

    def __init__(self, limit: int = LIMIT, workers: int = WORKERS) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._found: OrderedDict[bytes, bytes] = OrderedDict()
        self.bytes = 0
        self._pending: dict[bytes, _Batch] = {}
        self._leaves: OrderedDict[bytes, bytes] = OrderedDict()
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="view-ahead") for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    # --- chunks

    def peek(self, digest: bytes) -> bytes | None:
        """The chunk if it is here already."""
        return recall(self._found, digest)

    def get(self, store: packs.Packs, wanted: Sequence[Wanted]) -> list[bytes]:
        """The chunks, in order.  CorruptError naming the one that is damaged, never a wrong byte (rule S3)."""
        found: dict[bytes, bytes] = {}
        mine: list[Wanted] = []
        others: dict[_Batch, None] = {}
        batch = _Batch()
        with self._lock:
            for entry, what in wanted:
                data = self._found.get(entry.hash)
                if data is not None:
                    self._found.move_to_end(entry.hash)
                    found[entry.hash] = data
                elif (running := self._pending.get(entry.hash)) is None:
                    self._pending[entry.hash] = batch
                    mine.append((entry, what))
                elif running is not batch:
                    others[running] = None
        if len(mine) >= BATCH and self._threads:
            mine, half = mine[: len(mine) // 2], mine[len(mine) // 2 :]
            others[self._hand_over(store, half)] = None
        if mine:
            found |= self._run(batch, store, mine)
        for other in others:
            found |= other.wait()
        missing = [(entry, what) for entry, what in wanted if entry.hash not in found]
        if missing:  # its read-ahead failed, or it has been dropped meanwhile
            found |= _decode(store, missing)
        return [found[entry.hash] for entry, _ in wanted]

    def drop(self, digests: Iterable[bytes]) -> None:
        """Chunks that nobody will ask for again: their memory is used for the next ones while it is in a cache of the
        processor, instead of memory that the kernel first has to clear."""
        with self._lock:
            for digest in digests:
                self.bytes -= len(self._found.pop(digest, b""))

    def ahead(self, store: packs.Packs, wanted: Sequence[Wanted]) -> None:
        """Decode these soon, in the background, unless they are here or under way."""
        if not self._threads:
            return
        for start in range(0, len(wanted), BATCH):
            batch = _Batch()
            with self._lock:
                mine = [
                    (entry, what)
                    for entry, what in wanted[start : start + BATCH]
                    if entry.hash not in self._found and entry.hash not in self._pending
                ]
                for entry, _ in mine:
                    self._pending[entry.hash] = batch
            if mine:
                self._jobs.put(lambda mine=mine, batch=batch: self._quietly(batch, store, mine))  # type: ignore[misc]

    def _hand_over(self, store: packs.Packs, wanted: Sequence[Wanted]) -> _Batch:
        """Let another thread decode these, which are noted as being decoded by us."""
        batch = _Batch()
        with self._lock:
            for entry, _ in wanted:
                self._pending[entry.hash] = batch
        self._jobs.put(lambda: self._quietly(batch, store, wanted))
        return batch

    def _quietly(self, batch: _Batch, store: packs.Packs, wanted: Sequence[Wanted]) -> None:
        with contextlib.suppress(errors.BlkckptError):
            self._run(batch, store, wanted)

    def _run(self, batch: _Batch, store: packs.Packs, wanted: Sequence[Wanted]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        try:
            found = _decode(store, wanted)
        finally:
            with self._lock:
                for entry, _ in wanted:
                    if self._pending.get(entry.hash) is batch:
                        del self._pending[entry.hash]
                self._keep(found)
            batch.finish(found)
        return found

    def _keep(self, found: dict[bytes, bytes]) -> None:
        for digest, data in found.items():
            if digest not in self._found:
                self._found[digest] = data
                self.bytes += len(data)
        while self.bytes > self.limit:
            self.bytes -= len(self._found.popitem(last=False)[1])

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    # --- leaves

    def leaf(self, store: packs.Packs, table: layout.Table, number: int) -> bytes:
        """The entries of leaf *number*, which has data, as they stand in it.

        Its hash and its length are checked here, an entry when it is used (``layout.checked_entry``).
        """
        entry = table.leaf(number)
        digest = entry.hash
        with self._lock:
            data = self._leaves.get(digest)
            if data is not None:
                self._leaves.move_to_end(digest)
                return data
        what = f"image {table.image_id}"
        data = store.read(entry, f"{what} leaf {number}")
        if len(data) != layout.leaf_entries(table.size, number) * layout.ENTRY.size:
            raise errors.CorruptError(f"{what}: leaf {number} has the wrong length")
        with self._lock:
            self._leaves[digest] = data
            if len(self._leaves) > LEAVES:
                self._leaves.popitem(last=False)
        return data

    def used(self, store: packs.Packs, table: layout.Table, numbers: Iterable[int]) -> int:
        """The bytes of non-zero chunks of these leaves (which have data)."""
        total = 0
        for number in numbers:
            place = number * layout.ENTRY.size
            digest = table.directory[place : place + layout.HASH]
            count = self._counts.get(digest)
            if count is None:
                count = leaves.used(self.leaf(store, table, number))
                with self._lock:
                    self._counts[digest] = count
                    if len(self._counts) > COUNTS:
                        self._counts.popitem(last=False)
            total += count
        return total


def recall(found: OrderedDict[_K, _V], key: _K) -> _V | None:
    """The value of *key*, now the one used most recently.  Needs no lock beside threads that add and drop."""
    value = found.get(key)
    if value is not None:
        try:
            found.move_to_end(key)  # one operation under the interpreter's lock
        except KeyError:  # dropped meanwhile by another thread
            return value
    return value


def _decode(store: packs.Packs, wanted: Sequence[Wanted]) -> dict[bytes, bytes]:
    """Read and check; chunks that lie next to each other are read together, and apart when that fails.

    So that the error names the chunk that is damaged, not the first of those read with it.
    """
    try:
        return _decode_together(store, wanted)
    except errors.CorruptError:
        if len(wanted) == 1:
            raise
    found: dict[bytes, bytes] = {}
    for one in wanted:
        found |= _decode_together(store, [one])
    return found


def _decode_together(store: packs.Packs, wanted: Sequence[Wanted]) -> dict[bytes, bytes]:
    found = {}
    names = [what for _, what in wanted]
    for (entry, payload), what in zip(store.payloads([entry for entry, _ in wanted], names[0]), names, strict=True):
        place = f"{what} (pack {entry.pack:016x} at {entry.offset})"
        found[entry.hash] = store.codec.decode(payload, entry.raw, entry.hash, place)
    return found

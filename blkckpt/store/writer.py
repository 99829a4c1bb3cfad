"""Writing an image: the hot path of every checkpoint.

Data flow::

    write() ──jobs of 4 MiB──> workers: zero test, hash, look up, compress ──results──> appender: pack, leaves
                                                                                          └──> sealer: fsync, rename

``write`` copies what the caller may reuse, and returns; a bounded number of jobs is under way, so a slow disk slows
the caller and memory stays bounded.  The workers look for a chunk in the parent's entry, then among what this writer
has stored, then in the index, and compress only what is nowhere.  The appender alone touches the open pack and the
table, so neither needs a lock; two workers that meet the same new chunk at once merely compress it twice.  A full
pack is sealed in the background.

States: *writing* → ``finish`` → *finished*; → ``abort``, or an error in any thread, → *failed*.  After an error
every call raises it, and nothing is published.  ``finish`` keeps the order of rule S2: packs durable, table durable.

``write`` and ``zero`` may be called from several threads.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import codec, images, index, layout, leaves, packs

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")

BATCH = 64
"""Chunks a job: 4 MiB, so that handing a job from thread to thread (up to 0.1 ms) does not count."""

JOBS = 12
"""Jobs under way, each with a buffer that is used again and again (a fresh 4 MiB costs 1,024 page faults): bounds the
memory of a writer to about 100 MiB."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a writer works with."""

    packs: packs.Packs
    index: index.ChunkIndex


@dataclass(slots=True)
class _Job:
    """Chunks to be stored (number, bytes), gathered in *buffer* or the caller's own; or zeros (first, count)."""

    slot: bool = False
    buffer: bytearray | None = None
    chunks: list[tuple[int, memoryview]] = field(default_factory=list)
    zeros: tuple[int, int] | None = None


@dataclass(slots=True)
class _Result:
    """For each chunk its packed entry, or the new chunk that is to be appended."""

    job: _Job
    chunks: list[tuple[int, bytes | packs.NewChunk]] = field(default_factory=list)


class ImageWriter:
    """Writes one image.  A context manager: leaving it without ``finish`` aborts."""

    def __init__(
        self,
        resources: Resources,
        size: int,
        *,
        parent: images.ImageReader | None,
        kind: str,
        label: str,
        done: Callable[[str | None], None],
        workers: int | None = None,
        image: str | None = None,
    ) -> None:
        """*done* is called once, with the image's id or None after an abort.

        *image* is the id of a reference, which the image is to replace; ``None``: a new one.
        """
        if kind not in layout.IMAGE_KINDS:
            raise errors.InputError(f"{kind!r} is not a kind of image; use one of {', '.join(layout.IMAGE_KINDS)}")
        self.size = size
        self.image_id = image or secrets.token_hex(16)
        self._replaces = image is not None
        self._packs, self._index, self._codec = resources.packs, resources.index, resources.packs.codec
        self._parent, self._kind, self._label, self._done = parent, kind, label, done
        self._table = leaves.LeafTable(
            size,
            parent.table.leaves if parent else None,
            parent.leaf if parent else None,
        )
        self._seen = np.zeros(layout.chunk_count(size), np.bool_)
        self._lock = threading.Lock()
        self._front = threading.Lock()
        self._job = _Job()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        for _ in range(JOBS):
            self._free.put(None)
        self._error: BaseException | None = None
        self._open = True
        self._pack: packs.PackWriter | None = None
        self._recent: tuple[dict[bytes, bytes], ...] = ({},)
        self._sealer = futures.ThreadPoolExecutor(2, "blkckpt-seal")  # one makes durable, one tells the index
        self._sealing: list[futures.Future[None]] = []
        self._zero_chunks = self._data_chunks = self._new_chunks = self._new_bytes = 0
        self._begun = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, name="blkckpt-chunks", daemon=True)
            for _ in range(workers or min(len(os.sched_getaffinity(0)), 8))
        ]
        self._appender = threading.Thread(target=self._append, name="blkckpt-append", daemon=True)
        for thread in (*self._threads, self._appender):
            thread.start()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    # --- the caller's side

    def write(self, offset: int, data: bytes | memoryview, *, stable: bool = False) -> None:
        """Store *data* at *offset*: whole chunks (a short one only at the image's end), each at most once.

        *data* may be reused on return, unless the caller promises that it is *stable*, as ``bytes`` are: then it is
        not copied, and let go when it is stored.  Blocks while too much is under way.
        Raises what went wrong in any thread.
        """
        view = memoryview(data).cast("B")
        number = self._claim(offset, len(view))
        copy = not (stable or isinstance(data, bytes))
        with self._front:
            for start in range(0, len(view), layout.CHUNK):
                self._gather(number, view[start : start + layout.CHUNK], copy=copy)
                number += 1

    def zero(self, offset: int, length: int) -> None:
        """Make whole chunks zero, whatever the parent has there."""
        first = self._claim(offset, length)
        if length:
            self._jobs.put(_Job(zeros=(first, layout.chunk_count(length))))

    def finish(self) -> images.ImageInfo:
        """Make the image durable: packs, then table (rule S2).  It is garbage until a manifest names it."""
        try:
            self._check()
            with self._front:
                self._open = False
                self._submit()
            self._stop()
            self._check_error()
            self._finish_leaves()
            self._seal()
            for future in self._sealing:
                future.result()
            info = self._publish()
        except BaseException as error:
            self._fail(error)
            self.abort()
            raise
        self._sealer.shutdown()
        self._finished(self.image_id)
        return info

    def abort(self) -> None:
        """Give up; no error if it is finished or aborted already.  Packs that are sealed stay, as garbage."""
        if self._done is _nothing:
            return
        self._fail(errors.StateError("the image writer has been aborted"))
        self._open = False
        self._stop()
        self._sealer.shutdown()
        if self._pack is not None:
            self._pack.abort()
            self._pack = None
        self._finished(None)

    def _finished(self, image: str | None) -> None:
        self._table.close()
        done, self._done = self._done, _nothing
        done(image)

    def _claim(self, offset: int, length: int) -> int:
        """Check a range and mark its chunks as written; returns the number of the first one."""
        self._check()
        end = offset + length
        if offset < 0 or offset % layout.CHUNK or end > self.size or (end % layout.CHUNK and end != self.size):
            raise errors.InputError(f"{length} bytes at {offset} are not whole chunks of an image of {self.size} bytes")
        first, last = offset // layout.CHUNK, layout.chunk_count(end)
        with self._lock:
            if length and self._seen[first:last].any():
                raise errors.InputError(f"a chunk of the {length} bytes at {offset} has been written already")
            self._seen[first:last] = True
        return first

    def _gather(self, number: int, data: memoryview, *, copy: bool) -> None:
        """Put a chunk into the open job; submit that when it is full.  The caller holds ``_front``."""
        job = self._job
        if not job.slot:
            job.buffer, job.slot = self._free.get(), True
        if copy:
            job.buffer = job.buffer or bytearray(BATCH * layout.CHUNK)
            start = len(job.chunks) * layout.CHUNK
            place = memoryview(job.buffer)[start : start + len(data)]
            place[:] = data
            data = place
        job.chunks.append((number, data))
        if len(job.chunks) == BATCH:
            self._submit()

    def _submit(self) -> None:
        job, self._job = self._job, _Job()
        self._jobs.put(job)

    def _check(self) -> None:
        self._check_error()
        if not self._open:
            raise errors.StateError("the image writer is closed")

    def _check_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    def _stop(self) -> None:
        """Let every thread end, after what is queued."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._results.put(None)
        self._appender.join()

    # --- workers

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result = _Result(job)
            if self._error is None:
                try:
                    result.chunks = self._encode(job.chunks)
                except BaseException as error:  # it is the caller's: every call raises it from now on
                    self._fail(error)
            self._results.put(result)

    def _encode(self, chunks: list[tuple[int, memoryview]]) -> list[tuple[int, bytes | packs.NewChunk]]:
        result: list[tuple[int, bytes | packs.NewChunk]] = []
        unknown: list[tuple[int, bytes, memoryview]] = []
        for number, data in chunks:
            if codec.is_zero(data):
                result.append((number, layout.ZERO_ENTRY))
                continue
            digest = self._codec.digest(data)
            entry = self._inherited(number, digest) or self._own(digest)
            if entry:
                result.append((number, entry))
            else:
                unknown.append((number, digest, data))
        found = self._index.lookup([digest for _, digest, _ in unknown]) if unknown else {}
        fresh: dict[bytes, packs.NewChunk] = {}
        for number, digest, data in unknown:
            known = found.get(digest)
            if known is not None and known.raw == len(data):
                result.append((number, layout.pack_entry(known)))
                continue
            if digest not in fresh:
                fresh[digest] = packs.NewChunk(digest, codec.compress(data), len(data))
            result.append((number, fresh[digest]))
        return result

    def _inherited(self, number: int, digest: bytes) -> bytes | None:
        """The parent's entry of chunk *number*, if it has this content."""
        if self._parent is None:
            return None
        leaf, slot = divmod(number, layout.LEAF)
        entry = self._parent.leaf(leaf)[slot * layout.ENTRY.size : (slot + 1) * layout.ENTRY.size]
        return entry if entry.startswith(digest) else None

    def _own(self, digest: bytes) -> bytes | None:
        for known in self._recent:
            if entry := known.get(digest):
                return entry
        return None

    # --- the appender

    def _append(self) -> None:
        while (result := self._results.get()) is not None:
            try:
                if self._error is None:
                    self._store(result)
            except BaseException as error:  # it is the caller's: every call raises it from now on
                self._fail(error)
            finally:
                if result.job.slot:
                    self._free.put(result.job.buffer)

    def _store(self, result: _Result) -> None:
        fresh = {}
        for _, item in result.chunks:
            if isinstance(item, packs.NewChunk) and self._own(item.hash) is None:
                fresh[item.hash] = item
        self._append_chunks(list(fresh.values()))
        complete = []
        for number, item in result.chunks:
            entry = self._own(item.hash) if isinstance(item, packs.NewChunk) else item
            assert entry is not None
            self._zero_chunks += entry is layout.ZERO_ENTRY
            if (leaf := self._table.set(number, entry)) is not None:
                complete.append(leaf)
        self._data_chunks += len(result.chunks)
        self._new_chunks += len(fresh)
        if result.job.zeros:
            self._zero_chunks += result.job.zeros[1]
            complete += self._table.set_zero(*result.job.zeros)
        self._store_leaves(complete)

    def _append_chunks(self, chunks: list[packs.NewChunk]) -> None:
        """Append to the open pack; begin another one when it is full."""
        if not chunks:
            return
        need = sum(len(chunk.payload) for chunk in chunks) + len(chunks) * layout.ENTRY_HEADER.size
        if self._pack and (
            self._pack.size + need > layout.MAX_PACK or self._pack.count + len(chunks) > layout.MAX_PACK_ENTRIES
        ):
            self._seal()
        if self._pack is None:
            self._pack = packs.PackWriter(self._packs)
        known = self._recent[0]
        for entry in self._pack.append(chunks):
            known[entry.hash] = layout.pack_entry(entry)

    def _store_leaves(self, numbers: list[int]) -> None:
        for leaf in numbers:
            self._table.finish(leaf, self._store_leaf(leaf, self._table.take(leaf)))

    def _store_leaf(self, leaf: int, data: bytes) -> layout.Entry:
        """Where the leaf *data* is: as the parent's, as a known one, or appended now."""
        if not any(data):
            return layout.ZERO
        digest = self._codec.digest(data)
        if self._parent:
            inherited = self._parent.table.leaf(leaf)
            if inherited.hash == digest:
                return inherited
        found = self._index.lookup([digest]).get(digest)
        if found is not None and found.raw == len(data):
            return found
        if self._own(digest) is None:
            self._append_chunks([packs.NewChunk(digest, codec.compress(data), len(data), layout.LEAF_KIND)])
        entry = self._own(digest)
        assert entry is not None
        return layout.Entry(*layout.ENTRY.unpack(entry))

    def _finish_leaves(self) -> None:
        self._store_leaves(self._table.begun())

    def _seal(self) -> None:
        """Seal the open pack in the background, after the one before it."""
        if self._pack is None:
            return
        for future in self._sealing:
            future.result()
        pack, self._pack = self._pack, None
        known = self._recent[0]
        self._recent = ({}, *self._recent)
        self._sealing = [self._sealer.submit(self._make_durable, pack, known)]

    def _make_durable(self, pack: packs.PackWriter, known: dict[bytes, bytes]) -> None:
        try:
            sealed = pack.complete()
            entering = self._sealer.submit(self._index.enter, sealed.pack, sealed.size, sealed.records)
            try:
                pack.commit()
            finally:
                entering.result()
        except BaseException:
            pack.abort()
            raise
        self._new_bytes += sealed.size
        self._index.admit(sealed.pack, sealed.size)
        self._recent = tuple(entries for entries in self._recent if entries is not known)

    def _used(self) -> int | None:
        """The bytes of chunks that are not zero.  None if the parent is damaged where it is not needed."""
        if self._parent is None:
            return self._table.growth
        try:
            emptied = sum(leaves.used(self._parent.leaf(leaf)) for leaf in self._table.emptied)
            return self._parent.used() + self._table.growth - emptied
        except errors.BlkckptError:
            return None

    def _publish(self) -> images.ImageInfo:
        """Every pack is durable: now the table."""
        parent = self._parent.image_id if self._parent else None
        table = layout.Table(
            self.image_id, self.size, self._kind, self._label, parent, time.time_ns(), self._table.directory.tobytes(),
            used=self._used(),
        )  # fmt: skip
        data = layout.encode_table(table, self._codec.digest)
        self._packs.backend.put(layout.image_key(self.image_id), data, exclusive=not self._replaces)
        return images.ImageInfo(
            image=self.image_id,
            size=self.size,
            chunks=self._data_chunks,
            zero_chunks=self._zero_chunks,
            new_chunks=self._new_chunks,
            new_bytes=self._new_bytes + len(data),
            seconds=time.monotonic() - self._begun,
        )


def _nothing(_: str | None) -> None:
    """Stands where a callback has been called already."""

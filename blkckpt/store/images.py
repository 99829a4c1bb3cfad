"""Image tables and reading an image.

Opening an image reads its table: a few kilobytes a gigabyte.  Every chunk then costs one entry (of a cached leaf) and
one ranged read.  An :class:`ImageReader` is immutable but for its caches and may be used from any thread; it is the
:class:`Source` of a restored disk, which reads *ahead* (:mod:`blkckpt.store.readahead`) until it is closed.

Repacking gives an image other places under the same id (:mod:`blkckpt.store.repack`) and deletes the packs it was in.
A reader that finds a pack gone therefore reads the table again and goes on by it; only if the table is still the same
one, or is gone too, is the pack really missing.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from blkckpt import errors, lazy
from blkckpt.store import layout, leaves, packs, readahead
from blkckpt.store import reference as references

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")

_T = TypeVar("_T")

_LEAVES_CACHED = 256
"""28 KiB each, 7 MiB in all: the entries of 8 GiB of image."""

LONGEST = (
    layout.IMAGE_HEADER.size + layout.MAX_LABEL + layout.leaf_count(layout.MAX_IMAGE) * layout.ENTRY.size + layout.HASH
)
"""The longest table there can be."""

_RAW = struct.Struct("<52xI")
"""The raw length in an entry."""

_ANNOUNCED = 512
"""Chunks that the disk is told of ahead of a sequential reader: 32 MiB."""

_MET = 8 * _ANNOUNCED
"""Chunks whose packs are looked up ahead: 256 MiB."""

CACHE = 16 << 20
"""Bytes of chunks an ImageReader keeps: what eight sequential readers are ahead.  With 64 MiB every chunk is
decompressed into memory that no cache of the processor holds, and a sequential read takes half as long again."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What writing an image came to.

    ``chunks`` were written (zeros and inherited ones not counted), of which ``new_chunks`` were not in the store;
    ``new_bytes`` is what the store grew by, packs and table.
    """

    image: str
    size: int
    chunks: int
    zero_chunks: int
    new_chunks: int
    new_bytes: int
    seconds: float


def load_table(store: packs.Packs, image_id: str) -> layout.Table:
    """Read and check the table of image *image_id*; RetainedError if it is a retained one."""
    key = layout.image_key(layout.check_id(image_id))
    try:
        data = store.backend.whole(key, LONGEST)
    except errors.NotFoundError as error:
        raise errors.NotFoundError(f"image {image_id} is not in the store") from error
    except errors.CorruptError as error:
        raise errors.CorruptError(f"image {image_id}: its table is longer than any can be") from error
    if references.is_one(data):
        raise references.RetainedError(references.decode(data, image_id))
    return layout.decode_table(data, image_id, store.codec.digest)


def following(store: packs.Packs, image_ids: Sequence[str], work: Callable[[], _T]) -> _T:
    """What *work*, which goes by places in packs, gives: anew, when it finds a pack gone and an image is elsewhere now.

    Raises what it raises when all are where they were before it, or one is gone.
    """
    while True:
        before = _directories(store, image_ids)
        try:
            return work()
        except (packs.MissingPackError, errors.NotFoundError):
            if _directories(store, image_ids) == before:
                raise


def _directories(store: packs.Packs, image_ids: Sequence[str]) -> dict[str, bytes]:
    """What is different when an image has been moved, of each that is not retained."""
    found = {}
    for image in image_ids:
        with contextlib.suppress(references.RetainedError):
            found[image] = store.codec.digest(load_table(store, image).directory)
    return found


def read_leaf(store: packs.Packs, table: layout.Table, leaf: int) -> layout.Array:
    """The checked entries of leaf number *leaf*, an array of ``layout.ENTRY_TYPE``."""
    return np.frombuffer(packed_leaf(store, table, leaf), layout.ENTRY_TYPE)


def packed_leaf(store: packs.Packs, table: layout.Table, leaf: int) -> bytes:
    """The checked entries of leaf number *leaf* as they are stored."""
    entry = table.leaf(leaf)
    if not entry.raw:
        return bytes(layout.leaf_entries(table.size, leaf) * layout.ENTRY.size)
    what = f"image {table.image_id} leaf {leaf}"
    return layout.check_leaf(store.read(entry, what), table.size, leaf, f"image {table.image_id}")


class ImageReader:
    """Reads one image.  Thread-safe.  Every byte returned has had its hash checked (rule S3)."""

    def __init__(self, store: packs.Packs, table: layout.Table, *, cache: int = CACHE, ahead: bool = False) -> None:
        self.table = table
        self.size = table.size
        self._packs = store
        self._lock = threading.Lock()
        self._leaves: OrderedDict[int, bytes] = OrderedDict()
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._limit = max(cache // layout.CHUNK, 1)
        self._end, self._announced, self._met = 0 if ahead else -1, 0, 0
        self._ahead = readahead.ReadAhead(self._fetch, self._remember, self.chunks) if ahead else None

    @property
    def image_id(self) -> str:
        return self.table.image_id

    @property
    def chunks(self) -> int:
        """The number of chunks of the image."""
        return self.table.chunks

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes at *offset*; InputError outside of the image, CorruptError rather than a wrong byte."""
        self._check(offset, length)
        if not length:
            return b""
        first, last = offset // layout.CHUNK, (offset + length - 1) // layout.CHUNK
        parts = self._get(range(first, last + 1))
        begin = offset - first * layout.CHUNK
        if len(parts) == 1:
            return parts[0] if length == len(parts[0]) else parts[0][begin : begin + length]
        parts[0] = parts[0][begin:]
        parts[-1] = parts[-1][: offset + length - last * layout.CHUNK]
        return b"".join(parts)

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill *buf* with the bytes at *offset*; errors as :meth:`read`.

        Whole chunks are decoded in place and not kept, nor read ahead of: whoever reads this much at once does not
        come back for it, and in 256 KiB to hand a chunk over from another thread costs more than to decode it.
        """
        length = len(buf)
        self._check(offset, length)
        first, end = -(-offset // layout.CHUNK), (offset + length) // layout.CHUNK
        if first >= end:
            self._copy_into(buf, offset)
            return
        low, high = first * layout.CHUNK - offset, end * layout.CHUNK - offset
        with buf[:low] as head, buf[low:high] as body, buf[high:] as tail:
            self._copy_into(head, offset, follow=False)
            self._announce(first, end)
            self._follow(lambda _: self._decode_into(body, first))
            self._copy_into(tail, offset + high, follow=False)

    def _copy_into(self, buf: memoryview, offset: int, *, follow: bool = True) -> None:
        """Fill *buf* from chunks that are kept; *follow*: and read ahead, if it goes on from an earlier read."""
        length = len(buf)
        if not length:
            return
        first, last = offset // layout.CHUNK, (offset + length - 1) // layout.CHUNK
        position, begin = 0, offset - first * layout.CHUNK
        for data in self._get(range(first, last + 1), follow=follow):
            count = min(len(data) - begin, length - position)
            buf[position : position + count] = data if count == len(data) else data[begin : begin + count]
            position, begin = position + count, 0

    def _decode_into(self, buf: memoryview, first: int) -> None:
        """Fill *buf* with the whole chunks from *first* on."""
        numbers = range(first, first + len(buf) // layout.CHUNK)
        decode = self._packs.codec.decode_into
        for number, entry, payload in self._payloads(numbers, self._entries(numbers)):
            start = (number - first) * layout.CHUNK
            with buf[start : start + layout.CHUNK] as part:
                if payload is None:
                    part[:] = layout.ZERO_CHUNK
                else:
                    decode(payload, part, entry.hash, self._name(number, entry))

    def chunk(self, number: int) -> bytes:
        """The raw bytes of chunk *number* (64 KiB; less for the last one of an odd image)."""
        if not 0 <= number < self.chunks:
            raise errors.InputError(f"image {self.image_id} has no chunk {number}")
        return self._get(range(number, number + 1))[0]

    def used(self) -> int:
        """The bytes of chunks that are not zero; counted, if the table does not say it (one from before it did)."""
        table = self.table
        if table.used is not None:
            return table.used
        return sum(leaves.used(self.leaf(leaf)) for leaf in range(layout.leaf_count(self.size)) if table.filled(leaf))

    def entries(self, leaf: int) -> layout.Array:
        """The entries of leaf number *leaf* (``layout.ENTRY_TYPE``), read-only."""
        return np.frombuffer(self.leaf(leaf), layout.ENTRY_TYPE)

    def leaf(self, leaf: int) -> bytes:
        """The packed entries of leaf number *leaf*."""
        with self._lock:
            found = self._leaves.get(leaf)
            if found is not None:
                self._leaves.move_to_end(leaf)
                return found
        return self._follow(lambda table: self._read_leaf(table, leaf))

    def _read_leaf(self, table: layout.Table, leaf: int) -> bytes:
        entries = packed_leaf(self._packs, table, leaf)
        with self._lock:
            if self.table is table:  # else a leaf of old places would stay
                self._leaves[leaf] = entries
                if len(self._leaves) > _LEAVES_CACHED:
                    self._leaves.popitem(last=False)
        return entries

    def leaves(self, numbers: Sequence[int]) -> layout.Array:
        """The entries of these leaves, one after the other, each filled up to 512 with zeros.

        For going through many: neighbours in a pack are read together, none is kept.  Each leaf has its hash and
        its length; an entry is checked by whoever uses it (``layout.check_chosen``).
        """
        return self._follow(lambda table: self._read_leaves(table, numbers))

    def _read_leaves(self, table: layout.Table, numbers: Sequence[int]) -> layout.Array:
        size = layout.LEAF * layout.ENTRY.size
        buffer = bytearray(len(numbers) * size)
        entries = [table.leaf(number) for number in numbers]
        payloads = self._packs.payloads([one for one in entries if one.raw], f"leaves of image {self.image_id}")
        for index, entry in enumerate(entries):
            if entry.raw:
                what = f"image {self.image_id} leaf {numbers[index]}"
                data = self._packs.codec.decode(next(payloads)[1], entry.raw, entry.hash, what)
                if len(data) != layout.leaf_entries(self.size, numbers[index]) * layout.ENTRY.size:
                    raise errors.CorruptError(f"{what} has the wrong length")
                buffer[index * size : index * size + len(data)] = data
        return np.frombuffer(buffer, layout.ENTRY_TYPE)

    def _follow(self, read: Callable[[layout.Table], _T]) -> _T:
        """What *read* gives by the present table: again, when it finds a pack gone and the image is elsewhere now."""
        while True:
            table = self.table
            try:
                return read(table)
            except packs.MissingPackError as error:
                self._reload(table, error)

    def _reload(self, before: layout.Table, missing: packs.MissingPackError) -> None:
        """Take the table as it is in the store now; raises *missing* if that is *before*, or is gone."""
        with self._lock:
            if self.table is not before:
                return  # another thread has
        try:
            fresh = load_table(self._packs, before.image_id)
        except errors.NotFoundError:
            raise missing from None
        if fresh.directory == before.directory:
            raise missing
        with self._lock:
            if self.table is before:
                self.table = fresh
                self._leaves.clear()

    def entry(self, number: int) -> layout.Entry:
        """Where chunk *number* is."""
        return layout.unpack_entry(self.leaf(number // layout.LEAF), number % layout.LEAF)

    def _entries(self, numbers: range) -> list[layout.Entry]:
        """Where the chunks *numbers*, which follow each other, are."""
        found: list[layout.Entry] = []
        while numbers:
            leaf, slot = divmod(numbers.start, layout.LEAF)
            count = min(len(numbers), layout.LEAF - slot)
            found += layout.unpack_entries(self.leaf(leaf), slot, count)
            numbers = numbers[count:]
        return found

    def chunk_hashes(self, first: int, count: int) -> list[bytes]:
        """The hashes of chunks [first, first + count); zero chunks have the hash of 32 zero bytes."""
        return [self.entry(number).hash for number in range(first, first + count)]

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """``(offset, length, is_zero)``, in order, covering exactly the range; neighbours differ."""
        self._check(offset, length)
        end = offset + length
        start, state = offset, None
        for position, zero in self._changes(offset, end):
            if zero is state:
                continue
            if state is not None:
                yield start, position - start, state
            start, state = position, zero
        if state is not None:
            yield start, end - start, state

    def _changes(self, offset: int, end: int) -> Iterator[tuple[int, bool]]:
        """Positions at which zero or non-zero chunks may begin (like ones may follow each other)."""
        span = layout.CHUNK * layout.LEAF
        for leaf in range(offset // span, -(-end // span)):
            base = leaf * span
            if not self.table.leaf(leaf).raw:
                yield max(base, offset), True
                continue
            low = max(offset - base, 0) // layout.CHUNK
            high = -(-(min(end, base + span) - base) // layout.CHUNK)
            part = self.leaf(leaf)[low * layout.ENTRY.size : high * layout.ENTRY.size]
            for number, (raw,) in enumerate(_RAW.iter_unpack(part), low):
                yield max(base + number * layout.CHUNK, offset), not raw

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise errors.InputError(f"image {self.image_id}: {length} bytes at {offset} are outside of its {self.size}")

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead:
            self._ahead.close()

    def _get(self, numbers: range, *, follow: bool = True) -> list[bytes]:
        """The chunks *numbers*, from the cache, by reading ahead, or from the packs."""
        ahead = self._ahead
        self._announce(numbers.start, numbers.stop)
        coming = ahead.coming(numbers) if ahead else {}
        found: dict[int, bytes] = {}
        with self._lock:
            for number in numbers:
                data = self._chunks.get(number)
                if data is not None:
                    self._chunks.move_to_end(number)
                    found[number] = data
        self._take([number for number in numbers if number not in found and number not in coming], found)
        found |= readahead.arrived(coming)
        self._take([number for number in numbers if number not in found], found)
        if ahead and follow:
            ahead.note(numbers, self._chunks.__contains__)
        return [found[number] for number in numbers]

    def _announce(self, first: int, end: int) -> None:
        """When one read follows another, have the disk fetch what comes next.

        An image with a history lies in pieces in many packs; read one after the other, each would be waited for.
        """
        follows, self._end = first in (self._end, self._end - 1), end
        if not follows:
            self._announced = self._met = end
        elif self._announced < min(end + _ANNOUNCED // 2, self.chunks):
            coming = range(max(self._announced, end), min(end + _ANNOUNCED, self.chunks))
            self._announced = end + _ANNOUNCED
            if self._ahead:
                self._ahead.announce(lambda: self._tell(coming))
            else:
                self._tell(coming)

    def _tell(self, coming: range) -> None:
        """The disk may begin to read the chunks *coming*, and the directories of those that come later.

        To find a file is to wait behind all that the disk has been told, if the kernel has not met it yet.
        """
        with contextlib.suppress(errors.BlkckptError):  # it shows when it is read
            if coming.stop > self._met:
                later = range(coming.start, min(coming.start + _MET, self.chunks))
                self._met = later.stop
                for pack in {entry.pack for entry in self._entries(later) if entry.raw}:
                    self._packs.exists(pack)
            self._packs.hint([entry for entry in self._entries(coming) if entry.raw])

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the disk fetch what these ranges, ``(offset, length)``, need: they will be read, by whomever."""
        with contextlib.suppress(errors.BlkckptError):  # it shows when it is read
            for offset, length in ranges:
                numbers = range(offset // layout.CHUNK, -(-min(offset + length, self.size) // layout.CHUNK))
                self._packs.hint([entry for entry in map(self.entry, numbers) if entry.raw], scattered=True)

    def _take(self, numbers: Sequence[int], found: dict[int, bytes]) -> None:
        if numbers:
            fresh = self._fetch(numbers)
            found |= fresh
            self._remember(fresh)

    def _fetch(self, numbers: Sequence[int]) -> dict[int, bytes]:
        return self._follow(lambda _: self._read_chunks(numbers))

    def _read_chunks(self, numbers: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        decode = self._packs.codec.decode
        for number, entry, payload in self._payloads(numbers, [self.entry(number) for number in numbers]):
            if payload is None:
                length = layout.chunk_length(self.size, number)
                found[number] = layout.ZERO_CHUNK if length == layout.CHUNK else bytes(length)
            else:
                found[number] = decode(payload, entry.raw, entry.hash, self._name(number, entry))
        return found

    def _payloads(
        self, numbers: Sequence[int], entries: Sequence[layout.Entry]
    ) -> Iterator[tuple[int, layout.Entry, memoryview | None]]:
        """The stored bytes of chunks, unchecked; None for zeros.  Neighbours are read together."""
        wanted = [entry for entry in entries if entry.raw]
        payloads = self._packs.payloads(wanted, f"image {self.image_id} chunk {numbers[0]}…")
        for number, entry in zip(numbers, entries, strict=True):
            yield number, entry, next(payloads)[1] if entry.raw else None

    def _name(self, number: int, entry: layout.Entry) -> str:
        return f"image {self.image_id} chunk {number} (pack {entry.pack:016x} at {entry.offset})"

    def _remember(self, fresh: Mapping[int, bytes]) -> None:
        with self._lock:
            for number, data in fresh.items():
                if data is not layout.ZERO_CHUNK:
                    self._chunks[number] = data
            while len(self._chunks) > self._limit:
                self._chunks.popitem(last=False)


def changed(old: ImageReader, new: ImageReader) -> Iterator[tuple[int, int]]:
    """``(first chunk, count)`` of the runs in which two images of one size differ; reads no data, only leaves."""
    if old.size != new.size:
        raise errors.InputError(f"images {old.image_id} and {new.image_id} are not of the same size")
    before, after = old.table.leaves, new.table.leaves
    different = np.flatnonzero((before["hash"] != after["hash"]).any(axis=1) | (before["raw"] != after["raw"]))
    for leaf in different.tolist():
        left, right = old.entries(leaf), new.entries(leaf)
        mask = (left["hash"] != right["hash"]).any(axis=1) | (left["raw"] != right["raw"])
        edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
        for low, high in edges.reshape(-1, 2).tolist():
            yield leaf * layout.LEAF + low, high - low

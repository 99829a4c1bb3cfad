"""Map files: the live map that requests use, and the durable map it is written to at flush.

======================  ================================================================================
:class:`LiveMap`        shared mapping of a tmpfs file: survives the death of the server, not of the
                        machine; the truth while the machine runs
:class:`DurableMap`     two-slot pages beside the layer's data: the truth after power loss
======================  ================================================================================

The live map remembers which durable pages it is ahead of.  :meth:`LiveMap.take_dirty` takes their bits *before* the
layer's data is synced: a bit set meanwhile stays dirty for the next flush, so that no bit becomes durable before its
block (rule D2).

Where the C fast path is loaded it sets bits too, without a lock: every change then goes through its atomic functions
(``fast``; rule F8), and whoever takes the dirty pages first lets the requests in flight finish (F7), since one may
have set its bit and not yet marked the page, while another has been answered because of that bit.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from blkckpt import durable, errors
from blkckpt.disk import blockmap, blocks, fastpath, fileio
from blkckpt.disk import format as formats

Pages = dict[int, bytes]
"""Durable map page number → its 4032 bytes of bits."""


class Marks(Protocol):
    """What changed blocks are marked in."""

    def mark(self, first: int, end: int) -> None: ...


class _Unmarked:
    """Takes the marks of changes that nobody asks for: the image that the next one is relative to has them."""

    def mark(self, first: int, end: int) -> None:
        return


UNMARKED = _Unmarked()


class LiveMap(blockmap.BlockMap):
    """The bits of one layer.  Tests need no lock; :meth:`mark` and :meth:`unmark` take it."""

    __slots__ = ("_dirty", "_durable", "_lock", "fast", "fd", "path")

    def __init__(self, path: Path, descriptor: int, size: int, backed: bytearray) -> None:
        mapping = mmap.mmap(descriptor, formats.HEADER + blockmap.byte_count(blocks.count(size)))
        super().__init__(memoryview(mapping)[formats.HEADER :], blocks.count(size), backed=backed, back=self._allocate)
        self.path = path
        self.fd = descriptor
        self._lock = threading.Lock()
        self._dirty = bytearray(formats.slot_count_of(self.blocks))  # one byte a durable page
        self._durable: DurableMap | None = None
        library = fastpath.library()
        self.fast = None if library is None else fastpath.Map(library, self.bits, self.blocks, backed)

    @classmethod
    def create(cls, path: Path, layer: str, size: int, boot: str, pages: Pages | None = None) -> LiveMap:
        """A new map holding *pages*.

        It appears under its name only when it is whole: a server that is killed while it opens its layers must not
        leave a map that the next one takes for the truth.
        """
        temporary = path.with_name(f".new-{layer}")
        temporary.unlink(missing_ok=True)
        count = blockmap.byte_count(blocks.count(size)) >> blockmap.PAGE_SHIFT
        descriptor = -1
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.ftruncate(descriptor, formats.HEADER + (count << blockmap.PAGE_SHIFT))
            os.pwrite(descriptor, formats.encode_live_header(layer, size, boot), 0)
            self = cls(path, descriptor, size, bytearray(count))
            for page, bits in (pages or {}).items():
                self.write_bytes(page * formats.SLOT_BYTES, bits)
            durable.publish(temporary, path)
            return self
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise errors.from_os_error(error, f"creating the live map {path}") from error

    @classmethod
    def load(cls, path: Path, layer: str, size: int, boot: str) -> LiveMap | None:
        """The map that an earlier server of this boot left, or ``None``.  A foreign or torn file is an error (D12)."""
        try:
            descriptor = durable.open_checked(path, os.O_RDWR, "live map")
        except errors.NotFoundError:
            return None
        try:
            found = formats.check_live_header(os.pread(descriptor, formats.HEADER, 0), layer, size, path)
            if found != boot:
                os.close(descriptor)
                return None
            want = formats.HEADER + blockmap.byte_count(blocks.count(size))
            if os.fstat(descriptor).st_size != want:
                raise errors.CorruptError(f"the live map {path} is cut short; remove it to go on from the durable map")
            return cls(path, descriptor, size, _backed_pages(descriptor, want))
        except errors.CorruptError:
            os.close(descriptor)
            raise

    def attach(self, durable_map: DurableMap) -> None:
        """Follow *durable_map*: pages changed from now on are dirty."""
        self._durable = durable_map
        if self.fast is not None:
            self.fast.attach(durable_map.reserved, self._dirty, formats.SLOT_BLOCKS)

    def mark(self, first: int, end: int) -> None:
        """Set a range, from any thread; ENOSPC (of the live or the durable map) before any bit changes."""
        if not self.all_set(first, end):
            with self._lock:
                self._touch_locked(first, end)
                self.set_range(first, end)

    def unmark(self, first: int, end: int) -> None:
        """Clear a range, from any thread."""
        with self._lock:
            self._touch_locked(first, end)
            self.clear_range(first, end)

    def absorb(self, other: blockmap.BlockMap) -> None:
        """Merge *other* in.  Only for a map without a durable one."""
        with self._lock:
            self.merge(other)

    def _touch_locked(self, first: int, end: int) -> None:
        if self._durable is not None:
            low, high = first // formats.SLOT_BLOCKS, (end - 1) // formats.SLOT_BLOCKS + 1
            self._durable.reserve(low, high)
            self._dirty[low:high] = b"\1" * (high - low)

    def _fill(self, first: int, end: int, value: int) -> None:
        if self.fast is None:
            super()._fill(first, end, value)
        elif value:
            self.fast.set(first, end)
        else:
            self.fast.clear(first, end)

    def _join(self, page: int, data: bytes) -> None:
        if self.fast is None:
            super()._join(page, data)
        else:
            self.fast.merge(page << blockmap.PAGE_SHIFT, data)

    def take_dirty(self) -> Pages:
        """The bits of every page changed since it was last taken."""
        if self.fast is not None:
            fastpath.settle()
        with self._lock:
            return {page: self.slot_bits(page) for page in self._taken_locked()}

    def _taken_locked(self) -> Iterator[int]:
        """The dirty pages; each is clean before its bits are looked at, so that a later change marks it again."""
        page = self._dirty.find(1)
        while page >= 0:
            if self.fast is not None:
                self.fast.take(page)
            else:
                self._dirty[page] = 0
            yield page
            page = self._dirty.find(1, page + 1)

    def give_back(self, pages: Iterable[int]) -> None:
        """These pages did not become durable after all."""
        with self._lock:
            for page in pages:
                self._dirty[page] = 1

    def set_again(self, page: int, bits: bytes) -> None:
        """Set what is set in *bits*, those of a durable page."""
        start = page * formats.SLOT_BLOCKS
        page_map = blockmap.BlockMap(bits.ljust(blockmap.PAGE, b"\0"), min(formats.SLOT_BLOCKS, self.blocks - start))
        for first, end in page_map.set_runs(0, page_map.blocks):
            self.mark(start + first, start + end)

    def slot_bits(self, page: int) -> bytes:
        """The bits of one durable page."""
        return self.read_bytes(page * formats.SLOT_BYTES, formats.SLOT_BYTES)

    def all_pages(self) -> Pages:
        """Every durable page that has a set bit."""
        numbers: set[int] = set()
        for page, _ in self.pages():
            start = page << blockmap.PAGE_SHIFT
            numbers.update(range(start // formats.SLOT_BYTES, (start + blockmap.PAGE - 1) // formats.SLOT_BYTES + 1))
        return {page: self.slot_bits(page) for page in sorted(numbers) if page < formats.slot_count_of(self.blocks)}

    def differing(self, pages: Pages) -> set[int]:
        """The durable pages whose bits here are not those of *pages* (absent: clear)."""
        mine, clear = self.all_pages(), bytes(formats.SLOT_BYTES)
        return {page for page in mine.keys() | pages.keys() if mine.get(page, clear) != pages.get(page, clear)}

    def lacks(self, pages: Pages) -> bool:
        """Whether a bit of *pages* is not set here."""
        return any(
            int.from_bytes(bits, "little") & ~int.from_bytes(self.slot_bits(page), "little")
            for page, bits in pages.items()
        )

    def _allocate(self, page: int) -> None:
        """Back 4096 bytes of the mapping, so that touching them cannot be a SIGBUS on a full tmpfs."""
        os.posix_fallocate(self.fd, formats.HEADER + (page << blockmap.PAGE_SHIFT), blockmap.PAGE)

    def reopen(self) -> int:
        """A new read-only descriptor for a child process; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give up the file; the bits stay readable for whoever still holds the object, and go with the last of them.

        ``back`` refers to this object: kept, that cycle would hold the mapping (32 MiB for a TiB) until some later
        garbage collection.
        """
        self._back = _no_more
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


def _no_more(_page: int) -> None:
    raise OSError(errno.EBADF, "the live map is closed")


def _backed_pages(descriptor: int, size: int) -> bytearray:
    backed = bytearray((size - formats.HEADER) >> blockmap.PAGE_SHIFT)
    offset = formats.HEADER
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        first = (start - formats.HEADER) >> blockmap.PAGE_SHIFT
        last = (min(offset, size) - 1 - formats.HEADER) >> blockmap.PAGE_SHIFT
        backed[first : last + 1] = b"\1" * (last + 1 - first)
    return backed


class DurableMap:
    """The two-slot map file of one layer.  The caller serialises writers."""

    def __init__(self, file: fileio.File, layer: str, size: int) -> None:
        self.file = file
        self._layer = layer
        self._pages = formats.slot_count(size)
        self._sequence: dict[int, int] = {}
        self.reserved = bytearray(self._pages)  # one byte a page: space for it has been allocated

    @classmethod
    def create(cls, path: Path, layer: str, size: int) -> DurableMap:
        """A new map without a set bit, durable but for its name."""
        file = fileio.create_own(path, formats.HEADER + formats.slot_count(size) * 2 * formats.SLOT)
        try:
            file.pwrite(formats.encode_durable_header(layer, size), 0)
            file.datasync()
        except BaseException:
            file.close()
            raise
        return cls(file, layer, size)

    @classmethod
    def load(cls, path: Path, layer: str, size: int, *, clean: bool, writable: bool = True) -> tuple[DurableMap, Pages]:
        """The map and its pages.  Damage is a CorruptError, never an empty map (D12)."""
        file = fileio.open_own(path, "map", writable=writable)
        try:
            formats.check_durable_header(file.pread(formats.HEADER, 0), layer, size, path)
            want = formats.HEADER + formats.slot_count(size) * 2 * formats.SLOT
            if file.size() != want:
                raise errors.CorruptError(f"the map {path} has {file.size()} bytes, not {want}; it was cut or extended")
            self = cls(file, layer, size)
            return self, self._load_pages(clean)
        except BaseException:
            file.close()
            raise

    def _load_pages(self, clean: bool) -> Pages:
        pages: Pages = {}
        pair = 2 * formats.SLOT
        done = 0
        for offset, length, hole in self.file.segments(formats.HEADER, self._pages * pair):
            if hole:
                continue
            low, high = (offset - formats.HEADER) // pair, -(-(offset + length - formats.HEADER) // pair)
            for page in range(max(low, done), high):
                data = self.file.pread(pair, formats.HEADER + page * pair)
                sequence, bits = formats.choose_slot(self._layer, page, data, self.file.path, clean=clean)
                if sequence:
                    self._sequence[page] = sequence
                    pages[page] = bits
            done = max(done, high)
        return pages

    def read(self) -> Pages:
        """The pages as they are in the file."""
        return self._load_pages(clean=False)

    def reserve(self, low: int, high: int) -> None:
        """Allocate pages ``[low, high)``: the guest's write gets ENOSPC now, not its flush later (D10)."""
        if self.reserved.find(0, low, high) < 0:
            return
        for page in range(low, high):
            if not self.reserved[page]:
                self.file.allocate(formats.slot_offset(page, 0), 2 * formats.SLOT)
                self.reserved[page] = 1

    def write(self, pages: Pages) -> None:
        """Make *pages*, and all that was written before, durable.  Costs nothing if there is nothing.

        Each page goes to the slot that does not hold its last durable version.  The first sync is for what an earlier
        process wrote and did not live to sync: this flush vouches for it (D3), and it must not be the only version of
        a page that is about to lose its other slot.
        """
        self.file.datasync()
        for page, bits in pages.items():
            sequence = self._sequence.get(page, 0) + 1
            slot = formats.encode_slot(self._layer, page, sequence, bits)
            self.file.pwrite(slot, formats.slot_offset(page, sequence))
        self.file.datasync()
        for page in pages:
            self._sequence[page] = self._sequence.get(page, 0) + 1

    def close(self) -> None:
        self.file.close()

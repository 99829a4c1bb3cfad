"""Reading a retained image: the frozen layers of a VM, from outside, while the VM runs on above them.

What a reference says (:mod:`blkckpt.store.reference`) is only where to look.  The VM's state file must name an overlay
that keeps this very image; what lies below that overlay, as the state has it, are the layers: overlays with their
durable maps, and the raw base.  They are opened read-only and every one is checked as the disk server checks it (rules
D12, S4).

Why what is read is the disk of the checkpoint, and stays it:

* The claim (:mod:`blkckpt.disk.claim`) keeps the overlay above from being committed into them.  It is taken before the
  state is read for good.
* Until then the layers change only by commits among themselves, which leave the content of the whole as it is (D1).
  Such a commit makes a block durable below, data and bit, before it clears the bit above, and clears no data.  The
  maps are read once, newest first: a block is found above, or it is below already.
* All of it was durable before the state named it (:meth:`blkckpt.disk.retaining.Retainer.keep`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from blkckpt import durable, errors, paths
from blkckpt.disk import blockmap, blocks, chain, claim, fileio, layer, maps, stack
from blkckpt.disk import format as formats
from blkckpt.store import images, layout, reference

ATTEMPTS, PAUSE = 20, 0.05
"""A layer that is gone has been committed into the one below it since the state was read; then it is read again."""


class _Layer:
    """An overlay for reading, as :mod:`blkckpt.disk.chain` takes it."""

    __slots__ = ("bits", "file", "retained")

    def __init__(self, file: fileio.File, bits: blockmap.BlockMap) -> None:
        self.file, self.bits, self.retained = file, bits, False


class RetainedReader(images.ImageReader):
    """The disk of a retained checkpoint, as its image would be.  It has no table: what asks for one gets RetainedError.

    No hash is checked (there is none); the maps have their checksums.  Holds the claim until it is closed.
    """

    def __init__(self, found: reference.Reference, view: chain.View, held: contextlib.ExitStack) -> None:
        self.reference, self.size = found, found.size
        self._view, self._held = view, held

    def __getattr__(self, name: str) -> Any:
        if name == "table":
            raise reference.RetainedError(self.reference)
        raise AttributeError(name)

    def __del__(self) -> None:
        self.close()

    @property
    def image_id(self) -> str:
        return self.reference.image

    @property
    def chunks(self) -> int:
        return layout.chunk_count(self.size)

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes at *offset*; InputError outside of the image."""
        self._check(offset, length)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buf: memoryview, offset: int) -> None:
        self._check(offset, len(buf))
        if len(buf):
            try:
                chain.read(self._view, buf, offset)
            except OSError as error:
                raise errors.from_os_error(error, f"reading the layers of {self.reference.owner}") from error

    def chunk(self, number: int) -> bytes:
        if not 0 <= number < self.chunks:
            raise errors.InputError(f"image {self.image_id} has no chunk {number}")
        return self.read(number * layout.CHUNK, layout.chunk_length(self.size, number))

    def leaf(self, leaf: int) -> bytes:
        raise reference.RetainedError(self.reference)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """As those of an image: a chunk is zero as a whole, or data."""
        self._check(offset, length)
        end = offset + length
        start, state = offset, None
        for position, zero in self._states(offset, end):
            if zero is state:
                continue
            if state is not None and position > start:
                yield start, position - start, state
                start = position
            state = zero
        if state is not None and start < end:
            yield start, end - start, state

    def _states(self, offset: int, end: int) -> Iterator[tuple[int, bool]]:
        """Where runs of zero chunks, and of others, may begin inside the range."""
        low = offset - offset % layout.CHUNK
        high = min(-(-end // layout.CHUNK) * layout.CHUNK, self.size)
        position = low
        for start, count, kind in chain.extents(self._view, low, high - low) if high > low else ():
            if not kind & chain.ZERO:
                continue
            first = -(-start // layout.CHUNK) * layout.CHUNK
            until = start + count
            last = until if until == self.size else until - until % layout.CHUNK
            if first < last:
                if position < first:
                    yield max(position, offset), False
                yield max(first, offset), True
                position = last
        if position < min(high, end):
            yield max(position, offset), False

    def close(self) -> None:
        """Give the claim up, and the files."""
        held = self.__dict__.get("_held")
        if held is not None:
            held.close()


def open_image(found: reference.Reference) -> RetainedReader | None:
    """The reader of what *found* refers to; ``None`` if its VM does not keep that (any more)."""
    failure: errors.BlkckptError | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        try:
            return _open(found)
        except (errors.NotFoundError, errors.CorruptError) as error:  # gone, or being written, since the state was read
            failure = error
        except BlockingIOError:
            failure = errors.StateError(f"{found.owner} is being let go")
    assert failure is not None
    raise failure


def hold(found: reference.Reference) -> int:
    """Claim what *found* refers to; closing the descriptor gives it up.  StateError if the VM does not keep it."""
    vm = paths.home(found.home).vm(found.vm)
    with contextlib.suppress(BlockingIOError, errors.NotFoundError):
        kept = _kept(vm, found)
        if kept is not None:
            descriptor = claim.shared(_cut(vm, *kept))
            if _kept(vm, found) is not None:
                return descriptor
            os.close(descriptor)
    raise errors.StateError(f"the disks of VM {found.vm} do not keep {found.owner} (any more)")


def _kept(vm: paths.VmPaths, found: reference.Reference) -> tuple[formats.DiskState, int] | None:
    """The disk, and which of its overlays keeps what *found* refers to."""
    try:
        state = formats.decode_state(durable.read_small(vm.state, "the disks' state"), vm.state)
    except errors.NotFoundError:
        return None
    disks = [disk for disk in state.disks if (disk.name, disk.size) == (found.disk, found.size)]
    for disk in disks if state.vm_id == found.vm_id else ():
        for index, overlay in enumerate(disk.overlays):
            if overlay.retained is not None and overlay.retained.image == found.image:
                return disk, index
    return None


def _cut(vm: paths.VmPaths, disk: formats.DiskState, index: int) -> Path:
    return stack.Place(vm, disk.name, disk.size, "").data(disk.overlays[index].id)


def _open(found: reference.Reference) -> RetainedReader | None:
    vm = paths.home(found.home).vm(found.vm)
    before = _kept(vm, found)
    if before is None:
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, claim.shared(_cut(vm, *before)))
        kept = _kept(vm, found)
        if kept is None or _cut(vm, *kept) != _cut(vm, *before):
            raise errors.NotFoundError(f"{found.owner} has moved")
        disk, index = kept
        place = stack.Place(vm, disk.name, disk.size, "")
        layers = tuple(_open_layer(place, overlay.id, undo) for overlay in disk.overlays[index + 1 :])
        base = fileio.open_base(Path(disk.path), disk.size, writable=False)
        undo.callback(base.close)
        view = chain.View(disk.size, cast(tuple[layer.Overlay, ...], layers), base, cast(maps.LiveMap, maps.UNMARKED))
        return RetainedReader(found, view, undo.pop_all())


def _open_layer(place: stack.Place, layer_id: str, undo: contextlib.ExitStack) -> _Layer:
    file = fileio.open_own(place.data(layer_id), "overlay", writable=False)
    undo.callback(file.close)
    if file.size() != place.size:
        raise errors.CorruptError(f"the overlay {file.path} has {file.size()} bytes, the disk {place.size}; it was cut")
    durable_map, pages = maps.DurableMap.load(place.map(layer_id), layer_id, place.size, clean=False, writable=False)
    durable_map.close()
    length = blockmap.byte_count(blocks.count(place.size))
    bits = blockmap.BlockMap(bytearray(length), blocks.count(place.size), backed=bytearray(length // blockmap.PAGE))
    for page, data in pages.items():
        bits.write_bytes(page * formats.SLOT_BYTES, data)
    return _Layer(file, bits)

"""A VM's own disks go back to a checkpoint.

The disks are opened here, without a server, through the same :class:`blkckpt.disk.group.DiskGroup` that serves them:
its lock keeps out a running VM (rule D12), its recovery ends whatever a crash left, and what is written here is
written as a guest would write it, so that the changed-block tracking stays true and the next checkpoint copies what
the revert changed.

Phases::

    compare   every chunk of the disk against the image's hash; chunks that differ are read from the store and
              checked, so that a damaged store is found while the disk is still whole        (writes nothing)
    mark      unfinished.json, durable
    write     the chunks that differ; flush
    clear     the VM's lineage is noted, the mark goes

A retained checkpoint of the VM itself, if it is its youngest and nobody reads it, needs none of this: an empty overlay
takes the place of the one above it, in one replacement of the state file.

A crash before *mark* has changed nothing.  After it the VM is refused by whoever would serve it until the revert is
run again, which compares anew and so writes only what is still missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from blkckpt import errors, paths
from blkckpt.disk import disk
from blkckpt.restore import atrest
from blkckpt.store import images, layout, manifest, retained
from blkckpt.store import store as stores
from blkckpt.vm import definition, lineage, unfinished

Progress = Callable[[str, int, int | None], None]
"""Called as (stage, bytes done, bytes in all) from the calling thread."""

_HOLE_IS_ZERO = 2
_SPAN = 32 << 20
"""Bytes asked of ``extents`` at once."""


@dataclass(frozen=True, slots=True)
class Reverted:
    """What a revert did to one disk, in bytes."""

    name: str
    compared: int
    written: int


def disks(
    vm: paths.VmPaths,
    owner: definition.VmDefinition,
    store: stores.Store,
    checkpoint: manifest.Manifest,
    progress: Progress,
) -> tuple[Reverted, ...]:
    """Take all disks of *vm* back to *checkpoint*.  The VM's disks must not be served by anybody.

    Raises :class:`errors.StateError` when they are, :class:`errors.InputError` when the checkpoint's disks are not
    this VM's, :class:`errors.CorruptError` when the store is damaged; nothing has been written then.
    """
    _check_same_disks(owner, checkpoint)
    _check_mark(vm)
    with atrest.opened(vm, owner) as ours:
        if checkpoint.retained and checkpoint.vm == vm.name and ours.retained.rewind(checkpoint.name):
            ours.close()
            lineage.write(vm, f"{checkpoint.vm}@{checkpoint.name}")
            unfinished.clear(vm)
            return tuple(Reverted(name, 0, 0) for name in sorted(ours.disks))
        readers = {one.name: store.image(one.image) for one in checkpoint.disks}
        plans = {name: _compare(ours.disks[name], reader, store, progress) for name, reader in sorted(readers.items())}
        unfinished.write(vm, unfinished.REVERT, f"{checkpoint.vm}@{checkpoint.name}")
        for name, plan in plans.items():
            _write(ours.disks[name], readers[name], plan, progress)
        ours.close()
        lineage.write(vm, f"{checkpoint.vm}@{checkpoint.name}")
        unfinished.clear(vm)
        for reader in readers.values():
            reader.close()
    return tuple(Reverted(name, readers[name].size, sum(length for _, length in plan)) for name, plan in plans.items())


def _check_same_disks(owner: definition.VmDefinition, checkpoint: manifest.Manifest) -> None:
    ours = {one.name: one.size for one in owner.disks}
    theirs = {one.name: one.size for one in checkpoint.disks}
    if ours != theirs:
        raise errors.InputError(
            f"the disks of VM {owner.name} ({_list(ours)}) are not those of the checkpoint ({_list(theirs)}); "
            "restore it as a new VM instead: blkckpt restore "
            f"{checkpoint.vm}@{checkpoint.name} --as NEW"
        )


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {size} bytes" for name, size in sorted(sizes.items())) or "none"


def _check_mark(vm: paths.VmPaths) -> None:
    """An interrupted revert may be redone; anything still at work may not be disturbed."""
    mark = unfinished.read(vm)
    if mark is not None and (mark.alive or mark.what != unfinished.REVERT):
        unfinished.check(vm)


def _compare(
    target: disk.Disk, reader: images.ImageReader, store: stores.Store, progress: Progress
) -> list[tuple[int, int]]:
    """The ranges (offset, length), in whole chunks, that differ; their new contents have been read and checked."""
    found: list[tuple[int, int]] = []
    for start in range(0, reader.size, _SPAN):
        length = min(_SPAN, reader.size - start)
        for offset, size, zero in reader.extents(start, length):
            differing = (
                _zero_differs(target, offset, size) if zero else _data_differs(target, reader, store, offset, size)
            )
            for place in differing:
                if not zero:
                    reader.read(*place)
                _append(found, place)
        progress("compare", start + length, reader.size)
    return found


def _append(ranges: list[tuple[int, int]], new: tuple[int, int]) -> None:
    """Add *new*, joined with the last one where they touch."""
    if ranges and sum(ranges[-1]) == new[0]:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + new[1])
    else:
        ranges.append(new)


def _chunks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + length, layout.CHUNK):
        yield start, min(layout.CHUNK, offset + length - start)


def _data_differs(
    target: disk.Disk, reader: images.ImageReader, store: stores.Store, offset: int, length: int
) -> Iterator[tuple[int, int]]:
    buffer = bytearray(layout.CHUNK)
    for start, size in _chunks(offset, length):
        view = memoryview(buffer)[:size]
        target.pread(view, start)
        if isinstance(reader, retained.RetainedReader):
            same = view == reader.read(start, size)
        else:
            same = store.packs.codec.digest(view) == reader.entry(start // layout.CHUNK).hash
        if not same:
            yield start, size


def _zero_differs(target: disk.Disk, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Where the disk, wanted as zeros, holds something else.  Holes are not read."""
    buffer = bytearray(layout.CHUNK)
    for start, size, kind in target.extents(length, offset):
        if kind & _HOLE_IS_ZERO:
            continue
        for place, count in _chunks(start, size):
            view = memoryview(buffer)[:count]
            target.pread(view, place)
            if bytes(view) != bytes(count):
                yield place, count


def _write(target: disk.Disk, reader: images.ImageReader, plan: list[tuple[int, int]], progress: Progress) -> None:
    total, done = sum(length for _, length in plan), 0
    for offset, length in plan:
        for start, size, zero in reader.extents(offset, length):
            if zero:
                target.zero(size, start)
            else:
                for place, count in _chunks(start, size):
                    target.pwrite(reader.read(place, count), place)
        done += length
        progress("write", done, total)
    target.flush()

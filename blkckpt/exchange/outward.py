"""An image of a checkpoint to a file or a pipe.

==============  ==========================================================================================
raw file        written in place in a temporary file by several threads, at any order; holes stay holes
raw pipe        front to back, read ahead by several threads; zeros are written
other formats   ``qemu-img convert`` from a private NBD server (:mod:`blkckpt.exchange.server`)
==============  ==========================================================================================

In each case every byte has had its hash checked (rule X1), and a file has its name only when all of it is there and
durable (rule X2).

A RAM block is an image as a disk is; memory by physical address is :mod:`blkckpt.exchange.core`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from blkckpt import durable, errors
from blkckpt.exchange import inuse, pump, qemuimg, server
from blkckpt.store import images, manifest
from blkckpt.store import store as stores

_ZEROS = bytes(1 << 20)

Progress = Callable[[int, int], None]


def disk(one: manifest.Manifest, name: str | None) -> manifest.DiskImage:
    """The disk called *name*; None means the only one."""
    known = ", ".join(each.name for each in one.disks)
    if name is None and len(one.disks) == 1:
        return one.disks[0]
    if name is None:
        raise errors.InputError(f"{one.vm}@{one.name} has {len(one.disks)} disks; choose with --disk: {known}")
    for each in one.disks:
        if each.name == name:
            return each
    raise errors.NotFoundError(f"{one.vm}@{one.name} has no disk {name[:80]!r}; it has {known}")


def main_memory(one: manifest.Manifest, name: str | None) -> manifest.RamBlock:
    """The RAM block called *name*; None means the largest, which is the guest's main memory."""
    if one.memory is None or not one.memory.blocks:
        raise errors.InputError(f"{one.vm}@{one.name} holds disks only; it has no memory to export")
    if name is None:
        return max(one.memory.blocks, key=lambda block: block.size)
    for block in one.memory.blocks:
        if block.name == name:
            return block
    known = ", ".join(block.name for block in one.memory.blocks)
    raise errors.NotFoundError(f"{one.vm}@{one.name} has no RAM block {name[:80]!r}; it has {known}")


def to_file(place: stores.Store, image: str, path: Path, progress: Progress, *, force: bool) -> int:
    """Write *image* to the raw file *path*; returns its bytes of data."""
    with inuse.using(place, [image], "export"), target(path, force=force) as (descriptor, _):
        reader = place.image(image, cache=pump.CACHE)
        raw(reader, descriptor, progress)
        return pump.data_bytes(reader)


def raw(reader: images.ImageReader, descriptor: int, progress: Progress) -> None:
    """*reader* into an empty file, sparse."""

    os.ftruncate(descriptor, reader.size)
    pump.scatter(reader, lambda offset, data: write_at(descriptor, data, offset), progress)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """All of *data*, at *offset*."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def to_pipe(place: stores.Store, image: str, descriptor: int, progress: Progress) -> None:
    """Write *image*, all of it, to *descriptor*."""
    with inuse.using(place, [image], "export"):
        reader = place.image(image, cache=pump.CACHE)
        done = 0
        for length, data in pump.in_order(reader):
            for piece in _zeros(length) if data is None else (data,):
                _write_all(descriptor, piece)
            done += length
            progress(done, reader.size)


def convert(
    place: stores.Store,
    one: manifest.Manifest,
    chosen: manifest.DiskImage,
    path: Path,
    kind: str,
    progress: Progress,
    *,
    compress: bool,
    force: bool,
) -> None:
    """Write a disk to *path* as an image of format *kind*."""
    with target(path, force=force) as (_, temporary), server.private(place, one) as serving:
        options = ("-c",) if compress else ()
        try:
            qemuimg.convert(serving.uri(chosen.name), "raw", str(temporary), kind, chosen.size, progress, options)
        except errors.BlkckptError as error:
            if found := server.complaints(serving):
                raise errors.CorruptError(f"{one.vm}@{one.name} cannot be exported: {found}") from error
            raise


@contextlib.contextmanager
def target(path: Path, *, force: bool) -> Iterator[tuple[int, Path]]:
    """A new file that will be *path*."""
    if not path.parent.is_dir():
        raise errors.NotFoundError(f"there is no directory {path.parent} to write {path.name} to")
    if path.exists() or path.is_symlink():
        if not path.is_file() or path.is_symlink():
            raise errors.InputError(f"{path} is not a regular file; write to a file, or to a pipe with -o -")
        if not force:
            raise errors.InputError(f"{path} exists already; --force replaces it")
    try:
        with durable.new_file(path, replace=force) as opened:
            yield opened
    except FileExistsError as error:
        raise errors.StateError(f"{path} has appeared meanwhile; it is left as it is") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path}") from error


def _zeros(length: int) -> Iterator[bytes]:
    for _ in range(length // len(_ZEROS)):
        yield _ZEROS
    yield _ZEROS[: length % len(_ZEROS)]


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

"""A checkpoint's memory on its way into a new QEMU: raw images to map, and the stream that goes with them.

All of it lives in ``vms/NAME/incoming`` of the VM that is to run and can be removed when that QEMU runs: the mapping
keeps the file's contents for as long as the machine lives.

*Lazy*: each block that the command line can take from a file gets a raw image — a hard link to the one kept with
the checkpoint (same boot, same store image: :func:`blkckpt.memory.image.usable`), a copy-less share of an immutable
file; else it is materialised from the store first.  The stream then holds everything but those blocks' pages.

*Eager*: the stream holds every page, read from the kept raw image where there is one (no chunk needs to be
decompressed then), else from the store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from blkckpt import errors, paths
from blkckpt.memory import generate, image, records, skeleton
from blkckpt.store import manifest
from blkckpt.store import store as stores

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a checkpoint's memory consists of, opened for reading."""

    store: stores.Store
    image: manifest.MemoryImage
    skeleton: skeleton.Skeleton
    kept: Path | None = None
    """Where raw images of the blocks may lie."""

    def raw(self, block: manifest.RamBlock) -> Path | None:
        """The whole raw image of *block* that was kept with the checkpoint, if there is one."""
        if self.kept is None:
            return None
        path = self.kept / image.file_names([each.name for each in self.image.blocks])[block.name]
        return path if image.usable(path, block.size, block.image) else None


def directory(vm: paths.VmPaths) -> Path:
    """Where the memory of *vm* waits for its QEMU."""
    return vm.root / "incoming"


def open_memory(store: stores.Store, checkpoint: manifest.Manifest, kept: Path | None = None) -> Memory:
    """Read the skeleton of *checkpoint*; raw images may lie in *kept*.

    Raises :class:`errors.InputError` when the checkpoint has no memory.
    """
    if checkpoint.memory is None:
        raise errors.InputError(f"{checkpoint.vm}@{checkpoint.name} holds disks only; there is no memory to go on from")
    size = checkpoint.memory.skeleton_size
    if size > skeleton.MAX_SIZE:
        raise errors.CorruptError(f"{checkpoint.vm}@{checkpoint.name}: a memory skeleton of {size} bytes cannot be")
    data = store.image(checkpoint.memory.skeleton).read(0, size)
    return Memory(store, checkpoint.memory, skeleton.decode(data), kept)


def link_or_make(vm: paths.VmPaths, memory: Memory, lazy: Collection[str], progress: Progress) -> dict[str, Path]:
    """A raw image for each block named in *lazy*, in :func:`directory`."""
    place = paths.private_directory(directory(vm))
    names = image.file_names([block.name for block in memory.image.blocks])
    result = {}
    for block in memory.image.blocks:
        if block.name not in lazy:
            continue
        target = place / names[block.name]
        kept = memory.raw(block)
        if kept is None or not _link(kept, target, block):
            _materialise(memory.store, block, target, progress)
        result[block.name] = target
    return result


def _link(source: Path, target: Path, block: manifest.RamBlock) -> bool:
    """Share the image kept with the checkpoint, if it is on the same file system."""
    try:
        for suffix in ("", ".json"):
            target.with_name(target.name + suffix).unlink(missing_ok=True)
            os.link(source.with_name(source.name + suffix), target.with_name(target.name + suffix))
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOENT, errno.EPERM, errno.EMLINK):
            return False
        raise errors.from_os_error(error, f"sharing the memory image {source}") from error
    return image.usable(target, block.size, block.image)


def _materialise(store: stores.Store, block: manifest.RamBlock, target: Path, progress: Progress) -> None:
    reader = store.image(block.image)
    if reader.size != block.size:
        raise errors.CorruptError(f"the image of RAM block {block.name} has {reader.size} bytes, not {block.size}")
    image.materialise(reader, target, block.image, lambda done, total: progress("memory", done, total))


def stream(memory: Memory, lazy: Collection[str]) -> Iterator[bytes | memoryview]:
    """The pieces of the stream without the pages of *lazy*; each is valid until the next one is asked for."""
    with contextlib.ExitStack() as stack:
        readers: dict[str, generate.RamReader] = {}
        for block in memory.image.blocks:
            if block.name in lazy:
                continue
            if raw := memory.raw(block):
                readers[block.name] = stack.enter_context(image.RawReader(raw))
            else:
                readers[block.name] = memory.store.image(block.image)
        yield from generate.lean(memory.skeleton, readers, lazy)


def blocks(memory: Memory) -> tuple[records.Block, ...]:
    """The RAM blocks that have an image of their own."""
    return memory.skeleton.main


def write_stream(
    vm: paths.VmPaths, memory: Memory, lazy: Collection[str], progress: Progress, name: str = "stream"
) -> Path:
    """The stream as a file, for a QEMU that a person starts."""
    path = paths.private_directory(directory(vm)) / name
    total, done = sum(block.size for block in memory.image.blocks if block.name not in lazy), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for piece in stream(memory, lazy):
                write_all(file.fileno(), piece)
                done += len(piece)
                progress("memory", min(done, total), total)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise errors.from_os_error(error, f"writing the memory stream {path}") from error
    return path


def write_all(descriptor: int, piece: bytes | memoryview) -> None:
    """Write the whole of *piece*."""
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def remove(vm: paths.VmPaths) -> None:
    """Let go of :func:`directory`; a QEMU that mapped an image keeps it."""
    shutil.rmtree(directory(vm), ignore_errors=True)

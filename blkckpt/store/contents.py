"""What a disk and a memory skeleton hold, as a manifest says it.

Read once, when the checkpoint is published: whoever lists checkpoints then needs no more than their manifests.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import images, manifest
from blkckpt.view import source as sources

_LATER = ("blkckpt.memory.skeleton", "blkckpt.view.partitions", "blkckpt.view.probe")

if TYPE_CHECKING:
    from blkckpt.memory import skeleton
    from blkckpt.view import partitions, probe
else:
    skeleton, partitions, probe = map(lazy.Module, _LATER)

RULES = 1
"""What partitions and file systems are told by.  Who changes :mod:`partitions` or :mod:`probe` so that they may tell
something else of the same disk counts this up: what was looked at by other rules is looked at again."""


def prepare() -> None:
    """Load now what looking takes: who has to wait for something else anyway saves the time for it later."""
    for module in _LATER:
        importlib.import_module(module)


def on_disk(image: images.ImageReader) -> manifest.DiskContents | None:
    """What is on the disk in *image*; None if it cannot be read: whoever reads it is told why."""
    with contextlib.suppress(errors.BlkckptError):
        return of_disk(sources.Window(image, 0, image.size))
    return None


def of_disk(disk: sources.Source) -> manifest.DiskContents:
    """The partitions of a disk, and whether anything is known to be on it or in one of them."""
    table = partitions.partitions(disk)
    files = probe.probe(disk) is not None or any(
        probe.probe(sources.Window(disk, part.offset, part.length)) is not None
        for part in table
        if part.kind != "extended"
    )
    return manifest.DiskContents(RULES, tuple((part.number, part.offset, part.length) for part in table), files)


def look(image: images.ImageReader) -> manifest.Contents | None:
    """The contents of the skeleton in *image*, counted; None for what is none: whoever reads it is told why."""

    def used(offset: int, length: int) -> int:
        return sum(count for _, count, zero in image.extents(offset, length) if not zero)

    with contextlib.suppress(errors.CorruptError):
        found = of(skeleton.read_index(image), used)
        if all(block.name.isprintable() for block in found.blocks):
            return found
    return None


def of(index: skeleton.Index, used: Callable[[int, int], int | None]) -> manifest.Contents:
    """The contents by *index*; *used* counts the bytes that are not zero in a part of the skeleton."""
    blocks = (
        manifest.StreamBlock(block.name, block.size, used(*place) if (place := index.small.get(block.name)) else None)
        for block in index.blocks
    )
    return manifest.Contents(tuple(blocks), index.tail[1], used(*index.tail))

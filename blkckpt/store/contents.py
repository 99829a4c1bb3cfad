"""What a memory skeleton holds, as a manifest says it.

Read once, when the checkpoint is published: whoever lists checkpoints then needs no more than their manifests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from blkckpt import errors
from blkckpt.memory import skeleton
from blkckpt.store import images, manifest


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

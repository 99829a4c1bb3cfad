"""Guest memory by physical address, to a file: an ELF core or a raw image.

The bytes are those of the view's ``memory/core.elf`` and ``memory/guest-physical.raw`` (:mod:`blkckpt.view.tree`),
written without a mount.  Rules X1 and X2 hold as for :mod:`outward`'s files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from blkckpt import errors
from blkckpt.exchange import inuse, outward
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.view import chunks, content, library, nodes, tree

FORMATS = {"elf": "core.elf", "physical": "guest-physical.raw"}
"""Format → its file in the view."""

PIECE = 4 << 20


def to_file(
    place: stores.Store, one: manifest.Manifest, kind: str, path: Path, progress: outward.Progress, *, force: bool
) -> int:
    """Write the memory of *one* to *path*, sparse; returns the file's size.

    NotFoundError where it has no memory, or where that lies in the guest's address space is not known.
    """
    with contextlib.closing(library.Library(lambda: [place.path], chunks.Chunks())) as books:
        source = _find(books, one, kind).open()
        with inuse.using(place, source.images, "export"), outward.target(path, force=force) as (descriptor, _):
            os.ftruncate(descriptor, source.size)
            total, done = source.used(), 0
            for offset, length in _data(source):
                source.ahead(offset + length, PIECE)
                outward.write_at(descriptor, b"".join(source.pieces(offset, length)), offset)
                done += length
                progress(done, total)
    return source.size


def _find(books: library.Library, one: manifest.Manifest, kind: str) -> nodes.File:
    if one.memory is None:
        raise errors.NotFoundError(f"{one.vm}@{one.name} has no memory: it was taken with --disk-only")
    folder = tree.memory_folder(books, books.checkpoint(one.vm, one.name), one.memory)
    try:
        found = folder.child(FORMATS[kind])
    except errors.NotFoundError as error:
        raise errors.NotFoundError(
            f"where the memory of {one.vm}@{one.name} lies in its address space is not known; export it as raw, a "
            "block at a time"
        ) from error
    assert isinstance(found, nodes.File)
    return found


def _data(source: content.Content) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is not in a hole, in pieces."""
    at = 0
    while (start := source.data_at(at)) is not None:
        at = source.hole_at(start)
        for offset in range(start, at, PIECE):
            yield offset, min(PIECE, at - offset)

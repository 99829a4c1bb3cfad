"""Going through a guest's directories, which a hostile guest may have tied into knots.

A directory that is met twice (no honest file system has two names for one) is a :class:`Problem`, as is one that is
too deep or cannot be read; the walk goes on beside it.  So it ends after as many steps as there are files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from blkckpt import errors
from blkckpt.view import volumes

MAX_DEPTH = 512
"""Directories below each other; a path of Linux has room for 2,048, nobody uses a tenth."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something below *path* that cannot be read, and why."""

    path: str
    why: str


def walk(volume: volumes.Volume, path: str) -> Iterator[tuple[str, volumes.Entry] | Problem]:
    """Everything below the directory *path*, each directory before what is in it, by name."""
    seen = {volume.stat(path).inode}
    stack = [_listed(volume, path.rstrip("/"))]
    while stack:
        for step in stack[-1]:
            yield step
            if isinstance(step, Problem) or not step[1].is_directory:
                continue
            below, entry = step
            if entry.inode in seen:
                yield Problem(below, "the directory occurs twice: the file system is damaged")
            elif len(stack) >= MAX_DEPTH:
                yield Problem(below, f"deeper than {MAX_DEPTH} directories")
            else:
                seen.add(entry.inode)
                stack.append(_listed(volume, below))
                break
        else:
            stack.pop()


def _listed(volume: volumes.Volume, path: str) -> Iterator[tuple[str, volumes.Entry] | Problem]:
    try:
        found = volume.list(path or "/")
    except (errors.CorruptError, errors.StateError, errors.NotFoundError) as error:
        yield Problem(path or "/", str(error))
        return
    for entry in found:
        yield f"{path}/{entry.name}", entry

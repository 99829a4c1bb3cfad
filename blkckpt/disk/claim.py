"""Claims on retained layers: a lock on the data file of the overlay that keeps them where they are.

What is below a retained overlay is a checkpoint's disk, which any process of ours may read from the layers' files
while the VM runs.  Who reads holds the overlay's file *shared* and then looks whether the state still has it retained;
the disk server takes it *exclusively* before it lets go, and afterwards commits the overlay down into what was kept.
So nobody reads layers that change, and nobody's death leaves a claim behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from blkckpt import durable


def shared(path: Path) -> int:
    """Claim the layers below the overlay whose data is at *path*; the descriptor holds the claim until it is closed.

    NotFoundError if the overlay is gone, ``BlockingIOError`` while it is being let go.
    """
    descriptor = durable.open_checked(path, os.O_RDONLY, "overlay")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Whether nobody claims what is below the overlay at *path*; then nobody can until the block ends."""
    descriptor = durable.open_checked(path, os.O_RDONLY, "overlay")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)

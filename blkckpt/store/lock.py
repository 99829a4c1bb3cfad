"""The store's lock: many writers, or one collector; readers take none.

``flock`` on the file ``lock``, shared by whoever may create references (from the first image written until the
manifest, or until it gives up) and exclusive for the sweep of a collection.  While a writer holds it, nothing is
deleted, so a chunk found in an existing pack may be referenced without fear.  The kernel drops the lock of a process
that dies.  The lock belongs to the open file, so every hold opens the file anew.

``gc.lock`` is held exclusively by a collection from its first look to its last deletion: there is one at a time.
``labels.lock`` is held exclusively, for milliseconds, by whoever changes labels or removes a checkpoint.

``flock`` prefers nobody: the collector polls without queueing (a waiting exclusive lock would not stop new shared
ones anyway) and gives up after its deadline with :class:`errors.StateError`.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from blkckpt import errors

_POLL = 0.05


class Hold:
    """A lock that is held; context manager.  ``release`` may be called twice."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def shared(path: Path, timeout: float = 60.0) -> Hold:
    """Keep collectors out; waits for a running one, which takes seconds."""
    return _take(path, fcntl.LOCK_SH, timeout, "a collection is running in this store")


def exclusive(path: Path, timeout: float = 10.0, reason: str = "a checkpoint is being written to this store") -> Hold:
    """Keep everybody else out; *reason* is why that may not be had."""
    return _take(path, fcntl.LOCK_EX, timeout, reason)


def _take(path: Path, kind: int, timeout: float, reason: str) -> Hold:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"locking the store by {path}") from error
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return Hold(descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise errors.StateError(f"{reason} ({path.parent}); try again when it has finished") from None
            time.sleep(_POLL)

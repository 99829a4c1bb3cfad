"""Whose turn it is at a VM's guest: one checkpoint at a time from its beginning until its memory is saved (rule A4).

QEMU has one migration at a time, and the disks have one checkpoint at a time that has not switched.  What comes after
(the disks' copies, the manifest, the commit) needs no turn: the next checkpoint may begin meanwhile.

The turn is a lock on ``checkpoint.lock`` in the VM's directory; the kernel drops that of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from types import TracebackType
from typing import Self

from blkckpt import errors, paths

_POLL = 0.05
"""``flock`` has no deadline."""


class Turn:
    """A turn that is held.  A context manager; giving it back twice is no error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def take(vm: paths.VmPaths, wait: float = 0.0) -> Turn:
    """Take the turn at *vm*; StateError if another has it and does not give it back within *wait* seconds."""
    path = vm.root / "checkpoint.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"locking {path}") from error
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Turn(descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise errors.StateError(
                    f"a checkpoint of VM {vm.name} is being taken already; try again when its memory is saved, or "
                    "wait for it with --wait"
                ) from None
            time.sleep(_POLL)

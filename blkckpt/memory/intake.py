"""Taking the stream in: pipe → buffer → parser → assembler, at full speed, in one thread.

A guest whose write faults wait for the stream to drain is a guest that stalls, so nothing here waits for anything but
the page cache.

The receiver does not sleep in ``read``.  QEMU's background snapshot writes every page, and every 9-byte zero record,
with a system call of its own, and each would wake it.  It waits until there is something, and then for as long as
should bring :data:`TARGET` of it, by what the last wait brought.  QEMU must never find the pipe full: a page and its
header take one and a half of the pipe's 256 slots, so that 170 pages fill it, which QEMU writes within a millisecond.
(A reader that sleeps 1 ms before each read made QEMU's background snapshot of 190,000 pages and 334,000 zero pages last
4.3 s, one that sleeps 0.3 ms 3.4 to 3.9 s, one that never sleeps 4.3 to 4.6 s.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable
from typing import Protocol

from blkckpt import errors
from blkckpt.memory import assemble, stream

PIPE = 1 << 20
"""The largest pipe an unprivileged process gets (fs.pipe-max-size)."""

TARGET = 3 / 8
"""Of the pipe's bytes, what a read should find: a little more than half of its slots, if they are pages."""

SHORTEST, LONGEST = 0.0002, 0.001
"""Seconds of a wait for the pipe to fill."""

_WORTH_WAITING = PIPE // 4
"""A smaller pipe (a user may be out of large ones) is full before any wait is over: 64 KiB with 10 pages."""

BUFFER = 4 << 20
"""Room for a pipe's worth and the longest pending item; small enough to stay in the last-level cache."""


class Cancel:
    """One flag with a descriptor to wait on; once set it stays, with the first reason."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.reason: errors.BlkckptError | None = None

    def set(self, reason: errors.BlkckptError) -> None:
        """Async-signal-safe as far as Python is: one assignment and one system call."""
        self.reason = self.reason or reason
        os.eventfd_write(self.fd, 1)

    def check(self) -> None:
        """Raise the reason, if it is set."""
        if self.reason is not None:
            raise self.reason


class Stop(Protocol):
    """A reason to stop: ``check`` raises it, once ``fd`` is readable."""

    @property
    def fd(self) -> int: ...
    def check(self) -> None: ...


class Receiver:
    """Reads the stream to its end; used by one thread."""

    def __init__(self, descriptor: int, sink: assemble.Assembler, cancel: Stop) -> None:
        self._descriptor = descriptor
        self._sink = sink
        self._cancel = cancel
        self.parser = stream.Parser(sink)
        self.bytes = 0
        self.seconds = 0.0
        self._wait = SHORTEST
        size = _enlarge_pipe(descriptor)
        self._target = size * TARGET if size >= _WORTH_WAITING else 0

    def run(
        self, completed: Callable[[assemble.Block, int, int], None], after: Callable[[], None] = lambda: None
    ) -> stream.Parts:
        """Receive everything; *completed* is told of each run of chunks that is whole, *after* called after each read.

        Neither may wait for anything (rule M1).
        """
        buffer = bytearray(BUFFER)
        view = memoryview(buffer)
        have, begun = 0, 0.0
        poll = poll_for(self._descriptor, self._cancel.fd)
        while count := self._read(poll, view[have:]):
            begun = begun or time.monotonic()
            have += count
            done = self.parser.feed(view[:have])
            view[: have - done] = view[done:have]
            have -= done
            for block in self._sink.main:
                for low, high in block.complete():
                    completed(block, low, high)
            after()
        self.seconds = time.monotonic() - begun if begun else 0.0
        parts = self.parser.finish(have)
        self._sink.check()
        return parts

    def _read(self, poll: select.poll, room: memoryview) -> int:
        if any(descriptor != self._descriptor for descriptor, _ in poll.poll()):
            self._cancel.check()
        if self._target:
            time.sleep(self._wait)
        try:
            count = os.readv(self._descriptor, [room])
        except OSError as error:
            raise errors.from_os_error(error, "reading the memory stream") from error
        self._wait = min(max(self._wait * self._target / max(count, 1), SHORTEST), LONGEST)
        self.bytes += count
        return count


def poll_for(*descriptors: int) -> select.poll:
    """Waits until one of *descriptors* is readable."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return poll


def _enlarge_pipe(descriptor: int) -> int:
    """Make the pipe as large as allowed; its bytes, 0 if it is none."""
    with contextlib.suppress(OSError):  # not a pipe, or the user's pipes have all they may
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    except OSError:
        return 0

"""Taking the stream in: pipe → buffer → parser → assembler, at full speed, in one thread.

A guest whose write faults wait for the stream to drain is a guest that stalls, so nothing here waits for anything but
the page cache.

The receiver does not sleep in ``read``.  QEMU's background snapshot writes every page, and every 9-byte zero record,
with a system call of its own, and each would wake it.  It waits until there is something, then (if that is less than
a quarter of the pipe) for a millisecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Callable

from blkckpt import errors
from blkckpt.memory import assemble, stream

PIPE = 1 << 20
"""The largest pipe an unprivileged process gets (fs.pipe-max-size)."""

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


class Receiver:
    """Reads the stream to its end; used by one thread."""

    def __init__(self, descriptor: int, sink: assemble.Assembler, cancel: Cancel) -> None:
        self._descriptor = descriptor
        self._sink = sink
        self._cancel = cancel
        self.parser = stream.Parser(sink)
        self.bytes = 0
        self.seconds = 0.0
        self._capacity = _enlarge_pipe(descriptor)

    def run(self, completed: Callable[[assemble.Block, int, int], None]) -> stream.Parts:
        """Receive everything; *completed* is told of each run of chunks that is whole."""
        buffer = bytearray(BUFFER)
        view = memoryview(buffer)
        have, begun = 0, 0.0
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._cancel.fd, select.POLLIN)
        while count := self._read(poll, view[have:]):
            begun = begun or time.monotonic()
            have += count
            done = self.parser.feed(view[:have])
            view[: have - done] = view[done:have]
            have -= done
            for block in self._sink.main:
                for low, high in block.complete():
                    completed(block, low, high)
        self.seconds = time.monotonic() - begun if begun else 0.0
        parts = self.parser.finish(have)
        self._sink.check()
        return parts

    def _read(self, poll: select.poll, room: memoryview) -> int:
        poll.poll()
        self._cancel.check()
        if self._waiting() < self._capacity // 4:
            time.sleep(self._capacity / 1e9)  # the time a gigabyte a second takes to fill it
        try:
            count = os.readv(self._descriptor, [room])
        except OSError as error:
            raise errors.from_os_error(error, "reading the memory stream") from error
        self.bytes += count
        return count

    def _waiting(self) -> int:
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._descriptor, termios.FIONREAD, bytes(4)))[0])
        except OSError:
            return self._capacity


def _enlarge_pipe(descriptor: int) -> int:
    """Make the pipe as large as allowed; returns its capacity (something small for what is no pipe)."""
    with contextlib.suppress(OSError):  # not a pipe, or the user's pipes have all they may
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    except OSError:
        return 64 << 10

"""The data plane's files: every byte of disk data, map and base goes through a :class:`File`.

One seam, for three reasons: rule D9 (a failed fsync is final for its file), the guest's true errno (D10), and the
harnesses, which put their own class in place of :data:`factory` to record, block or fail I/O.  State files and
names go through :mod:`blkckpt.durable`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blkckpt import durable, errors
from blkckpt.disk import fastpath

Buffer = Any
"""``bytes``, ``bytearray`` or a ``memoryview`` of single bytes."""

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
_UNFIT = (*_UNSUPPORTED, errno.EINVAL)  # EINVAL: not aligned to the device's blocks; the next range may be
_ZERO_STEP = 1 << 20
_ZEROS = bytes(_ZERO_STEP)
_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python's os module does not have with a mode.  ctypes releases the interpreter lock."""
    result = _libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class File:
    """An open file or block device.  Thread-safe; positions are explicit, the descriptor's own is never used.

    ``dirty`` is set *after* a change and cleared *before* the sync that covers it, so that a change that returns
    while a sync runs is never taken for synced.  ``fast`` is the same file for the C fast path, which marks its own
    changes there; a subclass has none, since what it overrides must not be passed by.
    """

    __slots__ = ("_refused", "_sync", "dirty", "failed", "fast", "fd", "path", "writable")

    def __init__(self, descriptor: int, path: Path, writable: bool = True) -> None:
        self.fd = descriptor
        self.path = path
        self.writable = writable
        self.dirty = True  # what an earlier process wrote may not be durable yet
        self.failed: str | None = None
        self._sync = threading.Lock()
        self._refused: frozenset[int] = frozenset()
        library = fastpath.library()
        self.fast = fastpath.File(library, descriptor) if library is not None and type(self) is File else None

    def pread_into(self, buf: Buffer, offset: int) -> None:
        """Fill *buf*; EIO when the file is shorter than that."""
        done = os.preadv(self.fd, (buf,), offset)
        if done != len(buf):
            self._read_rest(memoryview(buf), done, offset)

    def _read_rest(self, view: memoryview, done: int, offset: int) -> None:
        while done < len(view):
            count = os.preadv(self.fd, (view[done:],), offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.path} ends before byte {offset + len(view)}; was it truncated?")
            done += count

    def pread(self, length: int, offset: int) -> bytes:
        """Up to *length* bytes, fewer only at the end of the file."""
        parts = []
        while length and (part := os.pread(self.fd, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, buf: Buffer, offset: int) -> None:
        if self.failed is not None:
            self.check()
        done = os.pwrite(self.fd, buf, offset)
        if done != len(buf):
            self._write_rest(memoryview(buf), done, offset)
        self.dirty = True

    def _write_rest(self, view: memoryview, done: int, offset: int) -> None:
        while done < len(view):
            count = os.pwrite(self.fd, view[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"writing {self.path} makes no progress")
            done += count

    def pwritev(self, bufs: Sequence[Buffer], offset: int) -> None:
        """Write *bufs* one after the other."""
        if self.failed is not None:
            self.check()
        done = os.pwritev(self.fd, bufs, offset)
        if done != sum(map(len, bufs)):
            joined = b"".join(bufs)
            self._write_rest(memoryview(joined), done, offset)
        self.dirty = True

    def zero(self, offset: int, length: int, *, punch: bool = True, fast: bool = False) -> None:
        """Make the range read as zeros: a hole if *punch*, else allocated.

        Where the file system cannot, zeros are written; with *fast*, EOPNOTSUPP is raised instead.
        """
        self.check()
        mode = _PUNCH_HOLE if punch else _ZERO_RANGE
        if mode not in self._refused and self._try(mode, offset, length):
            return
        if fast:
            raise OSError(errno.EOPNOTSUPP, f"{self.path} cannot be zeroed fast")
        while length:
            step = min(length, _ZERO_STEP)
            self.pwrite(_ZEROS if step == _ZERO_STEP else _ZEROS[:step], offset)
            offset += step
            length -= step

    def _try(self, mode: int, offset: int, length: int) -> bool:
        try:
            _fallocate(self.fd, mode | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNFIT:
                raise
            if error.errno in _UNSUPPORTED:
                self._refused |= {mode}
            return False
        self.dirty = True
        return True

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space, so that writing there later cannot fail for want of it.  Where unsupported: no effect."""
        try:
            _fallocate(self.fd, 0, offset, length)
        except OSError as error:
            if error.errno not in _UNFIT:
                raise

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.dirty = True

    def segments(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cover the range by ``(offset, length, is_hole)``; one data segment where holes cannot be told."""
        until = offset + length
        while offset < until:
            data = self._seek(offset, os.SEEK_DATA, until)
            if data > offset:
                yield offset, data - offset, True
            if data < until:
                hole = self._seek(data, os.SEEK_HOLE, until)
                yield data, hole - data, False
                data = hole
            offset = data

    def _seek(self, offset: int, whence: int, until: int) -> int:
        try:
            return min(os.lseek(self.fd, offset, whence), until)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here
                return until
            if error.errno == errno.EINVAL:  # a device that does not know holes
                return offset if whence == os.SEEK_DATA else until
            raise

    def datasync(self) -> None:
        """Make everything written so far durable; costs nothing when nothing was (D3).

        Waits for a sync under way in another thread, since that one may cover our write.  A failure is final (D9):
        the kernel has dropped the pages, and a second fsync that succeeded would prove nothing.
        """
        with self._sync:
            self.check()
            fast = self.fast is not None and self.fast.take_dirty()
            if not self.dirty and not fast:
                return
            self.dirty = False
            try:
                self.sync_now()
            except OSError as error:
                self.fail(f"syncing {self.path} failed: {error.strerror}")
                self.check()

    def sync_now(self) -> None:
        """The system call, for harnesses to replace."""
        os.fdatasync(self.fd)

    def lost_writes(self) -> bool:
        """Whether the file system has failed to write something and told nobody through here or by syncfs(2) before.

        A failed fsync leaves this mark beside the file's own, which it takes away, so that it is there for who comes
        after a server that was killed before it acted on that failure.  Of whichever file it was.  Writes out the
        whole file system.  A block device leaves no such mark: False.
        """
        return bool(_libc.syncfs(self.fd) != 0)

    def fail(self, reason: str) -> None:
        """Poison the file (D9): reads go on, everything else gets EIO."""
        self.failed = self.failed or reason
        if self.fast is not None:
            self.fast.fail()

    def check(self) -> None:
        if self.failed is not None:
            raise errors.PoisonedError(f"{self.failed}; only reads are served until the server is restarted")

    def size(self) -> int:
        """Bytes in the file or device."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def reopen(self) -> int:
        """A new read-only descriptor of the same file, for a child process; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)


factory: Callable[[int, Path, bool], File] = File
"""What :func:`open_own` and the others make of ``(descriptor, path, writable)``.  Replaced by harnesses."""


def create_own(path: Path, size: int) -> File:
    """A new sparse file of ours.  Its name is durable once the caller has synced the directory."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    file = factory(os.open(path, flags, 0o600), path, True)
    try:
        file.truncate(size)
    except BaseException:
        file.close()
        raise
    return file


def open_own(path: Path, what: str, *, writable: bool = True) -> File:
    """An existing file of ours (see :func:`durable.open_checked`)."""
    return factory(durable.open_checked(path, os.O_RDWR if writable else os.O_RDONLY, what), path, writable)


def open_base(path: Path, size: int, *, writable: bool = True) -> File:
    """A user's raw disk: a regular file or block device of at least *size* bytes."""
    try:
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise errors.from_os_error(error, f"opening the disk {path}") from error
    file = factory(descriptor, path, writable)
    mode = os.fstat(descriptor).st_mode
    problem = None
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        problem = "is neither a regular file nor a block device"
    elif file.size() < size:
        problem = f"has {file.size()} bytes, but the VM's definition says {size}; grow it or define the VM anew"
    if problem:
        file.close()
        raise errors.InputError(f"the disk {path} {problem}")
    return file


def create_base(path: Path, size: int) -> None:
    """A new sparse base for a restored disk, durable when this returns."""
    try:
        durable.make_directory(path.parent)
        file = create_own(path, size)
    except OSError as error:
        raise errors.from_os_error(error, f"creating the disk {path}") from error
    try:
        file.datasync()
    finally:
        file.close()
    durable.sync_directory(path.parent)

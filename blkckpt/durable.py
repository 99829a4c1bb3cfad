"""Writing files so that they survive a power cut.

The write order is: temporary file in the same directory, data, fsync, rename, directory fsync.  The rename is
the commit point: before it the old file (or no file) is seen, after the directory fsync the new one is, and
between the two a power cut shows either.  Nothing else in the project calls ``os.replace`` or ``os.fsync``
outside the data plane's own file layer (:mod:`blkckpt.disk.fileio`).

Source: POSIX ``rename``, ``fsync``; Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from blkckpt import errors

MAX_SMALL_FILE = 64 << 20
"""Bound of :func:`read_small`: manifests and state files are kilobytes; anything larger is foreign."""


def sync_directory(path: Path) -> None:
    """Make the names in directory *path* durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Create directory *path* (and parents) with *mode*; each new name is durable.  No error if it is there."""
    if path.is_dir():
        return
    make_directory(path.parent, mode)
    try:
        path.mkdir(mode)
    except FileExistsError:
        return
    sync_directory(path.parent)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace *path* by *data*, atomically and durably."""
    _commit(path, data, mode, exclusive=False)


def create_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """As :func:`write_file`, but never over an existing name: raises ``FileExistsError``."""
    _commit(path, data, mode, exclusive=True)


def _commit(path: Path, data: bytes, mode: int, *, exclusive: bool) -> None:
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if exclusive:
            os.link(temporary, path)
            temporary.unlink()
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def new_file(path: Path, mode: int = 0o600, *, replace: bool = False) -> Iterator[tuple[int, Path]]:
    """A large file being written: ``(descriptor, its temporary path)``, in the directory of *path*.

    When the body ends it is synced and gets its name; ``FileExistsError`` if that is taken and not to be *replaced*.
    When the body fails nothing is left.
    """
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            yield descriptor, temporary
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def publish(temporary: Path, path: Path) -> None:
    """Rename *temporary*, already written and synced by its owner, to *path* and make the name durable."""
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Unlink *path* durably; no error if it is gone."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def open_checked(path: Path | str, flags: int, what: str) -> int:
    """Open a file of ours: regular, not through a symlink, owned by us, not writable by others.

    Returns a descriptor (close-on-exec).  Raises :class:`errors.NotFoundError` or
    :class:`errors.AccessError`, saying *what* the file was to be.
    """
    try:
        # O_NONBLOCK: a FIFO in the file's place must be refused below, not waited for
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise errors.from_os_error(error, f"opening {what} {path}") from error
    info = os.fstat(descriptor)
    reason = None
    if not stat.S_ISREG(info.st_mode):
        reason = "is not a regular file"
    elif info.st_uid != os.geteuid():
        reason = f"belongs to uid {info.st_uid}, not to you"
    elif info.st_mode & 0o022:
        reason = "is writable by others"
    if reason:
        os.close(descriptor)
        raise errors.AccessError(f"{what} {path} {reason}; refusing to use it")
    return descriptor


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is not a hole."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end - start


def _read_up_to(descriptor: int, limit: int) -> bytes | None:
    """The whole file, None if it is longer than *limit*; room is made for what it has, not for what it may have.

    One that gives just its length when a byte more is asked for has been read to its end.
    """
    expected = os.fstat(descriptor).st_size
    data = b""
    while max(expected, len(data)) <= limit:
        more = os.read(descriptor, max(expected - len(data), 0) + 1)
        data = data + more if data else more
        if not more or len(data) == expected:
            return data
    return None


def read_small(path: Path | str, what: str, limit: int = MAX_SMALL_FILE) -> bytes:
    """Read a whole checked file of at most *limit* bytes (rule S4: bounded before use)."""
    descriptor = open_checked(path, os.O_RDONLY, what)
    try:
        data = _read_up_to(descriptor, limit)
    finally:
        os.close(descriptor)
    if data is None:
        raise errors.CorruptError(f"{what} {path} is larger than {limit} bytes; it is not one of ours")
    return data

"""Freeing a guest that a background snapshot left write-protected.

QEMU write-protects the guest's memory for a background snapshot (userfaultfd) and takes the protection away only
when the snapshot *completes*.  When it fails or is cancelled after that point — the reader of the stream died,
``migrate_cancel``, no space — QEMU 7.2 forgets its userfaultfd: every later write of the guest to a page that was not
saved yet waits for an answer that nobody gives, the virtual CPU hangs, and with it the monitor if the write was a
device's.  (Measured: 14 of 14 ways to cancel, from 0 to 40 ms after ``migrate``, hang the guest.  Source: QEMU 7.2
``migration/migration.c``: ``ram_write_tracking_stop`` is called by ``bg_migration_completion`` only.)

The way out needs nothing of QEMU: a userfaultfd acts on the memory of the process that made it, whoever holds the
descriptor.  So :func:`release` takes a duplicate of the forgotten descriptor (``pidfd_getfd``), unregisters the
protected ranges and wakes all who wait (unregistering alone wakes only those that wait for a *missing* page).

It needs the right to trace QEMU: root, or the same user with ``kernel.yama.ptrace_scope`` 0, or a process that QEMU
descends from.  It must not be called while a background snapshot is under way: its memory would change under it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from blkckpt import errors

_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
"""``_IOR(0xAA, n, struct uffdio_range)``: two u64, start and length."""

_SYS_PIDFD_GETFD = 438
_TARGET = "anon_inode:[userfaultfd]"
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def is_protected(pid: int) -> bool:
    """Whether some of *pid*'s memory is registered with a userfaultfd."""
    return any(_protected_ranges(pid))


def release(pid: int) -> int:
    """Take every write protection by userfaultfd away from process *pid*; the number of ranges that had one.

    Raises :class:`errors.AccessError` when we may not, :class:`errors.NotFoundError` when the process is gone.
    """
    ranges = list(_protected_ranges(pid))
    if not ranges:
        return 0
    freed = 0
    for descriptor in _duplicates(pid):
        try:
            freed += sum(_unregister(descriptor, start, length) for start, length in ranges)
        finally:
            os.close(descriptor)
    return freed


def _protected_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the mappings with write-protect tracking: flag ``uw`` of ``smaps``."""
    start = end = 0
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except OSError as error:
        raise errors.from_os_error(error, f"reading the memory map of process {pid}") from error
    for line in text.splitlines():
        if header := _HEADER.match(line):
            start, end = int(header[1], 16), int(header[2], 16)
        elif line.startswith("VmFlags:") and "uw" in line.split():
            yield start, end - start


def _duplicates(pid: int) -> Iterator[int]:
    """Our duplicates of the process's userfaultfds; the caller closes each."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise errors.from_os_error(error, f"finding process {pid}") from error
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if str(entry.readlink()) != _TARGET:
                    continue
            except FileNotFoundError:
                continue
            descriptor = libc.syscall(_SYS_PIDFD_GETFD, process, int(entry.name), 0)
            if descriptor < 0:
                number = ctypes.get_errno()
                problem = OSError(number, os.strerror(number))
                raise errors.from_os_error(problem, f"freeing the memory of QEMU (process {pid})") from problem
            yield descriptor
    finally:
        os.close(process)


def _unregister(descriptor: int, start: int, length: int) -> int:
    """1 if the range belonged to this userfaultfd and is free now, else 0."""
    place = struct.pack("QQ", start, length)
    try:
        fcntl.ioctl(descriptor, _UFFDIO_UNREGISTER, place)
        fcntl.ioctl(descriptor, _UFFDIO_WAKE, place)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOMEM):  # another descriptor's range, or a mapping that has gone
            return 0
        raise errors.from_os_error(error, "taking a write protection away") from error
    return 1

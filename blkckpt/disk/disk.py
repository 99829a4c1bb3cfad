"""One export: what the plugin's callbacks call.  (Interface; the body follows.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blkckpt.disk import api

DiskSpec = api.DiskSpec
Buffer = Any
"""A contiguous byte buffer: ``bytes``, ``bytearray`` or ``memoryview`` with items of one byte."""


class Disk:
    """A disk as the guest sees it.  Thread-safe.  Errors are ``OSError`` or have ``.errno`` (D10)."""

    name: str
    size: int

    def pread(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        """Fill the writable *buf* with the disk's bytes from *offset*."""
        raise NotImplementedError

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        raise NotImplementedError

    def zero(self, count: int, offset: int, fua: bool = False, may_trim: bool = True, fast: bool = False) -> None:
        raise NotImplementedError

    def trim(self, count: int, offset: int, fua: bool = False) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def extents(self, count: int, offset: int) -> Iterable[tuple[int, int, int]]:
        """``(offset, length, type)`` covering the range; type bits: 1 hole, 2 reads as zeros."""
        raise NotImplementedError

"""One export: what the plugin's callbacks call.

Each request: check its range, pass the gate, act on the view it was admitted with, leave.  While the disks are armed
a mutating request first asks the barrier (DESIGN §3), *after* it was admitted: if the guest has been resumed it
leaves, all disks are switched, and it is admitted again, to the new epoch.  Asking before admission would let a
switch slip in between, and with it a request of the new side into the old layer's epoch.

The paths of a plain read and a plain aligned write are written out flat: they run tens of thousands of times a second.
Buffers are used before the call returns and never kept (D6).  FUA is a flush of the whole chain (D3): when the bits
of the write are in a map page, that page and everything it vouches for must be durable, which is what flush does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from blkckpt.disk import api, blocks, chain, epoch, fileio

DiskSpec = api.DiskSpec
Buffer = fileio.Buffer
SHIFT, MASK = blocks.SHIFT, blocks.MASK

Gate = epoch.Gate[chain.View]
Ticket = epoch.Ticket[chain.View]


def _head(view: chain.View, first: int, end: int) -> bool:
    return chain.needs_copy_up(view, first, end, True, False)


def _tail(view: chain.View, first: int, end: int) -> bool:
    return chain.needs_copy_up(view, first, end, False, True)


def _both(view: chain.View, first: int, end: int) -> bool:
    return chain.needs_copy_up(view, first, end, True, True)


class Disk:
    """A disk as the guest sees it.  Thread-safe.  Errors are ``OSError`` or have ``.errno`` (D10).

    *ask_barrier* looks at the barrier and switches or disarms all disks if that is what it shows.  The counters are
    approximate under threads, and know nothing of what the fast path serves.
    """

    __slots__ = (
        "_ask_barrier", "flushes", "gate", "name", "path", "read_bytes", "reads", "size", "writes",
        "written_bytes",
    )  # fmt: skip

    def __init__(self, name: str, path: str, size: int, gate: Gate, ask_barrier: Callable[[], None]) -> None:
        self.name = name
        self.path = path
        self.size = size
        self.gate = gate
        self._ask_barrier = ask_barrier
        self.reads = self.writes = self.flushes = 0
        self.read_bytes = self.written_bytes = 0

    @property
    def activity(self) -> int:
        """Grows with every request that is served here."""
        return self.reads + self.writes

    # ---- requests ----

    def pread(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        """Fill the writable *buf* with the disk's bytes from *offset*."""
        length = len(buf)
        if offset < 0 or offset + length > self.size or not length:
            return self._bad_range(offset, length)
        gate = self.gate
        admitted = gate.enter()
        try:
            view = admitted.view
            if view.layers:
                chain.read_below(view, 0, buf, offset)
            else:
                view.floor.pread_into(buf, offset)
        finally:
            gate.leave(admitted)
        self.reads += 1
        self.read_bytes += length
        return None

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        """Write *buf*; with *fua* it is durable on return."""
        length = len(buf)
        if offset < 0 or offset + length > self.size or not length:
            return self._bad_range(offset, length)
        ticket = self._begin(offset, length)
        try:
            chain.write(ticket.view, buf, offset)
        finally:
            self.gate.finish(ticket)
        self.writes += 1
        self.written_bytes += length
        if fua:
            self.flush()
        return None

    def zero(self, count: int, offset: int, fua: bool = False, may_trim: bool = True, fast: bool = False) -> None:
        """Make the range read as zeros (D11); allocated unless *may_trim*; EOPNOTSUPP if *fast* and it would not be."""
        if offset < 0 or count < 0 or offset + count > self.size or not count:
            return self._bad_range(offset, count)
        ticket = self._begin(offset, count)
        try:
            chain.zero(ticket.view, offset, count, punch=may_trim, fast=fast)
        finally:
            self.gate.finish(ticket)
        self.writes += 1
        if fua:
            self.flush()
        return None

    def trim(self, count: int, offset: int, fua: bool = False) -> None:
        """Discard the range: it reads as zeros (D11)."""
        self.zero(count, offset, fua)

    def flush(self) -> None:
        """Everything acknowledged before, on any connection, is durable on return (D3)."""
        admitted = self.gate.enter()
        try:
            chain.flush(admitted.view)
        finally:
            self.gate.leave(admitted)
        self.flushes += 1

    def extents(self, count: int, offset: int) -> list[tuple[int, int, int]]:
        """``(offset, length, type)`` covering the range; type bits: 1 hole, 2 reads as zeros."""
        if offset < 0 or count < 0 or offset + count > self.size or not count:
            self._bad_range(offset, count)
            return []
        admitted = self.gate.enter()
        try:
            return list(chain.extents(admitted.view, offset, count))
        finally:
            self.gate.leave(admitted)

    # ---- admission ----

    def _begin(self, offset: int, length: int) -> Ticket:
        until = offset + length
        first, end = offset >> SHIFT, (until + MASK) >> SHIFT
        exclusive = None
        if (offset | until) & MASK:
            exclusive = self._partial(offset, until)
        ticket = self.gate.begin(first, end, exclusive)
        while ticket.view.armed:
            self._look(ticket)
            if ticket.epoch is self.gate.current:
                break
            self.gate.finish(ticket)
            ticket = self.gate.begin(first, end, exclusive)
        return ticket

    def _look(self, ticket: Ticket) -> None:
        try:
            self._ask_barrier()
        except BaseException:
            self.gate.finish(ticket)
            raise

    def _partial(self, offset: int, until: int) -> Callable[[chain.View, int, int], bool] | None:
        """Which of the range's blocks are covered in part; the end of the disk is a border (D11)."""
        tail = until & MASK and until != self.size
        if offset & MASK:
            return _both if tail else _head
        return _tail if tail else None

    def _bad_range(self, offset: int, length: int) -> None:
        if length == 0 and 0 <= offset <= self.size:
            return
        raise OSError(errno.EINVAL, f"request of {length} bytes at {offset} is outside the disk of {self.size}")

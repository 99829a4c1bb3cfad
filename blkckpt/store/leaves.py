"""The table of an image that is being written: leaves that are begun, and the directory of those that are done.

Belongs to one thread.  A leaf is kept from its first entry until it is complete (every chunk set) and finished, or
until the image is: an image written from front to back holds one or two, one that is written in any order, or only
here and there over a parent, at most one for every 32 MiB touched.  Beyond ``MAX_HELD`` the longest unused ones wait
in a nameless temporary file, so that memory is bounded for any size and order.  With a parent, a leaf begins as a
copy of the parent's, and what is never touched keeps the parent's directory entry.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import layout

if TYPE_CHECKING:
    import tempfile

    import numpy as np
else:  # whoever only counts what is used needs neither
    np, tempfile = lazy.Module("numpy"), lazy.Module("tempfile")

MAX_HELD = 2048
"""Leaves in memory: 56 MiB."""

_SIZE = layout.ENTRY.size

_WHOLE = _SIZE - 2
"""The byte of an entry that is one if the raw length is that of a whole chunk, 1 << 16, and else zero."""


def used(entries: bytes) -> int:
    """The bytes of the chunks of a leaf that are not zero: the whole ones, and what the last one has of it."""
    last = int.from_bytes(entries[-4:], "little")
    return entries[_WHOLE::_SIZE].count(1) * layout.CHUNK + (last if last < layout.CHUNK else 0)


class LeafTable:
    """Entries by chunk number; each chunk is set at most once.

    ``growth`` is how many bytes more than in the parent are in chunks that are not zero, in the leaves that have been
    taken; ``emptied`` are leaves of the parent that have become zero as a whole.
    """

    def __init__(self, size: int, directory: layout.Array | None, parent_leaf: Callable[[int], bytes] | None) -> None:
        """*directory* and *parent_leaf* (the bytes of a leaf of the parent) are given with a parent of this size."""
        self._size = size
        self._parent_leaf = parent_leaf
        self._held: OrderedDict[int, bytearray] = OrderedDict()
        self._missing: dict[int, int] = {}
        self._waiting: IO[bytes] | None = None
        self.growth = 0
        self.emptied: list[int] = []
        count = layout.leaf_count(size)
        self.directory = np.zeros(count, layout.ENTRY_TYPE) if directory is None else directory.copy()

    def set(self, chunk: int, entry: bytes) -> int | None:
        """Set the packed *entry* of *chunk*; returns the number of its leaf if that is complete now."""
        leaf, slot = divmod(chunk, layout.LEAF)
        self._leaf(leaf)[slot * _SIZE : (slot + 1) * _SIZE] = entry
        return self._count(leaf, 1)

    def set_zero(self, first: int, count: int) -> list[int]:
        """Make *count* chunks from *first* on zero; returns the leaves that are complete now."""
        complete = []
        end = first + count
        while first < end:
            leaf, slot = divmod(first, layout.LEAF)
            step = min(end - first, layout.LEAF - slot)
            if step == layout.leaf_entries(self._size, leaf):
                if self.directory["raw"][leaf]:
                    self.emptied.append(leaf)
                self.finish(leaf, layout.ZERO)
            else:
                self._leaf(leaf)[slot * _SIZE : (slot + step) * _SIZE] = bytes(step * _SIZE)
                if self._count(leaf, step) is not None:
                    complete.append(leaf)
            first += step
        return complete

    def begun(self) -> list[int]:
        """The leaves that are neither finished nor untouched, in order."""
        return sorted(self._missing)

    def take(self, leaf: int) -> bytes:
        """The bytes of a begun leaf, which the caller will ``finish``."""
        held = self._held.get(leaf)
        data = self._read(leaf) if held is None else bytes(held)
        self.growth += used(data)
        return data

    def finish(self, leaf: int, entry: layout.Entry) -> None:
        """Put *entry*, where the leaf is stored, into the directory and forget the leaf."""
        self._held.pop(leaf, None)
        self._missing.pop(leaf, None)
        self.directory[leaf : leaf + 1] = np.frombuffer(layout.pack_entry(entry), layout.ENTRY_TYPE)

    def close(self) -> None:
        """Let go of the temporary file."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _leaf(self, leaf: int) -> bytearray:
        """The bytes of a leaf, to be changed; it begins with this if need be."""
        data = self._held.get(leaf)
        if data is not None:
            self._held.move_to_end(leaf)
            return data
        data = self._held[leaf] = bytearray(self._read(leaf) if leaf in self._missing else self._fresh(leaf))
        if len(self._held) > MAX_HELD:
            self._put_aside(*self._held.popitem(last=False))
        return data

    def _fresh(self, leaf: int) -> bytes:
        count = self._missing[leaf] = layout.leaf_entries(self._size, leaf)
        if self._parent_leaf is None or not self.directory["raw"][leaf]:
            return bytes(count * _SIZE)
        data = self._parent_leaf(leaf)
        self.growth -= used(data)
        return data

    def _put_aside(self, leaf: int, data: bytearray) -> None:
        try:
            if self._waiting is None:
                self._waiting = tempfile.TemporaryFile(prefix="blkckpt-", buffering=0)
            os.pwrite(self._waiting.fileno(), data, leaf * layout.LEAF * _SIZE)
        except OSError as error:
            raise errors.from_os_error(error, "keeping the table of an image in a temporary file") from error

    def _read(self, leaf: int) -> bytes:
        """The bytes of a leaf that was put aside."""
        assert self._waiting is not None
        length = layout.leaf_entries(self._size, leaf) * _SIZE
        data = os.pread(self._waiting.fileno(), length, leaf * layout.LEAF * _SIZE)
        assert len(data) == length
        return data

    def _count(self, leaf: int, done: int) -> int | None:
        self._missing[leaf] -= done
        return None if self._missing[leaf] else leaf

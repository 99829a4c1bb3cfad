"""The table of an image that is being written: leaves that are begun, and the directory of those that are done.

Belongs to one thread.  A leaf is held in memory from its first entry until it is complete (every chunk set) and
taken; an image written from front to back therefore holds one or two, in any order at most one for every 32 MiB that
were touched.  With a parent, a leaf begins as a copy of the parent's, and what is never touched keeps the parent's
directory entry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blkckpt.store import layout

_SIZE = layout.ENTRY.size


class LeafTable:
    """Entries by chunk number; each chunk is set at most once."""

    def __init__(self, size: int, directory: layout.Array | None, parent_leaf: Callable[[int], bytes] | None) -> None:
        """*directory* and *parent_leaf* (the bytes of a leaf of the parent) are given with a parent of this size."""
        self._size = size
        self._parent_leaf = parent_leaf
        self._begun: dict[int, bytearray] = {}
        self._missing: dict[int, int] = {}
        count = layout.leaf_count(size)
        self.directory = np.zeros(count, layout.ENTRY_TYPE) if directory is None else directory.copy()

    def set(self, chunk: int, entry: bytes) -> int | None:
        """Set the packed *entry* of *chunk*; returns the number of its leaf if that is complete now."""
        leaf, slot = divmod(chunk, layout.LEAF)
        data = self._begun.get(leaf)
        if data is None:
            data = self._begin(leaf)
        data[slot * _SIZE : (slot + 1) * _SIZE] = entry
        return self._count(leaf, 1)

    def set_zero(self, first: int, count: int) -> list[int]:
        """Make *count* chunks from *first* on zero; returns the leaves that are complete now."""
        complete = []
        end = first + count
        while first < end:
            leaf, slot = divmod(first, layout.LEAF)
            step = min(end - first, layout.LEAF - slot)
            if step == layout.leaf_entries(self._size, leaf):
                self.finish(leaf, layout.ZERO)
            else:
                data = self._begun.get(leaf) or self._begin(leaf)
                data[slot * _SIZE : (slot + step) * _SIZE] = bytes(step * _SIZE)
                if self._count(leaf, step) is not None:
                    complete.append(leaf)
            first += step
        return complete

    def begun(self) -> list[int]:
        """The leaves that are neither finished nor untouched, in order."""
        return sorted(self._begun)

    def take(self, leaf: int) -> bytes:
        """The bytes of a begun leaf, which the caller will ``finish``."""
        return bytes(self._begun[leaf])

    def finish(self, leaf: int, entry: layout.Entry) -> None:
        """Put *entry*, where the leaf is stored, into the directory and forget the leaf."""
        self._begun.pop(leaf, None)
        self._missing.pop(leaf, None)
        self.directory[leaf : leaf + 1] = np.frombuffer(layout.pack_entry(entry), layout.ENTRY_TYPE)

    def _begin(self, leaf: int) -> bytearray:
        count = layout.leaf_entries(self._size, leaf)
        inherited = self._parent_leaf is not None and bool(self.directory["raw"][leaf])
        data = bytearray(self._parent_leaf(leaf)) if inherited and self._parent_leaf else bytearray(count * _SIZE)
        self._begun[leaf], self._missing[leaf] = data, count
        return data

    def _count(self, leaf: int, done: int) -> int | None:
        self._missing[leaf] -= done
        return None if self._missing[leaf] else leaf

"""What checkpoints cost: the accounting behind ``du`` and ``stats``.

Worked out from manifests, tables and leaves alone; no data is read.  For each checkpoint, each VM, and all together:

==============  =======================================================================================
``logical``     the sizes of its images: what a guest or a restored file sees
``referenced``  what of that is not zeros, as often as it occurs
``distinct``    the same, each chunk once: what is left after deduplication
``compressed``  what those chunks and the leaves of the tables take in packs, headers included
``unique``      the part of ``compressed`` that nothing else needs: what removing it would make garbage
==============  =======================================================================================

"Nothing else" counts pins too.  Chunks that two checkpoints share are in no one's ``unique``, so the sum of all
``unique`` is less than the total.

How.  The place of a payload, (pack, offset), is one 64-bit key: packs are numbered in the order in which they are
met, and an offset is below 2**30 (``layout.MAX_PACK_FILE``).  Equal leaves are read once, whatever number of images
they are in.  Each key becomes its position in the sorted array of all keys; a checkpoint is then a set of positions,
and everything is said by a handful of bulk operations on arrays.  Memory: about 40 bytes a stored chunk, and 4 bytes
an entry of each distinct leaf: 1 GiB for a store of 1 TiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blkckpt import errors
from blkckpt.store import images, layout, manifest, packs, reference, store

Keys = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int32]

OFFSET_BITS = 30
"""``layout.MAX_PACK_FILE`` is below 2**30."""

Progress = Callable[[int, int], None]
"""Called with (images looked at, images in all)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes; see the module."""

    logical: int
    referenced: int
    distinct: int
    compressed: int
    unique: int


@dataclass(frozen=True, slots=True)
class CheckpointUsage:
    """One checkpoint's."""

    vm: str
    name: str
    created_ns: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Report:
    """A whole store.

    ``stored_bytes`` is what its packs take on disk, ``dead_bytes`` what of that no manifest and no pin needs.
    ``damaged`` says what could not be read and is not counted; while there is any, ``unique`` and ``dead_bytes`` may
    be too large.
    """

    checkpoints: tuple[CheckpointUsage, ...]
    vms: dict[str, Usage]
    total: Usage
    stored_bytes: int
    dead_bytes: int
    damaged: tuple[str, ...]


class Places:
    """Numbers packs and makes one key of (pack, offset).  One thread at a time."""

    def __init__(self) -> None:
        self._packs: dict[int, int] = {}

    def keys(self, entries: layout.Array) -> Keys:
        """A key for each of *entries*, none of which is zero; equal places have equal keys."""
        names, positions = np.unique(entries["pack"], return_inverse=True)
        numbers = [self._packs.setdefault(name, len(self._packs)) for name in names.tolist()]
        keys: Keys = (np.array(numbers, np.uint64)[positions] << np.uint64(OFFSET_BITS)) | entries["offset"]
        return keys

    def packs(self) -> list[int]:
        """The packs, by number."""
        return list(self._packs)


class _MovedError(Exception):
    """Packs were rewritten while images were looked at: what was found so far has other places now."""


def measure(place: store.Store, progress: Progress | None = None) -> Report:
    """Account for every checkpoint and pin of *place*; begins anew when packs that it needs are rewritten meanwhile."""
    while True:
        try:
            return _measure(place, progress)
        except _MovedError:
            continue


def _measure(place: store.Store, progress: Progress | None) -> Report:
    found, damaged = _manifests(place)
    pins = place.pins()
    wanted = list(dict.fromkeys(itertools.chain(*(one.images() for one in found), *pins.values())))
    table = _Table(place)
    for number, image in enumerate(wanted):
        if progress:
            progress(number, len(wanted))
        try:
            table.add(image)
        except (errors.CorruptError, errors.NotFoundError) as error:
            damaged.append(str(error))
    table.close()
    return _report(place, table, found, list(pins.values()), damaged)


def _manifests(place: store.Store) -> tuple[list[manifest.Manifest], list[str]]:
    """Those that can be read, the oldest first, and what is wrong with the rest."""
    found, damaged = [], []
    for vm, name in place.names():
        try:
            found.append(place.manifest(vm, name))
        except errors.CorruptError as error:
            damaged.append(str(error))
        except errors.NotFoundError:
            continue  # removed meanwhile
    return sorted(found, key=lambda one: (one.created_ns, one.vm, one.name)), damaged


@dataclass(frozen=True, slots=True)
class _Image:
    """One image: its leaves by number in :class:`_Table`, each with how often it occurs."""

    size: int
    leaves: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


class _Table:
    """Every distinct leaf and chunk of the images added.

    After ``close`` a leaf is an array of positions in ``stored`` and ``raw``, one for each of its places.
    """

    def __init__(self, place: store.Store) -> None:
        self._place, self._places = place, Places()
        self._known: dict[bytes, int] = {}
        self._parts: list[tuple[Keys, npt.NDArray[np.uint32], npt.NDArray[np.uint32]]] = []
        self._referenced: list[int] = []
        self.images: dict[str, _Image] = {}
        self.leaves: list[Ids] = []
        self.referenced = np.zeros(0, np.int64)
        self.stored = np.zeros(0, np.int64)
        self.raw = np.zeros(0, np.int64)

    def add(self, image: str) -> None:
        """Read the table of *image*, and those of its leaves that no other image had.

        A retained one has no table, and nothing in the store.
        """
        try:
            table = images.load_table(self._place.packs, image)
        except reference.RetainedError as error:
            nothing = np.zeros(0, np.int64)
            self.images[image] = _Image(error.reference.size, nothing, nothing)
            return
        numbers, directory = [], table.leaves
        for leaf in np.flatnonzero(directory["raw"]).tolist():
            entry = directory[leaf : leaf + 1]
            place = entry.tobytes()[layout.HASH : layout.HASH + 16]
            number = self._known.get(place)
            if number is None:
                number = self._read(entry, self._leaf(table, leaf))
                self._known[place] = number
            numbers.append(number)
        leaves, counts = np.unique(np.array(numbers, np.int64), return_counts=True)
        self.images[image] = _Image(table.size, leaves, counts)

    def _leaf(self, table: layout.Table, leaf: int) -> layout.Array:
        try:
            return images.read_leaf(self._place.packs, table, leaf)
        except packs.MissingPackError:
            if images.load_table(self._place.packs, table.image_id).directory != table.directory:
                raise _MovedError from None
            raise

    def _read(self, own: layout.Array, entries: layout.Array) -> int:
        """Remember a leaf: its own payload first, then its chunks."""
        used = np.concatenate((own, entries[entries["raw"] > 0]))
        raw = used["raw"].copy()
        self._referenced.append(int(raw[1:].sum(dtype=np.int64)))
        raw[0] = 0  # a leaf is not the guest's data
        self._parts.append((self._places.keys(used), used["stored"].copy(), raw))
        return len(self._parts) - 1

    def close(self) -> None:
        """Number the places.  Nothing can be added any more."""
        if not self._parts:
            return
        keys, stored, raw = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        lengths = [len(part[0]) for part in self._parts]
        self._parts = []
        _, first, positions = np.unique(keys, return_index=True, return_inverse=True)
        self.leaves = np.split(positions.astype(np.int32), np.cumsum(lengths)[:-1])
        self.stored = stored[first].astype(np.int64) + layout.ENTRY_HEADER.size
        self.raw = raw[first].astype(np.int64)
        self.referenced = np.array(self._referenced, np.int64)

    def mark(self, image_ids: Iterable[str]) -> tuple[int, int, npt.NDArray[np.bool_]]:
        """``(logical, referenced, which places)`` of a set of images, each counted once."""
        logical = referenced = 0
        seen = np.zeros(len(self.stored), np.bool_)
        for image in dict.fromkeys(image_ids):
            known = self.images.get(image)
            if known is None:
                continue  # damaged, and told
            logical += known.size
            referenced += int((self.referenced[known.leaves] * known.counts).sum())
            for leaf in known.leaves.tolist():
                seen[self.leaves[leaf]] = True
        return logical, referenced, seen


class _Owners:
    """Who needs a place: nobody, one (who), or several."""

    SEVERAL = -2

    def __init__(self, places: int) -> None:
        self._owner = np.full(places, -1, np.int32)

    def add(self, owner: int, seen: npt.NDArray[np.bool_]) -> None:
        self._owner[seen & (self._owner != -1)] = self.SEVERAL
        self._owner[seen & (self._owner == -1)] = owner

    def unique(self, stored: npt.NDArray[np.int64], owners: int) -> list[int]:
        """The bytes that are each owner's alone."""
        alone = self._owner >= 0
        sums = np.bincount(self._owner[alone], weights=stored[alone], minlength=owners)
        return [round(value) for value in sums.tolist()]


def _report(
    place: store.Store,
    table: _Table,
    found: Sequence[manifest.Manifest],
    pinned: Sequence[Sequence[str]],
    damaged: Sequence[str],
) -> Report:
    stored = dict(place.packs.ids())
    by_checkpoint = _account(table, [one.images() for one in found], pinned)
    vms = list(dict.fromkeys(one.vm for one in found))
    of_vms = [[image for one in found if one.vm == vm for image in one.images()] for vm in vms]
    by_vm = _account(table, of_vms, pinned)
    (total,) = _account(table, [[image for ids in of_vms for image in ids]], pinned)
    _, _, live = table.mark(list(table.images))
    stored_bytes = sum(stored.values())
    return Report(
        checkpoints=tuple(
            CheckpointUsage(one.vm, one.name, one.created_ns, usage)
            for one, usage in zip(found, by_checkpoint, strict=True)
        ),
        vms=dict(zip(vms, by_vm, strict=True)),
        total=total,
        stored_bytes=stored_bytes,
        dead_bytes=max(stored_bytes - int(table.stored[live].sum()) - _overhead(len(stored), table), 0),
        damaged=tuple(damaged),
    )


def _overhead(packs: int, table: _Table) -> int:
    """What packs hold beside payloads of use: headers, trailers, index records of what is live."""
    fixed = layout.PACK_HEADER.size + layout.TRAILER_SIZE
    return packs * fixed + len(table.stored) * layout.RECORD.size


def _account(table: _Table, groups: Sequence[Sequence[str]], pinned: Sequence[Sequence[str]]) -> list[Usage]:
    """The usage of each group of images; a place is unique to a group if neither another nor a pin needs it."""
    owners = _Owners(len(table.stored))
    found = []
    for number, images_ in enumerate(groups):
        logical, referenced, seen = table.mark(images_)
        owners.add(number, seen)
        found.append((logical, referenced, int(table.raw[seen].sum()), int(table.stored[seen].sum())))
    for images_ in pinned:
        owners.add(len(groups), table.mark(images_)[2])
    unique = owners.unique(table.stored, len(groups) + 1)
    return [Usage(*figures, unique[number]) for number, figures in enumerate(found)]

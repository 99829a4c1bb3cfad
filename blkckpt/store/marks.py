"""What a store needs: from manifests and pins over images and leaves to the places in packs.

Tables, leaves and packs never change under a reader, so marking needs no lock; whoever acts on the marks sees to it
that they are still true (:mod:`blkckpt.store.collect`).

Memory: 8 bytes a stored chunk, about 100 a distinct leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import backend, images, index, layout, manifest, packs, pins, reference

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Keys = npt.NDArray[np.uint64]
else:
    np = lazy.Module("numpy")

Progress = Callable[[int, int], None]
"""Called with (done, of how much)."""

_COMPACT = 1 << 16
_LEAF = 1 << 17
_OFFSET = 18


@dataclass(slots=True)
class Usage:
    """The live payloads of one pack: ``offset << 18 | is it a leaf << 17 | stored``, repeated until compacted."""

    arrays: list[Keys] = field(default_factory=list)
    pending: int = 0

    def add(self, keys: Keys) -> None:
        self.arrays.append(keys)
        self.pending += len(keys)
        if self.pending > _COMPACT:
            self.keys()

    def keys(self) -> Keys:
        """Each key once, in order of offset."""
        if len(self.arrays) != 1 or self.pending:
            self.arrays, self.pending = [np.unique(np.concatenate(self.arrays))], 0
        return self.arrays[0]

    def size(self) -> int:
        """The size of a pack that holds this and nothing else."""
        fixed = layout.PACK_HEADER.size + layout.TRAILER_SIZE
        return fixed + self.live() + len(self.keys()) * layout.RECORD.size

    def live(self) -> int:
        """The bytes in use, entry headers included."""
        keys = np.unique(self.keys() & ~np.uint64(_LEAF))
        return int((keys & np.uint64(_LEAF - 1)).sum()) + len(keys) * layout.ENTRY_HEADER.size

    def data(self) -> Keys:
        """The offsets of the live payloads that are chunks of data, in order."""
        keys = self.keys()
        offsets: Keys = keys[(keys & np.uint64(_LEAF)) == 0] >> np.uint64(_OFFSET)
        return offsets


@dataclass(slots=True)
class Marks:
    """What is needed."""

    images: set[str] = field(default_factory=set)
    usage: dict[int, Usage] = field(default_factory=dict)
    leaves: set[bytes] = field(default_factory=set)
    references: set[str] = field(default_factory=set)
    """Of the images, the retained ones: they need nothing of the store, until they are flattened."""

    def tables(self) -> list[str]:
        """The images that have tables, sorted."""
        return sorted(self.images - self.references)

    def add(self, entries: layout.Array, *, leaves: bool = False) -> None:
        """Mark the payloads of *entries*, which are *leaves* or chunks of data."""
        used = entries[entries["raw"] > 0]
        keys = (used["offset"] << np.uint64(_OFFSET)) | used["stored"].astype(np.uint64)
        if leaves:
            keys |= np.uint64(_LEAF)
        for pack in np.unique(used["pack"]).tolist():
            self.usage.setdefault(pack, Usage()).add(keys[used["pack"] == pack])


def image_ids(where: backend.Backend) -> Iterator[str]:
    """The ids of every image object."""
    for key, _ in where.list("images"):
        name = key.rpartition("/")[2].removesuffix(".image")
        if len(name) == 32 and layout.image_key(name) == key:
            yield name


def manifest_names(where: backend.Backend, vm: str | None = None, kind: str = "manifests") -> Iterator[tuple[str, str]]:
    """``(vm, checkpoint)`` of every manifest object, or of every object of another *kind* that is kept so."""
    for key, _ in where.list(f"{kind}/{vm}" if vm else kind):
        parts = key.split("/")
        if len(parts) == 3 and parts[2].endswith(".json"):
            yield parts[1], parts[2].removesuffix(".json")


def records_of(store: packs.Packs) -> index.Loader:
    """The records of a pack: from its index, or by scanning when that is damaged."""

    def load(pack: int) -> layout.Array:
        try:
            return store.index(pack)
        except errors.CorruptError:
            entries = [entry for entry, _, _ in store.scan(pack)]
        data = b"".join(layout.pack_entry(e)[:32] + layout.pack_entry(e)[40:] for e in entries)
        return np.frombuffer(data, layout.RECORD_TYPE)

    return load


def roots(where: backend.Backend) -> dict[str, str]:
    """Every image that must stay → who needs it.  CorruptError if that cannot be known."""
    found = {}
    for vm, name in manifest_names(where):
        key, what = f"manifests/{vm}/{name}.json", f"manifest of {vm}@{name}"
        try:
            data = where.get(key, 0, min(where.size(key), manifest.MAX_SIZE + 1))
        except errors.NotFoundError:
            continue
        for image in manifest.decode(data, what).images():
            found[image] = f"{vm}@{name}"
    for owner, pinned in pins.load(where).items():
        for image in pinned:
            found.setdefault(image, f"pin {owner}")
    return found


def mark(store: packs.Packs, marks: Marks, progress: Progress | None = None) -> None:
    """Add to *marks* what the present manifests and pins need; *progress* counts images."""
    wanted = roots(store.backend)
    for number, (image, owner) in enumerate(sorted(wanted.items())):
        if progress:
            progress(number, len(wanted))
        if image not in marks.images:
            try:
                _mark_image(store, image, marks)
            except (errors.CorruptError, errors.NotFoundError) as error:
                raise errors.CorruptError(
                    f"nothing is collected, since what {owner} needs cannot be known: {error}; "
                    "remove that checkpoint, or repair the store"
                ) from error
            marks.images.add(image)


def again(store: packs.Packs, early: Marks) -> Marks:
    """The marks as of now: *early* where that is still all that is needed, with what came since.

    An image that was needed then and is not any more would keep its packs, so in that case marking starts over.
    """
    if early.images - set(roots(store.backend)):
        early = Marks()
    early.images -= early.references  # they may have been flattened
    early.references.clear()
    mark(store, early)
    return early


def _mark_image(store: packs.Packs, image: str, marks: Marks) -> None:
    try:
        table = images.load_table(store, image)
    except reference.RetainedError:
        marks.references.add(image)
        return
    marks.add(table.leaves, leaves=True)
    for leaf in np.flatnonzero(table.leaves["raw"]).tolist():
        digest = table.leaves["hash"][leaf].tobytes()
        if digest not in marks.leaves:
            marks.add(images.read_leaf(store, table, leaf))
            marks.leaves.add(digest)

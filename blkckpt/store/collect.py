"""Collection: mark what manifests and pins need, sweep the rest.

Mark follows manifest → image → leaves → packs.  Tables, leaves and packs never change, so the needs of an image are
worked out without the lock, and only what came meanwhile under it.  The sweep runs with the store held exclusively:
no writer, and no image whose manifest is still to come, exists then.

Order of the sweep: images, then (the index forgets and) packs, then temporary files.  An image that is there has
therefore all its packs, at every instant, also when the sweep is killed; repeating it finishes the work (rule S5).
A manifest, pin or table that cannot be read stops the collection before anything is deleted.

Packs are deleted whole.  What is dead in a pack that lives on is counted (``dead_bytes``): to be had by repacking,
which would write the live chunks of such packs to new ones, then each image's table and leaves anew under the same
id (``put`` replaces a table in one step), and leave the old packs to the next collection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import backend, images, index, layout, lock, manifest, packs, pins

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
else:
    np = lazy.Module("numpy")

Progress = Callable[[int, int], None]
"""Called with (images marked, images in all)."""

_COMPACT = 1 << 16


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collection deleted (or, dry, would delete) and what it left."""

    dry_run: bool
    images: int
    packs: int
    temporaries: int
    freed_bytes: int
    live_images: int
    live_packs: int
    live_bytes: int
    dead_bytes: int


@dataclass(slots=True)
class _Usage:
    """The live payloads of one pack: ``offset << 17 | stored``, repeated until compacted."""

    arrays: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    pending: int = 0

    def add(self, keys: npt.NDArray[np.uint64]) -> None:
        self.arrays.append(keys)
        self.pending += len(keys)
        if self.pending > _COMPACT:
            self.arrays = [np.unique(np.concatenate(self.arrays))]
            self.pending = 0

    def live(self) -> int:
        """The bytes in use, entry headers included."""
        keys = np.unique(np.concatenate(self.arrays))
        return int((keys & np.uint64(0x1FFFF)).sum()) + len(keys) * layout.ENTRY_HEADER.size


@dataclass(slots=True)
class Marks:
    """What is needed."""

    images: set[str] = field(default_factory=set)
    usage: dict[int, _Usage] = field(default_factory=dict)
    leaves: set[bytes] = field(default_factory=set)

    def add(self, entries: layout.Array) -> None:
        """Mark the payloads of *entries*."""
        used = entries[entries["raw"] > 0]
        keys = (used["offset"] << np.uint64(17)) | used["stored"].astype(np.uint64)
        for pack in np.unique(used["pack"]).tolist():
            self.usage.setdefault(pack, _Usage()).add(keys[used["pack"] == pack])


def image_ids(where: backend.Backend) -> Iterator[str]:
    """The ids of every image object."""
    for key, _ in where.list("images"):
        name = key.rpartition("/")[2].removesuffix(".image")
        if len(name) == 32 and layout.image_key(name) == key:
            yield name


def manifest_names(where: backend.Backend, vm: str | None = None) -> Iterator[tuple[str, str]]:
    """``(vm, checkpoint)`` of every manifest object."""
    for key, _ in where.list(f"manifests/{vm}" if vm else "manifests"):
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
    """Add to *marks* what the present manifests and pins need."""
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


def _mark_image(store: packs.Packs, image: str, marks: Marks) -> None:
    table = images.load_table(store, image)
    marks.add(table.leaves)
    for leaf in np.flatnonzero(table.leaves["raw"]).tolist():
        digest = table.leaves["hash"][leaf].tobytes()
        if digest not in marks.leaves:
            marks.add(images.read_leaf(store, table, leaf))
            marks.leaves.add(digest)


def run(
    store: packs.Packs,
    cache: index.ChunkIndex,
    lock_path: Path,
    *,
    dry_run: bool,
    progress: Progress | None,
    timeout: float,
) -> CollectReport:
    """Mark and sweep; see :meth:`blkckpt.store.store.Store.collect`."""
    early = Marks()
    with contextlib.suppress(errors.CorruptError):  # if it is so still, it is said below
        mark(store, early, progress)
    with lock.exclusive(lock_path, timeout):
        marks = _again(store, early)
        sizes = dict(store.ids())
        dead_packs = {pack: size for pack, size in sizes.items() if pack not in marks.usage}
        freed = sum(dead_packs.values())
        dead_images = [image for image in image_ids(store.backend) if image not in marks.images]
        for image in dead_images:
            key = layout.image_key(image)
            freed += store.backend.size(key)
            if not dry_run:
                store.backend.delete(key)
        if not dry_run:
            cache.drop(dead_packs)
            for pack in dead_packs:
                store.delete(pack)
        temporaries, temporary_bytes = store.backend.sweep(dry_run=dry_run)
    live = sum(usage.live() for pack, usage in marks.usage.items() if pack in sizes)
    total = sum(size for pack, size in sizes.items() if pack in marks.usage)
    return CollectReport(
        dry_run=dry_run,
        images=len(dead_images),
        packs=len(dead_packs),
        temporaries=temporaries,
        freed_bytes=freed + temporary_bytes,
        live_images=len(marks.images),
        live_packs=len(sizes) - len(dead_packs),
        live_bytes=live,
        dead_bytes=max(total - live, 0),
    )


def _again(store: packs.Packs, early: Marks) -> Marks:
    """The marks as of now: *early* where that is still all that is needed, with what came since.

    An image that was needed then and is not any more would keep its packs, so in that case marking starts over.
    """
    if early.images - set(roots(store.backend)):
        early = Marks()
    mark(store, early)
    return early

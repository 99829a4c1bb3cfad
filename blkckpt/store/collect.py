"""Collection: mark what manifests and pins need, sweep the rest, and repack what is mostly dead.

Mark (:mod:`blkckpt.store.marks`) follows manifest → image → leaves → packs without a lock; under the store's lock
only what came meanwhile is added.  The sweep runs with the store held exclusively: no writer, and no image whose
manifest is still to come, exists then.

Order of the sweep: images, then (the index forgets and) packs, then labels of checkpoints that are gone, then
temporary files.  An image that is there has therefore all its packs, at every instant, also when the sweep is killed;
repeating it finishes the work (rule S5).  A manifest, pin or table that cannot be read stops the collection before
anything is deleted.

Packs are deleted whole.  What is dead in a pack that lives on is counted (``dead_bytes``); :mod:`blkckpt.store.repack`
gets it back.  That runs between sweeps, in rounds, with the store free for writers: a first sweep makes room, and
each round is followed by marking everything anew and another sweep, which takes the packs that it has emptied.

One collection at a time: ``gc.lock`` is held throughout.  Without it, one that has marked before another repacks
would delete the new packs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blkckpt import errors
from blkckpt.store import backend, evidence, index, labels, layout, lock, manifest, marks, packs, repack

PATIENCE = 60.0
"""Seconds to wait for writers after a round of repacking: what it has emptied is to go."""

MARK, REPACK = "mark", "repack"

Progress = Callable[[str, int, int], None]
"""Called with (:data:`MARK`, images marked, images in all) and (:data:`REPACK`, bytes copied, of how many)."""


@dataclass(frozen=True, slots=True)
class Options:
    """*repack*: the share of dead bytes (0 to 1) above which a pack is rewritten, or None.  *timeout*: seconds to
    wait for writers to finish."""

    dry_run: bool = False
    repack: float | None = None
    timeout: float = 10.0
    progress: Progress | None = None

    def stage(self, name: str) -> marks.Progress | None:
        """The progress of one stage."""
        return functools.partial(self.progress, name) if self.progress else None


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collection deleted (or, dry, would delete) and what it left.

    ``freed_bytes`` is what the store shrank by, the packs that repacking wrote deducted; ``packs`` were dead as a
    whole, ``repacked_packs`` were rewritten, and ``moved_bytes`` copied for it.  ``live_bytes`` are what packs of the
    needed chunks alone would take.  ``damaged`` packs were not rewritten.
    """

    dry_run: bool
    images: int
    packs: int
    temporaries: int
    freed_bytes: int
    live_images: int
    live_packs: int
    live_bytes: int
    dead_bytes: int
    repacked_packs: int = 0
    repacked_images: int = 0
    moved_bytes: int = 0
    damaged: tuple[str, ...] = ()


def run(store: packs.Packs, cache: index.ChunkIndex, lock_path: Path, options: Options) -> CollectReport:
    """Mark and sweep, and repack; see :meth:`blkckpt.store.store.Store.collect`."""
    reason = "another collection is at work in this store"
    with lock.exclusive(lock_path.with_name("gc.lock"), options.timeout, reason):
        collection = _Collection(store, cache, lock_path, options)
        collection.sweep(options.timeout)
        if options.repack is not None:
            collection.repack(options.repack)
        return collection.report()


class _Collection:
    """One collection under way."""

    def __init__(self, store: packs.Packs, cache: index.ChunkIndex, lock_path: Path, options: Options) -> None:
        self._store, self._cache, self._lock_path, self._options = store, cache, lock_path, options
        self._marks = marks.Marks()
        self._sizes: dict[int, int] = {}
        self._victims: set[int] = set()
        self._images = self._packs = self._temporaries = self._freed = 0
        self._repacked = repack.Report()

    def sweep(self, timeout: float) -> None:
        """Mark, and delete what is not marked."""
        early = marks.Marks()
        with contextlib.suppress(errors.CorruptError):  # if it is so still, it is said below
            marks.mark(self._store, early, self._options.stage(MARK))
        with lock.exclusive(self._lock_path, timeout):
            self._marks = marks.again(self._store, early)
            self._delete()

    def _delete(self) -> None:
        dry, where = self._options.dry_run, self._store.backend
        present = dict(self._store.ids())
        self._sizes = {pack: size for pack, size in present.items() if pack in self._marks.usage}
        dead = {pack: size for pack, size in present.items() if pack not in self._marks.usage}
        dead_images = [image for image in marks.image_ids(where) if image not in self._marks.images]
        for image in dead_images:
            key = layout.image_key(image)
            self._freed += where.size(key)
            if not dry:
                where.delete(key)
        if not dry:
            self._cache.drop(dead)
            for pack in dead:
                self._store.delete(pack)
            for key in list(_dead_labels(where)):
                where.delete(key)
            with lock.exclusive(self._lock_path.with_name("labels.lock"), reason="labels are being changed"):
                for vm, name in _dead_evidence(where):  # not what is half written
                    evidence.remove(where, vm, name)
        temporaries, temporary_bytes = where.sweep(dry_run=dry)
        self._images += len(dead_images)
        self._packs += len(set(dead) - self._victims)
        self._temporaries += temporaries
        self._freed += sum(dead.values()) + temporary_bytes

    def repack(self, threshold: float) -> None:
        """Rewrite the packs with a share of more than *threshold* dead bytes, each at most once."""
        candidates = repack.victims(self._marks, self._sizes, threshold)
        if self._options.dry_run:
            self._repacked.packs = len(candidates)
            self._repacked.moved_bytes = sum(self._marks.usage[pack].size() for pack in candidates)
            self._freed += sum(candidates.values())
            return
        while candidates:
            chosen = repack.one_round(self._marks, candidates)
            left = set(candidates) - set(chosen)
            self._victims.update(chosen)
            before = self._repacked.written_bytes
            progress = self._options.stage(REPACK)
            repack.run(self._store, self._cache, self._marks, chosen, self._repacked, progress)
            self._freed -= self._repacked.written_bytes - before
            self.sweep(max(self._options.timeout, PATIENCE))
            again = repack.victims(self._marks, self._sizes, threshold)
            candidates = {pack: gain for pack, gain in again.items() if pack in left}

    def report(self) -> CollectReport:
        live = sum(self._marks.usage[pack].size() for pack in self._sizes)
        return CollectReport(
            dry_run=self._options.dry_run,
            images=self._images,
            packs=self._packs,
            temporaries=self._temporaries,
            freed_bytes=self._freed,
            live_images=len(self._marks.images),
            live_packs=len(self._sizes),
            live_bytes=live,
            dead_bytes=max(sum(self._sizes.values()) - live, 0),
            repacked_packs=self._repacked.packs,
            repacked_images=self._repacked.images,
            moved_bytes=self._repacked.moved_bytes,
            damaged=tuple(self._repacked.damaged),
        )


def _owner(where: backend.Backend, vm: str, name: str) -> str | None:
    """The id of the checkpoint of that name; None if there is none."""
    key = f"manifests/{vm}/{name}.json"
    try:
        return manifest.decode(where.get(key, 0, where.size(key)), f"manifest of {vm}@{name}").id
    except errors.NotFoundError:
        return None


def _dead_labels(where: backend.Backend) -> list[str]:
    """The labels of checkpoints that are gone, or whose name another has now; those that cannot be read stay."""
    found = []
    for vm, name in marks.manifest_names(where, kind="labels"):
        key = f"labels/{vm}/{name}.json"
        with contextlib.suppress(errors.CorruptError, errors.InputError):
            owner = _owner(where, vm, name)
            if labels.decode(where.get(key, 0, where.size(key)), key)[1] != owner:
                found.append(key)
    return found


def _dead_evidence(where: backend.Backend) -> list[tuple[str, str]]:
    """Of checkpoints that are gone, or whose name another has now; pictures without their description too."""
    found = []
    names = {key.rpartition(".")[0] for key, _ in where.list("evidence") if key.count("/") == 2}
    for vm, name in sorted((key.split("/")[1], key.split("/")[2]) for key in names):
        with contextlib.suppress(errors.CorruptError, errors.InputError):
            owner = _owner(where, vm, name)
            if owner is None or evidence.load(where, vm, name, owner) == evidence.NONE:
                found.append((vm, name))
    return found

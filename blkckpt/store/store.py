"""The store: images and manifests in one directory.  Chapter: the docstring of :mod:`blkckpt.store`."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blkckpt import durable, errors, lazy, paths, units
from blkckpt.store import backend, codec, contents, images, index, layout, lock, marks, packs, pins
from blkckpt.store import evidence as evidence_format
from blkckpt.store import labels as label_format
from blkckpt.store import manifest as manifest_format
from blkckpt.store import reference as references

if TYPE_CHECKING:
    from blkckpt.store import collect, retained, writer
else:
    collect = lazy.Module("blkckpt.store.collect")
    retained = lazy.Module("blkckpt.store.retained")
    writer = lazy.Module("blkckpt.store.writer")

_OURS = {
    "store.json", "lock", "labels.lock", "gc.lock", "packs", "images", "manifests", "labels", "evidence", "pins", "tmp",
    "index",
}  # fmt: skip


class Store:
    """One store.  Thread-safe; any number of processes may have it open.

    Whoever writes images in *another* process than the one that puts the manifest holds the store with
    :meth:`hold` from before the first image until the manifest: an image without a manifest is garbage, and only
    the hold keeps a collection from taking it.  Within one process the writers do so themselves.
    """

    def __init__(self, path: Path, info: layout.StoreInfo, where: backend.LocalBackend) -> None:
        """Use :meth:`open` or :meth:`init`."""
        self.path, self.info, self._backend = path, info, where
        self.packs = packs.Packs(where, codec.codec(info.hash_name), info.id)
        self.index = index.ChunkIndex(path / "index", info.id, self.packs.ids)
        self._lock = threading.RLock()
        self._hold: lock.Hold | None = None
        self._reconciled = False
        self._writers = 0
        self._unpublished: set[str] = set()

    @classmethod
    def init(cls, path: str | Path, *, hash_name: str | None = None) -> Store:
        """Make a new store at *path* (created 0700); StateError if there is one already."""
        root = Path(path)
        paths.private_directory(root)
        strange = sorted(p.name for p in root.iterdir() if p.name not in _OURS and not p.name.startswith(".tmp-"))
        if strange:
            raise errors.InputError(f"{root} is not empty ({strange[0]!r} is there); give an empty directory")
        info = layout.StoreInfo(
            secrets.token_bytes(16), codec.codec(hash_name or codec.preferred()).name, time.time_ns()
        )
        try:
            durable.create_file(root / "store.json", layout.encode_store(info))
        except FileExistsError as error:
            raise errors.StateError(f"there is a store at {root} already") from error
        except OSError as error:
            raise errors.from_os_error(error, f"creating a store at {root}") from error
        return cls.open(root)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store at *path*; NotFoundError, AccessError, or CorruptError for a damaged or newer one."""
        root = Path(path)
        if not (root / "store.json").exists():
            raise errors.NotFoundError(f"there is no checkpoint store at {root}")
        paths.private_directory(root)
        info = layout.decode_store(durable.read_small(root / "store.json", "store", 64 << 10), str(root))
        return cls(root, info, backend.LocalBackend(root))

    @classmethod
    def open_or_init(cls, path: str | Path) -> Store:
        """Open the store at *path*, which is made if it is not there."""
        try:
            return cls.open(path)
        except errors.NotFoundError:
            pass
        try:
            return cls.init(path)
        except errors.StateError:  # another process was faster
            return cls.open(path)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is not published, and every descriptor."""
        with self._lock:
            self._unpublished.clear()
            self._writers = 0
            self._release()
        self.index.close()
        self._backend.close()

    # --- images

    def image_writer(
        self,
        size: int,
        *,
        parent: str | None = None,
        kind: str = "disk",
        label: str = "",
        workers: int | None = None,
        image: str | None = None,
    ) -> writer.ImageWriter:
        """Begin an image of *size* bytes; with a *parent* (of the same size) unwritten chunks are the parent's.

        *image* is the id of a retained one that it takes the place of.
        """
        if not 0 <= size <= layout.MAX_IMAGE:
            raise errors.InputError(
                f"an image cannot have {size} bytes; the most is {units.format_size(layout.MAX_IMAGE)}"
            )
        self._begin()
        try:
            self._reconcile()
            above = images.ImageReader(self.packs, images.load_table(self.packs, parent)) if parent else None
            if image is not None and self.reference(image) is None:
                raise errors.StateError(f"image {image} is not a retained one; it is not replaced")
            if above and above.size != size:
                raise errors.InputError(f"parent image {parent} has {above.size} bytes, the new image {size}")
            return writer.ImageWriter(
                writer.Resources(self.packs, self.index),
                size, parent=above, kind=kind, label=label, done=self._end, workers=workers, image=image,
            )  # fmt: skip
        except BaseException:
            self._end(None)
            raise

    def image(self, image_id: str, *, cache: int = images.CACHE, ahead: bool = False) -> images.ImageReader:
        """Open an image for reading; *cache* is the bytes of chunks to keep, *ahead* is for a guest's disk.

        A retained one is read from its VM's layers, which it keeps where they are until it is closed.
        """
        while True:
            try:
                return images.ImageReader(self.packs, images.load_table(self.packs, image_id), cache=cache, ahead=ahead)
            except references.RetainedError as error:
                found = error.reference
            reader = retained.open_image(found)
            if reader is not None:
                return reader
            if self.reference(image_id) is not None:  # else it has been flattened meanwhile
                raise errors.CorruptError(
                    f"{found.owner} is retained, but VM {found.vm} in {found.home} does not have its layers any more; "
                    "remove the checkpoint"
                )

    def reference(self, image_id: str) -> references.Reference | None:
        """What stands for image *image_id* if it is a retained one; NotFoundError if it is not there."""
        key = layout.image_key(layout.check_id(image_id))
        try:
            data = self._backend.get(key, 0, 1)
            if not references.is_one(data):
                return None
            data = self._backend.whole(key, images.LONGEST)
        except errors.NotFoundError as error:
            raise errors.NotFoundError(f"image {image_id} is not in the store") from error
        return references.decode(data, image_id) if references.is_one(data) else None

    def put_reference(self, reference: references.Reference) -> None:
        """Let a VM's layers stand for an image, before the manifest that names it.  The caller holds the store."""
        self._backend.put(layout.image_key(reference.image), references.encode(reference), exclusive=True)

    def image_ids(self) -> Iterator[str]:
        """Every image in the store, whether a manifest names it or not."""
        return marks.image_ids(self._backend)

    # --- manifests

    def put_manifest(
        self,
        m: manifest_format.Manifest,
        with_labels: label_format.Labels = label_format.NONE,
        seen: tuple[evidence_format.Evidence, bytes | None] = (evidence_format.NONE, None),
    ) -> None:
        """Publish a checkpoint: the only commit point (rule S1).  It is never there without *with_labels*, and what was
        *seen* of it elsewhere, its picture too.

        Checks before that every image it names is there, with the right size (rule S2), and notes what is used of each
        and what the memory skeleton holds.  StateError if the VM has a checkpoint of this name.
        """
        key = _manifest_key(m.vm, m.name)
        with self.hold():
            data = manifest_format.encode(self._checked(m))
            with self._labels_lock():
                if not self._backend.exists(key):
                    if with_labels != label_format.NONE:
                        self._backend.put(label_format.key(m.vm, m.name), label_format.encode(with_labels, m.id))
                    if seen[0] != evidence_format.NONE:
                        evidence_format.put(self._backend, m, *seen)
                try:
                    self._backend.put(key, data, exclusive=True)
                except FileExistsError as error:
                    raise errors.StateError(f"{m.vm} has a checkpoint {m.name} already; choose another name") from error
            with self._lock:
                self._unpublished -= set(m.images())

    def amend_manifest(self, m: manifest_format.Manifest) -> None:
        """Replace a published manifest by one that differs in its timings and notes only (atomically, as S1).

        For what is known only after the commit point.  Also by one that is not retained any more, when all its images
        have tables.  StateError when the checkpoint is not there, or differs.
        """
        there = self.manifest(m.vm, m.name)
        if there.retained and not m.retained:
            there = self._checked(dataclasses.replace(there, retained=False))
        amended = dataclasses.replace(there, timings=m.timings, notes=m.notes)
        if amended != m:
            raise errors.StateError(f"{m.vm}@{m.name} is another checkpoint now; it is left as it is")
        self._backend.put(_manifest_key(m.vm, m.name), manifest_format.encode(amended))

    def manifest(self, vm: str, name: str) -> manifest_format.Manifest:
        """The manifest of checkpoint *name* of *vm*."""
        path = self._backend.path(_manifest_key(vm, name))
        what = f"manifest of {vm}@{name}"
        try:
            data = durable.read_small(path, what, manifest_format.MAX_SIZE)
        except errors.NotFoundError as error:
            raise errors.NotFoundError(f"{vm} has no checkpoint {name} in the store {self.path}") from error
        found = manifest_format.decode(data, what)
        if (found.vm, found.name) != (vm, name):
            raise errors.CorruptError(f"{what} is that of {found.vm}@{found.name}")
        return found

    def names(self, vm: str | None = None) -> list[tuple[str, str]]:
        """``(vm, checkpoint)`` of every manifest, sorted, without reading them."""
        if vm is not None:
            units.check_name(vm, "VM name")
        return list(marks.manifest_names(self._backend, vm))

    def manifests(self, vm: str | None = None) -> list[manifest_format.Manifest]:
        """Every manifest (of *vm*), oldest first.  CorruptError if one is damaged; :meth:`names` still lists it."""
        found = []
        for owner, name in self.names(vm):
            try:
                found.append(self.manifest(owner, name))
            except errors.NotFoundError:
                continue  # removed meanwhile
        return sorted(found, key=lambda m: (m.created_ns, m.vm, m.name))

    def remove(self, vm: str, name: str, *, pinned: bool = False) -> None:
        """Remove a checkpoint, damaged or not; its data goes with the next :meth:`collect` (rule S5).

        StateError if it is pinned, unless *pinned* says that this one goes all the same (it was taken back).
        """
        key = _manifest_key(vm, name)
        with self._labels_lock():
            if not self._backend.exists(key):
                raise errors.NotFoundError(f"{vm} has no checkpoint {name} in the store {self.path}")
            if not pinned:
                self.check_unpinned(vm, name)
            self._backend.delete(key)
            self._backend.delete(label_format.key(vm, name))
            evidence_format.remove(self._backend, vm, name)

    # --- evidence

    def evidence(self, m: manifest_format.Manifest) -> evidence_format.Evidence:
        """What was seen of checkpoint *m*; nothing where that cannot be read."""
        return evidence_format.load(self._backend, m.vm, m.name, m.id)

    def picture(self, m: manifest_format.Manifest) -> bytes | None:
        """The PNG of *m*'s screen, if one was taken and is whole."""
        screen = self.evidence(m).screen
        try:
            return evidence_format.picture(self._backend, m.vm, m.name, screen) if screen else None
        except (errors.NotFoundError, errors.CorruptError):
            return None

    def add_evidence(
        self,
        m: manifest_format.Manifest,
        *,
        boot: evidence_format.Boot | None = None,
        png: bytes | None = None,
        source: str,
    ) -> evidence_format.Evidence:
        """Keep what was seen, durably; StateError if the checkpoint is gone, or its name is another's now."""
        with self._labels_lock():
            try:
                there = self.manifest(m.vm, m.name).id == m.id
            except errors.NotFoundError:
                there = False
            if not there:
                raise errors.StateError(f"{m.vm}@{m.name} was removed meanwhile; what was seen of it is not kept")
            return evidence_format.add(self._backend, m, boot, png, source, time.time_ns())

    # --- labels

    def labels(self, m: manifest_format.Manifest) -> label_format.Labels:
        """The labels of checkpoint *m*; CorruptError if they cannot be read."""
        return label_format.load(self._backend, m.vm, m.name, m.id)

    def relabel(
        self, vm: str, name: str, change: Callable[[label_format.Labels], label_format.Labels], *, anew: bool = False
    ) -> label_format.Labels:
        """Change the labels of a checkpoint, durably, and return them; nobody else's change is lost.

        *anew* begins with none when those that are there cannot be read.
        """
        with self._labels_lock():
            m = self.manifest(vm, name)
            try:
                before = self.labels(m)
            except errors.CorruptError:
                if not anew:
                    raise
                before = label_format.NONE
            after = change(before)
            if after != before or anew:
                self._backend.put(label_format.key(vm, name), label_format.encode(after, m.id))
            return after

    def check_unpinned(self, vm: str, name: str) -> None:
        """StateError if checkpoint *name* of *vm* is pinned, CorruptError if that cannot be known."""
        try:
            checkpoint_id = self.manifest(vm, name).id
        except errors.CorruptError:
            checkpoint_id = None
        try:
            pinned = label_format.load(self._backend, vm, name, checkpoint_id).pinned
        except errors.CorruptError as error:
            raise errors.CorruptError(f"whether {vm}@{name} is pinned is not known: {error}") from error
        if pinned:
            raise errors.StateError(f"{vm}@{name} is pinned and stays; let it go first: blkckpt unpin {vm}@{name}")

    def _labels_lock(self) -> lock.Hold:
        return lock.exclusive(self.path / "labels.lock", reason="labels are being changed")

    # --- pins: images in use without a manifest (a restored disk that is not yet filled)

    def pin(self, owner: str, image_ids: Iterable[str]) -> None:
        """Keep *image_ids* from collection until :meth:`unpin`; replaces what *owner* had pinned.  Durable."""
        with self.hold():
            wanted = list(dict.fromkeys(image_ids))
            for image_id in wanted:
                if self.reference(image_id) is None:
                    images.load_table(self.packs, image_id)
            self._backend.put(pins.key(owner), pins.encode(owner, wanted))

    def unpin(self, owner: str) -> None:
        """Let go of what *owner* pinned; no error if that is nothing."""
        self._backend.delete(pins.key(owner))

    def pins(self) -> dict[str, list[str]]:
        """What is pinned: owner → images."""
        return pins.load(self._backend)

    # --- upkeep

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep collections out: for the process that will put the manifest of what its children write."""
        self._begin()
        try:
            yield
        finally:
            self._end(None)

    def collect(
        self,
        *,
        dry_run: bool = False,
        repack: float | None = None,
        progress: collect.Progress | None = None,
        timeout: float = 10.0,
    ) -> collect.CollectReport:
        """Delete images and packs that no manifest and no pin needs, and what killed writers left.

        *repack* also rewrites packs with a larger share (0 to 1) of dead bytes.  StateError if a writer, or another
        collection, is at work for longer than *timeout*; CorruptError, and nothing is deleted, if a manifest or table
        cannot be read: what it needs is then not known.
        """
        with self._lock:
            if self._hold is not None:
                raise errors.StateError("this process is writing a checkpoint; collect when it has finished")
        options = collect.Options(dry_run=dry_run, repack=repack, timeout=timeout, progress=progress)
        return collect.run(self.packs, self.index, self.path / "lock", options)

    def rebuild_index(self) -> int:
        """Make the deduplication index anew from the packs; returns the number of packs."""
        with self.hold():
            return self.index.rebuild(marks.records_of(self.packs))

    # --- the hold

    def _begin(self) -> None:
        with self._lock:
            if self._hold is None:
                self._hold = lock.shared(self.path / "lock")
            self._writers += 1

    def _reconcile(self) -> None:
        """The index learns of packs that it lacks: once a hold, and only for who will write chunks."""
        with self._lock:
            if not self._reconciled:
                self.index.reconcile(marks.records_of(self.packs))
                self._reconciled = True

    def _end(self, image: str | None) -> None:
        """A writer has finished *image*, or has given up."""
        with self._lock:
            self._writers = max(self._writers - 1, 0)
            if image:
                self._unpublished.add(image)
            if not self._writers and not self._unpublished:
                self._release()

    def abandon(self) -> None:
        """The checkpoint will not be: its finished images are garbage from now on."""
        with self._lock:
            self._unpublished.clear()
            if not self._writers:
                self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None
            self._reconciled = False

    def _checked(self, m: manifest_format.Manifest) -> manifest_format.Manifest:
        """*m* with what its images hold, all of which are there, with the right size (rule S2)."""
        used = {image_id: self._check_image(m, image_id, size) for image_id, size in _sizes(m)}
        on_disks = {disk.image: None if m.retained else contents.on_disk(self.image(disk.image)) for disk in m.disks}
        return m.counted(used, on_disks, contents.look(self.image(m.memory.skeleton)) if m.memory else None)

    def _check_image(self, m: manifest_format.Manifest, image_id: str, size: int) -> int | None:
        """What is used of an image, as far as its table says it."""
        try:
            table = images.load_table(self.packs, image_id)
            found = table.size
        except references.RetainedError as error:
            if not m.retained:
                raise
            table, found = None, error.reference.size
        if found != size:
            raise errors.InputError(
                f"manifest {m.vm}@{m.name}: image {image_id} has {found} bytes, the manifest says {size}"
            )
        if table is None:
            return None
        for pack in table.packs:
            if not self.packs.exists(pack):
                raise errors.CorruptError(f"image {image_id} needs pack {pack:016x}, which is not in the store")
        return table.used


def _manifest_key(vm: str, name: str) -> str:
    return f"manifests/{units.check_name(vm, 'VM name')}/{units.check_name(name, 'checkpoint name')}.json"


def _sizes(m: manifest_format.Manifest) -> Iterator[tuple[str, int]]:
    """Every image of a manifest with the size that it must have."""
    for disk in m.disks:
        yield disk.image, disk.size
    if m.memory:
        for block in m.memory.blocks:
            yield block.image, block.size
        yield m.memory.skeleton, m.memory.skeleton_size

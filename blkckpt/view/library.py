"""The stores that a view looks into: checkpoints and images, opened when asked for and kept while there is room.

Nothing is remembered that could be wrong later: the manifest of a checkpoint is looked at again whenever it is asked
for (one ``stat``), so that what is made, amended or removed meanwhile is seen; images never change.

Bounds: :data:`MANIFESTS` bytes of manifests, the nodes of :data:`FOLDERS` checkpoints, the names of
:data:`CHECKPOINTS` VMs' checkpoints, :data:`TABLES` bytes of image tables, the chunks' own bound
(:mod:`blkckpt.view.chunks`), and for every image ever looked at a few numbers, at most :data:`FACTS` of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from blkckpt import durable, errors, lazy, log, paths, units
from blkckpt.memory import skeleton
from blkckpt.store import contents, images, manifest, reference
from blkckpt.store import store as stores
from blkckpt.view import chunks, content, layers
from blkckpt.vm import definition

if TYPE_CHECKING:
    from blkckpt.view import devices
else:
    devices = lazy.Module("blkckpt.view.devices")

CHECKPOINTS = 256
MANIFESTS = 16 << 20
"""Bytes of decoded manifests, for two passes over some 3,000 checkpoints: a list by time, then each of them."""

_DECODED = 3
"""What a decoded manifest weighs, in lengths of its file."""

FOLDERS = 128
"""Checkpoints whose nodes are kept: 16 KiB each, about."""

TABLES = 16 << 20
FACTS = 1 << 16
DECODED = 8
"""Decoded device states kept: a megabyte each."""

_SETTLED_NS = 10**9

STORES_SECONDS = 2.0
"""How soon the store of a newly defined VM is seen."""

logger = log.get(__name__)
_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class _Recent(Generic[_K, _V]):
    """The values used most recently, bounded by the sum of their weights.  Thread-safe."""

    def __init__(self, limit: int, weight: Callable[[_V], int] = lambda _: 1) -> None:
        self._limit, self._weigh = limit, weight
        self._lock = threading.Lock()
        self._found: OrderedDict[_K, _V] = OrderedDict()
        self._total = 0

    def get(self, key: _K) -> _V | None:
        return chunks.recall(self._found, key)

    def put(self, key: _K, value: _V) -> None:
        with self._lock:
            old = self._found.pop(key, None)
            self._total += self._weigh(value) - (self._weigh(old) if old is not None else 0)
            self._found[key] = value
            while self._total > self._limit and len(self._found) > 1:
                self._total -= self._weigh(self._found.popitem(last=False)[1])

    def make(self, key: _K, make: Callable[[], _V]) -> _V:
        """The value, made now if it is not here (perhaps by two threads at once)."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value


@dataclass(slots=True)
class _Shelf:
    """The checkpoints of one VM: their names, and their times and tags once somebody has asked."""

    states: tuple[tuple[int, ...] | None, ...]
    files: frozenset[tuple[str, int]]
    names: list[str]
    settled: bool
    times: list[tuple[int, str]] | None = None
    stamps: dict[str, tuple[int, str]] | None = None
    tags: dict[str, tuple[int, str]] | None = None


@dataclass(slots=True)
class Checkpoint:
    """A manifest, the store it is in, and the file it was read from."""

    store: stores.Store
    manifest: manifest.Manifest
    data: bytes
    changed_ns: int


class Library:
    """Everything that is kept; thread-safe.  *find* gives the paths of the stores there are now."""

    def __init__(self, find: Callable[[], list[Path]], cache: chunks.Chunks) -> None:
        self.cache = cache
        self._find = find
        self._lock = threading.Lock()
        self._stores: dict[Path, stores.Store] = {}
        self._places: tuple[stores.Store, ...] = ()
        self._looked = float("-inf")
        self._checkpoints: _Recent[str, tuple[tuple[int, ...], Checkpoint]] = _Recent(
            MANIFESTS, lambda value: len(value[1].data) * _DECODED
        )
        self._made: _Recent[int, tuple[Checkpoint, Any]] = _Recent(FOLDERS)
        self._shelves: _Recent[str, _Shelf] = _Recent(CHECKPOINTS)
        self._images: _Recent[tuple[str, str], tuple[content.Content, int]] = _Recent(TABLES, lambda value: value[1])
        self._indexes: _Recent[tuple[str, str], skeleton.Index] = _Recent(FACTS // 64)
        self._used: _Recent[tuple[str, str], int] = _Recent(FACTS)
        self._decoded: _Recent[tuple[str, str], dict[str, Any]] = _Recent(DECODED)

    def places(self) -> Sequence[stores.Store]:
        """The stores that are there now."""
        if time.monotonic() - self._looked > STORES_SECONDS:
            self._look_for_stores()
        return self._places

    def _look_for_stores(self) -> None:
        with self._lock:
            for path in self._find():
                if path not in self._stores:
                    with contextlib.suppress(errors.NotFoundError):
                        self._stores[path] = stores.Store.open(path)
            self._places = tuple(self._stores.values())
            self._looked = time.monotonic()

    def close(self) -> None:
        self.cache.close()
        for one in self._stores.values():
            one.close()

    # --- checkpoints

    def vms(self) -> list[str]:
        """The VMs that have a checkpoint."""
        found = {name for place in self.places() for name in _names(f"{place.path}/manifests")}
        return sorted(name for name in found if units.NAME.fullmatch(name) and self.checkpoints(name))

    def checkpoints(self, vm: str) -> list[str]:
        """The checkpoints of *vm*, by name."""
        return self._shelf(vm).names

    def checkpoint(self, vm: str, name: str) -> Checkpoint:
        """Checkpoint *name* of *vm* as it is now; NotFoundError, or CorruptError for a damaged manifest."""
        units.check_name(vm, "VM name")
        units.check_name(name, "checkpoint name")
        for place in self.places():
            path = f"{place.path}/manifests/{vm}/{name}.json"
            state = _state(path)
            if state is None:
                continue
            known = self._checkpoints.get(path)
            if known is not None and known[0] == state:
                return known[1]
            found = _load(place, path, vm, name, state[0])
            self._checkpoints.put(path, (state, found))
            return found
        raise errors.NotFoundError(f"{vm} has no checkpoint {name}")

    def remember(self, found: Checkpoint, make: Callable[[], _V]) -> _V:
        """What *make* makes of a checkpoint: once for as long as its manifest stays the same and there is room."""
        known = self._made.get(id(found))
        if known is None or known[0] is not found:
            known = (found, make())
            self._made.put(id(found), known)
        made: _V = known[1]
        return made

    def times(self, vm: str) -> list[tuple[int, str]]:
        """``(created_ns, name)`` of every readable checkpoint of *vm*, oldest first."""
        shelf = self._shelf(vm)
        if shelf.times is None:
            shelf.times = sorted(self._times(vm, shelf.names))
        return shelf.times

    def stamps(self, vm: str, call: Callable[[int], str]) -> dict[str, tuple[int, str]]:
        """What *call* makes of the times of *vm*'s checkpoints → ``(created_ns, name)``; the second ``…-2``."""
        shelf = self._shelf(vm)
        if shelf.stamps is None:
            before, number, found = "", 1, {}
            for created, name in self.times(vm):
                text = call(created)
                number = number + 1 if text == before else 1
                before = text
                found[text if number == 1 else f"{text}-{number}"] = created, name
            shelf.stamps = found
        return shelf.stamps

    def tags(self, vm: str) -> dict[str, tuple[int, str]]:
        """Each tag of *vm*'s checkpoints → ``(created_ns, name)`` of the newest that has it."""
        shelf = self._shelf(vm)
        if shelf.tags is None:
            labelled = {name for place in self.places() for name in _names(f"{place.path}/labels/{vm}")}
            shelf.tags = {}
            for created, name in self.times(vm):
                if f"{name}.json" in labelled:
                    shelf.tags.update(dict.fromkeys(self._tags_of(vm, name), (created, name)))
        return shelf.tags

    def _tags_of(self, vm: str, name: str) -> tuple[str, ...]:
        try:
            found = self.checkpoint(vm, name)
            return found.store.labels(found.manifest).tags
        except errors.NotFoundError:
            return ()
        except errors.BlkckptError as error:
            logger.error("no tags", extra={"fields": {"checkpoint": f"{vm}@{name}", "error": str(error)}})
            return ()

    def _times(self, vm: str, names: list[str]) -> Iterator[tuple[int, str]]:
        for name in names:
            try:
                yield self.checkpoint(vm, name).manifest.created_ns, name
            except errors.NotFoundError:
                continue
            except errors.BlkckptError as error:
                logger.error("left out", extra={"fields": {"checkpoint": f"{vm}@{name}", "error": str(error)}})

    def _shelf(self, vm: str) -> _Shelf:
        """The list of *vm*'s checkpoints, made anew when a directory of manifests or labels has changed.

        Whatever is made, amended or removed there changes the directory's time.  One that changed within the clock's
        last steps before it was read is not believed again: it may change once more at the same time.  What has been
        worked out stays when the files are the same ones, by name and inode.
        """
        kinds = ("manifests", "labels")
        states = tuple(_state(f"{place.path}/{kind}/{vm}") for place in self.places() for kind in kinds)
        known = self._shelves.get(vm)
        if known is not None and known.states == states and known.settled:
            return known
        now = time.time_ns()
        files = frozenset(file for place in self.places() for file in _files(f"{place.path}/manifests/{vm}"))
        settled = all(state is None or now - state[0] > _SETTLED_NS for state in states)
        if known is not None and known.files == files:
            fresh = _Shelf(states, files, known.names, settled, known.times, known.stamps)
        else:
            plain = {name.removesuffix(".json") for name, _ in files if name.endswith(".json")}
            fresh = _Shelf(states, files, sorted(name for name in plain if units.NAME.fullmatch(name)), settled)
        names = fresh.names
        if names:
            self._shelves.put(vm, fresh)
        return fresh

    # --- images

    def image(self, store: stores.Store, image_id: str) -> content.Content:
        """The image, opened."""

        def load() -> tuple[content.Content, int]:
            try:
                table = images.load_table(store.packs, image_id)
            except reference.RetainedError as error:
                return layers.Layers(store, image_id, error.reference.size), 1024
            return content.Image(store.packs, table, self.cache), len(table.directory) + 1024

        return self._images.make((store.info.id.hex(), image_id), load)[0]

    def used(self, store: stores.Store, one: manifest.DiskImage | manifest.RamBlock) -> int:
        """Bytes of an image that are not in holes: as its manifest has it, else as they are counted."""
        if one.used is not None:
            return one.used
        return self._used.make((store.info.id.hex(), one.image), lambda: self.image(store, one.image).used())

    def contents(self, store: stores.Store, memory: manifest.MemoryImage) -> manifest.Contents:
        """What a memory skeleton holds: as its manifest has it, else by its own table, not counted."""
        return memory.contents or contents.of(self.index(store, memory), lambda *_: None)

    def index(self, store: stores.Store, memory: manifest.MemoryImage) -> skeleton.Index:
        """Where the parts of a memory skeleton lie."""

        def load() -> skeleton.Index:
            image = self.image(store, memory.skeleton)
            return skeleton.read_index(
                content.Glance(image) if isinstance(image, content.Image) else content.Reader(image)
            )

        return self._indexes.make((store.info.id.hex(), memory.skeleton), load)

    def devices(self, store: stores.Store, memory: manifest.MemoryImage) -> dict[str, Any]:
        """The device state of a checkpoint, decoded."""

        def load() -> dict[str, Any]:
            tail = self.index(store, memory).tail
            return devices.decode(content.read(self.image(store, memory.skeleton), *tail))

        return self._decoded.make((store.info.id.hex(), memory.skeleton), load)


def store_paths(home: paths.Home) -> list[Path]:
    """Where checkpoints of this home may be: its own store, and those its VMs name."""
    found = [home.store]
    for name in home.vm_names():
        with contextlib.suppress(errors.BlkckptError):  # a damaged VM hides no checkpoint of another
            chosen = definition.load(home.vm(name)).store
            found += [Path(chosen)] if chosen else []
    return [path for path in dict.fromkeys(path.resolve() for path in found) if path.exists()]


def _state(path: str) -> tuple[int, ...] | None:
    """What changes when the file is another one; its first item is the time of the change."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _load(place: stores.Store, path: str, vm: str, name: str, changed_ns: int) -> Checkpoint:
    what = f"manifest of {vm}@{name}"
    data = durable.read_small(path, what, manifest.MAX_SIZE)
    found = manifest.decode(data, what)
    if (found.vm, found.name) != (vm, name):
        raise errors.CorruptError(f"{what} is that of {found.vm}@{found.name}")
    return Checkpoint(place, found, data, changed_ns)


def _files(directory: str) -> list[tuple[str, int]]:
    """The names in *directory* and their inodes: a manifest that is amended is another file."""
    try:
        with os.scandir(directory) as found:
            return [(entry.name, entry.inode()) for entry in found]
    except OSError:
        return []


def _names(directory: str) -> list[str]:
    return [name for name, _ in _files(directory)]

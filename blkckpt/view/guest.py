"""What is on a checkpoint's disk, as part of the tree: its partitions, and the guest's files in them.

Both come from :mod:`blkckpt.view.volumes` and its neighbours, which read them through the disk's image; a volume's
parser process is started when one of its directories is looked into, and a few are kept.

``NAME.partitions/N.img`` is partition *N*; ``NAME.files`` holds the files of a disk without a table, else a directory
for each volume (``1``, ``2``, ``vg-lv``).  Neither is there when nothing is known; without the
optional extra ``files`` there are only partitions.  Owners and permissions are the
guest's, and so are the targets of its symbolic links: an absolute one leads, as after any mount, to a file of the host.
"""

from __future__ import annotations

import functools
import importlib.util
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from blkckpt import errors
from blkckpt.store import contents, manifest
from blkckpt.store import store as stores
from blkckpt.view import content, library, nodes, volumes
from blkckpt.view import source as sources

DISKS = 8
"""Disks whose volumes are kept: a parser process of 30 MB each where files are being read."""

ALIKE = 8
"""Looks at disks with which the next one is compared, by the hashes of what was read."""

ENTRIES = 4096
"""Directory entries remembered for each volume."""


class Guests:
    """The disks that have been looked into.  Thread-safe."""

    def __init__(self, books: library.Library) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._found: OrderedDict[str, manifest.DiskContents] = OrderedDict()
        self._alike: list[tuple[content.Glance, manifest.DiskContents]] = []
        self._volumes: OrderedDict[str, dict[str, Volume]] = OrderedDict()

    def look(self, store: stores.Store, disk: manifest.DiskImage) -> manifest.DiskContents:
        """What is on this disk: as its manifest has it, else by its image.  Files only if they can be read."""
        found = disk.contents
        if found is None or found.rules != contents.RULES:
            found = self._known(store, disk.image)
        return found if _files_can_be_read() else replace(found, files=False)

    def check(self, store: stores.Store, disk: manifest.DiskImage, partition: tuple[int, int, int]) -> None:
        """CorruptError if a partition, of which the manifest tells, is another one by the table on the disk (V1)."""
        if disk.contents is not None and partition not in self._known(store, disk.image).partitions:
            raise errors.CorruptError(
                f"partition {partition[0]} of {disk.image} is not by its table what its manifest says"
            )

    def _known(self, store: stores.Store, image_id: str) -> manifest.DiskContents:
        with self._lock:
            known = self._found.get(image_id)
        if known is None:
            known = self._look(self._books.image(store, image_id))
            with self._lock:
                self._found[image_id] = known
                if len(self._found) > library.FACTS:
                    self._found.popitem(last=False)
        return known

    def _look(self, image: content.Content) -> manifest.DiskContents:
        """A disk that is the same as one seen before, wherever that was looked at, is not read again."""
        if not isinstance(image, content.Image):  # a retained one, which has no hashes
            return contents.of_disk(content.Reader(image))
        for glance, found in reversed(self._alike):
            if glance.holds_for(image):
                return found
        glance = content.Glance(image)
        found = contents.of_disk(glance)
        self._alike = [*self._alike[-ALIKE + 1 :], (glance, found)]
        return found

    def volumes(self, store: stores.Store, image_id: str) -> dict[str, Volume]:
        """The volumes of this disk by name."""
        with self._lock:
            known = self._volumes.get(image_id)
            if known is not None:
                self._volumes.move_to_end(image_id)
                return known
        whole = self._books.image(store, image_id)
        fresh = {one.name: Volume(one, whole) for one in volumes.filesystems(content.Reader(whole)) if not one.problem}
        with self._lock:
            known = self._volumes.setdefault(image_id, fresh)
            dropped = [self._volumes.popitem(last=False)[1]] if len(self._volumes) > DISKS else []
        for gone in dropped:
            for volume in gone.values():
                volume.close()  # whoever still asks starts its parser again
        return known

    def close(self) -> None:
        for known in self._volumes.values():
            for volume in known.values():
                volume.close()


@functools.cache
def _files_can_be_read() -> bool:
    """Whether the optional extra ``files`` is installed."""
    return importlib.util.find_spec("dissect") is not None


class Volume:
    """One volume, with the entries seen last."""

    def __init__(self, volume: volumes.Volume, disk: content.Content) -> None:
        self._volume, self.disk = volume, disk
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, volumes.Entry] = OrderedDict()

    def stat(self, path: str) -> volumes.Entry:
        with self._lock:
            known = self._entries.get(path)
        return known if known is not None else self._remember(path, self._volume.stat(path or "/"))

    def list(self, path: str) -> list[volumes.Entry]:
        found = self._volume.list(path or "/")
        for entry in found[:ENTRIES]:
            self._remember(f"{path}/{entry.name}", entry)
        return found

    def _remember(self, path: str, entry: volumes.Entry) -> volumes.Entry:
        with self._lock:
            self._entries[path] = entry
            if len(self._entries) > ENTRIES:
                self._entries.popitem(last=False)
        return entry

    def readlink(self, path: str) -> str:
        return self._volume.readlink(path)

    def open(self, path: str) -> content.Content:
        return Contents(self._volume.open(path), self.disk.images)

    def close(self) -> None:
        self._volume.close()


@dataclass(frozen=True, slots=True)
class Contents:
    """A file of the guest as a content."""

    source: sources.Source
    images: frozenset[str]

    @property
    def size(self) -> int:
        return self.source.size

    def pieces(self, offset: int, length: int) -> list[bytes]:
        data = self.source.read(offset, length)
        if len(data) != length:
            raise errors.CorruptError(f"a file of the guest ends at {offset + len(data)}, not at {self.size}")
        return [data]

    def used(self) -> int:
        return content.used(self)

    def _extents(self, offset: int) -> Iterator[tuple[int, int, bool]]:
        if isinstance(self.source, sources.Runs):
            return self.source.extents(offset, self.size - offset)
        return iter([(offset, self.size - offset, False)])

    def data_at(self, offset: int) -> int | None:
        return next((start for start, length, hole in self._extents(offset) if length and not hole), None)

    def hole_at(self, offset: int) -> int:
        return next((start for start, length, hole in self._extents(offset) if length and hole), self.size)

    def ahead(self, offset: int, length: int) -> None:
        return  # where its bytes lie is the source's business; the kernel's own read-ahead remains


# --- nodes


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of the guest, at *path* (empty for the root) of a volume."""

    store: stores.Store
    image_id: str
    volume: Volume
    path: str
    entry: volumes.Entry | None = None

    def attributes(self) -> nodes.Attributes:
        return _attributes(self.entry or self.volume.stat(self.path))

    def names(self) -> Iterable[str]:
        return [entry.name for entry in self.volume.list(self.path)]

    def child(self, name: str) -> nodes.Node:
        return self.descend(name)

    def descend(self, rest: str) -> nodes.Node:
        """What is at *rest*, a relative path, with one question."""
        path = f"{self.path}/{rest}"
        entry = self.volume.stat(path)
        if entry.is_directory:
            return Directory(self.store, self.image_id, self.volume, path, entry)
        if entry.is_link:
            return nodes.Link(self.volume.readlink(path), entry.mtime_ns, (entry.uid, entry.gid))
        if not entry.is_file:
            return Special(entry)
        identity = f"{self.image_id}/{entry.inode}/{entry.mtime_ns}"
        return nodes.File(
            identity, entry.size, entry.mtime_ns, lambda: self.volume.open(path), lambda: entry.size, self.store,
            _attributes(entry),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Special:
    """A device, socket or pipe of the guest: to be seen, not to be opened."""

    entry: volumes.Entry

    def attributes(self) -> nodes.Attributes:
        return _attributes(self.entry)


def _attributes(entry: volumes.Entry) -> nodes.Attributes:
    size = 0 if stat.S_ISDIR(entry.mode) else entry.size
    return nodes.Attributes(entry.mode, size, size, entry.mtime_ns, (entry.uid, entry.gid))

"""What a checkpoint looks like as a tree.

::

    VM/CHECKPOINT/manifest.json          the store's own file
                  timings.json           its seconds by name
                  screenshot.png         the guest's screen, if a picture was taken
                  disks/NAME.img         raw, sparse
                  disks/NAME.partitions/N.img …
                  disks/NAME.files/…     the guest's files (blkckpt.view.guest)
                  memory/ram.img         main memory, as QEMU's back-end has it (no PCI hole)
                  memory/blocks/*.img    every RAM block, ROMs too
                  memory/guest-physical.raw   main memory at its guest-physical addresses, zeros where there is none
                  memory/core.elf        the same as an ELF core (blkckpt.view.elf)
                  device-state.bin       the device sections of the stream, verbatim
                  device-state.json      the same decoded (blkckpt.view.devices); ends in spaces
    VM/latest, VM/by-time/2026-11-26T18-52-16.123Z    links
    VM/by-tag/TAG                        a link to the newest checkpoint that has the tag

A path is looked up anew each time, from the root; what is expensive to know lies in :mod:`blkckpt.view.library`.
``attributes`` of a file may read image tables and leaves, never data, but for what a partition table takes; and the
first chunk of a memory skeleton where the manifest does not say what that holds.

A file that cannot be offered is left out: ``ram.img``, ``guest-physical.raw`` and ``core.elf`` where the layout is not
known (:mod:`blkckpt.view.physical`).
"""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from blkckpt import errors, lazy, log
from blkckpt.memory import image, skeleton
from blkckpt.store import manifest
from blkckpt.view import content, library, nodes, physical

if TYPE_CHECKING:
    from blkckpt.view import devices, elf, guest
else:  # a machine that waits for its memory needs none of them
    devices, elf, guest = (lazy.Module(f"blkckpt.view.{name}") for name in ("devices", "elf", "guest"))

LATEST = "latest"
BY_TIME = "by-time"
BY_TAG = "by-tag"
LINKS = (LATEST, BY_TIME, BY_TAG)

logger = log.get(__name__)


class Tree:
    """The whole of it; with *vm*, only that one is seen."""

    def __init__(self, books: library.Library, vm: str | None = None) -> None:
        self.library = books
        self._lock = threading.Lock()
        self._guests: guest.Guests | None = None
        self._only = vm
        self._started = time.time_ns()

    def find(self, path: str) -> nodes.Node:
        """The node at *path* (``/`` is the root).  NotFoundError, CorruptError."""
        node: nodes.Node = self
        parts = [part for part in path.split("/") if part]
        first = 0
        if len(parts) > 1 and parts[1] not in LINKS and self._only in (None, parts[0]):
            # a checkpoint is there or not, whatever is known of its VM
            node, first = _Machine(self.library, self, _checked(parts[0])), 1
        for number, part in enumerate(parts[first:], first):
            descend = getattr(node, "descend", None)
            if descend is not None:  # the guest's files: one question, however deep
                found: nodes.Node = descend("/".join(parts[number:]))
                return found
            if not nodes.is_directory(node):
                raise errors.NotFoundError(path)
            node = node.child(part)
        return node

    def attributes(self) -> nodes.Attributes:
        return nodes.Attributes(stat.S_IFDIR | 0o500, 0, 0, self._started)

    def names(self) -> Iterable[str]:
        known = self.library.vms()
        return known if self._only is None else [name for name in known if name == self._only]

    def child(self, name: str) -> nodes.Node:
        if self._only not in (None, name):
            raise errors.NotFoundError(name)
        _checked(name)
        if not self.library.checkpoints(name):
            raise errors.NotFoundError(name)
        return _Machine(self.library, self, name)

    def close(self) -> None:
        """End what reads guests' files; the library is its maker's."""
        if self._guests is not None:
            self._guests.close()

    @property
    def guests(self) -> guest.Guests:
        """What is on the disks."""
        with self._lock:
            if self._guests is None:
                self._guests = guest.Guests(self.library)
            return self._guests


def _checked(name: str) -> str:
    """A name that cannot be one of ours is one that is not there."""
    if "/" in name or not name.isprintable() or len(name) > 64 or not name[:1].isalnum():
        raise errors.NotFoundError(name)
    return name


class _Machine:
    """The checkpoints of one VM."""

    def __init__(self, books: library.Library, root: Tree, vm: str) -> None:
        self._library, self._root, self._vm = books, root, vm

    def attributes(self) -> nodes.Attributes:
        known = self._library.times(self._vm)
        return nodes.Attributes(stat.S_IFDIR | 0o500, 0, 0, known[-1][0] if known else 0)

    def names(self) -> Iterable[str]:
        known = self._library.checkpoints(self._vm)
        return [*(name for name in known if name not in LINKS), *(LINKS if known else ())]

    def child(self, name: str) -> nodes.Node:
        if name == BY_TIME:
            return _ByTime(self._library, self._vm)
        if name == BY_TAG:
            return self._by_tag()
        if name == LATEST:
            known = self._library.times(self._vm)
            if not known:
                raise errors.NotFoundError(name)
            return nodes.Link(known[-1][1], known[-1][0])
        found = self._library.checkpoint(self._vm, _checked(name))
        return self._library.remember(found, lambda: checkpoint_folder(self._library, self._root, found))

    def listing(self) -> tuple[Iterable[str], Callable[[str], nodes.Node]]:
        """Reads no manifest that has been read before, however many checkpoints there are."""
        known = {name: created for created, name in self._library.times(self._vm)}

        def look(name: str) -> nodes.Node:
            created = known.get(name) if name not in LINKS else None
            return self.child(name) if created is None else nodes.Folder(created, {})

        return self.names(), look

    def _by_tag(self) -> nodes.Folder:
        known = self._library.tags(self._vm)
        newest = max((created for created, _ in known.values()), default=self.attributes().changed_ns)
        entries: dict[str, Callable[[], nodes.Node]] = {
            tag: lambda created=created, name=name: nodes.Link(f"../{name}", created)  # type: ignore[misc]
            for tag, (created, name) in sorted(known.items())
        }
        return nodes.Folder(newest, entries)


class _ByTime:
    """Links to the checkpoints, called by their times; the second of one millisecond is ``…Z-2``."""

    def __init__(self, books: library.Library, vm: str) -> None:
        self._library, self._vm = books, vm

    def attributes(self) -> nodes.Attributes:
        known = self._library.times(self._vm)
        return nodes.Attributes(stat.S_IFDIR | 0o500, 0, 0, known[-1][0] if known else 0)

    def names(self) -> Iterable[str]:
        return self._library.stamps(self._vm, timestamp)

    def listing(self) -> tuple[Iterable[str], Callable[[str], nodes.Node]]:
        known = self._library.stamps(self._vm, timestamp)
        return known, lambda name: _time_link(*known[name])

    def child(self, name: str) -> nodes.Node:
        found = self._library.stamps(self._vm, timestamp).get(name)
        if found is None:
            raise errors.NotFoundError(name)
        return _time_link(*found)


def _time_link(created: int, name: str) -> nodes.Link:
    return nodes.Link(f"../{name}", created)


def timestamp(nanoseconds: int) -> str:
    """UTC in ISO 8601, with ``-`` for ``:``, which rsync takes for a host name's end."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(seconds)) + f".{rest // 10**6:03d}Z"


# --- one checkpoint


def checkpoint_folder(books: library.Library, root: Tree, found: library.Checkpoint) -> nodes.Folder:
    """The directory of one checkpoint."""
    entries: dict[str, Callable[[], nodes.Node]] = {
        "manifest.json": lambda: _small(found, "manifest.json", found.data),
        "timings.json": lambda: _small(found, "timings.json", _timings(found.manifest)),
        "disks": lambda: _disks(books, root.guests, found),
    }
    memory = found.manifest.memory
    if memory is not None:
        entries["memory"] = lambda: memory_folder(books, found, memory)
        entries["device-state.bin"] = lambda: _device_state(books, found, memory)
        entries["device-state.json"] = lambda: _decoded_state(books, found, memory)
    return nodes.Folder(found.manifest.created_ns, entries, lambda: _screenshot(found))


def _screenshot(found: library.Checkpoint) -> Mapping[str, Callable[[], nodes.Node]]:
    """The picture that there is now: one may be taken when the directory has been looked at already."""
    screen = found.store.evidence(found.manifest).screen
    if screen is None:
        return {}

    def opened() -> content.Content:
        data = found.store.picture(found.manifest)
        if data is None:
            raise errors.CorruptError(f"the picture of {found.manifest.vm}@{found.manifest.name} is not whole")
        return content.Bytes(data)

    identity = f"{found.manifest.id}/screenshot/{screen.sha256}"
    node = nodes.File(identity, screen.size, screen.when_ns, opened, lambda: screen.size, volatile=True)
    return {"screenshot.png": lambda: node}


def _timings(one: manifest.Manifest) -> bytes:
    """A line each.  Not by ``indent``: that is the slow encoder, which also leaves cycles to be collected."""
    items = json.dumps(dict(one.timings), sort_keys=True, separators=(",\n ", ": "))
    return f"{{\n {items[1:-1]}\n}}\n".encode() if one.timings else b"{}\n"


def _small(found: library.Checkpoint, name: str, data: bytes) -> nodes.File:
    """A file of the manifest's; its time is that of the manifest, which may be amended."""
    identity = f"{found.manifest.id}/{name}/{found.changed_ns}"
    return nodes.File(
        identity, len(data), found.changed_ns, lambda: content.Bytes(data), lambda: len(data), volatile=True
    )


def _image(
    books: library.Library, found: library.Checkpoint, one: manifest.DiskImage | manifest.RamBlock
) -> nodes.File:
    """A whole image of the store."""

    def opened() -> content.Content:
        whole = books.image(found.store, one.image)
        if whole.size != one.size:
            raise errors.CorruptError(f"image {one.image} has {whole.size} bytes, its manifest says {one.size}")
        return whole

    return nodes.File(
        one.image, one.size, found.manifest.created_ns, opened, lambda: books.used(found.store, one), found.store
    )


def _disks(books: library.Library, guests: guest.Guests, found: library.Checkpoint) -> nodes.Folder:
    entries: dict[str, Callable[[], nodes.Node]] = {}
    for disk in found.manifest.disks:
        entries[f"{disk.name}.img"] = lambda disk=disk: _image(books, found, disk)  # type: ignore[misc]
        try:
            known = guests.look(found.store, disk)
        except errors.BlkckptError as error:  # a damaged image has no partitions to show; reading it says why
            logger.warning("not looked into", extra={"fields": {"image": disk.image, "error": str(error)}})
            continue
        if known.partitions:
            entries[f"{disk.name}.partitions"] = (
                lambda disk=disk, known=known: _partitions(books, guests, found, disk, known)  # type: ignore[misc]
            )
        if known.files:
            entries[f"{disk.name}.files"] = lambda disk=disk: _files(guests, found, disk)  # type: ignore[misc]
    return nodes.Folder(found.manifest.created_ns, entries)


def _partitions(
    books: library.Library,
    guests: guest.Guests,
    found: library.Checkpoint,
    disk: manifest.DiskImage,
    known: manifest.DiskContents,
) -> nodes.Folder:
    entries: dict[str, Callable[[], nodes.Node]] = {
        f"{part[0]}.img": lambda part=part: _part(books, guests, found, disk, part)  # type: ignore[misc]
        for part in known.partitions
    }
    return nodes.Folder(found.manifest.created_ns, entries)


def _files(guests: guest.Guests, found: library.Checkpoint, disk: manifest.DiskImage) -> nodes.Node:
    """The root of the only volume of a disk without a table, else a directory of volumes."""
    known = guests.volumes(found.store, disk.image)
    if "" in known:
        return guest.Directory(found.store, disk.image, known[""], "")
    entries: dict[str, Callable[[], nodes.Node]] = {
        name: lambda volume=volume: guest.Directory(found.store, disk.image, volume, "")  # type: ignore[misc]
        for name, volume in known.items()
    }
    return nodes.Folder(found.manifest.created_ns, entries)


# --- memory


def memory_folder(books: library.Library, found: library.Checkpoint, memory: manifest.MemoryImage) -> nodes.Folder:
    """What is below ``memory/``."""
    entries: dict[str, Callable[[], nodes.Node]] = {"blocks": lambda: _blocks(books, found, memory)}
    main = physical.main_blocks(found.manifest)
    ranges = physical.ranges(found.manifest)
    if main:
        entries["ram.img"] = lambda: _ram(books, found, main)
    if ranges:
        entries["guest-physical.raw"] = lambda: _physical(books, found, ranges)
        entries["core.elf"] = lambda: _core(books, found, memory, ranges)
    return nodes.Folder(found.manifest.created_ns, entries)


def _ram(books: library.Library, found: library.Checkpoint, main: tuple[manifest.RamBlock, ...]) -> nodes.File:
    if len(main) == 1:
        return _image(books, found, main[0])
    starts = [sum(block.size for block in main[:number]) for number in range(len(main))]
    size = sum(block.size for block in main)

    def opened() -> content.Content:
        parts = [books.image(found.store, block.image) for block in main]
        return content.Pieces(size, list(zip(starts, parts, strict=True)))

    identity = "+".join(block.image for block in main)
    return nodes.File(
        identity, size, found.manifest.created_ns, opened, lambda: _used_by(books, found, main), found.store
    )


def _used_by(books: library.Library, found: library.Checkpoint, blocks: Iterable[manifest.RamBlock]) -> int:
    return sum(books.used(found.store, block) for block in blocks)


def _blocks(books: library.Library, found: library.Checkpoint, memory: manifest.MemoryImage) -> nodes.Folder:
    entries: dict[str, Callable[[], nodes.Node]] = {}
    main = {block.name: block for block in memory.blocks}
    inside = {block.name: block for block in books.contents(found.store, memory).blocks}
    for name, block in image.view_names(inside).items():
        if one := main.get(block):
            entries[name] = lambda one=one: _image(books, found, one)  # type: ignore[misc]
        else:
            entries[name] = lambda small=inside[block]: _small_block(books, found, memory, small)  # type: ignore[misc]
    return nodes.Folder(found.manifest.created_ns, entries)


def _small_block(
    books: library.Library, found: library.Checkpoint, memory: manifest.MemoryImage, block: manifest.StreamBlock
) -> nodes.File:
    """A RAM block that is in the skeleton."""

    def where(index: skeleton.Index) -> tuple[int, int]:
        return index.small.get(block.name, (0, 0))

    return _inside(books, found, memory, block.name, where, (block.size, block.used))


def _inside(
    books: library.Library,
    found: library.Checkpoint,
    memory: manifest.MemoryImage,
    name: str,
    where: Callable[[skeleton.Index], tuple[int, int]],
    said: tuple[int, int | None],
) -> nodes.File:
    """A part of the skeleton, of whose size and use this is *said*; where it lies only the skeleton says."""
    size, used = said

    def opened() -> content.Slice:
        place = where(books.index(found.store, memory))
        if place[1] != size:
            raise errors.CorruptError(f"{name} in {memory.skeleton} has {place[1]} bytes, its manifest says {size}")
        return content.Slice(books.image(found.store, memory.skeleton), *place)

    def count() -> int:
        return opened().used() if used is None else used

    identity = f"{memory.skeleton}/{name}"
    return nodes.File(identity, size, found.manifest.created_ns, opened, count, found.store)


def _part(
    books: library.Library,
    guests: guest.Guests,
    found: library.Checkpoint,
    disk: manifest.DiskImage,
    part: tuple[int, int, int],
) -> nodes.File:
    """A range of an image: a partition."""
    _, offset, length = part

    def opened() -> content.Slice:
        guests.check(found.store, disk, part)
        return content.Slice(books.image(found.store, disk.image), offset, length)

    identity = f"{disk.image}+{offset}"
    return nodes.File(identity, length, found.manifest.created_ns, opened, lambda: opened().used(), found.store)


def _sliced(books: library.Library, found: library.Checkpoint, ranges: Iterable[physical.Range]) -> list[content.Slice]:
    assert found.manifest.memory is not None
    blocks = {block.name: block.image for block in found.manifest.memory.blocks}
    return [content.Slice(books.image(found.store, blocks[one.block]), one.offset, one.size) for one in ranges]


def _physical(books: library.Library, found: library.Checkpoint, ranges: tuple[physical.Range, ...]) -> nodes.File:
    size = max(one.address + one.size for one in ranges)
    blocks = physical.main_blocks(found.manifest)

    def opened() -> content.Content:
        parts = zip((one.address for one in ranges), _sliced(books, found, ranges), strict=True)
        return content.Pieces(size, list(parts))

    identity = f"physical+{found.manifest.id}"
    return nodes.File(
        identity, size, found.manifest.created_ns, opened, lambda: _used_by(books, found, blocks), found.store
    )


def _core(
    books: library.Library,
    found: library.Checkpoint,
    memory: manifest.MemoryImage,
    ranges: tuple[physical.Range, ...],
) -> nodes.File:
    size = elf.size(ranges)
    blocks = physical.main_blocks(found.manifest)

    def opened() -> content.Content:
        parts: list[tuple[int, content.Content]] = [(0, content.Bytes(elf.head(ranges, _processors())))]
        offset = elf.HEAD
        for one in _sliced(books, found, ranges):
            parts.append((offset, one))
            offset += one.size
        return content.Pieces(size, parts)

    def _processors() -> list[devices.Fields]:
        try:
            return devices.processors(books.devices(found.store, memory))
        except errors.CorruptError as error:
            logger.warning("core without registers", extra={"fields": {"error": str(error)}})
            return []

    def count() -> int:
        return elf.HEAD + _used_by(books, found, blocks)

    return nodes.File(f"core+{found.manifest.id}", size, found.manifest.created_ns, opened, count, found.store)


def _device_state(books: library.Library, found: library.Checkpoint, memory: manifest.MemoryImage) -> nodes.File:
    inside = books.contents(found.store, memory)
    said = inside.state_size, inside.state_used
    return _inside(books, found, memory, "the device state", lambda index: index.tail, said)


def _decoded_state(books: library.Library, found: library.Checkpoint, memory: manifest.MemoryImage) -> nodes.File:
    size = devices.room(books.contents(found.store, memory).state_size)

    def opened() -> content.Content:
        return content.Bytes(devices.render(books.devices(found.store, memory), size))

    return nodes.File(f"devices+{memory.skeleton}", size, found.manifest.created_ns, opened, lambda: size, found.store)

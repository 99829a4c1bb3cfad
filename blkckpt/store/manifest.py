"""A checkpoint's manifest: what it consists of and how it came about.  Pure: values and bytes.

The file ``manifests/VM/NAME.json`` is one JSON object in canonical form (sorted keys, no spaces, ASCII), ended by a
newline, with two members of its own beside the fields of :class:`Manifest`:

* ``requires``: names of incompatible features.  A reader refuses any that it does not know.  Known: ``retained``,
  the disks' images are layers that the VM keeps (:mod:`blkckpt.store.reference`), until it is flattened.
* ``checksum``: ``sha256:`` and the hex digest of the same object in canonical form without this member.

What a disk or a RAM block has ``used`` may be missing (an older blkckpt wrote the manifest, or the disk is retained);
nothing but a file's size in blocks is told from it.  So may the ``contents`` of a disk and of the skeleton: what a
listing shows, never a byte that is read.

``version`` is 1; a higher one is refused.  A field that the reader does not know is ignored (and covered by the
checksum): whoever adds one that must not be ignored names it in ``requires``.  Every field is bounded and checked;
whatever is wrong is a CorruptError naming the field.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from blkckpt import errors, units

VERSION = 1
MAX_SIZE = 4 << 20
MAX_BYTES = 1 << 50
"""Bound of any size in bytes."""

MAX_ITEMS = 4096
"""Bound of the number of disks, RAM blocks, arguments and notes."""

RETAINED = "retained"

CONSISTENCY = ("machine", "crash", "filesystem")

_IMAGE = re.compile(r"[0-9a-f]{32}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DiskContents:
    """What is on a disk by the ``rules`` of whoever looked: partitions, and whether there are ``files`` to be read.

    A partition is ``(number, offset, length)``, in bytes.
    """

    rules: int
    partitions: tuple[tuple[int, int, int], ...]
    files: bool


@dataclass(frozen=True, slots=True)
class DiskImage:
    """One disk: the image of its bytes at the instant.

    ``used`` bytes of them are in chunks that are not zero; None if that has not been counted.  It and the ``contents``
    go without saying: two that differ in nothing else are equal.
    """

    name: str
    image: str
    size: int
    used: int | None = field(default=None, compare=False)
    contents: DiskContents | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One of QEMU's RAM blocks (``pc.ram``, ``/rom@etc/acpi/tables``); ``used`` as a disk's."""

    name: str
    size: int
    page_size: int
    image: str
    used: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class StreamBlock:
    """A RAM block of the stream; ``used`` of it in the skeleton, None if it has an image of its own (or uncounted)."""

    name: str
    size: int
    used: int | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a skeleton holds: all RAM blocks in the stream's order, and how long the device state is."""

    blocks: tuple[StreamBlock, ...]
    state_size: int
    state_used: int | None


@dataclass(frozen=True, slots=True)
class MemoryImage:
    """The memory and the device state: RAM blocks, and the stream without their pages (the *skeleton*)."""

    blocks: tuple[RamBlock, ...]
    skeleton: str
    skeleton_size: int
    contents: Contents | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """How the guest was started."""

    argv: tuple[str, ...]
    machine_type: str
    accel: str
    qemu_version: str
    ram_size: int


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """The consistency group that a checkpoint belongs to: its members (``VM@NAME``), and the seconds between the
    stops of the first and the last of their guests."""

    id: str
    members: tuple[str, ...]
    spread: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """One checkpoint.

    ``retained``: the bytes of its disks are in layers of the VM, for which their images stand.
    ``parent`` is ``NAME`` of the same VM or ``VM@NAME``, and may have been removed.  ``timings`` are seconds by name,
    ``notes`` are sentences for the user.
    """

    vm: str
    name: str
    id: str
    created_ns: int
    disks: tuple[DiskImage, ...]
    parent: str | None = None
    memory: MemoryImage | None = None
    machine: MachineInfo | None = None
    consistency: str = "crash"
    timings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    group: GroupInfo | None = None
    retained: bool = False
    version: int = VERSION

    def images(self) -> list[str]:
        """The ids of every image this checkpoint needs, each once."""
        skeleton = [self.memory.skeleton] if self.memory else []
        return list(dict.fromkeys([part.image for part in self.parts()] + skeleton))

    def parts(self) -> list[DiskImage | RamBlock]:
        """Disks and RAM blocks: all images but the skeleton."""
        return [*self.disks, *(self.memory.blocks if self.memory else ())]

    def counted(
        self,
        used: Mapping[str, int | None],
        on_disks: Mapping[str, DiskContents | None] = MappingProxyType({}),
        contents: Contents | None = None,
    ) -> Manifest:
        """The same with what is ``used`` of each image, what is ``on_disks``, and the ``contents`` of the skeleton."""
        disks = tuple(replace(disk, used=used[disk.image], contents=on_disks.get(disk.image)) for disk in self.disks)
        if self.memory is None:
            return replace(self, disks=disks)
        blocks = tuple(replace(block, used=used[block.image]) for block in self.memory.blocks)
        return replace(self, disks=disks, memory=replace(self.memory, blocks=blocks, contents=contents))


def encode(manifest: Manifest) -> bytes:
    """The file of *manifest*.  Raises InputError if it is not one that :func:`decode` would take."""
    fields = {
        "version": VERSION,
        "requires": [RETAINED] if manifest.retained else [],
        "vm": manifest.vm,
        "name": manifest.name,
        "id": manifest.id,
        "created_ns": manifest.created_ns,
        "parent": manifest.parent,
        "disks": [_encode_disk(disk) for disk in manifest.disks],
        "memory": _encode_memory(manifest.memory),
        "machine": _encode_machine(manifest.machine),
        "consistency": manifest.consistency,
        "timings": dict(manifest.timings),
        "notes": list(manifest.notes),
        "group": _encode_group(manifest.group),
    }
    try:
        data = seal(fields)
        decode(data, f"manifest of {manifest.vm}@{manifest.name}")
    except (errors.CorruptError, TypeError, ValueError) as error:
        raise errors.InputError(f"this cannot be a manifest: {error}") from error
    return data


def seal(fields: Mapping[str, Any]) -> bytes:
    """*fields* in canonical form with their checksum, as a file."""
    digest = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical({**fields, "checksum": f"sha256:{digest}"}) + b"\n"


def unseal(data: bytes, what: str, known: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a sealed file: an object of a version that is known, whole and in canonical form.

    *known* are the features that it may require.
    """
    if len(data) > MAX_SIZE:
        raise errors.CorruptError(f"{what} is longer than {MAX_SIZE} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.CorruptError(f"{what} is not JSON: it is torn or foreign") from error
    reader = _Reader(fields, what)
    version = reader.integer("version", 1, 1 << 30)
    if version > VERSION or set(reader.items("requires", _string(64))).difference(known):
        raise errors.CorruptError(f"{what} was written by a newer blkckpt (version {version}); upgrade blkckpt")
    checksum = fields.pop("checksum", None)
    try:
        whole = checksum is not None and data == seal(fields)
    except (ValueError, RecursionError) as error:
        raise errors.CorruptError(f"{what} holds values that it cannot have") from error
    if not whole:
        raise errors.CorruptError(f"{what}: its checksum is wrong")
    return dict(fields)


def decode(data: bytes, what: str) -> Manifest:
    """Parse a manifest file; raises CorruptError naming *what* and the field."""
    return _manifest(_Reader(unseal(data, what, (RETAINED,)), what))


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode_disk(disk: DiskImage) -> dict[str, Any]:
    fields = {"name": disk.name, "image": disk.image, "size": disk.size, **_used(disk)}
    found = disk.contents
    if found is not None:
        partitions = [list(part) for part in found.partitions]
        fields["contents"] = {"rules": found.rules, "partitions": partitions, "files": found.files}
    return fields


def _encode_memory(memory: MemoryImage | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    blocks = [
        {"name": b.name, "size": b.size, "page_size": b.page_size, "image": b.image, **_used(b)} for b in memory.blocks
    ]
    fields = {"blocks": blocks, "skeleton": memory.skeleton, "skeleton_size": memory.skeleton_size}
    return fields if memory.contents is None else {**fields, "contents": _encode_contents(memory.contents)}


def _encode_contents(contents: Contents) -> dict[str, Any]:
    return {
        "blocks": [{"name": b.name, "size": b.size, **_used(b)} for b in contents.blocks],
        "state_size": contents.state_size,
        "state_used": contents.state_used,
    }


def _used(one: DiskImage | RamBlock | StreamBlock) -> dict[str, int]:
    return {} if one.used is None else {"used": one.used}


def _encode_machine(machine: MachineInfo | None) -> dict[str, Any] | None:
    if machine is None:
        return None
    return {
        "argv": list(machine.argv),
        "machine_type": machine.machine_type,
        "accel": machine.accel,
        "qemu_version": machine.qemu_version,
        "ram_size": machine.ram_size,
    }


def _manifest(reader: _Reader) -> Manifest:
    consistency = reader.string("consistency", 16)
    if consistency not in CONSISTENCY:
        raise reader.bad("consistency")
    disks = reader.items("disks", _disk)
    if len({disk.name for disk in disks}) != len(disks):
        raise reader.bad("disks")
    return Manifest(
        vm=reader.name("vm"),
        name=reader.name("name"),
        id=reader.image("id"),
        created_ns=reader.integer("created_ns", 0, 1 << 63),
        disks=disks,
        parent=None if reader.get("parent") is None else reader.parent("parent"),
        memory=None if reader.get("memory") is None else _memory(reader.child("memory")),
        machine=None if reader.get("machine") is None else _machine(reader.child("machine")),
        consistency=consistency,
        timings=MappingProxyType(reader.timings()),
        notes=reader.items("notes", _string(4096)),
        group=None if reader.get("group") is None else _group(reader.child("group")),
        retained=RETAINED in reader.items("requires", _string(64)),
    )


def _disk(value: Any, what: str) -> DiskImage:
    reader = _Reader(value, what)
    size = reader.integer("size", 0, MAX_BYTES)
    contents = None if reader.get("contents") is None else _disk_contents(reader.child("contents"), size)
    return DiskImage(reader.name("name"), reader.image("image"), size, reader.used(size), contents)


def _disk_contents(reader: _Reader, size: int) -> DiskContents:
    def partition(value: Any, what: str) -> tuple[int, int, int]:
        if not isinstance(value, list) or [type(one) for one in value] != [int] * 3:
            raise errors.CorruptError(f"{what} is not a partition")
        number, offset, length = value
        if not 0 < number <= MAX_ITEMS or offset < 0 or length < 0 or offset + length > size:
            raise errors.CorruptError(f"{what} is not a partition of a disk of {size} bytes")
        return number, offset, length

    found = reader.items("partitions", partition)
    if len({number for number, _, _ in found}) != len(found):
        raise reader.bad("partitions")
    files = reader.get("files")
    if not isinstance(files, bool):
        raise reader.bad("files")
    return DiskContents(reader.integer("rules", 1, 1 << 30), found, files)


def _block(value: Any, what: str) -> RamBlock:
    reader = _Reader(value, what)
    page_size = reader.integer("page_size", 1, 1 << 30)
    if page_size & (page_size - 1):
        raise reader.bad("page_size")
    name = reader.block_name("name")
    size = reader.integer("size", 0, MAX_BYTES)
    return RamBlock(name, size, page_size, reader.image("image"), reader.used(size))


def _memory(reader: _Reader) -> MemoryImage:
    blocks = reader.items("blocks", _block)
    if len({block.name for block in blocks}) != len(blocks):
        raise reader.bad("blocks")
    contents = None if reader.get("contents") is None else _contents(reader.child("contents"))
    return MemoryImage(blocks, reader.image("skeleton"), reader.integer("skeleton_size", 0, MAX_BYTES), contents)


def _contents(reader: _Reader) -> Contents:
    size = reader.integer("state_size", 0, MAX_BYTES)
    return Contents(reader.items("blocks", _stream_block), size, reader.used(size, "state_used"))


def _stream_block(value: Any, what: str) -> StreamBlock:
    reader = _Reader(value, what)
    size = reader.integer("size", 0, MAX_BYTES)
    return StreamBlock(reader.block_name("name"), size, reader.used(size))


def _machine(reader: _Reader) -> MachineInfo:
    return MachineInfo(
        argv=reader.items("argv", _string(128 << 10)),
        machine_type=reader.string("machine_type", 256),
        accel=reader.string("accel", 256),
        qemu_version=reader.string("qemu_version", 256),
        ram_size=reader.integer("ram_size", 0, MAX_BYTES),
    )


def _encode_group(group: GroupInfo | None) -> dict[str, Any] | None:
    return None if group is None else {"id": group.id, "members": list(group.members), "spread": group.spread}


def _group(reader: _Reader) -> GroupInfo:
    spread = reader.get("spread")
    if not isinstance(spread, int | float) or not 0 <= spread < math.inf:
        raise reader.bad("spread")
    return GroupInfo(reader.image("id"), reader.items("members", _string(129)), float(spread))


def _string(limit: int) -> Callable[[Any, str], str]:
    def parse(value: Any, what: str) -> str:
        if not isinstance(value, str) or len(value) > limit or "\0" in value:
            raise errors.CorruptError(f"{what} is not a string of at most {limit} characters")
        return value

    return parse


class _Reader:
    """Typed access to the members of one JSON object."""

    def __init__(self, fields: Any, what: str) -> None:
        if not isinstance(fields, dict):
            raise errors.CorruptError(f"{what} is not an object")
        self._fields: dict[str, Any] = fields
        self._what = what

    def bad(self, key: str) -> errors.CorruptError:
        return errors.CorruptError(
            f"{self._what}: {key} is missing or not what it can be: {self._fields.get(key)!r:.80}"
        )

    def get(self, key: str) -> Any:
        return self._fields.get(key)

    def child(self, key: str) -> _Reader:
        return _Reader(self.get(key), f"{self._what}: {key}")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key)
        return value

    def used(self, size: int, key: str = "used") -> int | None:
        return None if self.get(key) is None else self.integer(key, 0, size)

    def string(self, key: str, limit: int) -> str:
        value = self.get(key)
        if not isinstance(value, str) or len(value) > limit or "\0" in value:
            raise self.bad(key)
        return value

    def block_name(self, key: str) -> str:
        value = self.string(key, 255)
        if not value or not value.isprintable():
            raise self.bad(key)
        return value

    def name(self, key: str) -> str:
        try:
            return units.check_name(self.string(key, 64), key)
        except errors.InputError as error:
            raise self.bad(key) from error

    def parent(self, key: str) -> str:
        """``NAME`` or ``VM@NAME``."""
        value = self.string(key, 129)
        try:
            for part in value.split("@", 1):
                units.check_name(part, key)
        except errors.InputError as error:
            raise self.bad(key) from error
        return value

    def image(self, key: str) -> str:
        value = self.string(key, 32)
        if not _IMAGE.fullmatch(value):
            raise self.bad(key)
        return value

    def items(self, key: str, parse: Callable[[Any, str], _T]) -> tuple[_T, ...]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise self.bad(key)
        return tuple(parse(item, f"{self._what}: {key}[{number}]") for number, item in enumerate(value))

    def timings(self) -> dict[str, float]:
        value = self.get("timings")
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise self.bad("timings")
        for name, seconds in value.items():
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if len(name) > 64 or not number or not math.isfinite(seconds):
                raise self.bad("timings")
        return {name: float(seconds) for name, seconds in value.items()}

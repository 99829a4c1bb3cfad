"""The data plane's formats: live map, durable map, state file.  Pure; integers are little-endian.

**Live map** (tmpfs; rules D2, D12)::

     0   8  magic "BLKCLIVE"
     8   4  version, 1
    12   4  incompatible feature bits, 0 (a reader that meets a bit it does not know refuses the file)
    16  16  layer id
    32   8  disk size in bytes
    40  16  boot id: the kernel's random/boot_id; another one means the file is from before a reboot
    56   4  block size, 4096
    60   4  CRC-32 of bytes 0-59
    4096    the bits: block i is byte i >> 3, mask 1 << (i & 7); whole 4096-byte pages, sparse

**Durable map** (beside the layer's data)::

     0   8  magic "BLKCDMAP"
     8   4  version, 1
    12   4  incompatible feature bits, 0
    16  16  layer id
    32   8  disk size in bytes
    40   4  block size, 4096
    44   4  CRC-32 of bytes 0-43
    4096 + 8192 * p           first slot of map page p
    4096 + 8192 * p + 4096    second slot of map page p

    slot:
     0   8  magic "BLKCSLOT"
     8  16  layer id
    24   8  map page number p
    32   8  sequence number, counting the writes of this page from 1
    40  20  reserved, zeros
    60   4  CRC-32 of the slot with this field zero
    64 4032 the bits of blocks [32256 p, 32256 (p + 1))

A page is written to its slots in turn (sequence odd: second slot, even: first), and only after the write before it
was synced.  So a torn write leaves the version before it in the other slot.  An all-zero slot was never written.  The
valid slot with the higher sequence counts.  One bad slot is excused, after an unclean stop only; two are damage.

**State file** ``state.json``: one JSON object, UTF-8, sorted keys; ``magic`` is "blkckpt-state", ``version`` 1,
``checksum`` the hex SHA-256 of the same object without it, serialised the same way without spaces.  A higher version
is refused; unknown keys of this version are an error, because a key that is ignored could be a layer that is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from blkckpt import errors, units
from blkckpt.disk import api, blocks

HEADER = 4096
SLOT = 4096
SLOT_HEAD = 64
SLOT_BYTES = SLOT - SLOT_HEAD
SLOT_BLOCKS = SLOT_BYTES * 8
VERSION = 1

_LIVE = struct.Struct("<8sII16sQ16sII")
_DURABLE = struct.Struct("<8sII16sQII")
_SLOT = struct.Struct("<8s16sQQ20xI")
_LIVE_MAGIC, _DURABLE_MAGIC, _SLOT_MAGIC = b"BLKCLIVE", b"BLKCDMAP", b"BLKCSLOT"
_EMPTY_SLOT = bytes(SLOT)
_LAYER_ID = re.compile(r"[0-9a-f]{32}")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This boot's id, 32 hex digits."""
    return bytes.fromhex(BOOT_ID.read_text().strip().replace("-", "")).hex()


# ---- map headers ----


def encode_live_header(layer: str, size: int, boot: str) -> bytes:
    """The first 4096 bytes of a live map."""
    fields = (_LIVE_MAGIC, VERSION, 0, bytes.fromhex(layer), size, bytes.fromhex(boot), blocks.SIZE)
    return _sealed(_LIVE, fields)


def check_live_header(data: bytes, layer: str, size: int, path: Path) -> str:
    """The boot id in the header of layer *layer*'s live map; CorruptError if it is not that map's header (D12)."""
    fields = _unsealed(_LIVE, data, _LIVE_MAGIC, f"the live map {path}")
    _match(fields[3:5] + fields[6:], layer, size, f"the live map {path}")
    return bytes(fields[5]).hex()


def encode_durable_header(layer: str, size: int) -> bytes:
    """The first 4096 bytes of a durable map."""
    return _sealed(_DURABLE, (_DURABLE_MAGIC, VERSION, 0, bytes.fromhex(layer), size, blocks.SIZE))


def check_durable_header(data: bytes, layer: str, size: int, path: Path) -> None:
    """CorruptError unless *data* is the header of layer *layer*'s durable map (D12)."""
    fields = _unsealed(_DURABLE, data, _DURABLE_MAGIC, f"the map {path}")
    _match(fields[3:], layer, size, f"the map {path}")


def _sealed(form: struct.Struct, fields: tuple[Any, ...]) -> bytes:
    bare = form.pack(*fields, 0)
    return (bare[:-4] + struct.pack("<I", zlib.crc32(bare[:-4]))).ljust(HEADER, b"\0")


def _unsealed(form: struct.Struct, data: bytes, magic: bytes, what: str) -> tuple[Any, ...]:
    if len(data) < form.size or data[:8] != magic:
        raise errors.CorruptError(f"{what} is not one: wrong or missing magic")
    fields = form.unpack_from(data)
    if fields[-1] != zlib.crc32(data[: form.size - 4]):
        raise errors.CorruptError(f"{what} is torn: its header's checksum does not match")
    if fields[1] != VERSION or fields[2] != 0:
        raise errors.CorruptError(f"{what} is of version {fields[1]} (features {fields[2]:#x}); this is {VERSION}")
    return fields[:-1]


def _match(fields: tuple[Any, ...], layer: str, size: int, what: str) -> None:
    if bytes(fields[0]).hex() != layer:
        raise errors.CorruptError(f"{what} belongs to another layer ({bytes(fields[0]).hex()}, not {layer})")
    if fields[1] != size or fields[2] != blocks.SIZE:
        raise errors.CorruptError(f"{what} is for {fields[1]} bytes in blocks of {fields[2]}; the disk has {size}")


# ---- slots of the durable map ----


def slot_count(size: int) -> int:
    """How many map pages a disk of *size* bytes has."""
    return slot_count_of(blocks.count(size))


def slot_count_of(block_count: int) -> int:
    """:func:`slot_count` for a number of blocks."""
    return -(-block_count // SLOT_BLOCKS)


def slot_offset(page: int, sequence: int) -> int:
    """Where version *sequence* of map page *page* is written."""
    return HEADER + page * 2 * SLOT + (sequence & 1) * SLOT


def encode_slot(layer: str, page: int, sequence: int, bits: bytes) -> bytes:
    """One slot; *bits* has 4032 bytes."""
    head = _SLOT.pack(_SLOT_MAGIC, bytes.fromhex(layer), page, sequence, 0)
    checksum = zlib.crc32(bits, zlib.crc32(head))
    return head[:-4] + struct.pack("<I", checksum) + bits


def decode_slot(layer: str, page: int, data: bytes) -> tuple[int, bytes] | None:
    """``(sequence, bits)``; sequence 0 for a slot never written, ``None`` for a bad one."""
    if data == _EMPTY_SLOT:
        return 0, b""
    if len(data) != SLOT:
        return None
    magic, owner, number, sequence, checksum = _SLOT.unpack_from(data)
    bits = data[SLOT_HEAD:]
    whole = zlib.crc32(bits, zlib.crc32(data[: SLOT_HEAD - 4] + b"\0\0\0\0"))
    if (magic, bytes(owner).hex(), number, checksum) != (_SLOT_MAGIC, layer, page, whole) or sequence == 0:
        return None
    return sequence, bits


def choose_slot(layer: str, page: int, pair: bytes, path: Path, *, clean: bool) -> tuple[int, bytes]:
    """The version of map page *page* that counts, of its two slots; ``(0, b"")`` if there is none (D2, D12).

    *clean*: the map was closed cleanly, so a bad slot cannot be a torn write.
    """
    first, second = decode_slot(layer, page, pair[:SLOT]), decode_slot(layer, page, pair[SLOT:])
    good = [slot for slot in (first, second) if slot is not None]
    bad = 2 - len(good)
    if bad == 2 or (bad and clean):
        raise errors.CorruptError(f"page {page} of the map {path} is damaged; restore the disk from a checkpoint")
    return max(good)


# ---- state ----


@dataclasses.dataclass(frozen=True, slots=True)
class Retained:
    """A checkpoint that keeps all that is below an overlay as its disk: in *store*, its name, its id, and the id of
    the image that stands for the disk there."""

    store: str
    checkpoint: str
    id: str
    image: str


@dataclasses.dataclass(frozen=True, slots=True)
class OverlayState:
    """An overlay that exists on disk.

    *retained*: the chain below it is a checkpoint's disk, so it is not committed as long as that checkpoint is one.
    """

    id: str
    retained: Retained | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ChangedState:
    """A map of what changed in the bottom layer.  *since* is the store image it is relative to, ``None``: not known."""

    id: str
    since: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DiskState:
    """One disk: its layers, newest overlay first.

    *fill* is the id of the presence map of the file at *path* while the disk still has a *source*.  *changed*
    collects the changes now (or will, from the switch of the checkpoint that is prepared, on); *frozen* are the maps of
    checkpoints under way, oldest first: each ended, or will end, at that checkpoint's switch.
    """

    name: str
    path: str
    size: int
    changed: ChangedState
    overlays: tuple[OverlayState, ...] = ()
    frozen: tuple[ChangedState, ...] = ()
    source: api.ImageRef | None = None
    fill: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class GroupState:
    """The state file.  *clean*: the last server stopped cleanly, so durable maps are complete (D13)."""

    vm_id: str
    disks: tuple[DiskState, ...]
    clean: bool = True
    boot: str = ""


def encode_state(state: GroupState) -> bytes:
    """``state.json``."""
    body = {"magic": "blkckpt-state", "version": VERSION, **dataclasses.asdict(state)}
    body["checksum"] = _checksum(body)
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def decode_state(data: bytes, path: Path) -> GroupState:
    """Parse and check ``state.json``; CorruptError naming *path* when it is not whole (D12)."""
    what = f"the state file {path}"
    try:
        body = json.loads(data)
    except ValueError as error:
        raise errors.CorruptError(f"{what} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.pop("magic", None) != "blkckpt-state":
        raise errors.CorruptError(f"{what} is not one of ours")
    version = body.pop("version", None)
    if version != VERSION:
        raise errors.CorruptError(f"{what} is of version {version}; this program knows {VERSION}")
    checksum = body.pop("checksum", None)
    if checksum != _checksum({"magic": "blkckpt-state", "version": version, **body}):
        raise errors.CorruptError(f"{what} is damaged: its checksum does not match")
    try:
        return _group(body)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise errors.CorruptError(f"{what} has fields this program does not know: {error}") from error


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _group(body: dict[str, Any]) -> GroupState:
    disks = tuple(_disk(entry) for entry in body.pop("disks"))
    return GroupState(disks=disks, **body)


def _disk(body: dict[str, Any]) -> DiskState:
    units.check_name(body["name"], "disk name")
    if not isinstance(body["size"], int) or body["size"] <= 0:
        raise ValueError(f"size {body['size']!r}")
    source, fill = body.pop("source"), body.pop("fill")
    frozen = tuple(ChangedState(**entry) for entry in body.pop("frozen"))
    overlays = tuple(_overlay(entry) for entry in body.pop("overlays"))
    changed = ChangedState(**body.pop("changed"))
    maps, layers = [entry.id for entry in (changed, *frozen)], [entry.id for entry in overlays]
    for layer in maps + layers + ([fill] if fill else []):
        check_layer_id(layer)
    return DiskState(
        changed=changed,
        overlays=overlays,
        frozen=frozen,
        source=api.ImageRef(**source) if source else None,
        fill=fill,
        **body,
    )


def _overlay(body: dict[str, Any]) -> OverlayState:
    kept = body.pop("retained")
    retained = Retained(**kept) if kept else None  # an older version wrote false where there was none
    if retained is not None:
        units.check_name(retained.checkpoint, "checkpoint name")
        check_layer_id(retained.id)
        check_layer_id(retained.image)
        if not retained.store.startswith("/"):
            raise ValueError(f"store {retained.store!r}")
    return OverlayState(retained=retained, **body)


def check_layer_id(text: str) -> str:
    """A layer id is 32 hex digits; it becomes part of file names."""
    if not _LAYER_ID.fullmatch(text):
        raise ValueError(f"layer id {text!r}")
    return text

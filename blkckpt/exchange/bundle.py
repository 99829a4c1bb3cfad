"""The format of a bundle: checkpoints on their way to another store.  Pure: no I/O.

A bundle is written and read from front to back once, so it can be a file or a pipe.  All integers are little-endian::

    0    64   header
    64   …    records: 52-byte header, then `stored` bytes of payload, with no gaps; the last one is END

    header                                        record header
    0   8  magic "BLKCBNDL"                       0   4  magic "BCBR"
    8   4  version (1 or 2)                       4   1  kind
    12  4  incompatible features                  5   3  reserved
    16 16  id of the store it was made from       8   4  stored length
    32  8  name of the hash ("blake3", zeros)     12  4  raw length
    40  8  created, ns since 1970                 16 32  hash of the raw payload
    48 12  reserved                               48  4  crc32 of 0..47
    60  4  crc32 of 0..59

A reader refuses a higher version and any feature bit it does not know; reserved bytes are zeros.  Kinds of records,
in the order in which they come::

    1  NEEDS     one: sealed JSON: ``needs`` [{vm, name, id}]: the checkpoints the receiver must have
    2  MANIFEST  one or more: manifest files as in the store; the image ids are the sender's
    3  CHUNK     any number: the raw bytes of a chunk, an lz4 block when stored < raw; each at most a few times
    4  IMAGE     sealed JSON: ``image`` (the sender's id), ``size``, ``kind``, ``label``, ``base`` (null, or
                 {checkpoint: id, part}); then for each of its leaves, in order, one of
    5  LEAF      the hashes of its chunks, 32 bytes each; zeros for a zero chunk
    6  ZEROS     a count (4 bytes): so many leaves of zero chunks only
    7  SAME      32 bytes: the hash of what LEAF would hold; it is as the same leaf of the base
    9  LABELS    version 2, before the first CHUNK: at most one a MANIFEST: labels as in the store, not pinned
    10 EVIDENCE  version 2, then: at most one a MANIFEST: evidence as in the store; if it has a screen, there follows
    11 SCREEN    the picture, a PNG
    8  END       sealed JSON: ``records`` (number before it), ``digest`` (hash of all headers before it, the file's
                 included)

Version 1 has none of the kinds from 9 on; a bundle with nothing of them is still written so, for older readers.

"Sealed" is as in :mod:`blkckpt.store.manifest`.  Only CHUNK is ever compressed.  A *part* is ``disk/NAME``,
``memory/BLOCK`` or ``state``.  A base is a checkpoint that NEEDS names, or one of an earlier MANIFEST.

An image is thus defined by the hashes of its chunks, whoever has them: the receiver looks each up in what it was sent
and what it had, and a chunk that is in neither is an error before anything is published.  Every payload is checked
against its hash, and END's digest covers every header and so every hash.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from blkckpt import errors, units
from blkckpt.store import evidence, layout, manifest

VERSION = 2
PLAIN = 1
"""The version without what is beside checkpoints."""

HEADER = struct.Struct("<8sII16s8sQ12xI")
RECORD = struct.Struct("<4sB3xII32sI")
MAGIC, RECORD_MAGIC = b"BLKCBNDL", b"BCBR"

NEEDS, MANIFEST, CHUNK, IMAGE, LEAF, ZEROS, SAME, END, LABELS, EVIDENCE, SCREEN = range(1, 12)
LIMITS = {
    NEEDS: manifest.MAX_SIZE,
    MANIFEST: manifest.MAX_SIZE,
    CHUNK: layout.CHUNK,
    IMAGE: 64 << 10,
    LEAF: layout.LEAF * layout.HASH,
    ZEROS: 4,
    SAME: layout.HASH,
    END: 64 << 10,
    LABELS: manifest.MAX_SIZE,
    EVIDENCE: manifest.MAX_SIZE,
    SCREEN: evidence.MAX_SCREEN,
}
"""The longest payload of each kind, raw."""

T = TypeVar("T")

MAX_CHECKPOINTS = 4096
"""Bound of the manifests, and of the needs, of one bundle."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first 64 bytes."""

    store_id: bytes
    hash_name: str
    created_ns: int
    version: int = PLAIN


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header."""

    kind: int
    stored: int
    raw: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Need:
    """A checkpoint the receiver must have; the id counts, the names are for people."""

    vm: str
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Base:
    """Where SAME leaves come from."""

    checkpoint: str
    part: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image that follows."""

    image: str
    size: int
    kind: str
    label: str
    base: Base | None


def encode_header(header: Header) -> bytes:
    body = HEADER.pack(
        MAGIC, header.version, 0, header.store_id, header.hash_name.encode(), header.created_ns, 0
    )[:-4]  # fmt: skip
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_header(data: bytes) -> Header:
    """Raises CorruptError for what is not the beginning of a bundle, or of a newer one."""
    if len(data) != HEADER.size or data[:8] != MAGIC:
        raise errors.CorruptError("this is not a bundle: it does not begin as one")
    _, version, features, store_id, name, created, crc = HEADER.unpack(data)
    if zlib.crc32(data[:-4]) != crc:
        raise errors.CorruptError("the bundle's header is damaged")
    if not PLAIN <= version <= VERSION or features:
        raise errors.CorruptError(
            f"the bundle was written by a newer blkckpt (version {version}, features {features:#x}); upgrade blkckpt"
        )
    return Header(store_id, name.rstrip(b"\0").decode(errors="replace"), created, version)


def encode_record(record: Record) -> bytes:
    body = RECORD.pack(RECORD_MAGIC, record.kind, record.stored, record.raw, record.hash, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_record(data: bytes, where: str) -> Record:
    """Check a record's header; its lengths are bounded by its kind (rule S4)."""
    if len(data) != RECORD.size or data[:4] != RECORD_MAGIC:
        raise errors.CorruptError(f"{where}: no record there")
    _, kind, stored, raw, digest, crc = RECORD.unpack(data)
    if zlib.crc32(data[:-4]) != crc:
        raise errors.CorruptError(f"{where}: the record's header is damaged")
    if kind not in LIMITS:
        raise errors.CorruptError(f"{where}: unknown kind of record {kind}")
    if not 0 < stored <= raw <= LIMITS[kind] or (stored < raw and kind != CHUNK):
        raise errors.CorruptError(f"{where}: impossible lengths (stored {stored}, raw {raw})")
    return Record(kind, stored, raw, digest)


def encode_needs(needs: list[Need]) -> bytes:
    return _seal({"needs": [{"vm": need.vm, "name": need.name, "id": need.id} for need in needs]})


def decode_needs(data: bytes) -> list[Need]:
    def parse(fields: dict[str, Any]) -> list[Need]:
        found = [
            Need(units.check_name(one["vm"], "VM name"), units.check_name(one["name"], "checkpoint"), _id(one["id"]))
            for one in fields["needs"]
        ]
        if len(found) > MAX_CHECKPOINTS:
            raise ValueError("too many")
        return found

    return _parsed(data, "the bundle's list of needs", parse)


def encode_image(image: Image) -> bytes:
    base = None if image.base is None else {"checkpoint": image.base.checkpoint, "part": image.base.part}
    fields = {"image": image.image, "size": image.size, "kind": image.kind, "label": image.label, "base": base}
    return _seal(fields)


def decode_image(data: bytes) -> Image:
    def parse(fields: dict[str, Any]) -> Image:
        size, kind, label, base = fields["size"], fields["kind"], fields["label"], fields["base"]
        if not isinstance(size, int) or not 0 <= size <= layout.MAX_IMAGE or kind not in layout.IMAGE_KINDS:
            raise ValueError("size or kind")
        if not isinstance(label, str) or len(label.encode()) > layout.MAX_LABEL:
            raise ValueError("label")
        known = None if base is None else Base(_id(base["checkpoint"]), str(base["part"])[:300])
        return Image(_id(fields["image"]), size, kind, label, known)

    return _parsed(data, "an image's description in the bundle", parse)


def encode_end(records: int, digest: bytes) -> bytes:
    return _seal({"records": records, "digest": digest.hex()})


def decode_end(data: bytes) -> tuple[int, bytes]:
    return _parsed(data, "the bundle's end", lambda fields: (int(fields["records"]), bytes.fromhex(fields["digest"])))


def parts(one: manifest.Manifest) -> dict[str, tuple[str, int, str]]:
    """Every part of a checkpoint: part → (image id, size, kind of image)."""
    found = {f"disk/{disk.name}": (disk.image, disk.size, "disk") for disk in one.disks}
    if one.memory:
        found |= {f"memory/{block.name}": (block.image, block.size, "memory") for block in one.memory.blocks}
        found["state"] = (one.memory.skeleton, one.memory.skeleton_size, "stream")
    return found


def hash_column(entries: layout.Array) -> bytes:
    """What LEAF holds: the hashes of *entries*, one after the other."""
    return np.ascontiguousarray(entries["hash"]).tobytes()


def _seal(fields: dict[str, Any]) -> bytes:
    return manifest.seal({"version": manifest.VERSION, "requires": [], **fields})


def _id(value: object) -> str:
    return layout.check_id(str(value))


def _parsed(data: bytes, what: str, parse: Callable[[dict[str, Any]], T]) -> T:
    fields = manifest.unseal(data, what)
    try:
        return parse(fields)
    except (errors.InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise errors.CorruptError(f"{what} is not what it can be ({error!r:.120})") from error

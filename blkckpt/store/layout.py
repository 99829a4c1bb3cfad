"""The formats of the store, as bytes.  Pure: no I/O.

All integers are little-endian.  Every format has a version and a set of *incompatible* feature bits: a reader
refuses a higher version and any bit it does not know.  Reserved bytes are written as zeros and are covered by
the checksum, but are not looked at.  Checksums are the store's hash (32 bytes) unless called crc32.

**Pack** (``packs/xx/<16 hex>.pack``), append-only, sealed by its trailer::

    0    64   header
    64   …    entries: 56-byte header, then `stored` bytes of payload, with no gaps
    …    48n  index: one record an entry, in order of offset
    end  64   trailer

    header                              entry header                        trailer
    0   8  magic "BLKCPACK"             0   4  magic "BCE1"                 0   8  magic "BLKCPEND"
    8   4  version (1)                  4   1  kind: 1 data, 2 leaf         8   4  version (1)
    12  4  incompatible features        5   3  reserved                     12  4  number of records
    16  8  pack id                      8   4  stored length                16  8  offset of the index
    24 16  store id                     12  4  raw length                   24  8  pack id
    40 20  reserved                     16 32  hash of the raw bytes        32 32  checksum of index + trailer[0:32]
    60  4  crc32 of 0..59               48  4  reserved
                                        52  4  crc32 of 0..51

    index record: 0 32 hash · 32 8 offset of the payload · 40 4 stored length · 44 4 raw length

A payload is an lz4 block when ``stored < raw`` and the raw bytes themselves when ``stored == raw``; anything else
is corrupt.  ``raw`` is at most 64 KiB.

**Image table** (``images/xx/<32 hex>.image``)::

    0    8   magic "BLKCIMGT"           48  16  image id
    8    4   version (1)                64  16  parent's image id, or zeros
    12   4   incompatible features      80   1  kind: 1 disk, 2 memory, 3 stream
    16   8   size of the image          81   3  reserved
    24   4   chunk size (65536)         84   4  length of the label
    28   4   entries a leaf (512)       88   8  used, see below
    32   8   number of leaves            96  32  reserved
    40   8   created, ns since 1970     128  …  label (UTF-8, at most 255 bytes)
                                         …  56n directory: one entry a leaf
                                        end 32  checksum of everything before

``used``: one more than the bytes of its chunks that are not zero; 0 if they have not been counted.

**Entry** (of a directory, and of a leaf: an image of 4 TiB is a directory of 2**17 entries)::

    0  32  hash of the raw bytes        48  4  stored length
    32  8  pack id                      52  4  raw length
    40  8  offset of the payload in the pack

All zeros means "zeros": a zero chunk, or a leaf of only zero chunks.  A **leaf** is the entries of 512 consecutive
chunks (fewer at the end of the image), itself stored as a chunk; equal leaves are therefore stored once, and two
images are compared by comparing the hashes in their directories.

**store.json**: a JSON object: ``format`` ("blkckpt-store"), ``version`` (1), ``id`` (32 hex digits), ``hash``
("blake3" or "sha256"), ``chunk`` (65536), ``leaf`` (512), ``created_ns``, ``features`` (list of incompatible
features by name).
"""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from blkckpt import errors, lazy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.void]
else:
    np = lazy.Module("numpy")


VERSION = 1
CHUNK = 64 << 10
"""Bytes a chunk.  Measured on guest memory: 4 KiB compresses 1.13:1, 64 KiB 1.92:1, 1 MiB no better."""

LEAF = 512
"""Chunks a leaf: 32 MiB of the image, 28 KiB of table."""

HASH = 32
MAX_PACK = 512 << 20
"""A pack is sealed when it would grow beyond this."""

MAX_PACK_ENTRIES = 1 << 20
"""… or hold more than this: the index is then 48 MiB."""

MAX_PACK_FILE = MAX_PACK + (64 << 20)
"""What a reader accepts: the data of a full pack and its index."""

MAX_IMAGE = 32 << 40
"""Bound of an image's size: its directory is then 56 MiB at most."""

MAX_LABEL = 255
ZERO_CHUNK = bytes(CHUNK)

PACK_HEADER = struct.Struct("<8sIIQ16s20xI")
ENTRY_HEADER = struct.Struct("<4sB3xII32s4xI")
TRAILER = struct.Struct("<8sIIQQ")
IMAGE_HEADER = struct.Struct("<8sIIQIIQQ16s16sB3xIQ32x")
ENTRY = struct.Struct("<32sQQII")
RECORD = struct.Struct("<32sQII")
TRAILER_SIZE = TRAILER.size + HASH

PACK_MAGIC = b"BLKCPACK"
ENTRY_MAGIC = b"BCE1"
TRAILER_MAGIC = b"BLKCPEND"
IMAGE_MAGIC = b"BLKCIMGT"

DATA_KIND = 1
LEAF_KIND = 2
IMAGE_KINDS = {"disk": 1, "memory": 2, "stream": 3}

ENTRY_TYPE = [("hash", "<u8", (4,)), ("pack", "<u8"), ("offset", "<u8"), ("stored", "<u4"), ("raw", "<u4")]
RECORD_TYPE = [("hash", "<u8", (4,)), ("offset", "<u8"), ("stored", "<u4"), ("raw", "<u4")]
"""What numpy makes a dtype of."""

Digest = Callable[[bytes | memoryview], bytes]

_ID = re.compile(r"[0-9a-f]{32}")


class Entry(NamedTuple):
    """Where one chunk is.  ``raw == 0`` is the zero chunk.  (One is made for every chunk that is read.)"""

    hash: bytes
    pack: int
    offset: int
    stored: int
    raw: int


ZERO = Entry(bytes(HASH), 0, 0, 0, 0)
ZERO_ENTRY = bytes(ENTRY.size)


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What store.json says."""

    id: bytes
    hash_name: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class Table:
    """An image table: the header and the directory, a packed entry for each leaf; *used* None if not counted."""

    image_id: str
    size: int
    kind: str
    label: str
    parent: str | None
    created_ns: int
    directory: bytes
    used: int | None = None

    @property
    def chunks(self) -> int:
        return chunk_count(self.size)

    def at(self, leaves: Array) -> Table:
        """The same image with its leaves elsewhere."""
        return replace(self, directory=leaves.tobytes())

    @property
    def leaves(self) -> Array:
        """The directory as an array of ``ENTRY_TYPE``."""
        return np.frombuffer(self.directory, ENTRY_TYPE)

    @property
    def packs(self) -> set[int]:
        """The packs that hold the leaves."""
        return {pack for _, pack, _, _, raw in ENTRY.iter_unpack(self.directory) if raw}

    def filled(self, number: int) -> bool:
        """Whether leaf *number* has data: its entry has a length."""
        end = (number + 1) * ENTRY.size
        return any(self.directory[end - 4 : end])

    def leaf(self, number: int) -> Entry:
        """Where leaf *number* is."""
        return unpack_entry(self.directory, number)


def chunk_count(size: int) -> int:
    return -(-size // CHUNK)


def leaf_count(size: int) -> int:
    return -(-size // (CHUNK * LEAF))


def leaf_entries(size: int, leaf: int) -> int:
    """The number of entries of leaf number *leaf* of an image of *size* bytes."""
    return min(LEAF, chunk_count(size) - leaf * LEAF)


def chunk_length(size: int, chunk: int) -> int:
    """The raw length of chunk number *chunk*: 64 KiB, less for the last one of an odd image."""
    return min(CHUNK, size - chunk * CHUNK)


def check_id(text: str, what: str = "image id") -> str:
    """Return *text* if it is 32 lower-case hex digits, else raise InputError (it becomes part of a path)."""
    if not _ID.fullmatch(text):
        raise errors.InputError(f"{what} {text[:80]!r} is not 32 hexadecimal digits")
    return text


def pack_key(pack: int) -> str:
    name = f"{pack:016x}"
    return f"packs/{name[:2]}/{name}.pack"


def image_key(image_id: str) -> str:
    return f"images/{image_id[:2]}/{image_id}.image"


def check_version(what: str, version: int, features: int) -> None:
    """Refuse what a newer release wrote; never guess."""
    if version > VERSION or features:
        raise errors.CorruptError(
            f"{what} was written by a newer blkckpt (version {version}, features {features:#x}; this one reads "
            f"version {VERSION}); upgrade blkckpt"
        )
    if version != VERSION:
        raise errors.CorruptError(f"{what} has the impossible version {version}")


# --- store.json


def encode_store(info: StoreInfo) -> bytes:
    fields = {
        "format": "blkckpt-store",
        "version": VERSION,
        "id": info.id.hex(),
        "hash": info.hash_name,
        "chunk": CHUNK,
        "leaf": LEAF,
        "created_ns": info.created_ns,
        "features": [],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def decode_store(data: bytes, where: str) -> StoreInfo:
    """Parse store.json; raises CorruptError naming *where*."""
    try:
        fields: dict[str, Any] = json.loads(data)
        if fields["format"] != "blkckpt-store":
            raise errors.CorruptError(f"{where} is not a blkckpt store")
        version, features = int(fields["version"]), list(fields.get("features", []))
        check_version(f"store {where}", version, len(features))
        if (fields["chunk"], fields["leaf"]) != (CHUNK, LEAF):
            raise errors.CorruptError(f"store {where} has chunks or leaves of a size this blkckpt does not read")
        return StoreInfo(bytes.fromhex(check_id(fields["id"])), str(fields["hash"]), int(fields["created_ns"]))
    except (errors.InputError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise errors.CorruptError(f"{where} is damaged: store.json cannot be read ({error!r:.120})") from error


# --- packs


def encode_pack_header(pack: int, store_id: bytes) -> bytes:
    body = PACK_HEADER.pack(PACK_MAGIC, VERSION, 0, pack, store_id, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_pack_header(data: bytes, pack: int, store_id: bytes) -> None:
    """Check that *data* opens pack *pack* of store *store_id*."""
    what = f"pack {pack:016x}"
    if len(data) != PACK_HEADER.size or data[:8] != PACK_MAGIC:
        raise errors.CorruptError(f"{what} does not begin with a pack header")
    _, version, features, found, owner, crc = PACK_HEADER.unpack(data)
    if zlib.crc32(data[:-4]) != crc:
        raise errors.CorruptError(f"{what}: checksum of the header is wrong")
    check_version(what, version, features)
    if found != pack:
        raise errors.CorruptError(f"{what} says that it is pack {found:016x}")
    if owner != store_id:
        raise errors.CorruptError(f"{what} belongs to another store ({owner.hex()})")


def encode_entry_header(kind: int, stored: int, raw: int, digest: bytes) -> bytes:
    body = ENTRY_HEADER.pack(ENTRY_MAGIC, kind, stored, raw, digest, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_entry_header(data: bytes, what: str) -> tuple[int, int, int, bytes]:
    """``(kind, stored, raw, hash)`` of an entry header; raises CorruptError naming *what*."""
    if len(data) != ENTRY_HEADER.size or data[:4] != ENTRY_MAGIC:
        raise errors.CorruptError(f"{what}: no entry header there")
    _, kind, stored, raw, digest, crc = ENTRY_HEADER.unpack(data)
    if zlib.crc32(data[:-4]) != crc:
        raise errors.CorruptError(f"{what}: checksum of the entry header is wrong")
    if kind not in (DATA_KIND, LEAF_KIND):
        raise errors.CorruptError(f"{what}: unknown kind of entry {kind}")
    check_lengths(stored, raw, what)
    return kind, stored, raw, digest


def check_lengths(stored: int, raw: int, what: str) -> None:
    if not 0 < stored <= raw <= CHUNK:
        raise errors.CorruptError(f"{what}: impossible lengths (stored {stored}, raw {raw})")


def encode_index(pack: int, records: Array, end: int, digest: Digest) -> bytes:
    """The index and the trailer of a pack whose entries end at *end*."""
    body = records.tobytes() + TRAILER.pack(TRAILER_MAGIC, VERSION, len(records), end, pack)
    return body + digest(body)


def decode_trailer(data: bytes, pack: int, size: int) -> tuple[int, int]:
    """``(index offset, number of records)`` from the last 64 bytes of a pack file of *size* bytes."""
    what = f"pack {pack:016x}"
    if len(data) != TRAILER_SIZE or data[:8] != TRAILER_MAGIC:
        raise errors.CorruptError(f"{what} is truncated or not sealed: no trailer at its end")
    _, version, count, offset, found = TRAILER.unpack(data[: TRAILER.size])
    check_version(what, version, 0)
    if found != pack:
        raise errors.CorruptError(f"{what} ends as pack {found:016x}")
    if offset < PACK_HEADER.size or offset + count * RECORD.size + TRAILER_SIZE != size:
        raise errors.CorruptError(f"{what}: its trailer does not fit its size")
    return offset, count


def decode_index(data: bytes, pack: int, end: int, digest: Digest) -> Array:
    """The records in *data* (index and trailer); *end* is where the entries end."""
    what = f"index of pack {pack:016x}"
    if digest(data[:-HASH]) != data[-HASH:]:
        raise errors.CorruptError(f"{what}: checksum is wrong")
    records = np.frombuffer(data[:-TRAILER_SIZE], RECORD_TYPE)
    stored, raw = records["stored"], records["raw"]
    if not ((stored > 0) & (stored <= raw) & (raw <= CHUNK)).all():
        raise errors.CorruptError(f"{what}: impossible lengths")
    steps = stored.astype(np.uint64) + np.uint64(ENTRY_HEADER.size)
    starts = np.concatenate((np.zeros(1, np.uint64), np.cumsum(steps, dtype=np.uint64))) + np.uint64(PACK_HEADER.size)
    if starts[-1] != end or (records["offset"] != starts[:-1] + np.uint64(ENTRY_HEADER.size)).any():
        raise errors.CorruptError(f"{what}: offsets do not follow each other")
    return records


# --- images


def encode_table(table: Table, digest: Digest) -> bytes:
    label = table.label.encode()[:MAX_LABEL]
    header = IMAGE_HEADER.pack(
        IMAGE_MAGIC, VERSION, 0, table.size, CHUNK, LEAF, leaf_count(table.size), table.created_ns,
        bytes.fromhex(table.image_id), bytes.fromhex(table.parent) if table.parent else bytes(16),
        IMAGE_KINDS[table.kind], len(label), 0 if table.used is None else table.used + 1,
    )  # fmt: skip
    body = header + label + table.directory
    return body + digest(body)


def decode_table(data: bytes, image_id: str, digest: Digest) -> Table:
    """Parse and check an image table; everything is bounded before it is used (rule S4)."""
    what = f"image {image_id}"
    if len(data) < IMAGE_HEADER.size + HASH or data[:8] != IMAGE_MAGIC:
        raise errors.CorruptError(f"{what}: the file is not an image table")
    _, version, features, size, chunk, leaf, count, created, found, parent, kind, label_length, used = (
        IMAGE_HEADER.unpack_from(data)
    )
    check_version(what, version, features)
    start = IMAGE_HEADER.size + label_length
    fixed = (chunk, leaf, count) == (CHUNK, LEAF, leaf_count(size))
    if size > MAX_IMAGE or used > size + 1 or label_length > MAX_LABEL or not fixed:
        raise errors.CorruptError(f"{what}: impossible header")
    if start + count * ENTRY.size + HASH != len(data):
        raise errors.CorruptError(f"{what}: the file has the wrong length ({len(data)} bytes)")
    if digest(memoryview(data)[:-HASH]) != data[-HASH:]:
        raise errors.CorruptError(f"{what}: checksum is wrong")
    if found.hex() != image_id:
        raise errors.CorruptError(f"{what}: the file says that it is image {found.hex()}")
    names = {number: name for name, number in IMAGE_KINDS.items()}
    if kind not in names:
        raise errors.CorruptError(f"{what}: unknown kind of image {kind}")
    label = data[IMAGE_HEADER.size : start].decode(errors="replace")
    directory = data[start:-HASH]
    last = leaf_entries(size, count - 1) * ENTRY.size
    _check_entries(directory, LEAF * ENTRY.size, last, f"directory of {what}")
    base, counted = parent.hex() if any(parent) else None, used - 1 if used else None
    return Table(image_id, size, names[kind], label, base, created, directory, counted)


def check_leaf(data: bytes, size: int, leaf: int, what: str) -> bytes:
    """*data*, if it is the packed entries of leaf number *leaf* of an image of *size* bytes, else CorruptError."""
    count = leaf_entries(size, leaf)
    if len(data) != count * ENTRY.size:
        raise errors.CorruptError(f"{what}: leaf {leaf} has the wrong length")
    _check_entries(data, CHUNK, chunk_length(size, leaf * LEAF + count - 1), f"leaf {leaf} of {what}")
    return data


def check_chosen(entries: Array, numbers: npt.NDArray[np.int64], size: int, what: str) -> None:
    """CorruptError if one of *entries*, which are those of the chunks *numbers* of an image of *size* bytes, cannot be.

    A number beyond the image's end has no entry: only zeros are right there.
    """
    count = chunk_count(size)
    lengths = np.full(len(entries), CHUNK, np.uint32)
    lengths[numbers == count - 1] = chunk_length(size, count - 1) if count else 0
    lengths[numbers >= count] = 0
    bad = _first_bad(entries, lengths)
    if bad is not None:
        raise errors.CorruptError(f"{what}: the entry of chunk {int(numbers[bad])} is impossible")


def _check_entries(data: bytes, length: int, last: int, what: str) -> None:
    """Every entry is all zeros or has a possible place in a pack and the raw length *length* (*last* for the last)."""
    many = len(data) > _FEW * ENTRY.size or "numpy" in sys.modules
    bad = (first_bad if many else first_bad_of_few)(data, length, last)
    if bad is not None:
        raise errors.CorruptError(f"{what}: entry {bad} is impossible")


_FIRST_PLACE = PACK_HEADER.size + ENTRY_HEADER.size
_FEW = 4096
"""Entries that are looked at one by one sooner (a millisecond for 4,000) than numpy is loaded."""


def first_bad_of_few(data: bytes, length: int, last: int) -> int | None:
    """The number of the first entry in *data* that cannot be; as :func:`first_bad`, without numpy."""
    final = len(data) // ENTRY.size - 1
    for number, (digest, pack, offset, stored, raw) in enumerate(ENTRY.iter_unpack(data)):
        if raw == 0 and not (stored or offset or pack or any(digest)):
            continue
        if raw != (last if number == final else length) or not 0 < stored <= raw:
            return number
        if not _FIRST_PLACE <= offset <= MAX_PACK_FILE:
            return number
    return None


def first_bad(data: bytes, length: int, last: int) -> int | None:
    """The number of the first entry in *data* that cannot be."""
    entries = np.frombuffer(data, ENTRY_TYPE)
    lengths = np.full(len(entries), length, np.uint32)
    lengths[-1:] = last
    return _first_bad(entries, lengths)


def _first_bad(entries: Array, lengths: npt.NDArray[np.uint32]) -> int | None:
    """The first entry that is neither all zeros nor has its raw length and a possible place in a pack.

    Columns are copied first, and bounds are one comparison each (what is below wraps around): a pass over columns of
    records costs more than the arithmetic.
    """
    raw, stored, offset = (np.ascontiguousarray(entries[column]) for column in ("raw", "stored", "offset"))
    first = np.uint64(_FIRST_PLACE)
    used = (raw == lengths) & (stored - np.uint32(1) < raw) & (offset - first <= np.uint64(MAX_PACK_FILE) - first)
    if used.all():
        return None
    rest = np.frombuffer(entries, np.uint64).reshape(-1, ENTRY.size // 8)[~used]
    if not rest.any():
        return None
    return int(np.flatnonzero(~used)[np.flatnonzero(rest.any(axis=1))[0]])


def pack_entry(entry: Entry) -> bytes:
    """*entry* as it stands in a leaf."""
    return ENTRY.pack(entry.hash, entry.pack, entry.offset, entry.stored, entry.raw)


def unpack_entry(data: bytes, number: int) -> Entry:
    """Entry *number* of the packed entries *data*."""
    return Entry(*ENTRY.unpack_from(data, number * ENTRY.size))


def unpack_entries(data: bytes, first: int, count: int) -> list[Entry]:
    """*count* entries of the packed entries *data* from number *first* on; a quarter of what they cost one by one."""
    part = memoryview(data)[first * ENTRY.size : (first + count) * ENTRY.size]
    return list(map(Entry._make, ENTRY.iter_unpack(part)))


def checked_entry(data: bytes, number: int, length: int, what: str) -> Entry | None:
    """Entry *number* of the packed entries *data*, whose raw length is *length*; None for zeros.

    CorruptError if it is impossible, as :func:`check_leaf` says it of all of them.
    """
    found = Entry(*ENTRY.unpack_from(data, number * ENTRY.size))
    if found == ZERO:
        return None
    if found.raw != length or not 0 < found.stored <= length or not _FIRST_PLACE <= found.offset <= MAX_PACK_FILE:
        raise errors.CorruptError(f"{what}: its entry is impossible")
    return found

"""Checkpoints to a bundle (:mod:`blkckpt.exchange.bundle`), without what the receiver has.

What is sent is worked out from tables and leaves: the places of all chunks of the chosen checkpoints, less those of
the *bases*, checkpoints that the receiver has.  Chunks are then read pack by pack in the order in which they lie
there, their hashes checked (rule X1), and sent as they are stored.  When one of these packs is rewritten meanwhile, all
are sent anew: the receiver keeps each chunk once.  Memory: 8 bytes a chunk, and one pack's index.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blkckpt import errors
from blkckpt.exchange import beside, bundle, inuse, pump
from blkckpt.store import images, layout, manifest, marks, usage
from blkckpt.store import store as stores

BATCH = 64
"""Chunks read and checked by one thread at a time: 4 MiB."""

Write = Callable[[bytes | memoryview], None]
Progress = Callable[[int, int], None]
"""Called with (bytes of chunks sent, in all), before compression."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a bundle came to."""

    checkpoints: tuple[str, ...]
    needs: tuple[str, ...]
    chunks: int
    bytes: int


def pack(
    place: stores.Store,
    chosen: Sequence[manifest.Manifest],
    bases: Sequence[manifest.Manifest],
    write: Write,
    progress: Progress,
) -> Packed:
    """Write a bundle of *chosen* for a receiver that has *bases*."""
    if len(chosen) > bundle.MAX_CHECKPOINTS:
        raise errors.InputError(f"{len(chosen)} checkpoints are too many for one bundle; make several")
    ordered = sorted(chosen, key=lambda one: (one.created_ns, one.vm, one.name))
    needed = [one for one in bases if one.id not in {each.id for each in chosen}]
    pinned = [image for one in (*ordered, *needed) for image in one.images()]
    with inuse.using(place, pinned, "bundle"):
        out = _Out(place, write)
        extra = beside.Outgoing(place, ordered)
        out.begin(bundle.VERSION if extra else bundle.PLAIN)
        needs = [bundle.Need(one.vm, one.name, one.id) for one in needed]
        out.record(bundle.NEEDS, bundle.encode_needs(needs))
        for one in ordered:
            out.record(bundle.MANIFEST, manifest.encode(one))
        extra.send(out.record)
        count = images.following(place.packs, pinned, lambda: _send_chunks(place, ordered, needed, out, progress))
        _send_images(place, ordered, needed, out)
        out.end()
    return Packed(
        tuple(f"{one.vm}@{one.name}" for one in ordered),
        tuple(f"{one.vm}@{one.name}" for one in needed),
        count,
        out.written,
    )


def choose_bases(
    known: Iterable[manifest.Manifest], chosen: Sequence[manifest.Manifest], have: Iterable[str]
) -> list[manifest.Manifest]:
    """For each VM of *chosen* the newest checkpoint of *known* whose id the receiver has (*have*)."""
    ids = set(have)
    newest: dict[str, manifest.Manifest] = {}
    for one in sorted(known, key=lambda each: each.created_ns):
        if one.id in ids and one.vm in {each.vm for each in chosen}:
            newest[one.vm] = one
    return list(newest.values())


class _Out:
    """Records, written and counted."""

    def __init__(self, place: stores.Store, write: Write) -> None:
        self._place, self._write = place, write
        self._headers = hashlib.sha256()
        self._records = 0
        self.written = 0

    def _put(self, data: bytes | memoryview) -> None:
        self._write(data)
        self.written += len(data)

    def begin(self, version: int) -> None:
        header = bundle.Header(self._place.info.id, self._place.info.hash_name, time.time_ns(), version)
        data = bundle.encode_header(header)
        self._headers.update(data)
        self._put(data)

    def record(self, kind: int, payload: bytes) -> None:
        self.raw(kind, payload, len(payload), self._place.packs.codec.digest(payload))

    def raw(self, kind: int, payload: bytes | memoryview, raw: int, digest: bytes) -> None:
        header = bundle.encode_record(bundle.Record(kind, len(payload), raw, digest))
        self._headers.update(header)
        self._records += 1
        self._put(header)
        self._put(payload)

    def end(self) -> None:
        self.record(bundle.END, bundle.encode_end(self._records, self._headers.digest()))


def _send_chunks(
    place: stores.Store,
    chosen: Sequence[manifest.Manifest],
    bases: Sequence[manifest.Manifest],
    out: _Out,
    progress: Progress,
) -> int:
    """Send what *chosen* needs and *bases* do not have; returns the number of chunks."""
    places = usage.Places()
    had = _keys(place, places, bases)
    wanted = np.setdiff1d(_keys(place, places, chosen), had, assume_unique=True)
    load = marks.records_of(place.packs)
    jobs = list(_by_pack(wanted, places.packs()))
    total, done, count = len(wanted) * layout.CHUNK, 0, 0
    for number, offsets in jobs:
        records = load(number)
        records = records[np.isin(records["offset"], offsets)]
        if len(records) != len(offsets):
            raise errors.CorruptError(f"pack {number:016x} lacks chunks that its images need; see `blkckpt verify`")
        batches = ((records[start : start + BATCH], number) for start in range(0, len(records), BATCH))

        def read(batch: layout.Array, pack: int) -> list[tuple[layout.Entry, bytes]]:
            return list(_checked(place, pack, batch))

        for entries in pump.ahead(read, batches):
            for entry, payload in entries:
                out.raw(bundle.CHUNK, payload, entry.raw, entry.hash)
                count += 1
            done += len(entries) * layout.CHUNK
            progress(done, total)
    return count


def _checked(place: stores.Store, pack: int, records: layout.Array) -> Iterator[tuple[layout.Entry, bytes]]:
    entries = [
        layout.Entry(one["hash"].tobytes(), pack, int(one["offset"]), int(one["stored"]), int(one["raw"]))
        for one in records
    ]
    for entry, payload in place.packs.payloads(entries, f"pack {pack:016x}"):
        where = f"chunk at {entry.offset} of pack {pack:016x}"
        place.packs.codec.decode(payload, entry.raw, entry.hash, where)
        yield entry, bytes(payload)


def _by_pack(keys: usage.Keys, packs: Sequence[int]) -> Iterator[tuple[int, usage.Keys]]:
    """``(pack, offsets)`` of sorted *keys*."""
    numbers, starts = np.unique(keys >> np.uint64(usage.OFFSET_BITS), return_index=True)
    for number, part in zip(numbers.tolist(), np.split(keys, starts[1:]), strict=False):
        yield packs[number], part & np.uint64((1 << usage.OFFSET_BITS) - 1)


def _keys(place: stores.Store, places: usage.Places, found: Iterable[manifest.Manifest]) -> usage.Keys:
    """The places of every chunk of *found*, sorted, each once."""
    seen: set[bytes] = set()
    parts: list[usage.Keys] = [np.zeros(0, np.uint64)]
    for image in dict.fromkeys(image for one in found for image in one.images()):
        table = images.load_table(place.packs, image)
        for leaf in np.flatnonzero(table.leaves["raw"]).tolist():
            where = layout.pack_entry(table.leaf(leaf))
            if where not in seen:
                seen.add(where)
                entries = images.read_leaf(place.packs, table, leaf)
                parts.append(places.keys(entries[entries["raw"] > 0]))
    keys: usage.Keys = np.unique(np.concatenate(parts))
    return keys


def _send_images(
    place: stores.Store, chosen: Sequence[manifest.Manifest], bases: Sequence[manifest.Manifest], out: _Out
) -> None:
    sent: set[str] = set()
    for number, one in enumerate(chosen):
        before = [*bases, *chosen[:number]]
        for part, (image, _, kind) in bundle.parts(one).items():
            if image in sent:
                continue
            sent.add(image)
            base = _base_of(one, part, before)
            _send_image(place, images.load_table(place.packs, image), kind, base, out)


def _base_of(one: manifest.Manifest, part: str, before: Sequence[manifest.Manifest]) -> tuple[bundle.Base, str] | None:
    """The same part, of the same size, of the newest checkpoint of the VM that the receiver has by then."""
    size = bundle.parts(one)[part][1]
    for other in reversed(before):
        found = bundle.parts(other).get(part) if other.vm == one.vm else None
        if found is not None and found[1] == size:
            return bundle.Base(other.id, part), found[0]
    return None


def _send_image(
    place: stores.Store, table: layout.Table, kind: str, base: tuple[bundle.Base, str] | None, out: _Out
) -> None:
    described = bundle.Image(table.image_id, table.size, kind, table.label, base[0] if base else None)
    out.record(bundle.IMAGE, bundle.encode_image(described))
    below = images.load_table(place.packs, base[1]) if base else None
    reader = images.ImageReader(place.packs, table)  # follows when packs are rewritten
    zeros = 0
    for leaf in range(layout.leaf_count(table.size)):
        if not table.leaf(leaf).raw:
            zeros += 1
            continue
        _send_zeros(out, zeros)
        zeros = 0
        column = bundle.hash_column(reader.entries(leaf))
        if below is not None and below.leaf(leaf).hash == table.leaf(leaf).hash:
            out.record(bundle.SAME, place.packs.codec.digest(column))
        else:
            out.record(bundle.LEAF, column)
    _send_zeros(out, zeros)


def _send_zeros(out: _Out, count: int) -> None:
    if count:
        out.record(bundle.ZEROS, count.to_bytes(4, "little"))

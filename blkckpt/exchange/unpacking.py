"""A bundle (:mod:`blkckpt.exchange.bundle`) to checkpoints of this store.

Steps, in the order of the records::

    needs, manifests    checked against this store: what is needed is here, no name is taken   (writes nothing)
    labels, evidence    checked, pictures set aside
    chunks              hash checked; those the index knows are dropped, the rest goes to packs
    images              leaves are put together from the places of their chunks; packs are sealed
    end                 counts and digest; then image tables, then manifests

Write order (rules S1, S2): packs, then tables, then manifests, each after what is beside it
(:mod:`blkckpt.exchange.beside`); the store is held throughout, so no collection takes what no manifest names yet.
Images get new ids: nothing of the sender's naming is trusted or can collide.

Crash windows.  Before the first manifest: packs, and perhaps tables, that no manifest names.  Repeating the command
finds the chunks of sealed packs in the index and does not store them again, unless a collection came between.  Between
two manifests: the checkpoints that have one are whole; a repeated run passes them over (the same name with the same
id) and goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from blkckpt import errors
from blkckpt.exchange import beside, bundle, pump
from blkckpt.store import codec, images, layout, leaves, manifest, packs
from blkckpt.store import store as stores

BATCH = 64
MAX_HELD_PACK = layout.MAX_PACK - (8 << 20)
"""A pack is sealed beyond this: a batch and the leaves of an image's description fit into the rest."""

MAX_HELD_ENTRIES = layout.MAX_PACK_ENTRIES - BATCH

Read = Callable[[int], bytes]
"""At most so many bytes; nothing at the end."""

Rename = Mapping[tuple[str, str | None], tuple[str, str | None]]
"""``(vm, checkpoint or None for all)`` → the same, new."""

Progress = Callable[[int], None]
"""Called with the bytes read so far."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a bundle came to: new checkpoints, those that were here, chunks it had and chunks that were stored."""

    checkpoints: tuple[str, ...]
    present: tuple[str, ...]
    chunks: int
    new_chunks: int


@dataclass(slots=True)
class _Built:
    """An image put together: its directory here, and of each leaf the hash of its column, for SAME, and its use."""

    image: bundle.Image
    directory: layout.Array
    columns: list[bytes] = field(default_factory=list)
    used: list[int] = field(default_factory=list)


def unpack(place: stores.Store, read: Read, rename: Rename, progress: Progress) -> Unpacked:
    """Read a bundle to its end and publish its checkpoints."""
    source = _Source(read, place.packs.codec, progress)
    with place.hold():
        needed, wanted, present = _check_names(place, source, rename)
        if not wanted:
            source.drain()
            return Unpacked((), tuple(f"{one.vm}@{one.name}" for one in present), 0, 0)
        ids_here = {one.id for one in source.manifests}
        with beside.Incoming(source.wanted, ids_here, place.path) as extra, _Packer(place) as packer:
            chunks = _take_chunks(source, packer)
            packer.seal()
            built = _take_images(place, source, packer, [*needed, *source.manifests])
            source.check_end()
            packer.seal()
            ids = _publish_tables(place, built, wanted)
            for one in wanted:
                seen = extra.evidence(one), extra.picture(one)
                place.put_manifest(with_images(one, ids), extra.labels(one), seen)
        return Unpacked(
            tuple(f"{one.vm}@{one.name}" for one in wanted),
            tuple(f"{one.vm}@{one.name}" for one in present),
            chunks,
            packer.stored,
        )


def renamed(one: manifest.Manifest, rename: Rename) -> manifest.Manifest:
    """*one* under the names it is to have here, its parent's too."""

    def new(vm: str, name: str) -> tuple[str, str]:
        to_vm, to_name = rename.get((vm, name)) or rename.get((vm, None)) or (vm, name)
        return to_vm, to_name or name

    vm, name = new(one.vm, one.name)
    parent = None if one.parent is None else new(one.vm, one.parent)[1]
    return dataclasses.replace(one, vm=vm, name=name, parent=parent)


def with_images(one: manifest.Manifest, ids: Mapping[str, str]) -> manifest.Manifest:
    """*one* with its images' ids replaced."""
    disks = tuple(dataclasses.replace(disk, image=ids[disk.image]) for disk in one.disks)
    if one.memory is None:
        return dataclasses.replace(one, disks=disks)
    blocks = tuple(dataclasses.replace(block, image=ids[block.image]) for block in one.memory.blocks)
    memory = dataclasses.replace(one.memory, blocks=blocks, skeleton=ids[one.memory.skeleton])
    return dataclasses.replace(one, disks=disks, memory=memory)


class _Source:
    """The records of a bundle, checked, one after the other."""

    def __init__(self, read: Read, coding: codec.Codec, progress: Progress) -> None:
        self._read, self.codec, self._progress = read, coding, progress
        self._position = self._records = 0
        self._headers = hashlib.sha256()
        self._waiting: tuple[bundle.Record, bytes] | None = None
        self.manifests: list[manifest.Manifest] = []
        data = self._take(bundle.HEADER.size, short=True)
        header = bundle.decode_header(data)
        self._headers.update(data)
        if header.hash_name != coding.name:
            raise errors.InputError(
                f"the bundle's chunks are named by {header.hash_name}, those of this store by {coding.name}; unbundle "
                f"it into another one: blkckpt store init DIR --hash {header.hash_name}"
            )

    def next(self) -> tuple[bundle.Record, bytes]:
        """The next record and its payload as stored; all but CHUNK's has been checked."""
        if self._waiting is not None:
            found, self._waiting = self._waiting, None
            return found
        where = f"bundle at byte {self._position}"
        header = self._take(bundle.RECORD.size)
        record = bundle.decode_record(header, where)
        payload = self._take(record.stored)
        if record.kind != bundle.CHUNK and self.codec.digest(payload) != record.hash:
            raise errors.CorruptError(f"{where}: the record does not have its hash")
        if record.kind == bundle.END:
            self._check(payload)
        self._headers.update(header)
        self._records += 1
        self._progress(self._position)
        return record, payload

    def wanted(self, kind: int) -> bytes | None:
        """The payload of the next record if it is of *kind*; it stays for later if not."""
        record, payload = self.next()
        if record.kind == kind:
            return payload
        self._waiting = record, payload
        return None

    def chunks(self) -> Iterator[tuple[bundle.Record, bytes]]:
        """All CHUNK records that come now."""
        while True:
            record, payload = self.next()
            if record.kind != bundle.CHUNK:
                self._waiting = record, payload
                return
            yield record, payload

    def check_end(self) -> None:
        """The next record is END; its counts and its digest are right."""
        if self.wanted(bundle.END) is None:
            raise errors.CorruptError("the bundle has records out of their order")

    def drain(self) -> None:
        """Read on to the end, so that who writes a pipe can finish."""
        while data := self._read(1 << 20):
            self._position += len(data)
            self._progress(self._position)

    def _check(self, payload: bytes) -> None:
        records, digest = bundle.decode_end(payload)
        if records != self._records or digest != self._headers.digest():
            raise errors.CorruptError("the bundle is not whole: records are missing, or in another order")

    def _take(self, length: int, *, short: bool = False) -> bytes:
        parts, missing = [], length
        while missing:
            data = self._read(missing)
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        self._position += length - missing
        if missing and not short:
            raise errors.CorruptError(f"the bundle is truncated: it ends at byte {self._position}")
        return b"".join(parts)


def _check_names(
    place: stores.Store, source: _Source, rename: Rename
) -> tuple[list[manifest.Manifest], list[manifest.Manifest], list[manifest.Manifest]]:
    """``(the needed, those to be made, those that are here already)``; refuses before anything is written."""
    here = {one.id: one for one in _readable(place)}
    listed = source.wanted(bundle.NEEDS)
    if listed is None:
        raise errors.CorruptError("the bundle does not begin with its needs")
    needed = []
    for need in bundle.decode_needs(listed):
        if need.id not in here:
            raise errors.NotFoundError(
                f"the bundle holds only what differs from {need.vm}@{need.name} ({need.id[:12]}), which this store "
                "does not have; unbundle that first, or make the bundle without --since and --have"
            )
        needed.append(here[need.id])
    wanted: list[manifest.Manifest] = []
    present: list[manifest.Manifest] = []
    for data in iter(lambda: source.wanted(bundle.MANIFEST), None):
        if len(source.manifests) >= bundle.MAX_CHECKPOINTS:
            raise errors.CorruptError("the bundle has too many checkpoints")
        one = manifest.decode(data, "a manifest in the bundle")
        source.manifests.append(one)
        local = renamed(one, rename)
        (present if _is_present(place, local) else wanted).append(local)
    if not source.manifests:
        raise errors.CorruptError("the bundle holds no checkpoint")
    if len({(one.vm, one.name) for one in wanted}) < len(wanted):
        raise errors.InputError("two checkpoints of the bundle would have one name here; choose another --rename")
    return needed, wanted, present


def _readable(place: stores.Store) -> Iterator[manifest.Manifest]:
    """The manifests of this store; a damaged one cannot be built on, and is no reason to refuse the rest."""
    for vm, name in place.names():
        with contextlib.suppress(errors.CorruptError, errors.NotFoundError):
            yield place.manifest(vm, name)


def _is_present(place: stores.Store, one: manifest.Manifest) -> bool:
    """Whether it is here already; StateError when another one has its name."""
    try:
        found = place.manifest(one.vm, one.name)
    except errors.NotFoundError:
        return False
    if found.id != one.id:
        raise errors.StateError(
            f"another checkpoint is called {one.vm}@{one.name} here; give this one another name: "
            f"--rename {one.vm}@{one.name}={one.vm}@NAME, or --rename {one.vm}=OTHER-VM"
        )
    return True


class _Packer:
    """Appends chunks and leaves that the store does not have; a context manager that gives up what is not sealed."""

    def __init__(self, place: stores.Store) -> None:
        self._place = place
        self._pack: packs.PackWriter | None = None
        self._own: dict[bytes, layout.Entry] = {}
        self.stored = 0

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pack is not None:
            self._pack.abort()
            self._pack = None

    def lookup(self, hashes: Sequence[bytes]) -> dict[bytes, layout.Entry]:
        """Where *hashes* are, of those that are known."""
        found = self._place.index.lookup([digest for digest in hashes if digest not in self._own])
        return found | {digest: self._own[digest] for digest in hashes if digest in self._own}

    def append(self, chunks: Sequence[packs.NewChunk]) -> None:
        """Append those of *chunks* that are not known."""
        known = self.lookup([chunk.hash for chunk in chunks])
        fresh = {chunk.hash: chunk for chunk in chunks if chunk.hash not in known}
        if not fresh:
            return
        if self._pack is not None and (self._pack.size > MAX_HELD_PACK or self._pack.count > MAX_HELD_ENTRIES):
            self.seal()
        if self._pack is None:
            self._pack = packs.PackWriter(self._place.packs)
        self._own |= {entry.hash: entry for entry in self._pack.append(list(fresh.values()))}
        self.stored += sum(chunk.kind == layout.DATA_KIND for chunk in fresh.values())

    def seal(self) -> None:
        """Make the open pack durable; others find its chunks from now on."""
        if self._pack is None:
            return
        sealed = self._pack.seal()
        self._pack = None
        self._place.index.add(sealed.pack, sealed.size, sealed.records)
        self._own.clear()


def _take_chunks(source: _Source, packer: _Packer) -> int:
    """Check and store the chunks; returns how many came."""
    count = 0

    def check(batch: list[tuple[bundle.Record, bytes]]) -> list[packs.NewChunk]:
        return [source_chunk(record, payload) for record, payload in batch]

    def source_chunk(record: bundle.Record, payload: bytes) -> packs.NewChunk:
        source.codec.decode(payload, record.raw, record.hash, f"chunk {record.hash.hex()[:16]} of the bundle")
        return packs.NewChunk(record.hash, payload, record.raw)

    chunks = source.chunks()
    batches = iter(lambda: list(itertools.islice(chunks, BATCH)), [])
    for checked in pump.ahead(check, ((batch,) for batch in batches)):
        packer.append(checked)
        count += len(checked)
    return count


def _take_images(
    place: stores.Store, source: _Source, packer: _Packer, bases: Sequence[manifest.Manifest]
) -> dict[str, _Built]:
    """Put the images together; the sender's image id → what it is here."""
    sizes = {image: (size, kind) for one in source.manifests for image, size, kind in bundle.parts(one).values()}
    built: dict[str, _Built] = {}
    for data in iter(lambda: source.wanted(bundle.IMAGE), None):
        image = bundle.decode_image(data)
        if sizes.get(image.image) != (image.size, image.kind) or image.image in built:
            raise errors.CorruptError(f"the bundle's image {image.image} is not one that its checkpoints name")
        base = _Base.find(place, image, bases, built)
        built[image.image] = _take_image(place, source, packer, image, base)
    if missing := set(sizes) - set(built):
        raise errors.CorruptError(f"the bundle lacks {len(missing)} of its images, {min(missing)} for one")
    return built


@dataclass(frozen=True, slots=True)
class _Base:
    """What SAME refers to: an image of this store, or one that was just put together."""

    place: stores.Store
    table: layout.Table | None
    built: _Built | None

    @classmethod
    def find(
        cls, place: stores.Store, image: bundle.Image, bases: Sequence[manifest.Manifest], built: Mapping[str, _Built]
    ) -> _Base | None:
        if image.base is None:
            return None
        for one in bases:
            part = bundle.parts(one).get(image.base.part) if one.id == image.base.checkpoint else None
            if part is None or part[1] != image.size:
                continue
            if part[0] in built:
                return cls(place, None, built[part[0]])
            return cls(place, images.load_table(place.packs, part[0]), None)
        raise errors.CorruptError(f"the bundle's image {image.image} refers to one that is not there")

    def same(self, leaf: int, digest: bytes) -> tuple[bytes, int]:
        """The directory entry of *leaf* and what is used of it; CorruptError when *digest* is not of its hashes."""
        if self.built is not None:
            found, entry = self.built.columns[leaf], self.built.directory[leaf : leaf + 1].tobytes()
            used = self.built.used[leaf]
        else:
            assert self.table is not None
            entries = images.read_leaf(self.place.packs, self.table, leaf)
            digested = self.place.packs.codec.digest(bundle.hash_column(entries))
            found, entry, used = digested, layout.pack_entry(self.table.leaf(leaf)), int(entries["raw"].sum())
        if found != digest:
            raise errors.CorruptError("the checkpoint that the bundle builds on is another one here: its data differs")
        return entry, used


def _take_image(
    place: stores.Store, source: _Source, packer: _Packer, image: bundle.Image, base: _Base | None
) -> _Built:
    count = layout.leaf_count(image.size)
    made = _Built(image, np.zeros(count, layout.ENTRY_TYPE))
    what = f"image {image.image} of the bundle"
    while (leaf := len(made.columns)) < count:
        record, payload = source.next()
        if record.kind == bundle.ZEROS:
            zeros = int.from_bytes(payload, "little")
            if not 0 < zeros <= count - leaf:
                raise errors.CorruptError(f"{what} has too many leaves")
            made.columns += [b""] * zeros
            made.used += [0] * zeros
            continue
        if record.kind == bundle.SAME and base is not None and len(payload) == layout.HASH:
            entry, used = base.same(leaf, payload)
            made.columns.append(payload)
        elif record.kind == bundle.LEAF and len(payload) == layout.leaf_entries(image.size, leaf) * layout.HASH:
            entry, used = _store_leaf(place, packer, image, leaf, payload)
            made.columns.append(record.hash)
        else:
            raise errors.CorruptError(f"{what}: leaf {leaf} is missing or has the wrong length")
        made.directory[leaf : leaf + 1] = np.frombuffer(entry, layout.ENTRY_TYPE)
        made.used.append(used)
    return made


def _store_leaf(
    place: stores.Store, packer: _Packer, image: bundle.Image, leaf: int, column: bytes
) -> tuple[bytes, int]:
    """The directory entry of a leaf with these hashes, and what is used of it."""
    hashes = [column[start : start + layout.HASH] for start in range(0, len(column), layout.HASH)]
    zero = bytes(layout.HASH)
    known = packer.lookup([digest for digest in dict.fromkeys(hashes) if digest != zero])
    entries = []
    for number, digest in enumerate(hashes, leaf * layout.LEAF):
        entry = layout.ZERO if digest == zero else known.get(digest)
        if entry is None or (digest != zero and entry.raw != layout.chunk_length(image.size, number)):
            raise errors.CorruptError(
                f"chunk {number} of image {image.image} is neither in the bundle nor in this store "
                f"({digest.hex()[:16]}…): the bundle was made for a receiver that has more"
            )
        entries.append(layout.pack_entry(entry))
    data = b"".join(entries)
    digest = place.packs.codec.digest(data)
    packer.append([packs.NewChunk(digest, codec.compress(data), len(data), layout.LEAF_KIND)])
    return layout.pack_entry(packer.lookup([digest])[digest]), leaves.used(data)


def _publish_tables(
    place: stores.Store, built: Mapping[str, _Built], wanted: Sequence[manifest.Manifest]
) -> dict[str, str]:
    """Write the tables of the images that *wanted* names; the sender's id → the new one."""
    ids = {}
    for image in dict.fromkeys(image for one in wanted for image in one.images()):
        made, new = built[image], secrets.token_hex(16)
        described = made.image
        table = layout.Table(
            new, described.size, described.kind, described.label, None, time.time_ns(), made.directory.tobytes(),
            used=sum(made.used),
        )  # fmt: skip
        data = layout.encode_table(table, place.packs.codec.digest)
        place.packs.backend.put(layout.image_key(new), data, exclusive=True)
        ids[image] = new
    return ids

"""Verifying a store: is every byte that a checkpoint needs there, and right?

Three passes, so that a chunk shared by many images is read once and memory stays small (16 bytes a chunk):

1. *structure*: every manifest, table and leaf is read and checked; what they need of each pack is noted;
2. *packs*: header, trailer and index of each pack, then every entry of the index is read, its header compared and its
   hash checked (of a single checkpoint: only the entries that it needs), and what images need must be in the index;
3. *blame*, only if something was bad: which chunks of which images of which checkpoints use it.

A pack that is missing may have been repacked, or collected with a checkpoint that was removed, since its name was read:
if a table has changed meanwhile, all begins anew.

Nothing is changed.  Problems are collected, not raised; a store that cannot be opened is an error as usual.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from blkckpt import errors
from blkckpt.store import contents, frozen, images, layout, marks, packs, reference, store
from blkckpt.store import manifest as manifests

Progress = Callable[[int, int], None]
"""Called with (bytes of packs read, bytes to be read), from one thread at a time."""

MAX_PROBLEMS = 1000
"""More than this are counted, not listed."""

_ATTEMPTS = 5
_GROUP = 64
_NEED = np.dtype([("place", "<u8"), ("fold", "<u8")])
Needs = npt.NDArray[np.void]
_Held = TypeVar("_Held", manifests.DiskContents, manifests.Contents)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: *where* names checkpoint, image and chunk as far as they are known."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome.  ``problem_count`` may be larger than the list.

    ``retained`` images are layers of a VM: there and whole, but without hashes to compare their bytes with.
    """

    checkpoints: int
    images: int
    packs: int
    chunks: int
    bytes: int
    seconds: float
    problem_count: int
    problems: tuple[Problem, ...]
    retained: int = 0

    @property
    def ok(self) -> bool:
        return not self.problem_count


@dataclass(slots=True)
class _State:
    """What the passes gather."""

    users: dict[str, list[str]] = field(default_factory=dict)
    said: dict[str, dict[str, int]] = field(default_factory=dict)
    """What is used of an image by the manifest of each checkpoint that says it."""
    tables: dict[str, layout.Table] = field(default_factory=dict)
    needs: dict[int, list[Needs]] = field(default_factory=dict)
    bad: dict[int, dict[int, str]] = field(default_factory=dict)
    checkpoints: int = 0
    retained: int = 0
    chunks: int = 0
    bytes: int = 0
    count: int = 0
    problems: list[Problem] = field(default_factory=list)
    missing: bool = False
    """Whether a pack was not there."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def problem(self, where: str, what: object) -> None:
        with self.lock:
            self.count += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(Problem(where, str(what)))


def verify(
    target: store.Store, vm: str | None = None, name: str | None = None, progress: Progress | None = None
) -> Report:
    """Verify one checkpoint, those of one VM, or the whole store.  Takes no lock: a reader like any other.

    Raises NotFoundError when the checkpoint is not there.
    """
    begun = time.monotonic()
    for _ in range(_ATTEMPTS):
        state, count = _attempt(target, vm, name, progress)
        if not (state.missing and _has_moved(target, state)):
            break
    if state.bad:
        _blame(target, state)
    return Report(
        checkpoints=state.checkpoints,
        images=len(state.users),
        packs=count,
        chunks=state.chunks,
        bytes=state.bytes,
        seconds=time.monotonic() - begun,
        problem_count=state.count,
        problems=tuple(state.problems),
        retained=state.retained,
    )


def _attempt(target: store.Store, vm: str | None, name: str | None, progress: Progress | None) -> tuple[_State, int]:
    """The first two passes: what they found, and the number of packs."""
    state = _State()
    whole = vm is None
    for owner, checkpoint in [(vm, name)] if vm and name else target.names(vm):
        _read_manifest(target, owner, checkpoint, state, given=name is not None)
    if whole:
        _read_pins(target, state)
    for image in sorted(state.users):
        _read_image(target, image, state)
    return state, _check_packs(target, state, whole, progress)


def _has_moved(target: store.Store, state: _State) -> bool:
    """Whether an image is elsewhere, or gone, since its table was read."""
    for image, table in state.tables.items():
        try:
            if (images.load_table(target.packs, image).leaves != table.leaves).any():
                return True
        except errors.NotFoundError:
            return True
        except errors.CorruptError:
            continue
    return False


# --- structure


def _read_manifest(target: store.Store, vm: str, name: str, state: _State, *, given: bool) -> None:
    try:
        manifest = target.manifest(vm, name)
    except errors.NotFoundError:
        if given:
            raise
        return  # removed meanwhile
    except errors.BlkckptError as error:
        state.problem(f"{vm}@{name}", error)
        return
    state.checkpoints += 1
    for image in manifest.images():
        state.users.setdefault(image, []).append(f"{vm}@{name}")
    for one in manifest.parts():
        if one.used is not None:
            state.said.setdefault(one.image, {})[f"{vm}@{name}"] = one.used
    _check_contents(target, manifest, state)


def _check_contents(target: store.Store, one: manifests.Manifest, state: _State) -> None:
    """What a manifest says that its disks and its skeleton hold; one that cannot be read is told of with its image."""

    def same(image: str, said: _Held | None, look: Callable[[images.ImageReader], _Held | None]) -> None:
        if said is not None:
            with contextlib.suppress(errors.BlkckptError):
                if look(target.image(image)) not in (None, said):
                    what = "its manifest says that it holds something else"
                    state.problem(f"{one.vm}@{one.name}, image {image}", what)

    for disk in one.disks:
        if disk.contents is not None and disk.contents.rules == contents.RULES:
            same(disk.image, disk.contents, contents.on_disk)
    if one.memory is not None:
        same(one.memory.skeleton, one.memory.contents, contents.look)


def _read_pins(target: store.Store, state: _State) -> None:
    try:
        for owner, pinned in target.pins().items():
            for image in pinned:
                state.users.setdefault(image, []).append(f"pin {owner}")
    except errors.BlkckptError as error:
        state.problem("pins", error)


def _where(image: str, state: _State) -> str:
    users = state.users[image]
    more = f" and {len(users) - 1} more" if len(users) > 1 else ""
    return f"{users[0]}{more}, image {image}"


def _read_image(target: store.Store, image: str, state: _State) -> None:
    try:
        table = state.tables[image] = images.load_table(target.packs, image)
    except reference.RetainedError:
        _read_retained(target, image, state)
        return
    except errors.BlkckptError as error:
        state.problem(_where(image, state), error)
        return
    _need(table.leaves, state)
    used, counted = 0, True
    for leaf in _leaves(table):
        try:
            entries = images.read_leaf(target.packs, table, leaf)
            _need(entries, state)
            used += int(entries["raw"].sum())
        except errors.BlkckptError as error:
            state.missing |= isinstance(error, packs.MissingPackError)
            chunk = leaf * layout.LEAF
            last = chunk + layout.leaf_entries(table.size, leaf) - 1
            state.problem(f"{_where(image, state)}, chunks {chunk} to {last} (leaf {leaf})", error)
            counted = False
    if counted:
        _check_used(table, used, state)


def _check_used(table: layout.Table, used: int, state: _State) -> None:
    """What the table and the manifests say of an image that has *used* bytes in chunks that are not zero."""
    if table.used not in (None, used):
        state.problem(_where(table.image_id, state), f"its table says that {table.used} bytes are used, not {used}")
    for owner, said in state.said.get(table.image_id, {}).items():
        if said != used:
            state.problem(
                f"{owner}, image {table.image_id}", f"its manifest says that {said} bytes are used, not {used}"
            )


def _read_retained(target: store.Store, image: str, state: _State) -> None:
    """A retained disk: its layers and their maps are whole.  There is no hash to compare its bytes with."""
    try:
        target.image(image).close()
        state.retained += 1
    except errors.BlkckptError as error:
        state.problem(_where(image, state), error)


def _leaves(table: layout.Table) -> Iterator[int]:
    yield from np.flatnonzero(table.leaves["raw"]).tolist()


def _need(entries: layout.Array, state: _State) -> None:
    """Note what *entries* need of each pack; repeated needs are dropped now and then."""
    used = entries[entries["raw"] > 0]
    for pack in np.unique(used["pack"]).tolist():
        mine = used[used["pack"] == pack]
        lists = state.needs.setdefault(pack, [])
        lists.append(_needs(mine))
        if len(lists) > _GROUP:
            state.needs[pack] = [np.unique(np.concatenate(lists))]


def _needs(entries: layout.Array) -> Needs:
    """Entries or records as (offset, fold of everything else): equal needs are equal entries."""
    words = entries["hash"]
    fold = words[:, 0] ^ (entries["stored"].astype(np.uint64) << np.uint64(32)) ^ entries["raw"].astype(np.uint64)
    for number, factor in enumerate((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9), 1):
        fold ^= words[:, number] * np.uint64(factor)
    found = np.empty(len(entries), _NEED)
    found["place"], found["fold"] = entries["offset"], fold
    return found


# --- packs


def _check_packs(target: store.Store, state: _State, whole: bool, progress: Progress | None) -> int:
    present = dict(target.packs.ids())
    wanted = sorted(set(state.needs) | (set(present) if whole else set()))
    total = sum(present.get(pack, 0) for pack in wanted)

    def advance(count: int) -> None:
        with state.lock:
            state.bytes += count
            if progress:
                progress(min(state.bytes, total), total)

    def check(pack: int) -> None:
        needs = state.needs.get(pack)
        merged = np.unique(np.concatenate(needs)) if needs else np.empty(0, _NEED)
        bad = _check_pack(target.packs, pack, merged, whole, state, advance)
        if bad:
            with state.lock:
                state.bad[pack] = bad

    with futures.ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4), "blkckpt-verify") as pool:
        for _ in pool.map(check, wanted):
            pass
    return len(wanted)


def _check_pack(
    source: packs.Packs, pack: int, needs: Needs, whole: bool, state: _State, advance: Callable[[int], None]
) -> dict[int, str]:
    """What is bad in a pack: offset of a payload → why."""
    try:
        try:
            records = source.index(pack)
        except errors.CorruptError as error:
            state.problem(f"index of pack {pack:016x}", error)
            records = marks.records_of(source)(pack)
    except errors.NotFoundError:
        state.missing = True
        return dict.fromkeys(needs["place"].tolist(), f"pack {pack:016x} is missing")
    except errors.BlkckptError as error:
        return dict.fromkeys(needs["place"].tolist(), f"pack {pack:016x} is damaged: {error}")
    found = _needs(records)
    strange = needs[~np.isin(needs, found)]
    bad = {place: f"pack {pack:016x} has no such entry at {place}" for place in strange["place"].tolist()}
    if not whole:
        records = records[np.isin(found, needs)]
    for start in range(0, len(records), _GROUP):
        _check_records(source, pack, records[start : start + _GROUP], bad, state, advance)
    with state.lock:
        state.chunks += len(records)
    unused = set(bad) - set(needs["place"].tolist())
    for place in sorted(unused):
        state.problem(f"pack {pack:016x} at {place} (no checkpoint needs it)", bad.pop(place))
    return bad


def _check_records(
    source: packs.Packs,
    pack: int,
    records: layout.Array,
    bad: dict[int, str],
    state: _State,
    advance: Callable[[int], None],
) -> None:
    """Check the entries at *records*, headers and data."""
    header = layout.ENTRY_HEADER.size
    entries = [
        layout.Entry(data[:32], pack, int(record["offset"]), int(record["stored"]), int(record["raw"]))
        for record, data in ((record, record.tobytes()) for record in records)
    ]
    # an entry's header is read with its payload: as a stretch that begins 56 bytes earlier
    stretches = [layout.Entry(e.hash, e.pack, e.offset - header, e.stored + header, e.raw) for e in entries]
    what = f"pack {pack:016x}"
    try:
        for entry, (_, data) in zip(entries, source.payloads(stretches, what), strict=True):
            if problem := _check_entry(source, entry, data):
                bad[entry.offset] = problem
            advance(len(data))
    except errors.BlkckptError as error:
        state.missing |= isinstance(error, packs.MissingPackError)
        for entry in entries:
            bad.setdefault(entry.offset, str(error))


def _check_entry(source: packs.Packs, entry: layout.Entry, data: memoryview) -> str | None:
    """What is wrong with one entry (header and payload), if anything."""
    header = layout.ENTRY_HEADER.size
    what = f"pack {entry.pack:016x} at {entry.offset}"
    try:
        source.codec.decode(data[header:], entry.raw, entry.hash, what)
        _, stored, raw, digest = layout.decode_entry_header(bytes(data[:header]), what)
    except errors.CorruptError as error:
        return str(error)
    same = (stored, raw, digest) == (entry.stored, entry.raw, entry.hash)
    return None if same else f"{what}: the entry's header does not agree with the index"


# --- blame


def _blame(target: store.Store, state: _State) -> None:
    """Name the chunks that use what is bad."""
    for image, table in state.tables.items():
        for leaf in _leaves(table):
            _blame_entries(table.leaves[leaf : leaf + 1], leaf, f"{_where(image, state)}, leaf", state)
            try:
                entries = images.read_leaf(target.packs, table, leaf)
            except errors.BlkckptError:
                continue  # said in the first pass
            _blame_entries(entries, leaf * layout.LEAF, f"{_where(image, state)}, chunk", state)


def _blame_entries(entries: layout.Array, first: int, where: str, state: _State) -> None:
    for pack in np.unique(entries["pack"][entries["raw"] > 0]).tolist():
        bad = state.bad.get(pack)
        if not bad:
            continue
        places = np.fromiter(bad, np.uint64, len(bad))
        mask = (entries["pack"] == pack) & (entries["raw"] > 0) & np.isin(entries["offset"], places)
        for low, high in frozen.runs(mask):
            numbers = f"{first + low}" if high == low + 1 else f"{first + low} to {first + high - 1}"
            state.problem(f"{where} {numbers}", bad[int(entries["offset"][low])])

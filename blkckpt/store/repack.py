"""Repacking: what lives in packs that are mostly dead is written to new packs, and the tables point there.

A **victim** is a pack that would shrink by more than the threshold if only what lives in it were kept.  One round::

    victims ──live chunks, hashes checked──> new packs ──> leaves that name them, anew ──> tables, anew, same ids
                                                                                                └──> the index

Write order: the new packs, with moved chunks and new leaves, are sealed (durable); then each table is replaced in one
step (``put``); then the index prefers the new places.  The victims are not touched: the next sweep finds that nothing
needs them any more.

Crash windows.  *Before the first table is replaced*: the new packs are garbage.  *Between two tables*: some images
read from the new packs, the others from the victims, and all are whole, since neither has gone.  *Before the index is
told*: it finds the chunks in the victims until these go, and a later writer stores a duplicate at worst.  *Before the
sweep*: the victims are garbage.  In every case the next collection works it out anew from the tables.

Who may do what meanwhile.  No lock is held but the collection's own, so writers go on: what they reference in a
victim keeps it, since the sweep marks again when they have finished.  Readers follow (:mod:`blkckpt.store.images`):
who finds a pack gone reads the table again.  What goes by places alone (a bundle, an accounting) begins anew
then.  Only images that were marked are rewritten; a later one keeps its packs.

A victim in which a chunk is damaged, or missing, is left as it is and told: its bytes may still be of use.

Memory: 24 bytes a moved chunk of the round (:data:`ROUND_CHUNKS`), 150 a distinct leaf, one buffer of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import codec, images, index, layout, marks, packs

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")

THRESHOLD = 0.25
"""A pack with more dead bytes than this share is rewritten: at most 3 bytes are written for one that is freed."""

ROUND_BYTES = 8 << 30
"""Live bytes of the victims of one round: the room that repacking needs, since victims go after the round only."""

ROUND_CHUNKS = 1 << 20
_GROUP = 64
"""Chunks copied at once: 4 MiB."""


@dataclass(slots=True)
class Report:
    """What repacking did.  *damaged* says which victims were left, and why."""

    packs: int = 0
    images: int = 0
    moved_bytes: int = 0
    written_bytes: int = 0
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Moves:
    """Where the chunks of one victim are now: sorted by their old offset."""

    old: marks.Keys
    pack: marks.Keys
    offset: marks.Keys


def victims(marked: marks.Marks, sizes: dict[int, int], threshold: float) -> dict[int, int]:
    """The packs that are worth rewriting → the bytes that this frees, most for the effort first."""
    gain = {}
    for pack, size in sizes.items():
        usage = marked.usage.get(pack)
        if usage is not None and size - usage.size() > threshold * size:
            gain[pack] = size - usage.size()
    return dict(sorted(gain.items(), key=lambda item: item[1] / sizes[item[0]], reverse=True))


def one_round(marked: marks.Marks, candidates: dict[int, int]) -> list[int]:
    """The first of *candidates* that fit into one round; at least one, if there is any."""
    chosen: list[int] = []
    data = chunks = 0
    for pack in candidates:
        usage = marked.usage[pack]
        data += usage.size()
        chunks += len(usage.keys())
        if chosen and (data > ROUND_BYTES or chunks > ROUND_CHUNKS):
            break
        chosen.append(pack)
    return chosen


def run(
    store: packs.Packs,
    cache: index.ChunkIndex,
    marked: marks.Marks,
    chosen: list[int],
    report: Report,
    progress: marks.Progress | None = None,
) -> None:
    """Rewrite the packs *chosen* and every marked image that needs them; adds to *report*.

    The caller holds the collection's lock.  Raises what writing raises; then, as after a crash, nothing is lost.
    """
    total = sum(marked.usage[pack].size() for pack in chosen)
    with _Output(store) as out:
        moves: dict[int, _Moves] = {}
        done = 0
        for pack in chosen:
            try:
                moves[pack] = _move(store, pack, marked.usage[pack], out)
                report.packs += 1
            except (errors.CorruptError, errors.NotFoundError) as error:
                report.damaged.append(str(error))
            done += marked.usage[pack].size()
            if progress:
                progress(done, total)
        report.moved_bytes += out.moved
        leaves = _rewrite_leaves(store, marked, moves, out)
        sealed = out.finish()
        report.images += _replace_tables(store, marked, leaves)
    report.written_bytes += sum(one.size for one in sealed)
    for one in sealed:
        cache.add(one.pack, one.size, one.records, prefer=True)


class _Output:
    """New packs, one after the other.  A context manager: what is not finished is aborted."""

    def __init__(self, store: packs.Packs) -> None:
        self._store = store
        self._open: packs.PackWriter | None = None
        self._sealed: list[packs.SealedPack] = []
        self.moved = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.abort()
            self._open = None

    def append(self, chunks: list[packs.NewChunk]) -> list[layout.Entry]:
        """Append *chunks*; they are durable after ``finish``."""
        need = sum(len(chunk.payload) + layout.ENTRY_HEADER.size for chunk in chunks)
        if self._open and (
            self._open.size + need > layout.MAX_PACK or self._open.count + len(chunks) > layout.MAX_PACK_ENTRIES
        ):
            self._seal()
        if self._open is None:
            self._open = packs.PackWriter(self._store)
        self.moved += need
        return self._open.append(chunks)

    def finish(self) -> list[packs.SealedPack]:
        """Make everything durable."""
        self._seal()
        return self._sealed

    def _seal(self) -> None:
        if self._open is not None:
            self._sealed.append(self._open.seal())
            self._open = None


def _move(store: packs.Packs, pack: int, usage: marks.Usage, out: _Output) -> _Moves:
    """Copy the live chunks of *pack*; CorruptError if one of them is damaged or not there."""
    wanted = usage.data()
    records = marks.records_of(store)(pack)
    records = records[np.isin(records["offset"], wanted)]
    if len(records) != len(wanted):
        raise errors.CorruptError(f"pack {pack:016x} lacks chunks that are needed; it is left as it is")
    moved = _Moves(wanted, np.empty(len(wanted), np.uint64), np.empty(len(wanted), np.uint64))
    for start in range(0, len(records), _GROUP):
        entries = out.append(list(_checked(store, pack, records[start : start + _GROUP])))
        moved.pack[start : start + _GROUP] = [entry.pack for entry in entries]
        moved.offset[start : start + _GROUP] = [entry.offset for entry in entries]
    return moved


def _checked(store: packs.Packs, pack: int, records: layout.Array) -> Iterator[packs.NewChunk]:
    """The chunks at *records*, as they are stored, their hashes checked (rule S3)."""
    entries = [
        layout.Entry(data[: layout.HASH], pack, int(record["offset"]), int(record["stored"]), int(record["raw"]))
        for record, data in ((record, record.tobytes()) for record in records)
    ]
    what = f"pack {pack:016x}"
    for entry, payload in store.payloads(entries, what):
        store.codec.decode(payload, entry.raw, entry.hash, f"{what} at {entry.offset}, left as it is")
        yield packs.NewChunk(entry.hash, payload, entry.raw)


def _rewrite_leaves(
    store: packs.Packs, marked: marks.Marks, moves: dict[int, _Moves], out: _Output
) -> dict[bytes, bytes | None]:
    """Hash of each leaf that is needed → its new directory entry, or None if it stays."""
    found: dict[bytes, bytes | None] = {}
    for image in marked.tables():
        table = images.load_table(store, image)
        for leaf in np.flatnonzero(table.leaves["raw"]).tolist():
            digest = table.leaves["hash"][leaf].tobytes()
            if digest not in found:
                found[digest] = _rewrite_leaf(store, table, leaf, moves, out)
    return found


def _rewrite_leaf(
    store: packs.Packs, table: layout.Table, leaf: int, moves: dict[int, _Moves], out: _Output
) -> bytes | None:
    entries = images.read_leaf(store, table, leaf)
    changed = _moved(entries, moves)
    if changed is None and table.leaf(leaf).pack not in moves:
        return None
    data = (entries if changed is None else changed).tobytes()
    chunk = packs.NewChunk(store.codec.digest(data), codec.compress(data), len(data), layout.LEAF_KIND)
    return layout.pack_entry(out.append([chunk])[0])


def _moved(entries: layout.Array, moves: dict[int, _Moves]) -> layout.Array | None:
    """*entries* with the new places, None if none of them has moved."""
    touched = [pack for pack in np.unique(entries["pack"]).tolist() if pack in moves]
    if not touched:
        return None
    result = entries.copy()
    for pack in touched:
        rows, found = np.flatnonzero(entries["pack"] == pack), moves[pack]
        at = np.searchsorted(found.old, entries["offset"][rows])
        if (found.old[np.minimum(at, len(found.old) - 1)] != entries["offset"][rows]).any():
            raise errors.CorruptError(f"a leaf that was marked needs more of pack {pack:016x} than before")
        result["pack"][rows], result["offset"][rows] = found.pack[at], found.offset[at]
    return result


def _replace_tables(store: packs.Packs, marked: marks.Marks, leaves: dict[bytes, bytes | None]) -> int:
    """Point the tables to the new leaves, which are durable; returns how many tables were replaced."""
    count = 0
    for image in marked.tables():
        table = images.load_table(store, image)
        directory = table.leaves.copy()
        changed = False
        for leaf in np.flatnonzero(directory["raw"]).tolist():
            if entry := leaves[directory["hash"][leaf].tobytes()]:
                directory[leaf : leaf + 1] = np.frombuffer(entry, layout.ENTRY_TYPE)
                changed = True
        if changed:
            store.backend.put(layout.image_key(image), layout.encode_table(table.at(directory), store.codec.digest))
            count += 1
    return count

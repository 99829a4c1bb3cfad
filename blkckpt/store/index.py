"""The deduplication index: hash → place, in SQLite.  A cache: delete it at any time.

The database is ``index/<number>.sqlite``; the highest number counts.  Rows are added while a pack is made durable, in
one transaction a pack, and count from when it is in the store.  When a store is first written to, the packs it lacks
are added from their own indexes (:meth:`ChunkIndex.reconcile`), which also heals what a killed writer left out.  A
rebuilt index gets the next number and is renamed into place complete, so that nobody's write-ahead log ever meets
another database; who still has the old one open goes on with it and merely finds fewer duplicates.

Nothing here is believed (rule S4): every row carries a crc32 of its columns, and a hit counts only when its pack is
in the store and long enough.  A database that SQLite finds malformed is set aside and made anew.

Lookups go by the batch, one statement for up to 128 hashes: 3 to 8 µs a hash.  Adding a pack of 8,192 chunks
takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blkckpt import durable, lazy, log
from blkckpt.store import layout

if TYPE_CHECKING:
    import sqlite3

    import numpy as np
else:
    np = lazy.Module("numpy")
    sqlite3 = lazy.Module("sqlite3")

_BATCH = 128
_SLICE = 4096
"""Records made into Python values at once: those of a whole pack would take 300 bytes each."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (store BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packs (pack BLOB PRIMARY KEY, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chunks (hash BLOB PRIMARY KEY, pack BLOB NOT NULL, place INTEGER NOT NULL,
    stored INTEGER NOT NULL, raw INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS dead (pack BLOB PRIMARY KEY) WITHOUT ROWID;
"""

_logger = log.get(__name__)

Loader = Callable[[int], "layout.Array"]
"""Gives the checked records of a pack."""


class ChunkIndex:
    """The index of one store.  Thread-safe; several processes may have it open."""

    def __init__(self, directory: Path, store_id: bytes, pack_sizes: Callable[[], Iterable[tuple[int, int]]]) -> None:
        self._directory, self._store_id, self._pack_sizes = directory, store_id, pack_sizes
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._sizes: dict[int, int] = {}

    def lookup(self, hashes: Sequence[bytes]) -> dict[bytes, layout.Entry]:
        """The known places of *hashes*, of packs that exist.  The caller holds the store's lock."""
        found: dict[bytes, layout.Entry] = {}
        with self._lock:
            try:
                for start in range(0, len(hashes), _BATCH):
                    self._lookup(hashes[start : start + _BATCH], found)
            except sqlite3.DatabaseError as error:
                self._discard(error)
        return found

    def add(self, pack: int, size: int, records: layout.Array, *, prefer: bool = False) -> None:
        """Remember the chunks of a sealed pack; the first place of a chunk stays, unless this one is to be preferred
        (the other will be deleted)."""
        self.enter(pack, size, records, prefer=prefer)
        self.admit(pack, size)

    def enter(self, pack: int, size: int, records: layout.Array, *, prefer: bool = False) -> None:
        """The first half of :meth:`add`, for a pack that is being made durable: its chunks are not found yet."""
        with self._lock:
            try:
                self._insert(self._connect(), pack, size, records, prefer=prefer)
            except sqlite3.DatabaseError as error:
                self._discard(error)

    def admit(self, pack: int, size: int) -> None:
        """The second half: the pack is in the store."""
        with self._lock:
            self._sizes[pack] = size

    def drop(self, packs: Iterable[int]) -> None:
        """Forget packs that are being deleted (in one pass over the table: they are not indexed by pack)."""
        blobs = [(_blob(pack),) for pack in packs]
        with self._lock:
            for (blob,) in blobs:
                self._sizes.pop(int.from_bytes(blob, "big"), None)
            try:
                if blobs:
                    self._drop(self._connect(), blobs)
            except sqlite3.DatabaseError as error:
                self._discard(error)

    def reconcile(self, load: Loader) -> int:
        """Add the packs that the index lacks; returns how many.  A damaged pack is left out, with a warning."""
        with self._lock:
            self._sizes = dict(self._pack_sizes())
            try:
                database = self._connect()
                known = {int.from_bytes(row[0], "big") for row in database.execute("SELECT pack FROM packs")}
                self.drop(known - set(self._sizes))
                return sum(self._load(database, pack, load) for pack in sorted(set(self._sizes) - known))
            except sqlite3.DatabaseError as error:
                self._discard(error)
                return 0

    def rebuild(self, load: Loader) -> int:
        """Make the index anew from the packs; returns the number of packs read."""
        with self._lock:
            self.close()
            number = self._newest() + 1
            self._sizes = dict(self._pack_sizes())
            durable.make_directory(self._directory)
            temporary = self._directory / f"{number:08d}.new"
            _remove_database(temporary)
            with contextlib.closing(self._open(temporary)) as database:
                count = sum(self._load(database, pack, load) for pack in sorted(self._sizes))
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            _remove_database(temporary, keep=True)
            durable.publish(temporary, self._path(number))
            self._remove_older(number)
            return count

    def close(self) -> None:
        with self._lock:
            database, self._database = self._database, None
            if database is not None:
                with contextlib.suppress(sqlite3.DatabaseError):
                    database.close()

    def _lookup(self, hashes: Sequence[bytes], found: dict[bytes, layout.Entry]) -> None:
        marks = ",".join("?" * len(hashes))
        query = f"SELECT hash, pack, place, stored, raw, crc FROM chunks WHERE hash IN ({marks})"  # noqa: S608
        for digest, pack_blob, place, stored, raw, crc in self._connect().execute(query, hashes):
            if crc != _crc(digest, pack_blob, place, stored, raw) or crc < 0:
                continue
            pack = int.from_bytes(pack_blob, "big")
            if 0 < stored <= raw <= layout.CHUNK and place + stored <= self._size(pack):
                found[digest] = layout.Entry(digest, pack, place, stored, raw)

    def _drop(self, database: sqlite3.Connection, blobs: list[tuple[bytes]]) -> None:
        with database:
            database.execute("DELETE FROM dead")
            database.executemany("INSERT INTO dead VALUES (?)", blobs)
            database.execute("DELETE FROM chunks WHERE pack IN dead")
            database.execute("DELETE FROM packs WHERE pack IN dead")

    def _size(self, pack: int) -> int:
        """The size of pack *pack*, 0 if it is not in the store.  Looked up again only for an unknown one."""
        if pack not in self._sizes:
            self._sizes = {**self._sizes, pack: 0, **dict(self._pack_sizes())}
        return self._sizes[pack]

    def _load(self, database: sqlite3.Connection, pack: int, load: Loader) -> int:
        try:
            records = load(pack)
        except Exception as error:  # whatever is wrong with one pack, it must not stop a writer
            _logger.warning(
                "pack left out of the index", extra={"fields": {"pack": f"{pack:016x}", "error": str(error)}}
            )
            return 0
        self._insert(database, pack, self._sizes[pack], records)
        return 1

    def _insert(
        self, database: sqlite3.Connection, pack: int, size: int, records: layout.Array, *, prefer: bool = False
    ) -> None:
        verb = "REPLACE" if prefer else "IGNORE"
        blob = _blob(pack)
        rows = (
            (digest, blob, place, stored, raw, _crc(digest, blob, place, stored, raw))
            for digest, place, stored, raw in _by_hash(records)
        )
        with database:
            database.executemany(f"INSERT OR {verb} INTO chunks VALUES (?,?,?,?,?,?)", rows)  # noqa: S608
            database.execute("INSERT OR REPLACE INTO packs VALUES (?,?)", (blob, size))

    def _connect(self) -> sqlite3.Connection:
        if self._database is None:
            durable.make_directory(self._directory)
            self._database = self._open(self._path(max(self._newest(), 1)))
        return self._database

    def _open(self, path: Path) -> sqlite3.Connection:
        # made here, so that SQLite gives its side files the mode 0600 too
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(path, timeout=30, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.executescript(_SCHEMA)
            owners = [row[0] for row in database.execute("SELECT store FROM meta")]
            if owners not in ([], [self._store_id]):
                raise sqlite3.DatabaseError("it belongs to another store")
            with database:
                database.execute("INSERT OR IGNORE INTO meta VALUES (?)", (self._store_id,))
        except BaseException:
            database.close()
            raise
        return database

    def _discard(self, error: sqlite3.DatabaseError) -> None:
        """Go on without what cannot be read: the next number is a fresh, empty index."""
        _logger.warning("the index cannot be used", extra={"fields": {"error": str(error)}})
        self.close()
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return
        number = self._newest()
        with contextlib.suppress(OSError, sqlite3.DatabaseError):
            self._open(self._path(number + 1)).close()
            self._remove_older(number + 1)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}.sqlite"

    def _newest(self) -> int:
        return max((int(p.stem) for p in self._directory.glob("*.sqlite") if p.stem.isdigit()), default=0)

    def _remove_older(self, number: int) -> None:
        for path in self._directory.glob("*.sqlite"):
            if path.stem.isdigit() and int(path.stem) < number:
                _remove_database(path)


def _by_hash(records: layout.Array) -> Iterator[tuple[bytes, int, int, int]]:
    """The fields of *records*, in the order of their hashes (of the first 8 bytes), which is how the table has them."""
    order = np.argsort(records["hash"][:, 0].astype("<u8").byteswap())
    for start in range(0, len(order), _SLICE):
        yield from layout.RECORD.iter_unpack(records[order[start : start + _SLICE]].tobytes())


def _crc(digest: bytes, pack: bytes, place: int, stored: int, raw: int) -> int:
    """The checksum of a row; -1, which none has, for a row that cannot be."""
    try:
        return zlib.crc32(layout.RECORD.pack(digest, place, stored, raw), zlib.crc32(pack))
    except (struct.error, TypeError):
        return -1


def _blob(pack: int) -> bytes:
    return pack.to_bytes(8, "big")


def _remove_database(path: Path, *, keep: bool = False) -> None:
    """Remove a database and its side files; *keep* leaves the database itself."""
    for suffix in ("-wal", "-shm", "-journal", *(() if keep else ("",))):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

"""The records of mounts: whose process, where, for whom.

``RUN/.mounts/ID.json`` (0600, in the home's run directory; the dot keeps it apart from VMs): ``version`` 1, ``boot``,
``id``, ``process`` {``pid``, ``start``}, ``directory``, ``vm``, ``user``, ``prefetched``.  Written before the mount is
made, removed after it is gone; one whose process is dead is what a kill left (:mod:`blkckpt.view.mounts`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blkckpt import durable, errors, paths
from blkckpt.agent import rundir

VERSION = 1
_LIMIT = 64 << 10
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SOURCE = "blkckpt-"


@dataclass(frozen=True, slots=True)
class Record:
    """One mount; *id* begins with what tells this home from others."""

    id: str
    process: rundir.Process
    directory: str
    vm: str | None
    user: str | None = None
    prefetched: bool = False

    @property
    def source(self) -> str:
        return _SOURCE + self.id

    @property
    def alive(self) -> bool:
        return self.process.alive


def place(home: paths.Home) -> Path:
    """Where the records are."""
    return home.run / ".mounts"


@contextlib.contextmanager
def recorded(home: paths.Home, directory: str, vm: str | None, user: str | None) -> Iterator[Record]:
    """A record of this process as the one behind a mount, for as long as the block lasts."""
    paths.private_directory(home.run)
    where = paths.private_directory(place(home))
    record = Record(f"{home.run.name}-{secrets.token_hex(6)}", rundir.Process.of(os.getpid()), directory, vm, user)
    _write(home, record)
    try:
        yield record
    finally:
        (where / f"{record.id}.json").unlink(missing_ok=True)


def _write(home: paths.Home, record: Record) -> None:
    body = {"version": VERSION, "boot": _BOOT_ID.read_text().strip(), **asdict(record)}
    durable.write_file(place(home) / f"{record.id}.json", json.dumps(body).encode())


def note_prefetched(home: paths.Home, record: Record) -> None:
    """The machine that uses this mount does not need it any more."""
    _write(home, replace(record, prefetched=True))


def memory_of(home: paths.Home, user: str) -> Record | None:
    """The mount that VM *user* has its memory from, dead or alive."""
    return next((record for record in records(home) if record.user == user), None)


def records(home: paths.Home) -> list[Record]:
    """Every record of this boot, of living processes or not; what is no record is left alone."""
    found = []
    for path in sorted(place(home).glob("*.json")):
        with contextlib.suppress(errors.BlkckptError, ValueError, KeyError, TypeError):
            body = json.loads(durable.read_small(path, "mount record", _LIMIT))
            if body.pop("version") == VERSION and body.pop("boot") == _BOOT_ID.read_text().strip():
                found.append(Record(**{**body, "process": rundir.Process(**body["process"])}))
    return found


def active(home: paths.Home) -> list[Record]:
    """The mounts whose process lives."""
    return [record for record in records(home) if record.alive]


def at(home: paths.Home, directory: Path) -> Record | None:
    """The mount on *directory*, dead or alive."""
    wanted = os.path.abspath(directory)  # noqa: PTH100  (resolving would look into a dead mount)
    return next((record for record in records(home) if record.directory == wanted), None)

"""The mounts of a home: their processes, their records, and clearing up after those that were killed.

``RUN/.mounts/ID.json`` (0600, in the home's run directory; the dot keeps it apart from VMs): ``version`` 1, ``boot``,
``id``, ``process`` {``pid``, ``start``}, ``directory``, ``vm``, ``kind``.  Written before the mount is made, removed
after it is gone.  The mount itself bears the id (source ``blkckpt-ID``), so that clearing up never touches a mount
that somebody made meanwhile at the same place.

What a killed process leaves, and who removes it:

* the mount: fusermount3, which waits for our death (``auto_unmount``), unless a file is open in it.  Then every access
  is ENOTCONN until :func:`clear` detaches it: the next ``mount``, ``umount`` or ``doctor``
* the record and the pins in the stores: :func:`clear`
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from blkckpt import durable, errors, paths
from blkckpt.agent import nbdserver, rundir
from blkckpt.control import wire
from blkckpt.store import store as stores
from blkckpt.view import chunks, held, library

VERSION = 1
READY_SECONDS = 30.0
STOP_SECONDS = 20.0
MAX_LOG = 16 << 20
_RECORD_LIMIT = 64 << 10
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SOURCE = "blkckpt-"


@dataclass(frozen=True, slots=True)
class Orders:
    """What to mount where.  *kind* is ``view``, or ``memory`` for a restored VM's own (*vm* is then its source)."""

    directory: str
    vm: str | None = None
    kind: str = "view"
    cache: int = chunks.LIMIT
    threads: bool = False
    shared: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One mount."""

    id: str
    process: rundir.Process
    directory: str
    vm: str | None
    kind: str

    @property
    def source(self) -> str:
        return _SOURCE + self.id

    @property
    def alive(self) -> bool:
        return self.process.alive


def _place(home: paths.Home) -> Path:
    return home.run / ".mounts"


def log_path(home: paths.Home) -> Path:
    """Where mounts say what could not be read."""
    return home.root / "log" / "mount.log"


def open_log(home: paths.Home) -> IO[bytes]:
    """The log of all mounts, for appending; begun anew when it has grown past ``MAX_LOG``."""
    path = log_path(home)
    paths.private_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"opening the log {path}") from error
    output = os.fdopen(descriptor, "ab")
    if output.tell() > MAX_LOG:
        output.truncate(0)
    return output


# --- records


@contextlib.contextmanager
def recorded(home: paths.Home, orders: Orders) -> Iterator[Record]:
    """A record of this process as the one behind a mount, for as long as the block lasts."""
    paths.private_directory(home.run)
    place = paths.private_directory(_place(home))
    record = Record(secrets.token_hex(8), rundir.Process.of(os.getpid()), orders.directory, orders.vm, orders.kind)
    path = place / f"{record.id}.json"
    body = {"version": VERSION, "boot": _BOOT_ID.read_text().strip(), **asdict(record)}
    durable.write_file(path, json.dumps(body).encode())
    try:
        yield record
    finally:
        path.unlink(missing_ok=True)


def records(home: paths.Home) -> list[Record]:
    """Every record of this boot, of living processes or not; what is no record is left alone."""
    found = []
    for path in sorted(_place(home).glob("*.json")):
        with contextlib.suppress(errors.BlkckptError, ValueError, KeyError, TypeError):
            body = json.loads(durable.read_small(path, "mount record", _RECORD_LIMIT))
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


def _mounted(record: Record) -> bool:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kind, source = line.partition(" - ")[2].split()[:2]
        if source == record.source and kind.startswith("fuse"):
            return True
    return False


# --- clearing up


def stale(home: paths.Home) -> list[Record]:
    """The mounts whose process was killed."""
    return [record for record in records(home) if not record.alive]


def clear(home: paths.Home) -> list[Record]:
    """Detach dead mounts and remove their records and pins; also the pins of mounts that a reboot ended."""
    gone = stale(home)
    for record in gone:
        if _mounted(record):
            _fusermount(record.directory, lazy=True)
        (_place(home) / f"{record.id}.json").unlink(missing_ok=True)
    if gone or not _place(home).exists():
        _unpin(home)
    return gone


def _unpin(home: paths.Home) -> None:
    """Remove the pins of this home's mounts that are no more; those of other homes' mounts are not known here."""
    alive = {held.owner(record.id) for record in active(home)}
    for path in library.store_paths(home):
        with contextlib.suppress(errors.BlkckptError), stores.Store.open(path) as store:
            for owner in store.pins():
                if owner.startswith(held.owner("")) and owner not in alive:
                    store.unpin(owner)


def _fusermount(directory: str, *, lazy: bool) -> str | None:
    """Unmount; None, or what went wrong."""
    program = shutil.which("fusermount3")
    if program is None:
        raise errors.MissingError("fusermount3 is not installed: apt install fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS, check=False)
    return None if result.returncode == 0 else " ".join((result.stderr or result.stdout).split())


# --- what others call


def prepare(home: paths.Home, directory: Path) -> Path:
    """Check that *directory* can be mounted on, after clearing up; its absolute path."""
    clear(home)
    target = Path(os.path.abspath(directory))  # noqa: PTH100
    try:
        if not target.is_dir():
            raise errors.NotFoundError(f"there is no directory {target}; make it first")
        if os.path.ismount(target):
            raise errors.StateError(f"something is mounted on {target} already")
        if any(target.iterdir()):
            raise errors.StateError(f"{target} is not empty; give an empty directory")
    except OSError as error:
        raise errors.from_os_error(error, f"looking at {target}") from error
    return target.resolve()


def start(home: paths.Home, orders: Orders) -> Record:
    """Mount in the background; returns when the mount is usable, raises what the process gave up with."""
    receiver, sender = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(receiver, "rb") as answers:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "blkckpt.view.daemon", str(sender)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[sender],
                # libfuse's threads would each get a heap of their own and keep it
                env={**os.environ, "MALLOC_ARENA_MAX": "2"}, cwd="/",
            )  # fmt: skip
        finally:
            os.close(sender)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps({"home": str(home.root), **asdict(orders)}).encode())
        if not nbdserver.wait_for([answers.fileno()], READY_SECONDS):
            process.terminate()
            raise errors.DeadlineError(f"mounting on {orders.directory} took longer than {READY_SECONDS:g} s")
        _check(answers.read(wire.MAX_MESSAGE), home)
    found = next((one for one in active(home) if one.process.pid == process.pid), None)
    if found is None:
        raise errors.StateError(f"the mount on {orders.directory} has ended already; see {log_path(home)}")
    return found


def _check(answer: bytes, home: paths.Home) -> None:
    if not answer:
        raise errors.BlkckptError(f"the process of the mount ended without a word; see {log_path(home)}")
    body: dict[str, Any] = json.loads(answer)
    if "type" in body:
        raise wire.error_from(wire.Failure(0, body["message"], body["type"], None))


def stop(home: paths.Home, directory: Path, *, lazy: bool = False) -> Record:
    """Unmount *directory* and wait for the end of its process (not if *lazy*: that ends with the last open file)."""
    record = at(home, directory)
    if record is None:
        raise errors.NotFoundError(
            f"no checkpoints are mounted on {directory}; `blkckpt mount` without a directory lists"
        )
    if not record.alive:
        clear(home)
        return record
    failed = _fusermount(record.directory, lazy=lazy) if _mounted(record) else None
    if failed is not None:
        raise errors.StateError(
            f"{record.directory} cannot be unmounted: {failed}; close what is open there, or use --lazy"
        )
    if not lazy:
        _wait(record.process)
    return record


def _wait(process: rundir.Process) -> None:
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.alive and not nbdserver.wait_for([descriptor], STOP_SECONDS):
            raise errors.DeadlineError(f"the process of the mount (pid {process.pid}) does not end")
    finally:
        os.close(descriptor)

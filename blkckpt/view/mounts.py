"""The mounts of a home: their processes, their records, and clearing up after those that were killed.

Each has a record (:mod:`blkckpt.view.records`).  The mount itself bears the record's id (source ``blkckpt-ID``), so
that clearing up never touches a mount that somebody made meanwhile at the same place.

What a killed process leaves, and who removes it:

* the mount: fusermount3, which waits for our death (``auto_unmount``), unless a file is open in it.  Then every access
  is ENOTCONN until :func:`clear` detaches it: the next ``mount``, ``umount`` or ``doctor``
* the record and the pins in the stores: :func:`clear`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from blkckpt import errors, paths
from blkckpt.agent import nbdserver, rundir
from blkckpt.control import wire
from blkckpt.store import store as stores
from blkckpt.view import chunks, held, library, records

READY_SECONDS = 30.0
READ_AHEAD = 1 << 20
STOP_SECONDS = 20.0
MAX_LOG = 16 << 20


@dataclass(frozen=True, slots=True)
class Orders:
    """What to mount where, for whom.

    A mount with a *user* serves the memory of that VM, which was restored from *vm*: its files can be opened for
    writing (QEMU does, and writes to its private mapping only), and it ends by itself when QEMU has closed them.
    """

    directory: str
    vm: str | None = None
    user: str | None = None
    cache: int = chunks.LIMIT
    threads: bool = False
    shared: bool = False


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


def _mounted(record: records.Record) -> bool:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kind, source = line.partition(" - ")[2].split()[:2]
        if source == record.source and kind.startswith("fuse"):
            return True
    return False


# --- clearing up


def stale(home: paths.Home) -> list[records.Record]:
    """The mounts whose process was killed, but for one that a QEMU has its memory from: that is `status`'s to say."""
    gone = [record for record in records.records(home) if not record.alive]
    return [record for record in gone if record.user is None or rundir.find(home.vm(record.user)) is None]


def clear(home: paths.Home) -> list[records.Record]:
    """Detach dead mounts and remove their records and pins; also the pins of mounts that a reboot ended."""
    gone = stale(home)
    for record in gone:
        if _mounted(record):
            _fusermount(record.directory, lazy=True)
        (records.place(home) / f"{record.id}.json").unlink(missing_ok=True)
    if gone or not records.place(home).exists():
        _unpin(home)
    return gone


def _unpin(home: paths.Home) -> None:
    """Remove the pins of this home's mounts that are no more; those of other homes' mounts are not known here."""
    alive = {held.owner(record.id) for record in records.active(home)}
    for path in library.store_paths(home):
        with contextlib.suppress(errors.BlkckptError), stores.Store.open(path) as store:
            for owner in store.pins():
                if owner.startswith(held.owner(f"{home.run.name}-")) and owner not in alive:
                    store.unpin(owner)


def unmount(directory: str) -> None:
    """Take the mount on *directory* away (a process does so with its own)."""
    _fusermount(directory, lazy=True)


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


def start(home: paths.Home, orders: Orders) -> records.Record:
    """Mount in the background; returns when the mount is usable, raises what the process gave up with."""
    return Starting(home, orders).wait()


class Starting:
    """A mount under way in the background; :meth:`wait` once."""

    def __init__(self, home: paths.Home, orders: Orders) -> None:
        self._home, self._orders = home, orders
        with open_log(home) as log:
            self._log_from = log.tell()
        receiver, sender = os.pipe2(os.O_CLOEXEC)
        self._answers = os.fdopen(receiver, "rb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "blkckpt.view.daemon", str(sender)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[sender],
                env={**os.environ, **_ENVIRONMENT}, cwd="/",
            )  # fmt: skip
        finally:
            os.close(sender)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps({"home": str(home.root), **asdict(orders)}).encode())

    def wait(self) -> records.Record:
        """Until the mount is usable; raises what its process gave up with."""
        with self._answers:
            if not nbdserver.wait_for([self._answers.fileno()], READY_SECONDS):
                self._process.terminate()
                raise errors.DeadlineError(f"mounting on {self._orders.directory} took over {READY_SECONDS:g} s")
            self._check(self._answers.read(wire.MAX_MESSAGE))
        found = next((one for one in records.active(self._home) if one.process.pid == self._process.pid), None)
        if found is None:
            raise errors.StateError(f"the mount on {self._orders.directory} has ended; see {log_path(self._home)}")
        settle(found)
        return found

    def _check(self, answer: bytes) -> None:
        body: dict[str, Any] = json.loads(answer) if answer else {"type": "BlkckptError", "message": "its process died"}
        if "type" in body:
            said = self._said() or f"see {log_path(self._home)}"
            raise wire.error_from(wire.Failure(0, f"{body['message']}: {said}", body["type"], None))

    def _said(self) -> str:
        """What the FUSE library and its helper said: lines of the log that are not ours."""
        with log_path(self._home).open("rb") as log:
            log.seek(self._log_from)
            lines = log.read(4096).decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines if line and not line.startswith("{"))

    def cancel(self) -> None:
        """The mount is not wanted any more."""
        self._process.terminate()


def settle(record: records.Record) -> None:
    """Wait until the kernel has begun to ask, and let it read ahead further, where that is permitted (root).

    1 MiB instead of 128 KiB: for 800 MB read in order 2.9 s of processor time instead of 3.9.  Not for memory, which
    is read where the guest happens to touch it.  To be called from another process, or another thread, than answers.
    """
    with contextlib.suppress(OSError):
        device = Path(record.directory).stat().st_dev
        if record.user is None:
            place = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
            Path(place).write_text(f"{READ_AHEAD >> 10}\n")


_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
}
"""libfuse's threads would each get a heap of their own; and what one read frees is what the next one needs."""


def stop(home: paths.Home, directory: Path, *, lazy: bool = False) -> records.Record:
    """Unmount *directory* and wait for the end of its process (not if *lazy*: that ends with the last open file)."""
    record = records.at(home, directory)
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

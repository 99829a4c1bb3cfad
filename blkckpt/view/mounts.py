"""The mounts of a home: their processes, their records, and clearing up after those that were killed.

Each has a record (:mod:`blkckpt.view.records`).  The mount itself bears the record's id (source ``blkckpt-ID``), so
that clearing up never touches a mount that somebody made meanwhile at the same place.

What a killed process leaves, and who removes it:

* the mount: fusermount3, which waits for our death (``auto_unmount``), unless it was killed too (a cgroup, the OOM
  killer).  Then every access is ENOTCONN until :func:`clear` detaches it: the next ``mount``, ``umount`` or ``doctor``
* the record and the pins in the stores: :func:`clear`
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from blkckpt import errors, paths
from blkckpt.agent import nbdserver, rundir
from blkckpt.store import store as stores
from blkckpt.view import held, library, records, starting

STOP_SECONDS = 20.0


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


def start(home: paths.Home, orders: starting.Orders) -> records.Record:
    """Mount in the background; returns when the mount is usable, raises what the process gave up with."""
    return starting.Starting(home, orders).wait()


def stop(home: paths.Home, directory: Path, *, lazy: bool = False) -> records.Record:
    """Unmount *directory* and wait for the end of its process (not if *lazy*: that ends with the last open file)."""
    record = records.at(home, directory)
    if record is None:
        raise errors.NotFoundError(
            f"no checkpoints are mounted on {directory}; `blkckpt mount` lists the mounts there are"
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

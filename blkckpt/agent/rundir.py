"""A VM's run directory: who runs it, on which sockets.

===================  =========================================================================================
``supervisor.lock``  locked for as long as a supervisor runs (an OFD write lock, so that others can *ask* for its
                     holder without taking it).  Never removed
``supervisor.json``  who runs: written after the lock was taken, removed before it is given up
``nbd.sock``         listening sockets, bound by the supervisor under the lock, 0600 in the 0700 directory; a
``control.sock``     name found there while we hold the lock is left over from one that was killed
``qmp.sock``         bound by QEMU
===================  =========================================================================================

``supervisor.json`` (one object): ``version`` 1, ``boot`` (the kernel's boot id), ``supervisor``, ``server`` and
``machine``, each null or ``{"pid", "start"}`` with the start time of ``/proc/PID/stat``, without which a pid that
was used again would pass for the old process.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from blkckpt import durable, errors, lazy, paths

if TYPE_CHECKING:
    from blkckpt.control import client
else:
    client = lazy.Module("blkckpt.control.client")

VERSION = 1
BACKLOG = 64
"""Connections that wait while nbdkit is being restarted: QEMU's one a disk, and the control clients'."""

_FLOCK = "hhqqi4x"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with the same pid."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """The running process *pid*; start 0 if it has gone."""
        return cls(pid, start_time(pid) or 0)

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.start


@dataclass(frozen=True, slots=True)
class Running:
    """What ``supervisor.json`` says."""

    supervisor: Process
    server: Process | None = None
    machine: Process | None = None


def start_time(pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat``, in clock ticks since boot; None when the process is gone or only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def lock_path(vm: paths.VmPaths) -> Path:
    return vm.run / "supervisor.lock"


def record_path(vm: paths.VmPaths) -> Path:
    return vm.run / "supervisor.json"


def find(vm: paths.VmPaths) -> Running | None:
    """Who runs *vm* now; None when nobody does."""
    return read(vm) if is_locked(lock_path(vm)) else None


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file *path*; asks without taking it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise errors.from_os_error(error, f"opening {path}") from error
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    finally:
        os.close(descriptor)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def take_lock(path: Path, taken: str) -> int:
    """Lock the file *path*, made if need be; the lock lives as long as the descriptor or a copy of it, in any process.

    Raises :class:`errors.StateError` saying *taken* when somebody holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise errors.StateError(taken) from error
    return descriptor


def bind(path: Path, unnamed: socket.socket | None = None) -> socket.socket:
    """A listening socket at *path*, 0600, in place of whatever was there: *unnamed*, or a new one."""
    listener = unnamed or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise errors.from_os_error(error, f"listening on {path}") from error
    return listener


def read(vm: paths.VmPaths) -> Running | None:
    """What ``supervisor.json`` says, whether it is still true or not; None when there is none of this boot."""
    path = record_path(vm)
    if not path.exists():
        return None
    try:
        body = json.loads(durable.read_small(path, "run record", 1 << 20))
        if body["version"] != VERSION or body["boot"] != _boot():
            return None
        return Running(Process(**body["supervisor"]), _process(body["server"]), _process(body["machine"]))
    except errors.NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise errors.CorruptError(f"{path} is not a run record; remove it if nothing runs") from error


def _process(body: dict[str, Any] | None) -> Process | None:
    return None if body is None else Process(**body)


def _boot() -> str:
    return _BOOT_ID.read_text().strip()


def _whole_file(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)


class RunDirectory:
    """The run directory, held: at most one in the whole system for one VM."""

    def __init__(self, vm: paths.VmPaths) -> None:
        """Create and lock.  Raises :class:`errors.StateError` when another supervisor runs the VM."""
        self.vm = vm
        for path in (vm.nbd_socket, vm.control_socket, vm.qmp_socket):
            client.check_path(path)
        for directory in (vm.run.parent, vm.run):
            paths.private_directory(directory)
        busy = f"VM {vm.name} is running already; `blkckpt status {vm.name}` shows it"
        self._lock = take_lock(lock_path(vm), busy)

    def listen(self, path: Path, unnamed: socket.socket | None = None) -> socket.socket:
        """A listening socket at *path*, 0600, in place of whatever a killed supervisor left there.

        It is *unnamed*, if that is given, else a new one.
        """
        return bind(path, unnamed)

    def record(self, running: Running) -> None:
        """Write ``supervisor.json``."""
        body = {"version": VERSION, "boot": _boot(), **asdict(running)}
        durable.write_file(record_path(self.vm), json.dumps(body).encode())

    def close(self, *, keep_record: bool = False) -> None:
        """Remove the sockets and give the lock up.  *keep_record*: QEMU goes on without us, and must be found."""
        names = [self.vm.nbd_socket, self.vm.control_socket]
        if not keep_record:
            names += [self.vm.qmp_socket, record_path(self.vm)]
        for name in names:
            name.unlink(missing_ok=True)
        os.close(self._lock)

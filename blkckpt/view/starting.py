"""Starting the process of a mount.  Light: a restore does this before anything else is loaded.

The process (:mod:`blkckpt.view.daemon`) answers once, through a pipe: that the mount is usable, or what it gave up
with.
A user's mount is a program of its own, which gets its orders on standard input.  A machine's, which a guest waits for,
is a fork of the command (:mod:`blkckpt.agent.forked`): half of what it needs is loaded then.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from blkckpt import errors, paths
from blkckpt.agent import forked, nbdserver
from blkckpt.control import wire
from blkckpt.view import records

READY_SECONDS = 30.0
CANCEL_SECONDS = 10.0
READ_AHEAD = 1 << 20
MAX_LOG = 16 << 20
CACHE = 64 << 20
"""Default bound of decoded chunks: the read-ahead of a dozen readers."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What to mount where, for whom.

    A mount with a *user* serves the memory of that VM, which was restored from *vm*: its files can be opened for
    writing (QEMU does, and writes to its private mapping only), and it ends by itself when QEMU has closed them.
    """

    directory: str
    vm: str | None = None
    user: str | None = None
    cache: int = CACHE
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


class Starting:
    """A mount under way in the background; :meth:`wait` once."""

    def __init__(self, home: paths.Home, orders: Orders) -> None:
        self._home, self._orders = home, orders
        with open_log(home) as log:
            self._log_from = log.tell()
        receiver, sender = os.pipe2(os.O_CLOEXEC)
        self._answers = os.fdopen(receiver, "rb")
        try:
            self._pid = (_start if orders.user is None else _fork)(home, orders, sender)
        finally:
            os.close(sender)

    def wait(self) -> records.Record:
        """Until the mount is usable; raises what its process gave up with."""
        with self._answers:
            if not nbdserver.wait_for([self._answers.fileno()], READY_SECONDS):
                self._signal(signal.SIGTERM)
                raise errors.DeadlineError(f"mounting on {self._orders.directory} took over {READY_SECONDS:g} s")
            self._check(self._answers.read(wire.MAX_MESSAGE))
        found = next((one for one in records.active(self._home) if one.process.pid == self._pid), None)
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
        """The mount is not wanted any more; returns when its process has ended."""
        self._answers.close()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            descriptor = os.pidfd_open(self._pid)
            try:
                if not nbdserver.wait_for([descriptor], CANCEL_SECONDS):
                    self._signal(signal.SIGKILL)
            finally:
                os.close(descriptor)
            os.waitpid(self._pid, 0)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)


def _start(home: paths.Home, orders: Orders, answers: int) -> int:
    """A program of its own; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "blkckpt.view.daemon", str(answers)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[answers],
        env={**os.environ, **_ENVIRONMENT}, cwd="/",
    )  # fmt: skip
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps({"home": str(home.root), **asdict(orders)}).encode())
    process.returncode = 0  # it outlives us, or is waited for by its number
    return process.pid


def _fork(home: paths.Home, orders: Orders, answers: int) -> int:
    """A fork of this process; its pid."""

    def run() -> int:
        os.chdir("/")
        code: int = importlib.import_module("blkckpt.view.daemon").run(home, orders, answers)
        return code

    return forked.fork(run, {answers})


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

"""Children: what the agent does it does by running ``blkckpt``, so that it survives whatever happens to that.

A child is a session of its own (Ctrl-C at the agent's terminal is for the agent) and writes its result (JSON) and its
messages into two files, not into pipes: an agent that was killed and started again *adopts* the child by its pid and
start time, waits for its end, and reads what it said.  Only the exit code of an adopted child is not known; it has
succeeded if it wrote a whole result.

Every wait has a deadline (A2).  A child is ended in three steps: SIGTERM, upon which ``blkckpt`` takes the checkpoint
back; SIGKILL, upon which the disk server does (D7) and the guard continues the guest; and being left.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from blkckpt import durable, errors, paths
from blkckpt.agent import rundir

KINDS = {
    1: "failed", 2: "usage", 3: "input", 4: "not_found", 5: "busy", 6: "damaged", 7: "hypervisor", 8: "no_space",
    9: "access", 10: "missing", 130: "interrupted", 143: "interrupted",
}  # fmt: skip
"""Exit codes of ``blkckpt`` as words: few, so that they can be a label of a metric."""
KILLED = "killed"
TIMEOUT = "timeout"
GARBLED = "garbled"
ALL_KINDS = (*dict.fromkeys(KINDS.values()), KILLED, TIMEOUT, GARBLED)

TAKE_BACK_SECONDS = 90.0
"""From SIGTERM to SIGKILL: the abort of a checkpoint, whose steps have deadlines of up to 30 s."""
MAX_OUTPUT = 4 << 20
PRIVATE = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What the service manager tells us, and our children must not take for theirs."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a child did not do what it was to: one of :data:`ALL_KINDS`, and one line."""

    kind: str
    text: str


Result = Mapping[str, Any] | Failure


@dataclass(frozen=True, slots=True)
class Files:
    """Where a child writes."""

    out: Path
    err: Path

    @classmethod
    def of(cls, directory: Path, name: str) -> Self:
        return cls(directory / f"{name}.out", directory / f"{name}.err")

    def remove(self) -> None:
        for path in (self.out, self.err):
            path.unlink(missing_ok=True)


class Job:
    """A running child.  Close it."""

    def __init__(
        self, process: rundir.Process, pidfd: int, files: Files, popen: subprocess.Popen[bytes] | None
    ) -> None:
        self.process = process
        self._pidfd = pidfd
        self._files = files
        self._popen = popen
        self._ended_by: Failure | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the child; if it still runs it goes on."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
        if self._popen is not None:
            self._popen.poll()

    def fileno(self) -> int:
        """Readable when the child has ended."""
        return self._pidfd

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, waiting so long at most."""
        return bool(ready([self._pidfd], seconds))

    def end(self, why: Failure, seconds: float = TAKE_BACK_SECONDS) -> bool:
        """Have it take back what it does; *why* is its result then.  False if not even SIGKILL ended it."""
        self._ended_by = why
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if self.wait(patience):
                return True
        return False

    def result(self) -> Result:
        """What came of it, once it has ended."""
        code = None if self._popen is None else self._popen.wait(10.0)
        if code == 0 or code is None:
            try:
                return _document(self._files.out)
            except (errors.BlkckptError, ValueError, RecursionError) as error:
                if code == 0:
                    return Failure(GARBLED, f"its result cannot be read: {error}")
        if self._ended_by is not None:
            return self._ended_by
        said = _last_line(self._files.err)
        if code is None:
            return Failure("failed", said or "it ended without a result while no agent was there")
        if code < 0:
            return Failure(KILLED, f"killed by {_signal_name(-code)}" + (f"; {said}" if said else ""))
        return Failure(KINDS.get(code, "failed"), said or f"exit code {code}")


def start(home: paths.Home, words: Sequence[str], files: Files) -> Job:
    """Run ``blkckpt`` *words* on *home*."""
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    command = [sys.executable, "-P", "-m", "blkckpt.cli.main", "--home", str(home.root), "--quiet", *words]
    files.remove()
    with _writer(files.out) as out, _writer(files.err) as err:
        popen = subprocess.Popen(
            command, cwd="/", env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
    return Job(rundir.Process.of(popen.pid), os.pidfd_open(popen.pid), files, popen)


def adopt(process: rundir.Process, files: Files) -> Job | None:
    """The child of an agent that is gone; None if it has ended, see :func:`leftover`."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if process.alive:  # asked after it was opened: it is this process that the descriptor is for
        return Job(process, pidfd, files, None)
    os.close(pidfd)
    return None


def leftover(files: Files) -> Result:
    """What came of a child that ended while no agent was there."""
    return Job(rundir.Process(0, 0), -1, files, None).result()


def ready(descriptors: Sequence[int], seconds: float) -> list[int]:
    """Those that are readable, waiting so long at most."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while True:
        found = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if found or time.monotonic() >= deadline:
            return [descriptor for descriptor, _ in found]


def _writer(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "wb")


def _document(path: Path) -> Mapping[str, Any]:
    document = json.loads(durable.read_small(path, "result", MAX_OUTPUT))
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def _last_line(path: Path) -> str:
    try:
        data = durable.read_small(path, "messages", MAX_OUTPUT)
    except errors.BlkckptError:
        return ""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("blkckpt: ")[:2000] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""The guard: looks after a guest whose agent was killed in the middle of a checkpoint (rule A1).

``python -m blkckpt.agent.guard (qmp|guest-agent) SOCKET [FD]``, started before the guest is touched.  It prints
``ready`` and waits on its standard input:

==============  =====================================================================================
``released``    the guest is well: the guard ends
end of file     the agent is gone.  The guest is continued (or thawed), then the guard ends
==============  =====================================================================================

QEMU's monitor and the guest agent talk to one client at a time, so the guard connects only after the agent's death
has closed the agent's connection.  A guest is continued only when it is paused, as it was when *we* stopped it; a
background snapshot that is still running resumes it by itself, so that is waited for first.

FD is the read end of the stream's pipe.  Holding it keeps QEMU from seeing a broken stream whichever of us dies, and
an abandoned stream is read to its end (:mod:`blkckpt.agent.drain` says why).  If the snapshot broke off all the same,
the write protection it left is taken away (:mod:`blkckpt.vm.writeprotect`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

from blkckpt import errors
from blkckpt.agent import drain
from blkckpt.vm import guestagent, qmp, writeprotect

QMP = "qmp"
GUEST_AGENT = "guest-agent"

READY_TIMEOUT = 20.0
"""Starting an interpreter and importing qemu.qmp takes 0.3 s on an idle machine."""
RESCUE_SECONDS = 60.0
"""Without success, and without a byte of an abandoned stream."""
INTERVAL = 0.2

PAUSED = ("paused", "postmigrate", "finish-migrate")
"""Run states in which a checkpoint can leave a guest; any other has a cause of its own."""
RUNNING_MIGRATION = ("setup", "active", "cancelling", "wait-unplug", "pre-switchover", "device")


class Guard:
    """The agent's end."""

    def __init__(self, kind: str, path: str, stream: int | None = None) -> None:
        """Start the process; it gets a duplicate of *stream*.  It stands when :meth:`await_ready` has returned."""
        given = [] if stream is None else [stream]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "blkckpt.agent.guard", kind, path, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=given,
            start_new_session=True,  # a Ctrl-C on the terminal is for the agent, not for its guard
        )

    def await_ready(self) -> None:
        """Wait until it stands."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self._process.wait(READY_TIMEOUT)
            raise errors.BlkckptError("the process that would continue the guest should we die did not start")

    def release(self) -> None:
        """The guest is well; idempotent."""
        with contextlib.suppress(OSError, ValueError):
            self._process.communicate(b"released\n", timeout=READY_TIMEOUT)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def abandon(self) -> None:
        """Leave the guest to the guard, which goes to work now; close the connection it needs."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()


def rescue(kind: str, path: str, stream: int | None = None, patience: float = RESCUE_SECONDS) -> bool:
    """Bring the guest back, until nothing has moved for *patience* seconds; whether it is known to be well."""
    attempt: Callable[[str], bool] = _continue if kind == QMP else _thaw
    thrown = None if stream is None else drain.Drain(stream)
    moved, since = 0, time.monotonic()
    while time.monotonic() - since < patience:
        try:
            if attempt(path):
                return True
        except errors.BlkckptError as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                return False  # nobody listens there any more: the guest has ended
        if thrown is not None and thrown.moved != moved:
            moved, since = thrown.moved, time.monotonic()
        time.sleep(INTERVAL)
    return False


def _continue(path: str) -> bool:
    with qmp.QmpSession(path) as session:
        migration = session.execute("query-migrate").get("status")
        if migration in RUNNING_MIGRATION:
            return False  # it may be about to stop the guest, or to resume it
        if migration in ("failed", "cancelled"):
            writeprotect.release(session.peer_pid)
        if session.execute("query-status")["status"] in PAUSED:
            session.execute("cont")
        return True


def _thaw(path: str) -> bool:
    with guestagent.GuestAgent(path) as agent:
        agent.thaw()
    return True


def main(arguments: Sequence[str], orders: IO[bytes], answers: IO[bytes]) -> int:
    """The guard's process."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the agent, or when its work is done
    kind, path, *rest = arguments
    with contextlib.suppress(BrokenPipeError):  # the agent is dead already: its guest is ours at once
        answers.write(b"ready\n")
    if orders.readline() == b"released\n":
        return 0
    return 0 if rescue(kind, path, int(rest[0]) if rest else None) else 1


if __name__ == "__main__":
    with os.fdopen(0, "rb") as standard_input, os.fdopen(1, "wb", buffering=0) as standard_output:
        sys.exit(main(sys.argv[1:], standard_input, standard_output))

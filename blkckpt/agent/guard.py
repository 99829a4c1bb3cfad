"""The guard: looks after a guest whose agent was killed in the middle of a checkpoint (rule A1).

``python -m blkckpt.agent.guard (qmp|guest-agent) SOCKET [FD]``, started before the guest is touched.  It prints
``ready`` and waits on its standard input:

==============  =====================================================================================
``charge``      the first line: from here on the guest is ours to touch.  Without it the guard just ends
``released``    the guest is well: the guard ends
end of file     the agent is gone.  The guest is continued (or thawed), then the guard ends
==============  =====================================================================================

So it can be started before anything is known of the guest, which may be paused because its user wants it so.

QEMU's monitor and the guest agent talk to one client at a time, so the guard connects only after the agent's death
has closed the agent's connection.  A guest is continued only when it is paused, as it was when *we* stopped it; a
background snapshot that is still running resumes it by itself, so that is waited for first.

What the guest's rescue takes (:mod:`blkckpt.agent.rescue`: asyncio, qemu.qmp) is imported when the agent is gone: every
checkpoint waits for the guard to stand, and almost none needs more of it.

FD is the read end of the stream's pipe.  Holding it keeps QEMU from seeing a broken stream whichever of us dies, and
an abandoned stream is read to its end (:mod:`blkckpt.agent.drain` says why).  If the snapshot broke off all the same,
the write protection it left is taken away (:mod:`blkckpt.vm.writeprotect`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import IO

from blkckpt import errors
from blkckpt.agent import child

QMP = "qmp"
GUEST_AGENT = "guest-agent"

READY_TIMEOUT = 20.0
"""Starting an interpreter takes 0.05 s on an idle machine."""


class Guard:
    """The agent's end."""

    def __init__(self, kind: str, path: str, stream: int | None = None) -> None:
        """Start the process; it gets a duplicate of *stream*.  It stands when :meth:`take_charge` has returned."""
        given = [] if stream is None else [stream]
        self._process = child.Child("blkckpt.agent.guard", [kind, path, *map(str, given)], given)

    def take_charge(self) -> None:
        """Wait until it stands; from here on the guest is in its charge."""
        if self._process.answers.readline() != b"ready\n":
            self._process.wait(READY_TIMEOUT)
            raise errors.BlkckptError("the process that would continue the guest should we die did not start")
        self._order(b"charge\n")

    def release(self) -> None:
        """The guest is well: the guard ends, and :meth:`reap` waits for that; idempotent."""
        with contextlib.suppress(OSError, ValueError):
            self._order(b"released\n")
        self.abandon()

    def abandon(self) -> None:
        """Leave the guest to the guard, which goes to work now; close the connection it needs.

        A guard that was never given the charge of it just ends.  Nothing happens if it has been released.
        """
        with contextlib.suppress(OSError, ValueError):
            self._process.orders.close()

    def reap(self) -> None:
        """Wait for the end of a guard that has been released."""
        try:
            self._process.wait(READY_TIMEOUT)
        except TimeoutError:
            self._process.kill()
        self._process.close()

    def _order(self, line: bytes) -> None:
        self._process.orders.write(line)
        self._process.orders.flush()


def main(arguments: Sequence[str], orders: IO[bytes], answers: IO[bytes]) -> int:
    """The guard's process."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the agent, or when its work is done
    kind, path, *rest = arguments
    with contextlib.suppress(BrokenPipeError):  # the agent is dead already: its guest is ours at once
        answers.write(b"ready\n")
        answers.flush()
    if orders.readline() != b"charge\n" or orders.readline() == b"released\n":
        return 0
    rescue: Callable[[str, str, int | None], bool] = importlib.import_module("blkckpt.agent.rescue").rescue
    return 0 if rescue(kind, path, int(rest[0]) if rest else None) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.fdopen(0, "rb", buffering=0), os.fdopen(1, "wb")))

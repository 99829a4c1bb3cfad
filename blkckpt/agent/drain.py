"""Taking a migration stream to its end when nobody wants it any more.

A background snapshot must not be cancelled, and its stream must not be broken: QEMU (7.2, seen) then leaves the guest's
memory write-protected with nobody to answer the faults, and the guest hangs at its next write, for ever; broken early
enough, QEMU itself does.  So a checkpoint that is given up lets the migration end in the usual way, and throws away
what comes.  As long as one process holds the pipe's read end QEMU cannot see it broken: the agent and the guard both
do.
"""

from __future__ import annotations

import os
import threading

CHUNK = 1 << 20


class Drain:
    """Reads *descriptor* (which stays the caller's) to its end in a thread, and forgets it."""

    def __init__(self, descriptor: int) -> None:
        self.moved = 0
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Whether the end has come; only then may the descriptor be closed."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while data := os.read(self._descriptor, CHUNK):
                self.moved += len(data)
        except OSError:
            return

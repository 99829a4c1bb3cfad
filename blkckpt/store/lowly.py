"""A process that gives way: what a machine has left over, in small pieces.

Nice 19 alone is not enough: where guest, disk server and this share the processors, each time it gets its small share
it keeps it for 3 ms (``base_slice_ns``), for which a request of the guest waits.  So it also does not preempt when it
wakes up (``SCHED_BATCH``), and asks for slices of 0.1 ms (``sched_runtime`` of sched_setattr(2), Linux 6.12 and later).
Not ``SCHED_IDLE``: on a machine whose processors are all busy the work would never end.

``python -m blkckpt.store.lowly MODULE`` runs the module's ``main`` so, from its imports on, which take 0.2 s of
processor time, while QEMU wants it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from blkckpt import scheduling

NICE = 19
SLICE_NS = 100_000


def give_way() -> None:
    """From now on this thread, and threads and processes that it starts, are of the lowest priority."""
    os.nice(max(NICE - os.nice(0), 0))
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        scheduling.set_thread(os.SCHED_BATCH, os.nice(0), SLICE_NS)


def command(python: str, module: str) -> tuple[str, ...]:
    """The command that has the interpreter *python* run *module* as a process that gives way."""
    return (python, "-P", "-m", __name__, module)


if __name__ == "__main__":
    give_way()
    sys.exit(importlib.import_module(sys.argv[1]).main())

"""A process that gives way: what a machine has left over, in small pieces.

Nice 19 alone is not enough: where guest, disk server and this share the processors, each time it gets its small share
it keeps it for 3 ms (``base_slice_ns``), for which a request of the guest waits.  So it also does not preempt when it
wakes up (``SCHED_BATCH``), and asks for slices of 0.1 ms (``sched_runtime`` of sched_setattr(2), Linux 6.12 and later).

``SCHED_IDLE`` is better still: a processor that runs only such work is idle to who looks for one, so guest and server
do not share the other one.  But on a machine whose processors are all busy the work would never end.  So it is for
work that gets on fast enough (:class:`Leftover`).

``python -m blkckpt.store.lowly MODULE`` runs the module's ``main`` so, from its imports on, which take 0.2 s of
processor time, while QEMU wants it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from concurrent import futures

from blkckpt import scheduling

NICE = 19
SLICE_NS = 100_000


def give_way() -> None:
    """From now on this thread, and threads and processes that it starts, are of the lowest priority."""
    os.nice(max(NICE - os.nice(0), 0))
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        _set(os.SCHED_BATCH)


class Leftover:
    """Work that is told of, which takes only what nobody wants while it gets on at *rate* bytes a second or more.

    Behind that, and at the end, it is as :func:`give_way` made it; in a process that does not give way nothing is
    changed.  Where one may not come back from ``SCHED_IDLE`` (sched(7): without ``CAP_SYS_NICE`` or ``RLIMIT_NICE``)
    it always is.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._began = time.monotonic()
        self._idle = False
        self._may = None if os.sched_getscheduler(0) == os.SCHED_BATCH else False

    def told(self, done: int) -> None:
        """*done* bytes are done since the beginning."""
        self._be(idle=done > self._rate * (time.monotonic() - self._began))

    def end(self) -> None:
        """What is still to be done is not told of."""
        self._be(idle=False)

    def _be(self, *, idle: bool) -> None:
        if idle and self._may is None:
            self._may = _may_come_back()
        if idle == self._idle or not self._may:
            return
        self._idle = idle
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            with contextlib.suppress(OSError):  # it has ended
                _set(os.SCHED_IDLE if idle else os.SCHED_BATCH, int(thread))


def _may_come_back() -> bool:
    """Whether a thread can, of its own."""

    def there_and_back() -> bool:
        try:
            _set(os.SCHED_IDLE)
            _set(os.SCHED_BATCH)
        except OSError:
            return False
        return True

    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(there_and_back).result()


def _set(policy: int, thread: int = 0) -> None:
    scheduling.set_thread(policy, os.nice(0), SLICE_NS if policy == os.SCHED_BATCH else 0, thread)


def command(python: str, module: str) -> tuple[str, ...]:
    """The command that has the interpreter *python* run *module* as a process that gives way."""
    return (python, "-P", "-m", __name__, module)


if __name__ == "__main__":
    give_way()
    sys.exit(importlib.import_module(sys.argv[1]).main())

"""Work in short pieces that is not interrupted, since requests of the guest may be waiting for it.

Who commits holds locks that the guest's requests take too: an inode's while it writes, the interpreter's.  Where guest,
server and this share the processors, it was preempted there, and all of them waited until its turn came again: 3 ms.
So it asks to be run soon and for 0.1 ms at a time, and has a high priority where that is permitted (root,
``CAP_SYS_NICE``, ``RLIMIT_NICE``).  Beside a commit on two processors the 99th percentile of a guest's writes was 2.2
times that at rest instead of 3.9, without the priority 2.9 to 3.6.

Only for work that rests most of the time (:class:`blkckpt.disk.job.Pace`), and for as long as a guest is active: what
does not rest would take the processor from others.  A commit's last pass does not; next to nothing is left for it.
"""

from __future__ import annotations

import contextlib
import os

from blkckpt import scheduling

NICE = -20
SLICE_NS = 100_000


class Brisk:
    """The scheduling of the thread that uses it; nobody's who has been given another policy or a low priority."""

    def __init__(self) -> None:
        self._on = False
        self._nice = 0

    def set(self, on: bool) -> None:
        """Be brisk, or as before."""
        if on == self._on or os.sched_getscheduler(0) != os.SCHED_OTHER:
            return
        self._on = on
        if not on:
            with contextlib.suppress(OSError):
                scheduling.set_thread(os.SCHED_OTHER, self._nice, 0)
            return
        self._nice = os.nice(0)
        wanted = NICE if self._nice <= 0 else self._nice
        for nice in (wanted, self._nice):
            with contextlib.suppress(OSError):  # no permission; a sandbox may forbid all of it
                scheduling.set_thread(os.SCHED_OTHER, nice, SLICE_NS)
                return

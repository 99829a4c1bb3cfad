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
import ctypes
import importlib
import os
import platform
import sys

NICE = 19
SLICE_NS = 100_000

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


class _Attributes(ctypes.Structure):
    """``struct sched_attr``, first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip


def give_way() -> None:
    """From now on this thread, and threads and processes that it starts, are of the lowest priority."""
    os.nice(max(NICE - os.nice(0), 0))
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:  # an older kernel takes no notice of the slice
        wanted = _Attributes(size=ctypes.sizeof(_Attributes), policy=os.SCHED_BATCH, nice=os.nice(0), runtime=SLICE_NS)
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0)


def command(python: str, module: str) -> tuple[str, ...]:
    """The command that has the interpreter *python* run *module* as a process that gives way."""
    return (python, "-P", "-m", __name__, module)


if __name__ == "__main__":
    give_way()
    sys.exit(importlib.import_module(sys.argv[1]).main())

"""How the kernel schedules a thread: sched_setattr(2), which Python's ``os`` lacks."""

from __future__ import annotations

import ctypes
import os
import platform

_NUMBER = {"x86_64": 314, "aarch64": 274}.get(platform.machine())


class _Attributes(ctypes.Structure):
    """``struct sched_attr``, first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip


def set_thread(policy: int, nice: int, slice_ns: int, thread: int = 0) -> None:
    """Set policy (``SCHED_OTHER``, ``SCHED_BATCH``, ``SCHED_IDLE``), nice value and slice of *thread*, or of this one.

    *slice_ns*: for how long it may run when others wait, 0.1 to 100 ms in nanoseconds, 0 for the kernel's own choice
    (``base_slice_ns``, 3 ms); kernels before Linux 6.12 take no notice of it.  Raises ``PermissionError`` for a nice
    value that is not permitted, and where one may not come back from ``SCHED_IDLE``.
    """
    if _NUMBER is None:  # this machine's number is not known: no slices
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        os.sched_setscheduler(thread, policy, os.sched_param(0))
        return
    wanted = _Attributes(size=ctypes.sizeof(_Attributes), policy=policy, nice=nice, runtime=slice_ns)
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(_NUMBER, thread, ctypes.byref(wanted), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

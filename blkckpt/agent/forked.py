"""A background process that is a fork of the command: it has loaded what the command has, which saves 0.1 s and more.

To be made while the command has one thread.  It uses nothing that another thread of the command's (a progress bar's)
may hold: streams of its own, and locks that the interpreter makes anew.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What asks a process to stop."""


def fork(run: Callable[[], int], kept: set[int]) -> int:
    """Run *run* in a child and end it with its result; returns the child's pid.

    The child has a session of its own, signals as in a new program, and of the command's descriptors standard error and
    those *kept*.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        gc.freeze()  # of the command's garbage: mappings close their descriptors, whose numbers are other files by then
        _close_all_but({2, *kept})
        for standard in (os.open(os.devnull, os.O_RDWR), os.open(os.devnull, os.O_RDWR)):  # 0 and 1
            os.set_inheritable(standard, True)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    """What a caller's shell or test has open is not to stay open as long as a VM runs."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (names are what is wanted)
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))

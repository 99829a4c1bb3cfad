"""How the kernel schedules work that gives way to the guest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures

import pytest

from blkckpt import scheduling
from blkckpt.store import lowly


def in_thread(work: Callable[[], object]) -> None:
    """Run *work* in a thread of its own: what it does to its scheduling ends with it."""
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


def permitted() -> bool:
    """Whether a high priority may be had here."""
    found = []

    def ask() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        except PermissionError:
            found.append(False)
        else:
            found.append(True)

    in_thread(ask)
    return found[0]


def test_who_gives_way_is_last_and_does_not_preempt() -> None:
    def work() -> None:
        lowly.give_way()
        assert os.nice(0) == lowly.NICE
        assert os.sched_getscheduler(0) == os.SCHED_BATCH

    in_thread(work)


LEFTOVER = """
import os, sys, threading, time
from blkckpt.store import lowly

now, on, done = 0.0, threading.Event(), threading.Event()
time.monotonic = lambda: now
if sys.argv[1:]:
    lowly.give_way()
other = threading.Thread(target=lambda: (on.set(), done.wait()))
other.start()
on.wait()
one = lowly.Leftover(100)
for now, told in ((1.0, 101), (2.0, 199), (3.0, 299), (3.0, 301), (4.0, None)):
    one.end() if told is None else one.told(told)
    print(*(os.sched_getscheduler(tid) for tid in (0, other.native_id)), os.nice(0))
done.set()
"""


def leftover(*prefix: str, gives_way: str = "yes") -> list[list[int]]:
    """Policy of two threads and the nice value: ahead, behind, behind, ahead, at the end."""
    command = [*prefix, sys.executable, "-c", LEFTOVER, *gives_way.split()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [list(map(int, line.split())) for line in said.stdout.splitlines()]


@pytest.mark.skipif(not permitted(), reason="no CAP_SYS_NICE")
def test_who_gets_on_fast_enough_takes_only_what_is_left_over() -> None:
    idle, batch = ([policy, policy, lowly.NICE] for policy in (os.SCHED_IDLE, os.SCHED_BATCH))
    assert leftover() == [idle, batch, batch, idle, batch]
    usual = [os.sched_getscheduler(0)] * 2 + [os.nice(0)]
    assert leftover(gives_way="") == [usual] * 5, "whoever does not give way is left alone"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
@pytest.mark.skipif(os.geteuid() != 0, reason="it is so already, or cannot be")
def test_who_could_not_come_back_does_not_go() -> None:
    """sched(7): without CAP_SYS_NICE, and with RLIMIT_NICE 0, nobody leaves SCHED_IDLE."""
    drop = ("prlimit", "--nice=0", "setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice")
    assert leftover(*drop) == [[os.SCHED_BATCH, os.SCHED_BATCH, lowly.NICE]] * 5


def test_a_refused_priority_is_an_error() -> None:
    def work() -> None:
        with pytest.raises(OSError, match="Invalid argument"):
            scheduling.set_thread(77, 0, 0)

    in_thread(work)

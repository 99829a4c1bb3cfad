"""How the kernel schedules work behind the guest: brisk while a guest is active, as before when it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures

import pytest

from blkckpt import scheduling
from blkckpt.disk import brisk, job
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
            os.setpriority(os.PRIO_PROCESS, 0, brisk.NICE)
        except PermissionError:
            found.append(False)
        else:
            found.append(True)

    in_thread(ask)
    return found[0]


class Guest:
    """Counts requests, when it is active."""

    def __init__(self) -> None:
        self.active = True
        self._requests = 0

    def __call__(self) -> int:
        self._requests += self.active
        return self._requests


def test_work_beside_an_active_guest_is_brisk_and_calm_beside_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.nice(0)
    raised = brisk.NICE if usual <= 0 and permitted() else usual
    guest, now = Guest(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def work() -> None:
        nonlocal now
        with job.Pace(threading.Event(), guest, rests=0.001) as pace:
            pace.SLICE = 0  # every piece is followed by a rest
            pace.rest(1)
            assert os.nice(0) == raised
            guest.active = False
            now += job.Pace.IDLE / 2
            pace.rest(1)
            assert os.nice(0) == raised, "it may have waited for a processor"
            now += job.Pace.IDLE / 2
            pace.rest(1)
            assert os.nice(0) == usual
            guest.active = True
            pace.rest(1)
            assert os.nice(0) == raised
        assert os.nice(0) == usual, "the thread goes on with other things"

    in_thread(work)


@pytest.mark.skipif(os.nice(0) > 0, reason="a nice process stays nice")
def test_without_permission_it_asks_for_short_pieces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    set_thread, usual = scheduling.set_thread, os.nice(0)
    monkeypatch.setattr(brisk, "NICE", usual - 1)

    def refuse(policy: int, nice: int, slice_ns: int) -> None:
        asked.append((nice, slice_ns))
        if nice < usual:
            raise PermissionError
        set_thread(policy, nice, slice_ns)

    monkeypatch.setattr(scheduling, "set_thread", refuse)

    def work() -> None:
        one = brisk.Brisk()
        one.set(True)
        one.set(True)
        one.set(False)

    in_thread(work)
    assert asked == [(usual - 1, brisk.SLICE_NS), (usual, brisk.SLICE_NS), (usual, 0)]


def test_a_server_that_its_user_has_made_nice_stays_so() -> None:
    def work() -> None:
        wanted = os.nice(5)
        one = brisk.Brisk()
        one.set(True)
        assert os.nice(0) == wanted
        one.set(False)
        assert os.nice(0) == wanted

    in_thread(work)


def test_another_policy_stays() -> None:
    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        brisk.Brisk().set(True)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH

    in_thread(work)


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

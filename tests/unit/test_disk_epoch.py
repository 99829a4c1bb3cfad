"""The gate: admission, exclusion in order of arrival (D4, 812), O(1) advance, drain with a deadline (D5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from blkckpt import errors
from blkckpt.disk import epoch

Gate = epoch.Gate[str]
WAIT = 10.0


def gate() -> Gate:
    return Gate(threading.Lock(), "old")


def alone(view: str, first: int, end: int) -> bool:
    return True


class Later:
    """Something that runs in a thread; it must still be running when asked, and must end when let."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.done = threading.Event()
        self.result: object = None
        self._work = work
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.result = self._work()
        self.done.set()

    def waits(self, table: Gate, tickets: int) -> bool:
        """Whether it is in the table (as the last of *tickets*) and does not go on."""
        until = time.monotonic() + WAIT
        while len(table._tickets) < tickets or not table._waiting:
            assert time.monotonic() < until and not self.done.is_set()
        return not self.done.is_set()


def advance(table: Gate, view: str) -> epoch.Epoch[str]:
    with table.lock:
        return table.advance_locked(view)


def test_plain_writes_overlap_freely() -> None:
    table = gate()
    first, second = table.begin(0, 10), table.begin(5, 15)
    table.finish(first)
    table.finish(second)
    assert table.in_flight() == 0 and table.waits == 0


def test_d4_a_copy_up_waits_for_older_writes_of_any_epoch() -> None:
    table = gate()
    old = table.begin(3, 6)
    advance(table, "new")
    later = Later(lambda: table.begin(5, 6, alone))
    assert later.waits(table, 2)
    table.finish(old)
    assert later.done.wait(WAIT)
    assert isinstance(later.result, epoch.Ticket) and later.result.view == "new"
    assert table.waits == 1, "counted once, however often it is woken"


def test_d4_later_writes_wait_for_a_copy_up_and_others_do_not() -> None:
    table = gate()
    copying = table.begin(5, 6, alone)
    elsewhere = table.begin(6, 9)
    later = Later(lambda: table.begin(0, 6))
    assert later.waits(table, 3)
    table.finish(copying)
    assert later.done.wait(WAIT)
    table.finish(elsewhere)


def test_waiting_is_in_order_of_arrival() -> None:
    """A plain write behind a waiting copy-up does not overtake it, so the copy-up cannot starve."""
    table = gate()
    first = table.begin(0, 4)
    second = Later(lambda: table.begin(2, 6, alone))
    assert second.waits(table, 2)
    third = Later(lambda: table.begin(3, 4))
    assert third.waits(table, 3)
    table.finish(first)
    assert second.done.wait(WAIT) and not third.done.is_set()
    assert isinstance(second.result, epoch.Ticket)
    table.finish(second.result)
    assert third.done.wait(WAIT)


def test_exclusion_is_decided_of_the_view_that_is_used() -> None:
    table = gate()
    seen: list[str] = []

    def ask(view: str, first: int, end: int) -> bool:
        seen.append(view)
        return False

    table.begin(0, 1, ask)
    advance(table, "new")
    table.begin(0, 1, ask)
    assert seen == ["old", "new"]


def test_d8_a_watch_notes_who_writes_to_its_blocks() -> None:
    """From those in flight at its beginning to those that began before writers were held off."""
    table = gate()
    early, elsewhere = table.begin(11, 12), table.begin(50, 60)
    with table.watch([(0, 4), (10, 14), (100, 101)]) as watch:
        table.finish(early)
        table.finish(table.begin(0, 1))
        table.finish(table.begin(13, 200))
        assert watch.untouched() == [(1, 4), (10, 11), (12, 13)]
    table.finish(table.begin(2, 3))
    assert watch.untouched() == [(1, 4), (10, 11), (12, 13)], "it is over"
    table.finish(elsewhere)


def test_d8_a_window_of_runs_holds_off_only_its_blocks() -> None:
    table = gate()
    window = table.exclude([(0, 2), (10, 12), (100, 101)])
    between = table.begin(2, 10)
    behind = table.begin(101, 200)
    touching = Later(lambda: table.begin(11, 50))
    assert touching.waits(table, 4)
    table.finish(window)
    assert touching.done.wait(WAIT)
    table.finish(between)
    table.finish(behind)


def test_d5_draining_waits_for_every_epoch_before_and_none_after() -> None:
    table = gate()
    oldest = table.enter()
    advance(table, "b")
    middle = table.begin(0, 1)
    ended = advance(table, "c")
    table.enter()
    drained = Later(lambda: table.wait_drained(ended, time.monotonic() + WAIT))
    table.finish(middle)
    assert not drained.done.wait(0.05)
    table.leave(oldest)
    assert drained.done.wait(WAIT)


def test_draining_has_a_deadline() -> None:
    table = gate()
    table.enter()
    ended = advance(table, "b")
    with pytest.raises(errors.DeadlineError):
        table.wait_drained(ended, time.monotonic() + 0.01)


def test_advance_waits_for_nobody() -> None:
    table = gate()
    for _ in range(1000):
        table.begin(0, 1)
    began = time.monotonic()
    advance(table, "b")
    assert time.monotonic() - began < 0.05


class Fast(epoch.NoPort[str]):
    """A fast path in the test's hand: what it was told, and whether its requests in flight have left."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.empty = threading.Event()
        self.empty.set()

    def publish(self, view: str | None) -> None:
        self.told.append(view)

    def exclude(self, runs: Sequence[tuple[int, int]]) -> object:
        self.told.append(("exclude", runs))
        return runs

    def include(self, excluded: object) -> None:
        self.told.append(("include", excluded))

    def settle(self, seconds: float) -> bool:
        return self.empty.wait(seconds)


def test_f1_draining_waits_for_the_fast_path() -> None:
    fast = Fast()
    table = Gate(threading.Lock(), "a", fast)
    fast.empty.clear()
    table.wait_drained(table.current, time.monotonic())  # no epoch has ended: nothing to wait for
    ended = advance(table, "b")
    assert fast.told == ["a", "b"]
    with pytest.raises(errors.DeadlineError):
        table.wait_drained(ended, time.monotonic() + 0.01)
    drained = Later(lambda: table.wait_drained(ended, time.monotonic() + WAIT))
    assert not drained.done.wait(0.05)
    assert table.lock.acquire(timeout=WAIT), "others are held up meanwhile"
    table.lock.release()
    fast.empty.set()
    assert drained.done.wait(WAIT)


def test_f5_an_exclusive_ticket_turns_the_fast_path_away_and_waits_for_it() -> None:
    fast = Fast()
    table = Gate(threading.Lock(), "a", fast)
    fast.empty.clear()
    later = Later(lambda: table.exclude([(1, 2), (5, 9)]))
    assert not later.done.wait(0.05)
    assert fast.told[1:] == [("exclude", [(1, 2), (5, 9)])]
    other = table.begin(20, 21)
    table.finish(other)
    fast.empty.set()
    assert later.done.wait(WAIT)
    assert isinstance(later.result, epoch.Ticket)
    table.finish(later.result)
    assert fast.told[2:] == [("include", [(1, 2), (5, 9)])]

    copying = table.begin(3, 4, alone)
    table.finish(copying)
    table.finish(table.begin(3, 4))
    assert fast.told[3:] == [("exclude", [(3, 4)]), ("include", [(3, 4)])]


def test_many_threads_leave_nothing_behind() -> None:
    table = gate()
    inside = [0] * 8
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(300):
            block = (seed * 7 + turn * 3) % 8
            ticket = table.begin(block, block + 1, alone if turn % 3 == 0 else None)
            if ticket.exclusive:
                inside[block] += 1
                if inside[block] != 1:
                    wrong.append(f"two inside block {block}")
                inside[block] -= 1
            table.finish(ticket)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong and table.in_flight() == 0 and not table._tickets

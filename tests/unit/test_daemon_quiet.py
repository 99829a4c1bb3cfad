"""The choice of a quiet moment: the rule's three parts, and that it finds the quietest as often as it should."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from blkckpt.daemon import quiet

WINDOW = 100.0


def choose(loads: Sequence[float | None]) -> tuple[int, str]:
    """Which of *loads*, spread evenly over the window, is taken, and why; the last at the latest."""
    looks: list[quiet.Look] = []
    for number, load in enumerate(loads):
        elapsed = WINDOW * (number + 1) / len(loads)
        looks.append(quiet.Look(elapsed, load))
        if reason := quiet.choose(looks, WINDOW, elapsed):
            return number, reason
    raise AssertionError("the window has no end")


def test_only_looks_first_and_takes_the_first_as_quiet_after_that() -> None:
    assert choose([50, 10, 40, 60, 30, 20, 10, 5, 1, 9]) == (6, "the quietest moment so far")
    assert choose([1, 50, 40, 60, 30, 20, 10, 5, 9, 8]) == (9, "the window ended")


def test_a_disk_at_rest_is_taken_at_once() -> None:
    assert choose([None, 5, 0, 3]) == (2, "the disks rest")


def test_looks_that_say_nothing() -> None:
    """The first of all, and those while the disk server is away."""
    assert choose([None] * 10) == (9, "the window ended")
    assert choose([None] * 5 + [7.0, None, 7.0, 1.0, 1.0])[0] == 7, "there must be something to compare with"


def test_it_finds_the_quietest_as_often_as_the_theory_says() -> None:
    """1/e of the random orders: 0.368; every other choice of the share to look at first finds it less often."""
    generator, count = random.Random(1), 60
    hits = 0
    for _ in range(2000):
        loads = [float(one + 1) for one in generator.sample(range(count), count)]
        hits += loads[choose(loads)[0]] == 1
    assert hits / 2000 == pytest.approx(1 / 2.718, abs=0.04)


def test_load_is_what_was_moved_and_asked_a_second() -> None:
    disks: list[dict[str, object]] = [
        {"reads": 10, "writes": 5, "read_bytes": 1000, "written_bytes": None},
        {"reads": 1},
    ]
    before = quiet.counters(7, disks)
    assert before == quiet.Counters(7, 16, 1000)
    now = quiet.Counters(7, 18, 9192)
    assert quiet.load(before, now, 2.0) == (8192 + 2 * quiet.REQUEST_BYTES) / 2
    assert quiet.load(None, now, 2.0) is None
    assert quiet.load(before, quiet.Counters(8, 18, 9192), 2.0) is None, "another server's counters"
    assert quiet.load(now, before, 2.0) is None
    assert quiet.load(before, None, 2.0) is None


def test_the_looks_are_neither_too_many_nor_too_few() -> None:
    assert quiet.interval(0.5) == quiet.SHORTEST_SECONDS
    assert quiet.interval(120) == 2.0
    assert quiet.interval(86400) == quiet.LONGEST_SECONDS

"""The rules of ``prune``: restic's words and meaning, over clocks that jump and checkpoints that tie."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.store import retention
from blkckpt.store.retention import Candidate, Duration, Policy

NS = 10**9
BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [UTC, BERLIN, ZoneInfo("America/New_York"), ZoneInfo("Asia/Kathmandu"), ZoneInfo("Australia/Lord_Howe")]


def at(text: str, zone: tzinfo = UTC) -> int:
    """Nanoseconds of a time as written; its own offset wins over *zone*."""
    when = datetime.fromisoformat(text)
    return int((when if when.tzinfo else when.replace(tzinfo=zone)).timestamp()) * NS


def candidates(*texts: str, zone: tzinfo = UTC) -> list[Candidate]:
    return [Candidate(text, at(text, zone)) for text in texts]


def kept(policy: Policy, found: Iterable[Candidate], zone: tzinfo = UTC) -> list[str]:
    return [one.candidate.name for one in retention.decide(policy, found, zone) if one.keep]


def reasons(policy: Policy, found: Iterable[Candidate], zone: tzinfo = UTC) -> dict[str, tuple[str, ...]]:
    return {one.candidate.name: one.reasons for one in retention.decide(policy, found, zone)}


def test_last() -> None:
    found = candidates("2026-01-01T00:00", "2026-01-03T00:00", "2026-01-02T00:00", "2026-01-04T00:00")
    assert kept(Policy(last=2), found) == ["2026-01-04T00:00", "2026-01-03T00:00"]
    assert len(kept(Policy(last=99), found)) == 4
    assert len(kept(Policy(last=retention.UNLIMITED), found)) == 4
    assert retention.decide(Policy(last=2), []) == []


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(hourly=3), ["2026-03-10T12:50", "2026-03-10T11:59", "2026-03-09T23:00"]),
        (Policy(daily=3), ["2026-03-10T12:50", "2026-03-09T23:00", "2026-03-02T00:00"]),
        (Policy(weekly=3), ["2026-03-10T12:50", "2026-03-02T00:00", "2026-03-01T23:59"]),
        (Policy(monthly=2), ["2026-03-10T12:50", "2026-02-28T10:00"]),
        (Policy(yearly=2), ["2026-03-10T12:50", "2025-12-31T23:59"]),
    ],
)
def test_the_newest_of_each_period_that_has_any(policy: Policy, expected: list[str]) -> None:
    """Periods without a checkpoint do not count; Sunday 1 March ends a week that Monday the 2nd does not share."""
    found = candidates(
        "2026-03-10T12:50", "2026-03-10T12:00", "2026-03-10T11:59", "2026-03-09T23:00", "2026-03-09T22:59",
        "2026-03-02T00:00", "2026-03-01T23:59", "2026-02-28T10:00", "2026-01-01T00:00", "2025-12-31T23:59",
        "2025-06-01T00:00", "2024-01-01T00:00",
    )  # fmt: skip
    assert kept(policy, found) == expected


def test_iso_weeks_over_new_year() -> None:
    """Thursday 1 January 2026 is in week 2026-W01 with Monday 29 December 2025."""
    found = candidates("2026-01-01T00:00", "2025-12-29T00:00", "2025-12-28T00:00", "2020-01-01T00:00")
    assert kept(Policy(weekly=2), found) == ["2026-01-01T00:00", "2025-12-28T00:00"]
    assert reasons(Policy(weekly=2), found)["2026-01-01T00:00"] == ("weekly 2026-W01",)


def test_the_oldest_stays_while_a_rule_wants_more() -> None:
    """As restic and borg do, so that the history reaches back as far as it can."""
    found = candidates("2026-03-10T12:00", "2026-03-10T11:00", "2026-03-10T10:00")
    assert reasons(Policy(daily=2), found) == {
        "2026-03-10T12:00": ("daily 2026-03-10",),
        "2026-03-10T11:00": (),
        "2026-03-10T10:00": ("daily, the oldest",),
    }
    assert kept(Policy(daily=1), found) == ["2026-03-10T12:00"]


def test_rules_are_applied_each_by_itself() -> None:
    """restic, not borg: what the daily rule keeps counts for the weekly rule too."""
    found = candidates("2026-03-11T00:00", "2026-03-10T00:00", "2026-03-04T00:00", "2026-03-03T00:00")
    assert kept(Policy(daily=2, weekly=2), found) == ["2026-03-11T00:00", "2026-03-10T00:00", "2026-03-04T00:00"]
    assert reasons(Policy(daily=2, weekly=2), found)["2026-03-11T00:00"] == ("daily 2026-03-11", "weekly 2026-W11")


@pytest.mark.parametrize(
    ("span", "oldest"),
    [
        ("1h", "2026-03-31T11:00"),
        ("1d", "2026-03-30T12:00"),
        ("1w", "2026-03-24T12:00"),
        ("1m", "2026-02-28T12:00"),  # the last of February, not 3 March
        ("1y", "2025-03-31T12:00"),
        ("1y1m1d1h", "2025-02-27T11:00"),
        ("9999y", "0001-01-01T00:00"),
    ],
)
def test_within(span: str, oldest: str) -> None:
    """Measured from the newest checkpoint, to the second, the limit included."""
    newest = at("2026-03-31T12:00")
    limit = max(at(oldest), 0)
    found = [Candidate("newest", newest), Candidate("just", limit), Candidate("epoch", 0)]
    if limit > 1:
        found.append(Candidate("before", limit - 1))
    names = kept(Policy(within=retention.parse_duration(span)), found)
    assert "just" in names
    assert "before" not in names
    assert ("epoch" in names) == (span == "9999y")


def test_tags() -> None:
    """Commas are 'and', repeating is 'or'."""
    found = [
        Candidate("a", 1, frozenset({"x"})), Candidate("b", 2, frozenset({"x", "y"})), Candidate("c", 3),
        Candidate("d", 4, frozenset({"z"})),
    ]  # fmt: skip
    assert kept(Policy(tags=(frozenset({"x", "y"}),)), found) == ["b"]
    assert kept(Policy(tags=(frozenset({"x", "y"}), frozenset({"z"}))), found) == ["d", "b"]
    assert reasons(Policy(tags=(frozenset({"x", "y"}),)), found)["b"] == ("tagged x, y",)


def test_pinned_and_used() -> None:
    """Neither is a rule: alone they make no policy, and beside one they keep."""
    found = [Candidate("a", 1, pinned=True), Candidate("b", 2, uses=("VM copy",)), Candidate("c", 3)]
    assert reasons(Policy(last=1), found) == {"c": ("last 1",), "b": ("used by VM copy",), "a": ("pinned",)}
    with pytest.raises(errors.InputError, match="--keep-"):
        retention.decide(Policy(), found)


def test_ties() -> None:
    """Of one instant, the name that sorts last is the newer; the order in which they are given says nothing."""
    found = [Candidate(name, at("2026-03-10T12:00")) for name in ("b", "c", "a")]
    for order in (found, found[::-1], [found[1], found[0], found[2]]):
        assert kept(Policy(last=1), order) == ["c"]
        assert kept(Policy(daily=1), order) == ["c"]


def test_periods_are_of_the_local_clock() -> None:
    """23:30 and 00:30 in Berlin are one day in UTC and two where the user lives."""
    found = candidates("2026-07-01T23:30", "2026-07-02T00:30", "2026-01-01T00:00", zone=BERLIN)
    assert len(kept(Policy(daily=2), found, BERLIN)) == 2
    assert kept(Policy(daily=2), found, BERLIN) == ["2026-07-02T00:30", "2026-07-01T23:30"]
    assert kept(Policy(daily=2), found, UTC) == ["2026-07-02T00:30", "2026-01-01T00:00"]


def test_the_hour_that_comes_twice() -> None:
    """25 October 2026, 02:30 in Berlin: once in summer time, an hour later again."""
    found = candidates(
        "2026-10-25T02:30+01:00", "2026-10-25T02:30+02:00", "2026-10-25T01:30+02:00", "2026-10-24T00:00+02:00"
    )
    assert len(kept(Policy(hourly=3), found, BERLIN)) == 3
    assert kept(Policy(daily=1), found, BERLIN) == ["2026-10-25T02:30+01:00"]


def test_the_hour_that_is_missing() -> None:
    """29 March 2026: 01:30 is followed by 03:00; a day within is a day of the calendar, 23 hours."""
    found = candidates("2026-03-29T03:00+02:00", "2026-03-29T01:30+01:00", "2026-03-29T01:00+01:00")
    assert len(kept(Policy(hourly=2), found, BERLIN)) == 2
    found = candidates("2026-03-29T12:00+02:00", "2026-03-28T12:00+01:00", "2026-03-28T11:59+01:00")
    assert len(kept(Policy(within=Duration(days=1)), found, BERLIN)) == 2
    assert len(kept(Policy(within=Duration(hours=24)), found, BERLIN)) == 3


def test_the_machines_own_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a zone the machine's own clock is used, with its summer time at each instant."""
    found = candidates("2026-07-01T23:30", "2026-07-02T00:30", "2025-01-01T00:00", zone=BERLIN)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        names = [one.candidate.name for one in retention.decide(Policy(daily=2), found) if one.keep]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert names == ["2026-07-02T00:30", "2026-07-01T23:30"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1y6m", Duration(years=1, months=6)), ("2w", Duration(days=14)), ("1w1d", Duration(days=8)),
        ("7d12h", Duration(days=7, hours=12)), (" 36h ", Duration(hours=36)),
    ],
)  # fmt: skip
def test_spans(text: str, expected: Duration) -> None:
    assert retention.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "0h", "1", "1x", "-1d", "1h1d", "1.5d", "1d 2h", "99999y", "d"])
def test_bad_spans(text: str) -> None:
    with pytest.raises(errors.InputError, match="span of time"):
        retention.parse_duration(text)


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(errors.InputError, match="number of checkpoints"):
        retention.parse_count(text)


def test_counts() -> None:
    assert [retention.parse_count(text) for text in ("7", "unlimited", "all")] == [7, -1, -1]


# --- against a second, naive statement of the rules

PERIODS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda when: (when.date(), when.hour, when.utcoffset()),
    "daily": lambda when: when.date(),
    "weekly": lambda when: when.isocalendar()[:2],
    "monthly": lambda when: (when.year, when.month),
    "yearly": lambda when: when.year,
}

counts = st.sampled_from([0, 0, 1, 2, 3, 7, retention.UNLIMITED])
instants = st.integers(min_value=0, max_value=3 * 366 * 86400).map(lambda n: (1_700_000_000 + n) * NS)
near = st.integers(min_value=-90, max_value=90).map(lambda n: at("2026-10-25T01:00", UTC) + n * 60 * NS)
tags = st.frozensets(st.sampled_from("xyz"), max_size=2)
histories = st.lists(st.tuples(st.one_of(instants, near), tags, st.booleans()), min_size=1, max_size=40).map(
    lambda rows: [Candidate(f"c{n}", when, tagged, pinned) for n, (when, tagged, pinned) in enumerate(rows)]
)
policies = st.builds(
    Policy, last=counts, hourly=counts, daily=counts, weekly=counts, monthly=counts, yearly=counts,
    within=st.one_of(st.none(), st.builds(Duration, hours=st.integers(1, 5000))),
    tags=st.lists(st.frozensets(st.sampled_from("xyz"), min_size=1, max_size=2), max_size=2).map(tuple),
).filter(lambda policy: not policy.empty)  # fmt: skip


def naive(policy: Policy, found: list[Candidate], zone: tzinfo) -> set[str]:
    """What must be kept, each rule by a set of periods."""
    newest_first = sorted(found, key=lambda one: (one.created_ns, one.name), reverse=True)
    result = {one.name for one in found if one.pinned or any(tagged <= one.tags for tagged in policy.tags)}
    if policy.within:
        limit = newest_first[0].created_ns - policy.within.hours * 3600 * NS
        result |= {one.name for one in found if one.created_ns >= limit}
    rules = {"last": policy.last, **{name: getattr(policy, name) for name in PERIODS}}
    for name, count in rules.items():
        first: dict[object, str] = {}
        for one in newest_first:
            when = datetime.fromtimestamp(one.created_ns // NS, zone)
            first.setdefault(one.name if name == "last" else PERIODS[name](when), one.name)
        chosen = list(first.values()) if count == retention.UNLIMITED else list(first.values())[:count]
        result |= set(chosen)
        if count and (count == retention.UNLIMITED or len(first) < count):
            result.add(newest_first[-1].name)
    return result


@given(policies, histories, st.sampled_from(ZONES))
def test_never_removes_what_a_rule_keeps(policy: Policy, found: list[Candidate], zone: tzinfo) -> None:
    """Exactly what the rules say is kept, and everything is decided once, the newest first."""
    decided = retention.decide(policy, found, zone)
    assert {one.candidate.name for one in decided if one.keep} == naive(policy, found, zone)
    assert sorted(one.candidate.name for one in decided) == sorted(one.name for one in found)
    times = [one.candidate.created_ns for one in decided]
    assert times == sorted(times, reverse=True)


@given(policies, histories, st.sampled_from(ZONES))
def test_pruning_again_removes_nothing_more(policy: Policy, found: list[Candidate], zone: tzinfo) -> None:
    """What one run keeps, the same run right after it keeps too: a timer that fires twice does no harm."""
    first = [one.candidate for one in retention.decide(policy, found, zone) if one.keep]
    if first:
        assert kept(policy, first, zone) == [one.name for one in first]


@given(histories, st.integers(1, 5))
def test_keep_last_never_leaves_fewer(found: list[Candidate], count: int) -> None:
    assert len(kept(Policy(last=count), found)) >= min(count, len(found))


def test_a_year_of_hourly_checkpoints() -> None:
    """The usual policy on a long history: the numbers a user can work out by hand."""
    start = datetime(2025, 3, 1, tzinfo=BERLIN)
    found = [
        Candidate(f"h{n:05}", int((start.astimezone(UTC) + timedelta(hours=n)).timestamp()) * NS)
        for n in range(24 * 365)
    ]
    names = kept(Policy(hourly=24, daily=7, weekly=4, monthly=12), found, BERLIN)
    # the newest of the week before is that of a day that is kept; February's is the newest of all
    assert len(names) == 24 + 6 + 2 + 11

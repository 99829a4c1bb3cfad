"""Which checkpoints to keep: the rules of ``prune``.  Pure: values in, values out.

The words are those of restic and borg, the meaning is **restic's** (``restic forget``):

* ``--keep-last N``: the N newest.
* ``--keep-hourly N`` (``daily``, ``weekly``, ``monthly``, ``yearly``): of each of the last N hours *that have a
  checkpoint*, the newest one.  Hours without any do not count.
* ``--keep-within DURATION``: everything at most so much older than the *newest checkpoint* (not than now: a VM that
  is not used does not lose its history by and by).
* ``--keep-tag TAG[,TAG…]``: everything that has all of these tags; given again, any of the lists.

Every rule is applied by itself to all checkpoints of one VM, and what any rule keeps is kept.  (borg's rules, in
contrast, take turns: what ``--keep-daily`` keeps, its ``--keep-weekly`` does not count.)  While a rule of periods has
not found N of them, it keeps the oldest checkpoint too, as restic and borg do: so the history reaches as far back as
it can.  N may be :data:`UNLIMITED`.  What is pinned, and what somebody uses, is kept beside the rules, and counts
for them like any other.

Periods are those of the local clock and calendar, weeks those of ISO 8601 (Monday to Sunday).  The hour that a clock
which is put back shows twice is two hours.  Of checkpoints of the same nanosecond the one whose name sorts last is the
newer.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo

from blkckpt import errors

UNLIMITED = -1
_NS = 10**9
_WITHIN = re.compile(r"(?:(\d{1,4})y)?(?:(\d{1,5})m)?(?:(\d{1,5})w)?(?:(\d{1,6})d)?(?:(\d{1,7})h)?")


@dataclass(frozen=True, slots=True)
class Duration:
    """A span of the calendar: years, months and days by the calendar, then hours by the clock."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep; counts are 0 (no such rule), N, or :data:`UNLIMITED`."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None
    tags: tuple[frozenset[str], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether no rule keeps anything."""
        return self == Policy()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint as the rules see it.  *uses* says by whom it is needed, beside its user's wish."""

    name: str
    created_ns: int
    tags: frozenset[str] = frozenset()
    pinned: bool = False
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one checkpoint: it is kept if there is a reason."""

    candidate: Candidate
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        return bool(self.reasons)


def parse_duration(text: str) -> Duration:
    """``1y6m``, ``2w``, ``7d12h``: years, months, weeks, days, hours, in this order; InputError for anything else."""
    match = _WITHIN.fullmatch(text.strip())
    years, months, weeks, days, hours = (int(part or 0) for part in match.groups()) if match else (0,) * 5
    found = Duration(years, months, 7 * weeks + days, hours)
    if found == Duration():
        raise errors.InputError(
            f"{text[:40]!r} is not a span of time: write for example 12h, 7d, 2w, 6m (months) or 1y6m, longest first"
        )
    return found


def parse_count(text: str) -> int:
    """``7``, or ``unlimited``."""
    if text.strip().lower() in ("unlimited", "all"):
        return UNLIMITED
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise errors.InputError(f"{text[:40]!r} is no number of checkpoints to keep: write 1 or more, or 'unlimited'")
    return count


def decide(policy: Policy, candidates: Iterable[Candidate], zone: tzinfo | None = None) -> list[Decision]:
    """What becomes of each of *candidates* (the checkpoints of one VM), the newest first.

    *zone* None is the machine's own.  InputError for a policy that is empty.
    """
    if policy.empty:
        raise errors.InputError("nothing says what is to be kept: give at least one --keep-… rule")
    ordered = sorted(candidates, key=lambda one: (one.created_ns, one.name), reverse=True)
    local = [_local(one.created_ns, zone) for one in ordered]
    buckets = _buckets(policy)
    cutoff = _cutoff(policy.within, ordered[0].created_ns, zone) if policy.within and ordered else None
    return [
        Decision(one, _reasons(policy, one, buckets, local[number], number, number == len(ordered) - 1, cutoff))
        for number, one in enumerate(ordered)
    ]


@dataclass(slots=True)
class _Bucket:
    """One rule of periods: how many it may still keep, and the period it has kept last."""

    rule: str
    left: int
    period: Callable[[datetime, int], str]
    seen: str | None = field(default=None)

    def reason(self, when: datetime, number: int, oldest: bool) -> str | None:
        """Why checkpoint *number*, of *when*, is kept, if it is.  To be asked in order, the newest first."""
        if not self.left:
            return None
        period = self.period(when, number)
        if period == self.seen and not oldest:
            return None
        why = f"{self.rule} {period}" if period != self.seen else f"{self.rule}, the oldest"
        self.seen = period
        self.left -= self.left > 0
        return why


def _buckets(policy: Policy) -> Sequence[_Bucket]:
    return (
        _Bucket("last", policy.last, lambda _, number: str(number + 1)),
        # with its offset from UTC: the hour that is there twice in autumn is two
        _Bucket("hourly", policy.hourly, lambda when, _: when.strftime("%Y-%m-%d %H:00 %z")),
        _Bucket("daily", policy.daily, lambda when, _: when.strftime("%Y-%m-%d")),
        _Bucket("weekly", policy.weekly, lambda when, _: when.strftime("%G-W%V")),
        _Bucket("monthly", policy.monthly, lambda when, _: when.strftime("%Y-%m")),
        _Bucket("yearly", policy.yearly, lambda when, _: when.strftime("%Y")),
    )


def _reasons(
    policy: Policy,
    one: Candidate,
    buckets: Sequence[_Bucket],
    when: datetime,
    number: int,
    oldest: bool,
    cutoff: int | None,
) -> tuple[str, ...]:
    found = ["pinned"] if one.pinned else []
    found += [f"used by {who}" for who in one.uses]
    found += [f"tagged {', '.join(sorted(tags))}" for tags in policy.tags if tags <= one.tags]
    if cutoff is not None and one.created_ns >= cutoff:
        found.append("within")
    found += [why for bucket in buckets if (why := bucket.reason(when, number, oldest)) is not None]
    return tuple(found)


def _local(created_ns: int, zone: tzinfo | None) -> datetime:
    return datetime.fromtimestamp(created_ns // _NS, UTC).astimezone(zone)


def _cutoff(span: Duration, newest_ns: int, zone: tzinfo | None) -> int:
    """*span* before *newest_ns*, in ns: by the local calendar (31 March less a month is the last of February)."""
    newest = _local(newest_ns, zone)
    years, month = divmod(newest.year * 12 + newest.month - 1 - span.months - 12 * span.years, 12)
    if years < 1:
        return -1
    day = min(newest.day, calendar.monthrange(years, month + 1)[1])
    wall = newest.replace(year=years, month=month + 1, day=day, tzinfo=None)
    try:
        earlier = (wall - timedelta(days=span.days)).replace(tzinfo=zone).astimezone(UTC)
        instant = earlier - timedelta(hours=span.hours)
    except (OverflowError, ValueError, OSError):  # before the calendar begins
        return -1
    return int(instant.timestamp()) * _NS + newest_ns % _NS

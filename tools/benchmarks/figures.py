"""Figures: what a bench found, the bar it must reach, and how both are shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

_PRECISION = ((1000, 0), (100, 0), (10, 1), (0, 2))


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach: at most or at least *value*."""

    relation: str
    value: float

    def holds(self, value: float) -> bool:
        return value >= self.value if self.relation == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.relation} {self.value:g}"


def at_least(value: float) -> Bar:
    return Bar(">=", value)


def at_most(value: float) -> Bar:
    return Bar("<=", value)


@dataclass(frozen=True, slots=True)
class Samples:
    """What was measured of one peer, in measuring order."""

    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def as_json(self) -> dict[str, Any]:
        low, high = self.spread
        return {"unit": self.unit, "median": self.median, "min": low, "max": high, "samples": list(self.values)}

    def __str__(self) -> str:
        low, high = self.spread
        median = f"{number(self.median)} {self.unit}"
        return median if len(self.values) == 1 else f"{median} ({number(low)} to {number(high)}, n={len(self.values)})"


@dataclass(frozen=True, slots=True)
class Figure:
    """One named result; *bar* is None for context that nothing is demanded of.

    *ceiling* is what a server that does less, or nothing, reaches in its place, in the same run: a bar above it asks
    for more than the client, the socket and the processors of this machine let through.
    """

    name: str
    unit: str
    value: float
    peers: Mapping[str, Samples] = field(default_factory=dict)
    bar: Bar | None = None
    ceiling: float | None = None

    @property
    def holds(self) -> bool | None:
        return None if self.bar is None else self.bar.holds(self.value)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "value": self.value,
            "peers": {name: samples.as_json() for name, samples in self.peers.items()},
            "bar": None if self.bar is None else str(self.bar),
            "holds": self.holds,
            "ceiling": self.ceiling,
        }


def ratio(
    name: str, over: str, under: str, peers: Mapping[str, Samples], bar: Bar | None, ceiling: str | None = None
) -> Figure:
    """The figure "median of *over* ÷ median of *under*"; *ceiling* names the peer that does nothing."""
    below = peers[under].median
    most = None if ceiling is None else peers[ceiling].median / below
    return Figure(name, "x", peers[over].median / below, peers, bar, most)


def number(value: float) -> str:
    """Three or so digits that mean something."""
    for limit, digits in _PRECISION:
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    raise AssertionError(value)


def table(found: Sequence[Figure]) -> Table:
    """All figures as one readable table."""
    result = Table(box=box.SIMPLE_HEAD, title_justify="left")
    result.add_column("figure", no_wrap=True)
    result.add_column("value", justify="right", no_wrap=True)
    result.add_column("bar", justify="right", no_wrap=True)
    result.add_column("", no_wrap=True)
    result.add_column("ceiling", justify="right", no_wrap=True)
    result.add_column("measured: median (range)")
    for figure in found:
        verdict = {True: "[green]holds[/]", False: "[red]missed[/]", None: ""}[figure.holds]
        measured = "\n".join(f"{name}: {samples}" for name, samples in figure.peers.items())
        unit = figure.unit if figure.unit == "x" else f" {figure.unit}"
        ceiling = "" if figure.ceiling is None else f"{number(figure.ceiling)}{unit}"
        value = f"{number(figure.value)}{unit}"
        result.add_row(figure.name, value, str(figure.bar or ""), verdict, ceiling, measured)
    return result

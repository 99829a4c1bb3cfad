"""The figures as a picture: one panel a figure, one bar a peer, medians with their ranges."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import context, figures

_COLUMNS = 4


def need() -> Any:
    """matplotlib's pyplot, or an error that says how to get it."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise context.BenchError("--chart needs matplotlib: pip install -e '.[bench]'") from error


def write(found: Sequence[figures.Figure], path: Path) -> None:
    """Draw *found* into *path*, whose suffix (``.png``, ``.svg``) chooses the format."""
    pyplot = need()
    rows = -(-len(found) // _COLUMNS)
    height = max(len(figure.peers) for figure in found) * 0.3 + 1.2
    canvas, axes = pyplot.subplots(rows, _COLUMNS, figsize=(5.2 * _COLUMNS, height * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for figure, axis in zip(found, axes.flat, strict=False):
        _panel(figure, axis)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)


def _panel(figure: figures.Figure, axis: Any) -> None:
    names = list(figure.peers)[::-1]
    medians = [figure.peers[name].median for name in names]
    ranges = [figure.peers[name].spread for name in names]
    below = [median - low for median, (low, _) in zip(medians, ranges, strict=True)]
    above = [high - median for median, (_, high) in zip(medians, ranges, strict=True)]
    colours = ["#2a6f97" if name.startswith("blkckpt") else "#adb5bd" for name in names]
    axis.barh(names, medians, xerr=[below, above], color=colours, ecolor="#495057", capsize=2)
    bar = "" if figure.bar is None else f"  (bar {figure.bar}{'' if figure.holds else ', missed'})"
    axis.set_title(f"{figure.name}: {figures.number(figure.value)} {figure.unit}{bar}", fontsize=9, loc="left")
    units = {samples.unit for samples in figure.peers.values()}
    axis.set_xlabel(", ".join(sorted(units)), fontsize=8)
    axis.tick_params(labelsize=8)

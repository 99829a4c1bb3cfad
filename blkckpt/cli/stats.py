"""``blkckpt stats``: sizes, deduplication, compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import output, session, verb
from blkckpt.store import store, usage

_RATIOS = "logical, data, distinct, stored, unique, dedup_ratio, compression_ratio"


@click.command(
    cls=verb.Verb,
    examples=("blkckpt stats", "blkckpt stats web", "blkckpt stats --json | jq '.stores[0].dedup_ratio'"),
    keys=(
        f"checkpoints: [{{vm, name, created, {_RATIOS}}}], stores: [{{path, {_RATIOS}, packs, dead}}], in bytes, "
        "ratios null where there is no data; damaged: [what could not be read]"
    ),
)
@click.argument("name", metavar="[VM]", required=False)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, as_json: bool) -> None:
    """Show how much checkpoints stand for and how little they take, each and in all.

    LOGICAL: disks and memory. DATA: what of it is not zeros. DISTINCT: each chunk of it once. STORED: those,
    compressed, with the tables that find them. UNIQUE: what of it only this checkpoint needs. DEDUP is data ÷
    distinct, COMPRESSION distinct ÷ stored. The last line of each store is about all of its checkpoints together.
    """
    places = ours.stores(None if name is None else units.check_name(name, "VM name"))
    with ours.reporter():
        reports = [usage.measure(place) for place in places]
    if name is not None and not any(name in one.vms for one in reports):
        ours.vm(name)
    damaged = [text for one in reports for text in one.damaged]
    if as_json:
        output.write_json({**_keys(places, reports, name), "damaged": damaged})
    else:
        output.write(_text(places, reports, name))
    if damaged:
        raise errors.CorruptError(f"not counted: {damaged[0]} ({len(damaged)} in all); see `blkckpt verify`")


def ratio(over: int, under: int) -> float | None:
    """*over* ÷ *under*, None where there is nothing to divide."""
    return over / under if over and under else None


def _figures(found: usage.Usage) -> dict[str, Any]:
    return {
        "logical": found.logical,
        "data": found.referenced,
        "distinct": found.distinct,
        "stored": found.compressed,
        "unique": found.unique,
        "dedup_ratio": ratio(found.referenced, found.distinct),
        "compression_ratio": ratio(found.distinct, found.compressed),
    }


def _chosen(report: usage.Report, name: str | None) -> list[usage.CheckpointUsage]:
    return [one for one in report.checkpoints if name in (None, one.vm)]


def _keys(places: Sequence[store.Store], reports: Sequence[usage.Report], name: str | None) -> dict[str, Any]:
    return {
        "checkpoints": [
            {"vm": one.vm, "name": one.name, "created": output.timestamp(one.created_ns), **_figures(one.usage)}
            for report in reports
            for one in _chosen(report, name)
        ],
        "stores": [
            {"path": str(place.path), **_figures(report.total), "packs": report.stored_bytes, "dead": report.dead_bytes}
            for place, report in zip(places, reports, strict=True)
        ],
    }


def _text(places: Sequence[store.Store], reports: Sequence[usage.Report], name: str | None) -> str:
    headers = ("CHECKPOINT", "LOGICAL", "DATA", "DISTINCT", "STORED", "UNIQUE", "DEDUP", "COMPRESSION")
    rows = [
        _row(label, found)
        for place, report in zip(places, reports, strict=True)
        for label, found in [
            *((f"{one.vm}@{one.name}", one.usage) for one in _chosen(report, name)),
            (f"all in {place.path}", report.total),
        ]
    ]
    lines = [output.table(headers, rows, right=headers[1:])]
    for place, report in zip(places, reports, strict=True):
        lines.append(
            f"{place.path}: packs of {units.format_size(report.stored_bytes)}, of which "
            f"{units.format_size(report.dead_bytes)} nothing needs (`blkckpt gc --repack`)"
        )
    return "\n".join(lines)


def _row(label: str, found: usage.Usage) -> tuple[str, ...]:
    sizes = (found.logical, found.referenced, found.distinct, found.compressed, found.unique)
    ratios = (ratio(found.referenced, found.distinct), ratio(found.distinct, found.compressed))
    return (label, *map(units.format_size, sizes), *("-" if one is None else f"{one:.2f}x" for one in ratios))

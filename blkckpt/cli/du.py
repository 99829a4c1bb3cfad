"""``blkckpt du``: what checkpoints cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import output, session, verb
from blkckpt.store import store, usage

_USAGE = "logical, referenced, distinct, compressed, unique"
_HEADERS = ("LOGICAL", "REFERENCED", "DISTINCT", "COMPRESSED", "UNIQUE")


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt du",
        "blkckpt du web",
        "blkckpt du --json | jq '.checkpoints | sort_by(.unique) | last'",
    ),
    keys=(
        f"checkpoints: [{{vm, name, created, {_USAGE}}}], vms: [{{vm, {_USAGE}}}], stores: [{{path, {_USAGE}, "
        "stored, dead}], all in bytes; damaged: [what could not be read]"
    ),
)
@click.argument("name", metavar="[VM]", required=False)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, as_json: bool) -> None:
    """Show what checkpoints cost: per checkpoint, per VM, in all. No data is read.

    logical: the sizes of disks and memory. referenced: what of it is not zeros. distinct: each piece once, as
    deduplication leaves it. compressed: what that takes in the store. unique: what no other checkpoint needs, so what
    removing this one makes free.
    """
    if name is not None and name not in ours.home.vm_names():
        units.check_name(name, "VM name")
    places = ours.stores(name)
    with ours.reporter() as bars:
        reports = [usage.measure(place, lambda done, total: bars.update("images", done, total)) for place in places]
    if name is not None and not any(name in one.vms for one in reports):
        ours.vm(name)
    damaged = [text for one in reports for text in one.damaged]
    if as_json:
        output.write_json({**_keys(places, reports, name), "damaged": damaged})
    else:
        output.write(_text(places, reports, name))
    if damaged:
        raise errors.CorruptError(f"not counted: {damaged[0]} ({len(damaged)} in all); see `blkckpt verify`")


def _keys(places: Sequence[store.Store], reports: Sequence[usage.Report], name: str | None) -> dict[str, Any]:
    return {
        "checkpoints": [
            {"vm": one.vm, "name": one.name, "created": output.timestamp(one.created_ns), **_bytes(one.usage)}
            for report in reports
            for one in _chosen(report, name)
        ],
        "vms": [{"vm": vm, **_bytes(found)} for report in reports for vm, found in _vms(report, name)],
        "stores": [
            {
                "path": str(place.path),
                **_bytes(report.total),
                "stored": report.stored_bytes,
                "dead": report.dead_bytes,
            }
            for place, report in zip(places, reports, strict=True)
        ],
    }


def _bytes(found: usage.Usage) -> dict[str, int]:
    return dict(zip(_USAGE.split(", "), _figures(found), strict=True))


def _figures(found: usage.Usage) -> tuple[int, ...]:
    return (found.logical, found.referenced, found.distinct, found.compressed, found.unique)


def _chosen(report: usage.Report, name: str | None) -> list[usage.CheckpointUsage]:
    return [one for one in report.checkpoints if name in (None, one.vm)]


def _vms(report: usage.Report, name: str | None) -> list[tuple[str, usage.Usage]]:
    return [(vm, found) for vm, found in report.vms.items() if name in (None, vm)]


def _text(places: Sequence[store.Store], reports: Sequence[usage.Report], name: str | None) -> str:
    rows = [
        (f"{one.vm}@{one.name}", *map(units.format_size, _figures(one.usage)))
        for report in reports
        for one in _chosen(report, name)
    ]
    rows += [
        (f"{vm} (all)", *map(units.format_size, _figures(found)))
        for report in reports
        for vm, found in _vms(report, name)
    ]
    lines = [output.table(("CHECKPOINT", *_HEADERS), rows, right=_HEADERS)]
    for place, report in zip(places, reports, strict=True):
        lines.append(
            f"\n{place.path}: {units.format_size(report.total.logical)} kept in "
            f"{units.format_size(report.stored_bytes)}, of which {units.format_size(report.dead_bytes)} nothing needs"
        )
    return "\n".join(lines)

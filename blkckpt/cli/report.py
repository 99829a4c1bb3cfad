"""``blkckpt report``: a VM's history as one HTML page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from blkckpt import errors
from blkckpt.cli import output, session, verb
from blkckpt.view import changes, report

LAST = 30
"""Checkpoints whose heat maps are drawn: 30 make a page of a few megabytes at most."""


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt report web -o web.html",
        "blkckpt report web -o web.html --last 5",
    ),
    keys="path, bytes, checkpoints, drawn",
)
@verb.vm_argument
@click.option(
    "-o", "--output", "path", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file to write."
)
@click.option(
    "--last", type=click.IntRange(0), default=LAST, show_default=True, help="Draw heat maps of this many, the newest."
)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str, path: Path, last: int, as_json: bool) -> None:
    """Write a page with a VM's checkpoints: history, sizes, how long each stopped the guest, where each changed.

    The page is one file, loads nothing and runs no script. No data is read for it, only the images' tables.
    """
    found = ours.checkpoints(name)
    if not found:
        ours.vm(name)
        raise errors.NotFoundError(f"VM {name} has no checkpoint yet; take one: blkckpt checkpoint {name}")
    drawn = _checkpoints(ours, found, last)
    data = report.page(name, drawn, time.time_ns()).encode("utf-8", "replace")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path}") from error
    shown = sum(1 for one in drawn if one.maps)
    if as_json:
        output.write_json({"path": str(path), "bytes": len(data), "checkpoints": len(drawn), "drawn": shown})
    else:
        output.write(f"{path}: {len(drawn)} checkpoints, heat maps of {shown}")


def _checkpoints(ours: session.Session, found: Sequence[session.Found], last: int) -> list[report.Checkpoint]:
    """All of *found*, the newest *last* compared with what they came after."""
    names = {one.manifest.name: one for one in found}
    result: list[report.Checkpoint] = []
    with ours.reporter() as bars:
        for index, one in enumerate(found):
            if index < len(found) - last:
                result.append(report.Checkpoint(one.manifest, one.manifest.parent, None, None, ()))
                continue
            bars.count("checkpoints compared", index + 1)
            parent = names.get(one.manifest.parent or "")
            before = parent or (found[index - 1] if index else None)
            result.append(_compared(before, one))
    return result


def _compared(before: session.Found | None, one: session.Found) -> report.Checkpoint:
    parts = changes.parts(
        changes.Side(before.store, before.manifest) if before else None, changes.Side(one.store, one.manifest)
    )
    sums = {kind: sum(part.difference.bytes for part in parts if part.kind == kind) for kind in ("disk", "memory")}
    worth = [part for part in parts if part.difference.size >= report.SMALL or part.difference.bytes]
    maps = tuple(part.map(report.CELLS) for part in worth)
    return report.Checkpoint(one.manifest, before.manifest.name if before else None, sums["disk"], sums["memory"], maps)

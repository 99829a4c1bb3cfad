"""``blkckpt pin``: keep checkpoints from rm and prune."""

from __future__ import annotations

import dataclasses

import click

from blkckpt.cli import labelling, names, session, verb


@click.command(
    cls=verb.Verb,
    examples=("blkckpt pin web@before-upgrade", "blkckpt pin ci@run-41 ci@run-42"),
    keys=f"checkpoints: [{{{labelling.KEYS}}}]",
)
@click.argument("targets", metavar="VM@CKPT…", nargs=-1, required=True, callback=verb.targets)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, targets: tuple[names.Target, ...], as_json: bool) -> None:
    """Keep checkpoints from rm and prune until they are unpinned."""
    labelling.change(ours, targets, lambda now: dataclasses.replace(now, pinned=True), as_json=as_json)

"""``blkckpt unpin``: let pinned checkpoints go."""

from __future__ import annotations

import dataclasses

import click

from blkckpt.cli import labelling, names, session, verb


@click.command(
    cls=verb.Verb,
    examples=("blkckpt unpin web@before-upgrade", "blkckpt unpin ci@run-41 ci@run-42"),
    keys=f"checkpoints: [{{{labelling.KEYS}}}]",
)
@click.argument("targets", metavar="VM@CKPT…", nargs=-1, required=True, callback=verb.targets)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, targets: tuple[names.Target, ...], as_json: bool) -> None:
    """Let pinned checkpoints go: rm and prune may remove them.

    Labels that are damaged (their checkpoint then counts as pinned) are set anew.
    """
    labelling.change(ours, targets, lambda now: dataclasses.replace(now, pinned=False), as_json=as_json, anew=True)

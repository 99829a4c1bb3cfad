"""``blkckpt untag``: take tags from a checkpoint."""

from __future__ import annotations

import click

from blkckpt.cli import labelling, names, session, verb


@click.command(
    cls=verb.Verb, examples=("blkckpt untag web@before-upgrade keep",), keys=f"checkpoints: [{{{labelling.KEYS}}}]"
)
@verb.target_argument
@click.argument("tags", metavar="TAG…", nargs=-1, required=True)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, tags: tuple[str, ...], as_json: bool) -> None:
    """Take tags from a checkpoint."""
    labelling.change(ours, (target,), lambda now: now.untag(tags), as_json=as_json)

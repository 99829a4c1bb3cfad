"""``blkckpt tag``: give a checkpoint tags."""

from __future__ import annotations

import click

from blkckpt.cli import labelling, names, session, verb


@click.command(
    cls=verb.Verb,
    examples=("blkckpt tag web@before-upgrade release keep", "blkckpt restore web@tag:release"),
    keys=f"checkpoints: [{{{labelling.KEYS}}}]",
)
@verb.target_argument
@click.argument("tags", metavar="TAG…", nargs=-1, required=True)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, tags: tuple[str, ...], as_json: bool) -> None:
    """Give a checkpoint tags: words to find it by ('list --tag', VM@tag:TAG) and to keep it by ('prune --keep-tag')."""
    labelling.change(ours, (target,), lambda now: now.tag(tags), as_json=as_json)

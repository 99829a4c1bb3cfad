"""``blkckpt show``: one checkpoint."""

from __future__ import annotations

import click

from blkckpt.cli import describe, names, output, session, verb


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt show web@before-upgrade",
        "blkckpt show web@latest --json | jq '.timings'",
    ),
    keys=describe.KEYS,
)
@verb.target_argument
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, as_json: bool) -> None:
    """Show one checkpoint: its images, how the guest was started, how long each step took."""
    found = ours.checkpoint(target)
    if as_json:
        output.write_json(describe.keys(found.manifest, found.labels, found.evidence))
    else:
        output.write(describe.text(found.manifest, found.labels, found.evidence))

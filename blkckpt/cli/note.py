"""``blkckpt note``: add a note to a checkpoint."""

from __future__ import annotations

import dataclasses

import click

from blkckpt import errors
from blkckpt.cli import labelling, names, session, verb
from blkckpt.store import labels


@click.command(
    cls=verb.Verb,
    examples=("blkckpt note web@latest 'kernel 6.1.90 boots'", "blkckpt note web@latest --clear"),
    keys=f"checkpoints: [{{{labelling.KEYS}}}]",
)
@verb.target_argument
@click.argument("notes", metavar="[TEXT]…", nargs=-1)
@click.option("--clear", is_flag=True, help="Take away the notes that were made since first.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, notes: tuple[str, ...], clear: bool, as_json: bool) -> None:
    """Add a note to a checkpoint; 'show' and 'list' have it. Those that it was taken with stay."""
    if not notes and not clear:
        raise errors.InputError("give a text, or --clear")

    def change(now: labels.Labels) -> labels.Labels:
        return (dataclasses.replace(now, notes=()) if clear else now).note(notes)

    labelling.change(ours, (target,), change, as_json=as_json)

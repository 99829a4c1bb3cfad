"""``blkckpt man``: the manual."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

from blkckpt import errors
from blkckpt.cli import manual, output, verb


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt man",
        "blkckpt man vm create",
        "blkckpt man --directory /usr/local/share/man/man1",
    ),
)
@click.argument("words", metavar="[VERB]…", nargs=-1)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Write every page there, to be found by man(1).",
)
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...], directory: Path | None) -> None:
    """Show the manual page of blkckpt, or of a verb; in a pipe, print its source for man(1)."""
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    if directory is None:
        _show(manual.page(manual.find(root, words)))
        return
    if words:
        raise errors.InputError("--directory writes the pages of all verbs; leave the verb out")
    count = 0
    for name, text in manual.pages(root):
        (directory / name).write_text(text)
        count += 1
    output.write(f"{count} pages in {directory}")


def _show(text: str) -> None:
    if sys.stdout.isatty() and shutil.which("man"):
        subprocess.run(["man", "-l", "-"], input=text.encode())
    else:
        output.write(text.rstrip("\n"))

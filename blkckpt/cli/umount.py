"""``blkckpt umount``: the end of a mount."""

from __future__ import annotations

from pathlib import Path

import click

from blkckpt.cli import output, session, verb
from blkckpt.view import mounts, records


@click.command(
    cls=verb.Verb,
    examples=("blkckpt umount /mnt/checkpoints", "blkckpt umount /mnt/checkpoints --lazy"),
    keys="directory, id, was_alive",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Take it away now; what is open there stays readable until it is closed.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, directory: Path, lazy: bool, as_json: bool) -> None:
    """Unmount checkpoints from DIR, and clear up after a mount whose process was killed."""
    known = records.at(ours.home, directory)
    alive = known is not None and known.alive
    record = mounts.stop(ours.home, directory, lazy=lazy)
    if as_json:
        output.write_json({"directory": record.directory, "id": record.id, "was_alive": alive})
    else:
        output.write(f"{record.directory} is unmounted")

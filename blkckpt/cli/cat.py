"""``blkckpt cat``: the contents of a guest's file in a checkpoint."""

from __future__ import annotations

import click

from blkckpt.cli import guestpath, output, session, verb
from blkckpt.view import source as sources

_READ = 4 << 20


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt cat web@before:/etc/passwd",
        "blkckpt cat web@before:vda:2:/var/log/syslog | grep oom",
        "diff <(blkckpt cat web@a:/etc/fstab) <(blkckpt cat web@b:/etc/fstab)",
    ),
)
@click.argument("addresses", metavar=f"{guestpath.SYNTAX}…", nargs=-1, required=True)
@guestpath.narrowing
@click.pass_obj
def command(ours: session.Session, addresses: tuple[str, ...], disk: str | None, volume: str | None) -> None:
    """Write files of the guest to standard output, byte for byte. Nothing is mounted."""
    for text in addresses:
        wanted = guestpath.narrowed(guestpath.parse(text), disk, volume)
        with guestpath.opened(ours, wanted.target, wanted.disk, wanted.volume) as places:
            found = guestpath.locate(wanted, places)
            _write(found.place.volume.open(found.path))


def _write(source: sources.Source) -> None:
    for offset in range(0, source.size, _READ):
        output.write_bytes(source.read(offset, min(_READ, source.size - offset)))

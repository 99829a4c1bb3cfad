"""``blkckpt store``: make or find the checkpoint store."""

from __future__ import annotations

from pathlib import Path

import click

from blkckpt import units
from blkckpt.cli import output, session, verb
from blkckpt.store import store


@click.group()
def command() -> None:
    """Make or find the checkpoint store.

    A store is made by itself when the first checkpoint is taken; 'init' makes one elsewhere, or with a chosen hash.
    """


@command.command(
    cls=verb.Verb,
    examples=("blkckpt store init", "blkckpt store init /mnt/big/ckpt --hash sha256"),
    keys="path, hash",
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--hash", "hash_name", type=click.Choice(["blake3", "sha256"]), help="[default: blake3 if installed]")
@verb.json_option
@click.pass_obj
def init(ours: session.Session, path: Path | None, hash_name: str | None, as_json: bool) -> None:
    """Make a store at PATH [default: in the home]. Give it to VMs with 'vm create --store PATH'."""
    place = ours.home.store if path is None else path.absolute()
    made = store.Store.init(place, hash_name=hash_name)
    if as_json:
        output.write_json({"path": str(place), "hash": made.info.hash_name})
    else:
        output.write(f"store at {place}, chunks named by {made.info.hash_name}")


@command.command(
    "path",
    cls=verb.Verb,
    examples=("blkckpt store path", "blkckpt store path web", "du -sh $(blkckpt store path)"),
    keys="path, exists",
)
@click.argument("name", metavar="[VM]", required=False)
@verb.json_option
@click.pass_obj
def path_(ours: session.Session, name: str | None, as_json: bool) -> None:
    """Print where the store is: the home's, or that of a VM."""
    if name is not None:
        ours.vm(units.check_name(name, "VM name"))
    place = ours.store_path(name)
    if as_json:
        output.write_json({"path": str(place), "exists": place.exists()})
    else:
        output.write(str(place))

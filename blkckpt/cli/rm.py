"""``blkckpt rm``: remove checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.agent import forget
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import inuse
from blkckpt.restore import flatten
from blkckpt.store import collect as collection
from blkckpt.store import keeping, store

COLLECTED = "images, packs, freed_bytes, live_bytes, dead_bytes, repacked_packs, moved_bytes, damaged"
"""The keys of a collection, as helps list them."""


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt rm web@before-upgrade",
        "blkckpt rm ci@run-41 ci@run-42 --yes",
        "blkckpt rm ci@run-43 --yes --no-collect --json",
    ),
    keys=f"removed: [VM@CKPT], collected: null or {{{COLLECTED}}}",
)
@click.argument("targets", metavar="VM@CKPT…", nargs=-1, required=True, callback=verb.targets)
@click.option("--collect/--no-collect", default=True, help="Delete at once what no other checkpoint needs [default].")
@verb.yes_option
@verb.json_option
@click.pass_obj
def command(ours: session.Session, targets: tuple[names.Target, ...], collect: bool, yes: bool, as_json: bool) -> None:
    """Remove checkpoints, and the data that no other checkpoint and no restored disk needs.

    One that is pinned is refused, and then none is removed.
    """
    found = [(target.vm, *ours.locate(target)) for target in targets]
    removed = [f"{vm}@{name}" for vm, _, name in found]
    verb.confirm(f"Remove {', '.join(removed)}?", yes=yes)
    forget.let_go(ours.home)
    for vm, place, name in found:
        check(ours, vm, place, name)  # before any of them goes
    retained = [(vm, name) for vm, place, name in found if discard(ours, vm, place, name)]
    settle_all(ours, retained)
    reports = collect_now(list({place.path: place for _, place, _ in found}.values())) if collect else None
    if as_json:
        output.write_json({"removed": removed, "collected": None if reports is None else keys(reports)})
        return
    output.write(f"removed {', '.join(removed)}")
    if reports is not None:
        output.write(f"freed {units.format_size(sum(one.freed_bytes for one in reports))}")


def check(ours: session.Session, vm: str, place: store.Store, name: str) -> None:
    """StateError if the checkpoint is pinned, or retained and the source of a restored disk that is not yet filled."""
    place.check_unpinned(vm, name)
    images = _retained(place, vm, name)
    if images:
        inuse.let_go(place)  # of readers that were killed
    for image in images:
        if keeping.needed(place, image):
            owner = next((owner for owner, pinned in place.pins().items() if image in pinned), "somebody")
            users = [f"VM {one}" for one in ours.home.vm_names() if ours.vm(one)[1].id == owner]
            raise errors.StateError(
                f"{vm}@{name} is retained, and {users[0] if users else owner} still reads its disks; flatten it "
                f"(blkckpt flatten {vm}@{name}), or wait until that has ended"
            )


def _retained(place: store.Store, vm: str, name: str) -> list[str]:
    """The images of the checkpoint's disks if it is retained; a damaged one is nothing of the kind."""
    try:
        one = place.manifest(vm, name)
    except errors.CorruptError:
        return []
    return [disk.image for disk in one.disks] if one.retained else []


def discard(ours: session.Session, vm: str, place: store.Store, name: str) -> bool:
    """Remove one checkpoint and its unpacked memory; its data goes with the next collection.

    Whether it was a retained one: then the VM's disks are to :func:`settle`.
    """
    check(ours, vm, place, name)
    retained = bool(_retained(place, vm, name))
    place.remove(vm, name)
    shutil.rmtree(ours.home.vm(vm).memory / name, ignore_errors=True)
    return retained


def settle_all(ours: session.Session, removed: Sequence[tuple[str, str]]) -> None:
    """The same for several VMs.  The checkpoints are gone, so what fails here is told and mends itself later."""
    for vm in dict.fromkeys(vm for vm, _ in removed):
        try:
            settle(ours, vm, [name for owner, name in removed if owner == vm])
        except errors.BlkckptError as error:
            later = f"its disks let go of it when they are served next: {error}"
            click.echo(f"blkckpt: removed; VM {vm} keeps the layers, and {later}", err=True)


def settle(ours: session.Session, vm: str, checkpoints: Sequence[str]) -> list[str]:
    """The retained *checkpoints* of *vm* are removed: its disks let go of them.  Those that somebody still reads."""
    if vm not in ours.home.vm_names():
        return []
    place, owner = ours.vm(vm)
    with ours.reporter() as bars:
        return [f"{vm}@{name}" for name in checkpoints if not flatten.settle(place, owner, name, bars.update)]


def collect_now(places: Sequence[store.Store], repack: float | None = None) -> list[collection.CollectReport] | None:
    """Delete what is not needed; not now if a checkpoint is being written (the next removal does it)."""
    try:
        for place in places:
            inuse.let_go(place)
        return [place.collect(repack=repack) for place in places]
    except errors.StateError as error:
        click.echo(f"blkckpt: removed, but its space is not freed yet: {error}", err=True)
        return None


def keys(reports: Sequence[collection.CollectReport]) -> dict[str, Any]:
    return {
        "images": sum(one.images for one in reports),
        "packs": sum(one.packs for one in reports),
        "freed_bytes": sum(one.freed_bytes for one in reports),
        "live_bytes": sum(one.live_bytes for one in reports),
        "dead_bytes": sum(one.dead_bytes for one in reports),
        "repacked_packs": sum(one.repacked_packs for one in reports),
        "moved_bytes": sum(one.moved_bytes for one in reports),
        "damaged": [text for one in reports for text in one.damaged],
    }

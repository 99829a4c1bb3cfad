"""``blkckpt vm``: define VMs and their disks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.agent import forget
from blkckpt.cli import names, output, session, verb
from blkckpt.disk import api, group
from blkckpt.vm import definition, lineage


@click.group()
def command() -> None:
    """Define VMs and their disks."""


@command.command(
    cls=verb.Verb,
    examples=(
        "blkckpt vm create web --disk /srv/web.raw",
        "blkckpt vm create db --disk root=/srv/db-root.raw --disk data=/dev/vg0/db:100G",
    ),
    keys="name, id, created, store, running, from: VM@CKPT or null, disks: [{name, path, size, restored_from}]",
)
@verb.vm_argument
@click.option(
    "--disk",
    "disks",
    multiple=True,
    required=True,
    metavar="[ID=]PATH[:SIZE]",
    help="A raw file or a block device; ID is the export's name [default: vda, vdb, …]. Repeat for more.",
)
@click.option("--store", type=click.Path(path_type=Path), help="Keep its checkpoints here instead of in the home.")
@verb.json_option
@click.pass_obj
def create(ours: session.Session, name: str, disks: tuple[str, ...], store: Path | None, as_json: bool) -> None:
    """Define a VM over raw disks that exist already.

    Nothing is written to the disks. SIZE must be the file's own size; of a block device it may be a part.
    """
    vm = ours.home.vm(name)
    described = [definition.disk(disk.name, disk.path, disk.size) for disk in names.parse_disks(disks)]
    made = definition.create(vm, described, store=None if store is None else str(store.absolute()))
    try:
        group.DiskGroup.create(vm, made.id, [api.DiskSpec(disk.name, disk.path, disk.size) for disk in described])
    except BaseException:
        shutil.rmtree(vm.root)
        raise
    _print(ours, made, as_json)


@command.command(
    "list",
    cls=verb.Verb,
    examples=("blkckpt vm list", "blkckpt vm list --json | jq -r '.vms[].name'"),
    keys="vms: [{name, id, created, store, running, from (or null), disks: [{name, path, size, restored_from}]}]",
)
@verb.json_option
@click.pass_obj
def list_(ours: session.Session, as_json: bool) -> None:
    """List the VMs that are defined, and whether their disks are being served."""
    found, damaged = _read(ours)
    if as_json:
        output.write_json({"vms": [_keys(ours, one) for one in found]})
    else:
        output.write(_overview(ours, found))
    if damaged:
        raise errors.CorruptError(f"not listed: {damaged[0]} ({len(damaged)} in all)")


def _read(ours: session.Session) -> tuple[list[definition.VmDefinition], list[str]]:
    """What can be read, and what is wrong with the rest."""
    found, damaged = [], []
    for name in ours.home.vm_names():
        try:
            found.append(ours.vm(name)[1])
        except errors.CorruptError as error:
            damaged.append(str(error))
    return found, damaged


def _overview(ours: session.Session, found: Sequence[definition.VmDefinition]) -> str:
    rows = [
        (
            one.name,
            _running(ours, one),
            len(one.disks),
            _total(one),
            output.local_time(one.created_ns),
            _origin(ours, one) or "-",
        )
        for one in found
    ]
    return output.table(("VM", "STATE", "DISKS", "SIZE", "CREATED", "FROM"), rows, right=("DISKS", "SIZE"))


@command.command(
    cls=verb.Verb,
    examples=("blkckpt vm show web", "blkckpt vm show web --json | jq -r '.disks[].path'"),
    keys="name, id, created, store, running, from: VM@CKPT or null, disks: [{name, path, size, restored_from}]",
)
@verb.vm_argument
@verb.json_option
@click.pass_obj
def show(ours: session.Session, name: str, as_json: bool) -> None:
    """Show one VM: its identity, its disks, its store."""
    _print(ours, ours.vm(name)[1], as_json)


@command.command(
    cls=verb.Verb,
    examples=("blkckpt vm rm web", "blkckpt vm rm ci-42 --yes --json"),
    keys="removed",
)
@verb.vm_argument
@verb.yes_option
@verb.json_option
@click.pass_obj
def rm(ours: session.Session, name: str, yes: bool, as_json: bool) -> None:
    """Forget a stopped VM.

    The disks it was created over stay, and so do its checkpoints. The disks of a VM that was restored, which blkckpt
    made, go with it.
    """
    vm = ours.home.vm(name)
    if not vm.root.is_dir():
        definition.load(vm)
    if ours.is_running(vm):
        raise errors.StateError(f"VM {name} is running; stop it first: blkckpt stop {name}")
    verb.confirm(f"Forget VM {name}?", yes=yes)
    forget.forget(vm)
    if as_json:
        output.write_json({"removed": name})
    else:
        output.write(f"forgot VM {name}")


def _print(ours: session.Session, one: definition.VmDefinition, as_json: bool) -> None:
    if as_json:
        output.write_json(_keys(ours, one))
        return
    head = {"vm": one.name, "id": one.id, "created": output.local_time(one.created_ns), "state": _running(ours, one)}
    if origin := _origin(ours, one):
        head["from"] = origin
    rows = [(disk.name, units.format_size(disk.size), disk.path) for disk in one.disks]
    output.write(f"{output.fields(head)}\n\n{output.table(('DISK', 'SIZE', 'PATH'), rows, right=('SIZE',))}")


def _keys(ours: session.Session, one: definition.VmDefinition) -> dict[str, Any]:
    disks = [
        {
            "name": disk.name,
            "path": disk.path,
            "size": disk.size,
            "restored_from": None if disk.source is None else disk.source.image,
        }
        for disk in one.disks
    ]
    return {
        "name": one.name,
        "id": one.id,
        "created": output.timestamp(one.created_ns),
        "store": one.store or str(ours.home.store),
        "running": ours.is_running(ours.home.vm(one.name)),
        "from": _origin(ours, one) or None,
        "disks": disks,
    }


def _origin(ours: session.Session, one: definition.VmDefinition) -> str:
    """The checkpoint that it was restored, forked or reverted from; empty if it never was."""
    return lineage.read(ours.home.vm(one.name)).checkpoint


def _running(ours: session.Session, one: definition.VmDefinition) -> str:
    return "running" if ours.is_running(ours.home.vm(one.name)) else "stopped"


def _total(one: definition.VmDefinition) -> str:
    return units.format_size(sum(disk.size for disk in one.disks))

"""``blkckpt import``: an image file becomes a VM's disk, or a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import inward, qemuimg
from blkckpt.vm import definition


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt import debian-12.qcow2 --as web",
        "blkckpt import root=a.vmdk data=b.vmdk --as db --directory /srv/db",
        "blkckpt import /srv/web.raw --as web --in-place",
        "blkckpt import backup-2024.qcow2 --as web@2024 --note 'from the old backup'",
    ),
    keys="vm, checkpoint (null: a VM was defined), disks: [{name, source, format, size, path, image}], seconds",
)
@click.argument("images", metavar="[ID=]IMAGE…", nargs=-1, required=True)
@click.option("--as", "target", metavar="VM[@CKPT]", required=True, help="The new VM, or the new checkpoint of a VM.")
@click.option(
    "--format", "kind", type=click.Choice(qemuimg.FORMATS), help="Of all IMAGEs [default: by their first bytes]."
)
@click.option("--in-place", is_flag=True, help="With VM: use raw files where they are, without a copy.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="With VM: put the raw copies there [default: in the VM's own directory, with which they are removed].",
)
@click.option("--note", "notes", multiple=True, metavar="TEXT", help="With VM@CKPT: kept with it. Repeat for more.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    images: tuple[str, ...],
    target: str,
    kind: str | None,
    in_place: bool,
    directory: Path | None,
    notes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Import disk images: as a new VM's first disks, or straight into the store as a checkpoint.

    raw, qcow2, vmdk, vdi, vhdx and vpc are read (all but raw by qemu-img). The images are not changed; one that a
    running VM writes to is refused. An image that reads from a backing file is refused unless its format is given: that
    says that you trust it.
    """
    wanted = names.parse_vm_or_target(target)
    _check_choices(wanted, in_place, directory, notes)
    arguments = names.parse_disks(images)
    if sized := next((one for one in arguments if one.size is not None), None):
        raise errors.InputError(f"an image is imported whole: leave the size at {sized.path} out")
    _check_at_rest(ours, [one.path for one in arguments])
    began = time.monotonic()
    sources = [inward.look(one.name, one.path, kind) for one in arguments]
    with ours.reporter() as bars:
        if wanted.checkpoint is not None:
            name = names.check_new_checkpoint(wanted.checkpoint)
            with ours.store_for_writing(wanted.vm) as place:
                made = inward.to_checkpoint(ours.home, place, wanted.vm, name, sources, bars.update, notes)
            where = {disk.name: {"path": None, "image": disk.image} for disk in made.disks}
        else:
            defined = (
                inward.in_place(ours.home, wanted.vm, sources)
                if in_place
                else _copy(ours, wanted.vm, sources, bars.update, directory)
            )
            where = {disk.name: {"path": disk.path, "image": None} for disk in defined.disks}
    _report(wanted, sources, where, time.monotonic() - began, as_json)


def _check_choices(wanted: names.Target, in_place: bool, directory: Path | None, notes: tuple[str, ...]) -> None:
    if wanted.checkpoint is not None and (in_place or directory):
        raise errors.InputError("--in-place and --directory are for a new VM; a checkpoint is kept in the store")
    if wanted.checkpoint is None and notes:
        raise errors.InputError("--note is kept with a checkpoint: --as VM@CKPT")
    if in_place and directory:
        raise errors.InputError("--in-place copies nothing to --directory; give one of them")


def _check_at_rest(ours: session.Session, images: Sequence[Path]) -> None:
    """Refuse a disk that a VM of ours is writing to: a copy of it would be of no one time."""
    wanted = {known: path for path in images if (known := definition.identity(path)) is not None}
    for name in ours.home.vm_names():
        vm = ours.home.vm(name)
        if not ours.is_running(vm):
            continue
        disks: Sequence[definition.DiskDefinition] = ()
        with contextlib.suppress(errors.CorruptError):  # a damaged VM is no other import's concern
            disks = definition.load(vm).disks
        for disk in disks:
            known = definition.identity(disk.path)
            if known in wanted:
                raise errors.StateError(
                    f"{wanted[known]} is disk {disk.name} of VM {name}, which runs; take a checkpoint of it instead: "
                    f"blkckpt checkpoint {name}"
                )


def _copy(
    ours: session.Session, vm: str, sources: list[inward.Source], progress: inward.Progress, directory: Path | None
) -> Any:
    with ours.store_for_writing(vm) as place:
        where = None if directory is None else directory.absolute()
        return inward.to_vm(ours.home, place, vm, sources, progress, directory=where)


def _report(
    wanted: names.Target, sources: list[inward.Source], where: dict[str, Any], seconds: float, as_json: bool
) -> None:
    disks = [
        {"name": one.name, "source": str(one.path), "format": one.format, "size": one.size, **where[one.name]}
        for one in sources
    ]
    if as_json:
        output.write_json({"vm": wanted.vm, "checkpoint": wanted.checkpoint, "disks": disks, "seconds": seconds})
        return
    total = units.format_size(sum(one.size for one in sources))
    what = "VM " if wanted.checkpoint is None else ""
    output.write(f"{what}{wanted} made from {total} of images in {units.format_duration(seconds)}")

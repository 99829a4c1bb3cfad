"""``blkckpt mount``: checkpoints as files."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import output, session, verb
from blkckpt.view import mounts, records, starting

KEYS = "directory, vm, pid, id, log; without DIR: mounts: [{directory, vm, pid, id, alive, user, prefetched}]"
OPTIONS = ("allow_other",)


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt mount /mnt/checkpoints",
        "sudo mount -o loop,ro /mnt/checkpoints/web/latest/disks/vda.img /mnt/disk",
        "gdb vmlinux -c /mnt/checkpoints/web/before-upgrade/memory/core.elf",
        "blkckpt mount ~/look --vm web --foreground",
        "blkckpt umount /mnt/checkpoints",
    ),
    keys=KEYS,
)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--vm", metavar="NAME", help="Show the checkpoints of this VM only.")
@click.option("--foreground", is_flag=True, help="Answer in this process until it is unmounted or interrupted.")
@click.option("--cache", default="64M", show_default=True, metavar="SIZE", help="Decompressed data to keep in memory.")
@click.option("--threads", is_flag=True, help="Answer in several threads: for stores that are slow to read.")
@click.option("-o", "options", multiple=True, metavar="allow_other", help="Let other users in, who then see all of it.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    directory: Path | None,
    vm: str | None,
    foreground: bool,
    cache: str,
    threads: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Mount all checkpoints on DIR, an empty directory, read-only; without DIR, list what is mounted.

    \b
    DIR/VM/CHECKPOINT/disks/vda.img           the disk; vda.partitions/1.img …, vda.files/… what is on it
    DIR/VM/CHECKPOINT/memory/core.elf         memory for debuggers; guest-physical.raw, ram.img, blocks/
    DIR/VM/CHECKPOINT/device-state.json       devices; device-state.bin, manifest.json, timings.json
    DIR/VM/latest, DIR/VM/by-time/…, by-tag/…  links

    New checkpoints appear by themselves; what is open stays readable when its checkpoint is removed. Needs no root.
    """
    if directory is None:
        _list(ours, as_json)
        return
    orders = starting.Orders(
        directory=str(mounts.prepare(ours.home, directory)),
        vm=units.check_name(vm, "VM name") if vm else None,
        cache=units.parse_size(cache),
        threads=threads,
        shared=_shared(options),
    )
    if vm is not None and not any(place.names(vm) for place in ours.stores(vm)):
        ours.vm(vm)
    if foreground:
        _foreground(ours, orders, as_json)
        return
    _report(ours, mounts.start(ours.home, orders), as_json)


def _shared(options: tuple[str, ...]) -> bool:
    given = [one for text in options for one in text.split(",") if one]
    for one in given:
        if one not in OPTIONS:
            raise errors.InputError(
                f"-o {one}: only {', '.join(OPTIONS)} can be asked for; a mount is always read-only"
            )
    return bool(given)


def _foreground(ours: session.Session, orders: starting.Orders, as_json: bool) -> None:
    def ready() -> None:
        record = next(one for one in records.active(ours.home) if one.process.pid == os.getpid())
        _report(ours, record, as_json)
        threading.Thread(target=starting.settle, args=(record,), daemon=True).start()

    # the FUSE library is needed in the process that answers only
    importlib.import_module("blkckpt.view.daemon").serve(ours.home, orders, ready)


def _report(ours: session.Session, record: records.Record, as_json: bool) -> None:
    if as_json:
        output.write_json({**_keys(record), "log": str(starting.log_path(ours.home))})
        return
    output.write(
        f"checkpoints are mounted on {record.directory} (pid {record.process.pid}); what cannot be read is said in "
        f"{starting.log_path(ours.home)}; end it: blkckpt umount {record.directory}"
    )


def _keys(record: records.Record) -> dict[str, Any]:
    return {"directory": record.directory, "vm": record.vm, "pid": record.process.pid, "id": record.id}


def _more(record: records.Record) -> dict[str, Any]:
    return {"alive": record.alive, "user": record.user, "prefetched": record.prefetched}


def _list(ours: session.Session, as_json: bool) -> None:
    known = records.records(ours.home)
    if as_json:
        output.write_json({"mounts": [{**_keys(one), **_more(one)} for one in known]})
        return
    rows = [
        (one.directory, one.vm or "all", one.process.pid, "yes" if one.alive else "killed", one.user or "-")
        for one in known
    ]
    output.write(output.table(("DIRECTORY", "VM", "PID", "ALIVE", "MEMORY OF"), rows, right=("PID",)))

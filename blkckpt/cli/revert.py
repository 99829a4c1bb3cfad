"""``blkckpt revert``: a VM's own disks and state go back to a checkpoint."""

from __future__ import annotations

import time
from typing import Any

import click

from blkckpt import units
from blkckpt.agent import supervisor
from blkckpt.cli import names, output, restore, session, verb
from blkckpt.restore import machine, revert


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt revert web@before-upgrade",
        "blkckpt revert web@before-upgrade --yes --detach",
        "blkckpt revert web@nightly --yes --disks-only --json",
    ),
    keys=f"disks: [{{name, compared, written}}] with --disks-only, else with --detach: {restore.KEYS}",
)
@verb.target_argument
@click.option("--disks-only", is_flag=True, help="Do not start the machine; its next start is a boot.")
@restore.mode_option
@restore.detach_option
@verb.yes_option
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    target: names.Target,
    disks_only: bool,
    mode: str,
    detach: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Take a VM back to a checkpoint: it is stopped, its disks are rewritten where they differ, it goes on from there.

    What was written since the checkpoint is lost, unless a newer checkpoint has it. A checkpoint without memory takes
    the disks back only.
    """
    began = time.monotonic()
    vm, owner = ours.vm(target.vm)
    found = ours.checkpoint(target)
    what = f"{target.vm}@{found.manifest.name}"
    stop = "is running and will be stopped; " if ours.is_running(vm) else ""
    verb.confirm(f"VM {vm.name} {stop}what it wrote since {what} is lost. Go on?", yes=yes)
    supervisor.stop(vm)
    with ours.reporter() as bars:
        done = revert.disks(vm, owner, found.store, found.manifest, bars.update)
        if disks_only or found.manifest.memory is None:
            _report(what, done, as_json)
            return
        prepared = machine.prepare_memory(ours.home, vm, found.store, found.manifest, mode=mode, progress=bars.update)
    restore.go_on(ours, prepared, mode=mode, detach=detach, as_json=as_json, began=began)


def _report(what: str, done: tuple[revert.Reverted, ...], as_json: bool) -> None:
    if as_json:
        disks: list[dict[str, Any]] = [
            {"name": one.name, "compared": one.compared, "written": one.written} for one in done
        ]
        output.write_json({"checkpoint": what, "disks": disks})
        return
    for one in done:
        written, compared = units.format_size(one.written), units.format_size(one.compared)
        how = f"{written} of {compared} differed" if one.compared else "its layers were there, nothing was copied"
        output.write(f"disk {one.name} is back at {what}: {how}")

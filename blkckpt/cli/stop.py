"""``blkckpt stop``: stop a VM, or the export of a checkpoint."""

from __future__ import annotations

import importlib

import click

from blkckpt import errors, paths
from blkckpt.agent import rundir, supervisor
from blkckpt.cli import names, output, session, verb


@click.command(
    cls=verb.Verb,
    examples=("blkckpt stop web", "blkckpt stop web --json", "blkckpt stop web@before-upgrade"),
    keys="vm, checkpoint (of an export only), stopped (false: it was not running)",
)
@click.argument("name", metavar="VM[@CKPT]")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str, as_json: bool) -> None:
    """Stop a VM: QEMU ends as if its power was cut, the disks are flushed and closed cleanly.

    Shut the guest down from inside first where its own caches matter. No error when it does not run. With VM@CKPT it
    ends what `blkckpt nbd VM@CKPT` started.
    """
    if "@" in name:
        target = names.parse_target(name)
        importlib.import_module("blkckpt.cli.nbd").stop(ours, target, as_json)  # numpy and SQLite come with it
        return
    vm, _ = ours.vm(name)
    stopped = supervisor.stop(vm)
    if not stopped:
        _refuse_orphan(vm)
    if as_json:
        output.write_json({"vm": name, "stopped": stopped})
    else:
        output.write(f"VM {name} {'is stopped' if stopped else 'was not running'}")


def _refuse_orphan(vm: paths.VmPaths) -> None:
    before = rundir.read(vm)
    if before and before.machine and before.machine.alive:
        raise errors.StateError(
            f"QEMU of VM {vm.name} (process {before.machine.pid}) runs without its disks: its supervisor was killed; "
            f"`blkckpt serve {vm.name}` gives them back, 'kill {before.machine.pid}' ends it"
        )

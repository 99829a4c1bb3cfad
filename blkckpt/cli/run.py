"""``blkckpt run``: start a VM, its disk server and its QEMU."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from blkckpt import paths
from blkckpt.agent import rundir, supervisor
from blkckpt.cli import output, session, verb

KEYS = "vm, supervisor, server, machine (process ids; machine is null without QEMU), console, log (files)"


@click.command(
    cls=verb.Verb,
    context_settings={"ignore_unknown_options": True},
    examples=(
        "blkckpt run web -- qemu-system-x86_64 -m 2G -accel kvm -nographic",
        "blkckpt run web --detach -- qemu-system-x86_64 -m 2G -accel tcg -display none -serial stdio",
        "blkckpt run db --detach --json -- qemu-system-x86_64 -m 4G -device nvme,drive=root,serial=1",
    ),
    keys=f"{KEYS}; with --detach only",
)
@verb.vm_argument
@click.option("--detach", is_flag=True, help="Return when the guest runs; its console goes to a log file.")
@verb.json_option
@click.argument("qemu", nargs=-1, required=True, metavar="-- QEMU [ARGS]…", type=click.UNPROCESSED)
@click.pass_obj
def command(ours: session.Session, name: str, detach: bool, as_json: bool, qemu: tuple[str, ...]) -> None:
    """Start a VM: its disk server, and QEMU with the disks and a QMP socket added to the command line.

    Each disk becomes -blockdev node-name=ID and, unless your command has a -device with drive=ID, a virtio disk.
    Without --detach the guest has this terminal and the exit code is QEMU's. The disk server is started again when
    it dies; the guest waits for it.
    """
    vm, _ = ours.vm(name)
    machine = supervisor.Machine(qemu, directory=str(Path.cwd()))
    if detach:
        report(vm, supervisor.start(vm, machine), as_json)
    else:
        click.get_current_context().exit(supervisor.run(vm, machine, lambda _: _hint(ours, name)))


def report(vm: paths.VmPaths, running: rundir.Running, as_json: bool) -> None:
    """What runs now, in the background."""
    if as_json:
        output.write_json(keys(vm, running))
        return
    pid = running.machine.pid if running.machine else running.supervisor.pid
    what = f"is running (QEMU is process {pid})" if running.machine else f"is served (process {pid})"
    output.write(f"VM {vm.name} {what}; console and messages: {console(vm)}")


def keys(vm: paths.VmPaths, running: rundir.Running) -> dict[str, str | int | None]:
    """The JSON of something that runs."""
    return {
        "vm": vm.name,
        "supervisor": running.supervisor.pid,
        "server": running.server.pid if running.server else None,
        "machine": running.machine.pid if running.machine else None,
        "console": str(console(vm)),
        "log": str(vm.log / "nbdkit.log"),
    }


def console(vm: paths.VmPaths) -> Path:
    """Where a detached QEMU's output goes."""
    return vm.log / "qemu.log"


def _hint(ours: session.Session, name: str) -> None:
    if not ours.quiet and sys.stderr.isatty():
        click.echo(f"blkckpt: VM {name} runs; in another terminal: blkckpt checkpoint {name}", err=True)

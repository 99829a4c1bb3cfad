"""``blkckpt serve``: serve a VM's disks without a hypervisor."""

from __future__ import annotations

import click

from blkckpt.agent import rundir, supervisor
from blkckpt.cli import run, session, verb


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt serve web",
        "blkckpt serve web --detach --json",
        "nbdcopy \"$(blkckpt status web --json | jq -r '.vms[0].disks[0].uri')\" - | sha256sum",
    ),
    keys=f"{run.KEYS}; with --detach only",
)
@verb.vm_argument
@click.option("--detach", is_flag=True, help="Return when the disks are served.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str, detach: bool, as_json: bool) -> None:
    """Serve a VM's disks to any NBD client, until Ctrl-C or `blkckpt stop`.

    Also gives a QEMU whose supervisor was killed its disks back, and ends what an interrupted checkpoint left.
    """
    vm, _ = ours.vm(name)
    if detach:
        run.report(vm, supervisor.start(vm, None), as_json)
        return

    def say(_: rundir.Running) -> None:
        if not ours.quiet:
            click.echo(f"blkckpt: serving the disks of VM {name}; Ctrl-C ends it", err=True)

    click.get_current_context().exit(supervisor.run(vm, None, say))

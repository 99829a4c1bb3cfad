"""``blkckpt prefetch``: a restored machine's memory becomes its own."""

from __future__ import annotations

import click

from blkckpt.cli import output, session, verb
from blkckpt.restore import prefetch


@click.command(
    cls=verb.Verb,
    examples=("blkckpt restore web@latest --as copy --memory fuse --detach", "blkckpt prefetch copy"),
    keys="vm, directory (of the mount that is not needed any more)",
)
@verb.vm_argument
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str, as_json: bool) -> None:
    """Read all memory of a VM that was restored with --memory fuse, so that it needs its mount no longer.

    The guest runs on while it is read; in the end QEMU copies it, which its devices wait for (half a second for each
    GiB). It then takes as much of the host's memory as the guest has.
    """
    vm, _ = ours.vm(name)
    with ours.reporter() as bars:
        record = prefetch.prefetch(ours.home, vm, bars.update)
    if as_json:
        output.write_json({"vm": name, "directory": record.directory})
    else:
        output.write(f"the memory of VM {name} is its own now")

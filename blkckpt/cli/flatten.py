"""``blkckpt flatten``: retained checkpoints become ordinary ones."""

from __future__ import annotations

import click

from blkckpt import errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.restore import flatten


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt flatten web                          all that are retained, the oldest first",
        "blkckpt flatten web@before-upgrade --rate 50M",
        "blkckpt flatten web --json | jq -r '.flattened[]'",
    ),
    keys="flattened: [VM@CKPT], still_read: [VM@CKPT] (of these, those whose layers somebody still reads)",
)
@click.argument("target", metavar="VM[@CKPT]", callback=lambda _c, _p, value: names.parse_vm_or_target(value))
@click.option("--rate", metavar="SIZE", help="Copy at most so many bytes of the disks a second, for example 50M.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, rate: str | None, as_json: bool) -> None:
    """Copy retained checkpoints into the store, and take the VM back to its base; it runs on meanwhile.

    Interrupted, a checkpoint is retained as before; run it again. Afterwards it is like any other, and the VM's writes
    since are committed into the base.
    """
    limit = None if rate is None else units.parse_size(rate)
    if limit is not None and limit < 1:
        raise errors.InputError("--rate must be at least one byte a second")
    vm, owner = ours.vm(target.vm)
    found = ours.checkpoints(target.vm) if target.checkpoint is None else [ours.checkpoint(target)]
    retained = [one for one in found if one.manifest.retained]
    if not retained and target.checkpoint is not None:
        raise errors.StateError(f"{target} is not retained: it is an ordinary checkpoint already")
    flattened: list[str] = []
    left: list[str] = []
    with ours.reporter() as bars:
        for one in retained:
            done = flatten.flatten(vm, owner, one.store, one.manifest, limit, bars.update)
            name = f"{one.manifest.vm}@{one.manifest.name}"
            flattened.append(name)
            left += [] if done else [name]
    if as_json:
        output.write_json({"flattened": flattened, "still_read": left})
        return
    output.write(f"flattened {', '.join(flattened)}" if flattened else f"VM {vm.name} has no retained checkpoint")
    if left:
        output.write(still_read(vm.name, left))


def still_read(vm: str, left: list[str]) -> str:
    """What is to be said when layers could not be let go."""
    return f"VM {vm} keeps the layers of {', '.join(left)} until those who read them (a restore, an export) have ended"

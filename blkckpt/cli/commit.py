"""``blkckpt commit``: give a retained checkpoint up."""

from __future__ import annotations

import click

from blkckpt import errors
from blkckpt.cli import flatten, names, output, rm, session, verb


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt commit web@before-upgrade",
        "blkckpt commit web --yes                     all that are retained",
        "blkckpt commit web@nightly --yes --json",
    ),
    keys="committed: [VM@CKPT], still_read: [VM@CKPT] (of these, those whose layers somebody still reads)",
)
@click.argument("target", metavar="VM[@CKPT]", callback=lambda _c, _p, value: names.parse_vm_or_target(value))
@verb.yes_option
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target, yes: bool, as_json: bool) -> None:
    """Give retained checkpoints up: they are removed, and what the VM wrote since goes into its base, while it runs.

    To keep the checkpoint as well, flatten it. One that is pinned, or that a restored VM still reads its disk from, is
    refused, and then none is given up.
    """
    vm, _ = ours.vm(target.vm)
    found = ours.checkpoints(target.vm) if target.checkpoint is None else [ours.checkpoint(target)]
    retained = [one for one in found if one.manifest.retained]
    if not retained:
        what = f"{target} is not retained: `blkckpt rm` removes it"
        raise errors.StateError(f"VM {vm.name} has no retained checkpoint" if target.checkpoint is None else what)
    committed = [f"{vm.name}@{one.manifest.name}" for one in retained]
    verb.confirm(f"Give up {', '.join(committed)}? The state they hold is lost.", yes=yes)
    for one in retained:
        rm.check(ours, vm.name, one.store, one.manifest.name)
    for one in retained:
        rm.discard(ours, vm.name, one.store, one.manifest.name)
    left = rm.settle(ours, vm.name, [one.manifest.name for one in retained])
    if as_json:
        output.write_json({"committed": committed, "still_read": left})
        return
    output.write(f"gave up {', '.join(committed)}")
    if left:
        output.write(flatten.still_read(vm.name, left))

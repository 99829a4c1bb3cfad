"""``blkckpt list``: the checkpoints there are."""

from __future__ import annotations

import click

from blkckpt import errors, units
from blkckpt.cli import describe, output, session, tree, verb
from blkckpt.store import manifest


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt list",
        "blkckpt list web",
        "blkckpt list --tree                        which came after which, with the branches that reverts left",
        "blkckpt list web --json | jq -r '.checkpoints[].name'",
    ),
    keys=f"checkpoints: [{{{describe.KEYS}}}], the oldest first",
)
@click.argument("name", metavar="[VM]", required=False)
@click.option("--tree", "as_tree", is_flag=True, help="Each below the one that it came after, of whatever VM.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, as_tree: bool, as_json: bool) -> None:
    """List the checkpoints of one VM, or of all, the oldest first."""
    if name is not None and name not in ours.home.vm_names():
        units.check_name(name, "VM name")
    found, damaged = _read(ours, name)
    if name is not None and not found and not damaged:
        ours.vm(name)
    if as_json:
        output.write_json({"checkpoints": [describe.keys(one) for one in found]})
    elif as_tree:
        drawn = list(tree.order(found))
        output.write(describe.overview([one for _, one in drawn], [lead for lead, _ in drawn]))
    else:
        output.write(describe.overview(found))
    if damaged:
        raise errors.CorruptError(f"not listed: {damaged[0]} ({len(damaged)} in all); see `blkckpt verify`")


def _read(ours: session.Session, name: str | None) -> tuple[list[manifest.Manifest], list[str]]:
    """What can be read, the oldest first, and what is wrong with the rest."""
    found, damaged = [], []
    for place in ours.stores(name):
        for vm, checkpoint in place.names(name):
            try:
                found.append(place.manifest(vm, checkpoint))
            except errors.CorruptError as error:
                damaged.append(str(error))
            except errors.NotFoundError:
                continue  # removed meanwhile
    return sorted(found, key=lambda one: one.created_ns), damaged

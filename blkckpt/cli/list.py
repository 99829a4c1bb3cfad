"""``blkckpt list``: the checkpoints there are."""

from __future__ import annotations

import click

from blkckpt import errors, units
from blkckpt.cli import describe, names, output, session, tree, verb
from blkckpt.store import labels, manifest, store
from blkckpt.vm import lineage


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt list",
        "blkckpt list web",
        "blkckpt list --tree                        which came after which, reverts' branches, restored VMs",
        "blkckpt list web --tag nightly            with this tag",
        "blkckpt list --tag release,x86 --tag keep  with both of the first two, or with the third",
        "blkckpt list web --json | jq -r '.checkpoints[].name'",
    ),
    keys=f"checkpoints: [{{{describe.KEYS}}}], the oldest first",
)
@click.argument("name", metavar="[VM]", required=False)
@click.option("--tree", "as_tree", is_flag=True, help="Each below the one that it came after, of whatever VM.")
@click.option("--tag", "tags", multiple=True, metavar="TAG[,TAG…]", help="Only those with all of these; repeat for or.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, as_tree: bool, tags: tuple[str, ...], as_json: bool) -> None:
    """List the checkpoints of one VM, or of all, the oldest first."""
    wanted = [names.parse_tags(text) for text in tags]
    if name is not None and name not in ours.home.vm_names():
        units.check_name(name, "VM name")
    found, damaged = _read(ours, name)
    if name is not None and not found and not damaged:
        ours.vm(name)
    if wanted:
        found = [(one, marked) for one, marked in found if any(some.issubset(marked.tags) for some in wanted)]
    if as_json:
        output.write_json({"checkpoints": [describe.keys(one, marked) for one, marked in found]})
    elif as_tree:
        of = {id(one): marked for one, marked in found}
        drawn = list(tree.order([one for one, _ in found]))
        heirs = _heirs(ours, [one for one, _ in found])
        output.write(describe.overview([(one, of[id(one)]) for _, one in drawn], [lead for lead, _ in drawn], heirs))
    else:
        output.write(describe.overview(found))
    if damaged:
        raise errors.CorruptError(f"damaged: {damaged[0]} ({len(damaged)} in all); see `blkckpt verify`")


def _heirs(ours: session.Session, found: list[manifest.Manifest]) -> dict[str, list[str]]:
    """The VMs that go on from each checkpoint and have none of their own since, which would be drawn below it."""
    heirs: dict[str, list[str]] = {}
    for name in ours.home.vm_names():
        line = lineage.read(ours.home.vm(name))
        if line.checkpoint and not any(one.vm == name and one.created_ns >= line.since_ns for one in found):
            heirs.setdefault(line.checkpoint, []).append(name)
    return heirs


def _read(ours: session.Session, name: str | None) -> tuple[list[tuple[manifest.Manifest, labels.Labels]], list[str]]:
    """What can be read, the oldest first, and what is wrong with the rest."""
    found: list[tuple[manifest.Manifest, labels.Labels]] = []
    damaged: list[str] = []
    for place in ours.stores(name):
        for vm, checkpoint in place.names(name):
            try:
                one = place.manifest(vm, checkpoint)
                found.append((one, _labels(place, one, damaged)))
            except errors.CorruptError as error:
                damaged.append(str(error))
            except errors.NotFoundError:
                continue  # removed meanwhile
    return sorted(found, key=lambda pair: pair[0].created_ns), damaged


def _labels(place: store.Store, one: manifest.Manifest, damaged: list[str]) -> labels.Labels:
    """The labels of *one*; damaged ones hide no checkpoint, and pin it."""
    try:
        return place.labels(one)
    except errors.CorruptError as error:
        damaged.append(str(error))
        return labels.Labels(pinned=True)

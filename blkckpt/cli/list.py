"""``blkckpt list``: the checkpoints there are."""

from __future__ import annotations

import click

from blkckpt import errors, units
from blkckpt.cli import describe, names, output, session, tree, verb
from blkckpt.store import evidence, labels, manifest, store
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
        found = [one for one in found if any(some.issubset(one[1].tags) for some in wanted)]
    if as_json:
        output.write_json({"checkpoints": [describe.keys(*one) for one in found]})
    elif as_tree:
        of = {id(one[0]): one for one in found}
        drawn = list(tree.order([one[0] for one in found]))
        heirs = _heirs(ours, [one[0] for one in found])
        output.write(describe.overview([of[id(one)] for _, one in drawn], [lead for lead, _ in drawn], heirs))
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


_Row = tuple[manifest.Manifest, labels.Labels, evidence.Evidence]


def _read(ours: session.Session, name: str | None) -> tuple[list[_Row], list[str]]:
    """What can be read, the oldest first, and what is wrong with the rest."""
    found: list[_Row] = []
    damaged: list[str] = []
    for place in ours.stores(name):
        for vm, checkpoint in place.names(name):
            try:
                one = place.manifest(vm, checkpoint)
                found.append((one, _labels(place, one, damaged), place.evidence(one)))
            except errors.CorruptError as error:
                damaged.append(str(error))
            except errors.NotFoundError:
                continue  # removed meanwhile
    return sorted(found, key=lambda row: row[0].created_ns), damaged


def _labels(place: store.Store, one: manifest.Manifest, damaged: list[str]) -> labels.Labels:
    """The labels of *one*; damaged ones hide no checkpoint, and pin it."""
    try:
        return place.labels(one)
    except errors.CorruptError as error:
        damaged.append(str(error))
        return labels.Labels(pinned=True)

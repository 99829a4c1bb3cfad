"""``blkckpt prune``: remove checkpoints by rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.agent import forget
from blkckpt.cli import names, output, rm, session, verb
from blkckpt.store import collect as collection
from blkckpt.store import manifest, retention, store
from blkckpt.store import repack as repacking
from blkckpt.vm import definition


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What becomes of one checkpoint, and where it is."""

    place: store.Store
    manifest: manifest.Manifest
    decision: retention.Decision

    def __str__(self) -> str:
        return f"{self.manifest.vm}@{self.manifest.name}"


def _count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int:
    return 0 if value is None else retention.parse_count(value)


def _keep(period: str, what: str) -> Callable[[Any], Any]:
    return click.option(f"--keep-{period}", metavar="N", callback=_count, help=f"Keep {what}.")


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt prune web --keep-last 5 --dry-run",
        "blkckpt prune --keep-hourly 24 --keep-daily 7 --keep-weekly 4 --keep-monthly unlimited --yes",
        "blkckpt prune web --tag scheduled --keep-daily 7 --yes",
        "blkckpt prune ci --keep-within 2d12h --keep-tag release --keep-tag golden,x86 --yes --repack",
    ),
    keys=(
        "dry_run, checkpoints: [{vm, name, created, keep, reasons}] the newest first, removed: [VM@CKPT], "
        f"collected: null or {{{rm.COLLECTED}}}"
    ),
)
@click.argument("vms", metavar="[VM]…", nargs=-1)
@_keep("last", "the N newest")
@_keep("hourly", "the newest of each of the last N hours that have any")
@_keep("daily", "the newest of each of the last N days that have any")
@_keep("weekly", "the newest of each of the last N weeks (Monday to Sunday) that have any")
@_keep("monthly", "the newest of each of the last N months that have any")
@_keep("yearly", "the newest of each of the last N years that have any")
@click.option(
    "--keep-within", metavar="SPAN", help="Keep what is so much older than the newest at most: 2w, 1y6m, 36h."
)
@click.option(
    "--keep-tag", "tags", multiple=True, metavar="TAG[,TAG…]", help="Keep what has all of these; repeat for or."
)
@click.option(
    "--tag", "only", multiple=True, metavar="TAG", help="Look only at those with this tag (each of them); others stay."
)
@click.option("--dry-run", is_flag=True, help="Say what would be kept and removed, and why.")
@click.option("--collect/--no-collect", default=True, help="Delete at once what no checkpoint needs [default].")
@click.option("--repack", is_flag=True, help="Also rewrite packs that are mostly dead then; see 'gc'.")
@verb.yes_option
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    /,
    vms: tuple[str, ...],
    keep_within: str | None,
    tags: tuple[str, ...],
    only: tuple[str, ...],
    dry_run: bool,
    collect: bool,
    repack: bool,
    yes: bool,
    as_json: bool,
    **counts: int,
) -> None:
    """Remove the checkpoints of VMs (default: of each VM) that no rule keeps.

    The words mean what they mean in restic: each rule looks at all checkpoints of a VM by itself, in local time, and
    what any rule keeps stays. N may be 'unlimited'. A rule that finds fewer than N keeps the oldest too. Pinned
    checkpoints stay, and so do those that a restored disk still reads from. A rule that would leave a VM nothing is
    refused.
    """
    policy = retention.Policy(
        **{name.removeprefix("keep_"): count for name, count in counts.items()},
        within=None if keep_within is None else retention.parse_duration(keep_within),
        tags=tuple(names.parse_tags(text) for text in tags),
    )
    if policy.empty:
        raise errors.InputError("nothing says what is to be kept: give at least one --keep-… rule")
    verdicts = _decide(ours, vms, policy, frozenset(units.check_name(tag, "tag") for tag in only))
    gone = [one for one in verdicts if not one.decision.keep]
    if not dry_run and gone:
        if not as_json:
            output.write(_table(verdicts))
        count = f"{len(gone)} checkpoint{'s' if len(gone) > 1 else ''}"
        verb.confirm(f"Remove {count}?", yes=yes)
    retained: list[tuple[str, str]] = []
    removed = [str(one) for one in gone if dry_run or _remove(ours, one, retained)]
    rm.settle_all(ours, retained)
    reports = None
    if collect and removed and not dry_run:
        threshold = repacking.THRESHOLD if repack else None
        reports = rm.collect_now(list({one.place.path: one.place for one in gone}.values()), threshold)
    if as_json:
        output.write_json(_keys(verdicts, removed, reports, dry_run))
    else:
        output.write(_text(verdicts, removed, reports, dry_run))


def _decide(
    ours: session.Session, vms: Sequence[str], policy: retention.Policy, only: frozenset[str]
) -> list[_Verdict]:
    """The verdict on every checkpoint of *vms*, or of all, that has the tags *only*."""
    for vm in vms:
        if not ours.checkpoints(units.check_name(vm, "VM name")):
            ours.vm(vm)
    forget.let_go(ours.home)
    found = [one for vm in vms or (None,) for one in ours.checkpoints(vm)]
    owners = _owners(ours)
    verdicts = []
    for vm in dict.fromkeys(one.manifest.vm for one in found):
        mine = {one.manifest.name: one for one in found if one.manifest.vm == vm}
        pins = {one.store.path: one.store.pins() for one in mine.values()}
        candidates = [_candidate(one, pins[one.store.path], owners) for one in mine.values()]
        decided = retention.decide(policy, [one for one in candidates if only <= one.tags])
        if decided and not any(one.keep for one in decided):
            raise errors.InputError(
                f"these rules would remove every checkpoint of {vm}; if that is meant: blkckpt rm {vm}@…"
            )
        verdicts += [
            _Verdict(mine[one.candidate.name].store, mine[one.candidate.name].manifest, one) for one in decided
        ]
    return verdicts


def _owners(ours: session.Session) -> dict[str, str]:
    """The owners of pins in stores → how a user knows them."""
    found = {}
    for name in ours.home.vm_names():
        try:
            found[definition.load(ours.home.vm(name)).id] = f"VM {name}"
        except errors.BlkckptError:
            continue  # its pins keep their images under their own name
    return found


def _candidate(one: session.Found, pins: dict[str, list[str]], owners: dict[str, str]) -> retention.Candidate:
    images = set(one.manifest.images())
    uses = tuple(owners.get(owner, owner) for owner, pinned in sorted(pins.items()) if images & set(pinned))
    try:
        marked = one.labels
    except errors.CorruptError:
        return retention.Candidate(one.manifest.name, one.manifest.created_ns, pinned=True, uses=uses)
    return retention.Candidate(one.manifest.name, one.manifest.created_ns, frozenset(marked.tags), marked.pinned, uses)


def _remove(ours: session.Session, one: _Verdict, retained: list[tuple[str, str]]) -> bool:
    try:
        if rm.discard(ours, one.manifest.vm, one.place, one.manifest.name):
            retained.append((one.manifest.vm, one.manifest.name))
    except errors.StateError as error:  # pinned meanwhile
        click.echo(f"blkckpt: {error}", err=True)
        return False
    except errors.NotFoundError:
        return False
    return True


def _keys(
    verdicts: Sequence[_Verdict],
    removed: Sequence[str],
    reports: Sequence[collection.CollectReport] | None,
    dry_run: bool,
) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "checkpoints": [
            {
                "vm": one.manifest.vm,
                "name": one.manifest.name,
                "created": output.timestamp(one.manifest.created_ns),
                "keep": one.decision.keep,
                "reasons": list(one.decision.reasons),
            }
            for one in verdicts
        ],
        "removed": list(removed),
        "collected": None if reports is None else rm.keys(reports),
    }


def _table(verdicts: Sequence[_Verdict]) -> str:
    rows = [
        (
            "keep" if one.decision.keep else "remove",
            str(one),
            output.local_time(one.manifest.created_ns),
            "; ".join(one.decision.reasons) or "no rule keeps it",
        )
        for one in verdicts
    ]
    return output.table(("", "CHECKPOINT", "TAKEN", "WHY"), rows)


def _text(
    verdicts: Sequence[_Verdict],
    removed: Sequence[str],
    reports: Sequence[collection.CollectReport] | None,
    dry_run: bool,
) -> str:
    if dry_run:
        return f"{_table(verdicts)}\n\nwould remove {len(removed)} of {len(verdicts)} checkpoints"
    if not removed:
        return f"nothing to remove: {len(verdicts)} checkpoints are kept"
    freed = "" if reports is None else f", freed {units.format_size(sum(one.freed_bytes for one in reports))}"
    return f"removed {len(removed)} of {len(verdicts)} checkpoints{freed}"

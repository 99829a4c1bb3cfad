"""``blkckpt gc``: free the space that nothing needs."""

from __future__ import annotations

import click

from blkckpt import errors, units
from blkckpt.agent import forget
from blkckpt.cli import output, progress, rm, session, verb
from blkckpt.exchange import inuse
from blkckpt.store import collect, repack, store


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt gc",
        "blkckpt gc --repack",
        "blkckpt gc --repack --threshold 10 --dry-run",
        "blkckpt gc --repack --json | jq .freed_bytes",
    ),
    keys=f"dry_run, {rm.COLLECTED}, images_live, stores: [path]",
)
@click.option("--repack/--no-repack", help="Rewrite what lives in packs that are mostly dead [default: no].")
@click.option(
    "--threshold", type=click.FloatRange(0, 100), metavar="PERCENT", default=100 * repack.THRESHOLD,
    show_default=True, help="With --repack: of packs with more dead bytes than this.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be freed.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, repack: bool, threshold: float, dry_run: bool, as_json: bool) -> None:
    """Free the space in the stores that no checkpoint and no restored disk needs.

    Removed checkpoints leave data in packs (large files) that others need in part. Without --repack only packs that
    nobody needs are deleted; with it, what lives in the others is written anew, which reads and writes that much.

    Checkpoints, restores and mounts go on meanwhile; only the deleting waits for checkpoints under way to end. It may
    be interrupted at any time.
    """
    places = ours.stores()
    if not dry_run:
        forget.let_go(ours.home)
        for place in places:
            inuse.let_go(place)
    with ours.reporter() as bars:
        reports = [_collect(place, threshold / 100 if repack else None, dry_run, bars) for place in places]
    found = rm.keys(reports)
    if as_json:
        output.write_json({
            "dry_run": dry_run, **found, "images_live": sum(one.live_images for one in reports),
            "stores": [str(place.path) for place in places],
        })  # fmt: skip
    else:
        output.write(_text(reports, dry_run))
    if found["damaged"]:
        raise errors.CorruptError(f"not repacked: {found['damaged'][0]}; see `blkckpt verify`")


def _collect(
    place: store.Store, threshold: float | None, dry_run: bool, bars: progress.Reporter
) -> collect.CollectReport:
    def advance(stage: str, done: int, total: int) -> None:
        if stage == collect.REPACK:
            bars.update("repack", done, total)

    return place.collect(dry_run=dry_run, repack=threshold, progress=advance)


def _text(reports: list[collect.CollectReport], dry_run: bool) -> str:
    found = rm.keys(reports)
    would = "would free" if dry_run else "freed"
    lines = [
        f"{would} {units.format_size(found['freed_bytes'])}: {found['images']} images, {found['packs']} packs of which "
        "nothing is needed"
    ]
    if found["repacked_packs"]:
        verb_ = "would be rewritten" if dry_run else "rewritten"
        lines.append(
            f"{found['repacked_packs']} packs {verb_}, {units.format_size(found['moved_bytes'])} of what lives in them"
        )
    dead = found["dead_bytes"]
    if dead and not dry_run:
        hint = "" if found["repacked_packs"] else "; `blkckpt gc --repack` frees most of it"
        lines.append(f"{units.format_size(found['live_bytes'])} live, {units.format_size(dead)} dead among it{hint}")
    return "\n".join(lines)

"""``blkckpt verify``: are the checkpoints whole?"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import describe, names, output, progress, session, verb
from blkckpt.store import check, evidence, store

SHOWN = 20
"""Problems that people are told; JSON has all that were kept."""


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt verify",
        "blkckpt verify web",
        "blkckpt verify web@before-upgrade --json | jq '.problems'",
        "blkckpt verify --boot web@latest                   does it come back to life?",
        "blkckpt verify --boot web@latest --deadline 300 --json | jq .boot.sign",
    ),
    keys=(
        "ok, checkpoints, images, retained (of the images, layers of a VM, without hashes), packs, chunks, bytes, "
        "seconds, problem_count, problems: [{where, what}], stores: [path]; with --boot: vm, checkpoint, "
        "boot: {alive, sign, seconds, when, message}, screenshot: null or {when, source, size}"
    ),
)
@verb.optional_target_argument
@click.option("--boot", is_flag=True, help="Resume the guest, apart from everything, and see whether it lives.")
@click.option(
    "--deadline", type=click.FloatRange(1, 86400), default=60.0, show_default=True, metavar="SECONDS",
    help="With --boot: how long to wait for a sign of life.",
)  # fmt: skip
@verb.json_option
@click.pass_obj
def command(ours: session.Session, target: names.Target | None, boot: bool, deadline: float, as_json: bool) -> None:
    """Read every byte that checkpoints need and compare it with its hash; without a VM, everything in the stores.

    Changes nothing. Exit code 6 when something is damaged, and each damaged chunk is named with the checkpoints that
    need it.

    With --boot the guest of one checkpoint is resumed, without network, on disks that are thrown away: it lives when
    its guest agent answers, its console says something, or its processors move. The outcome and a screenshot are kept
    with the checkpoint (`list`, `show`, screenshot.png in a mount). Exit code 6 when it does not live.
    """
    if boot:
        _boot(ours, target, deadline, as_json)
        return
    with ours.reporter() as bars:
        reports = [_verify(place, target, name, bars) for place, name in _places(ours, target)]
    places = [str(place.path) for place, _ in _places(ours, target)]
    if as_json:
        output.write_json({**_keys(reports), "stores": places})
    else:
        output.write(_text(reports))
    count = sum(one.problem_count for one in reports)
    if count:
        raise errors.CorruptError(f"{count} problem{'s' if count > 1 else ''} found in {', '.join(places)}")


def _boot(ours: session.Session, target: names.Target | None, deadline: float, as_json: bool) -> None:
    if target is None or (target.checkpoint is None and not target.is_newest):
        raise errors.InputError("--boot is for one checkpoint: blkckpt verify --boot VM@CKPT")
    found = ours.checkpoint(target)
    what = f"{found.manifest.vm}@{found.manifest.name}"
    module = importlib.import_module("blkckpt.restore.boot")
    with ours.reporter() as bars:
        seen = module.boot(ours.home, found.store, found.manifest, deadline=deadline, progress=bars.update)
    kept = found.store.add_evidence(found.manifest, boot=seen.boot, png=seen.png, source=evidence.AT_BOOT)
    if as_json:
        body = {"vm": found.manifest.vm, "checkpoint": found.manifest.name, **describe.sights(kept)}
        output.write_json(body)
    else:
        picture = "no screen" if seen.png is None else "a screenshot was kept"
        output.write(f"{what} lives: {describe.lives(seen.boot)}; {picture}")
    if not seen.boot.alive:
        raise errors.CorruptError(f"{what} does not live: {seen.boot.message}")


def _places(ours: session.Session, target: names.Target | None) -> list[tuple[store.Store, str | None]]:
    """The stores to look at, and the one checkpoint if it is one."""
    if target is None:
        return [(place, None) for place in ours.stores()]
    if target.checkpoint is not None:
        return [ours.locate(target)]
    found = [(place, None) for place in ours.stores(target.vm)]
    if not any(place.names(target.vm) for place, _ in found):
        ours.vm(target.vm)
    return list(found)


def _verify(place: store.Store, target: names.Target | None, name: str | None, bars: progress.Reporter) -> check.Report:
    def advance(done: int, total: int) -> None:
        bars.update("verify", done, total)

    return check.verify(place, target.vm if target else None, name, advance)


def _keys(reports: Sequence[check.Report]) -> dict[str, Any]:
    return {
        "ok": all(one.ok for one in reports),
        "checkpoints": sum(one.checkpoints for one in reports),
        "images": sum(one.images for one in reports),
        "retained": sum(one.retained for one in reports),
        "packs": sum(one.packs for one in reports),
        "chunks": sum(one.chunks for one in reports),
        "bytes": sum(one.bytes for one in reports),
        "seconds": sum(one.seconds for one in reports),
        "problem_count": sum(one.problem_count for one in reports),
        "problems": [{"where": each.where, "what": each.what} for one in reports for each in one.problems],
    }


def _text(reports: Sequence[check.Report]) -> str:
    found = _keys(reports)
    lines = [f"{each['where']}: {each['what']}" for each in found["problems"][:SHOWN]]
    if found["problem_count"] > SHOWN:
        lines.append(f"and {found['problem_count'] - len(lines)} more")
    rate = f", {units.format_size(found['bytes'] / found['seconds'])}/s" if found["seconds"] > 0 else ""
    lines.append(
        f"{'damaged' if lines else 'whole'}: {found['checkpoints']} checkpoints, {found['images']} images, "
        f"{found['chunks']} chunks; {units.format_size(found['bytes'])} read{rate}"
    )
    if found["retained"]:
        lines.append(
            f"{found['retained']} of the images are retained layers: they are there and their maps are whole, but what "
            "they hold can only be verified when they are flattened"
        )
    return "\n".join(lines)

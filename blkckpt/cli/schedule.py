"""``blkckpt schedule``: take checkpoints of a VM again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from blkckpt import errors, paths, units
from blkckpt.cli import output, session, verb
from blkckpt.daemon import schedule, service

KEYS = (
    "vm, schedule: null or {every, window, timeout (seconds), disk_only, guest_agent, qmp, rate, keep_memory, tags, "
    "keep: {rule: [text]}}"
)
_DEFAULT_TIMEOUT = "6h"


def _keep(rule: str, what: str) -> Callable[[Any], Any]:
    return click.option(f"--keep-{rule}", metavar="N", help=f"Keep {what}.")


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt schedule web --every 15m --keep-last 8 --keep-hourly 24 --keep-daily 7",
        "blkckpt schedule db --every 1h --window 10m --rate 50M",
        "blkckpt schedule files --every 5m --disk-only --keep-within 2d --tag files",
        "blkckpt schedule",
        "blkckpt schedule web --off",
    ),
    keys=f"{KEYS}; without VM schedules: [the same], damaged: {{vm: reason}}, agent (whether one runs)",
)
@click.argument("name", metavar="[VM]", required=False)
@click.option("--every", metavar="TIME", help="Time from one checkpoint to the next: 30s, 15m, 6h, 1d.")
@click.option(
    "--window", metavar="TIME", help="Look at the disks for up to so long after that, and take a quiet moment."
)
@click.option("--disk-only", is_flag=True, help="No memory, no hypervisor, as `checkpoint --disk-only`.")
@click.option(
    "--guest-agent", type=click.Path(path_type=Path), metavar="SOCKET",
    help="With --disk-only: freeze the guest's file systems through the QEMU guest agent.",
)  # fmt: skip
@click.option("--qmp", type=click.Path(path_type=Path), metavar="SOCKET", help="QEMU's QMP socket, if not our own.")
@click.option("--rate", metavar="SIZE", help="Copy at most so many bytes of the disks a second, for example 50M.")
@click.option(
    "--keep-memory", type=click.IntRange(0), default=2, show_default=True, metavar="N",
    help="Keep the unpacked memory of the N newest checkpoints.",
)  # fmt: skip
@click.option(
    "--timeout", default=_DEFAULT_TIMEOUT, show_default=True, metavar="TIME", help="Give one up that takes longer."
)
@click.option(
    "--tag", "tags", multiple=True, default=(schedule.TAG,), show_default=True, metavar="TAG",
    help="What its checkpoints are tagged with. The keep rules look at checkpoints with all of these tags only.",
)  # fmt: skip
@_keep("last", "the N newest")
@_keep("hourly", "the newest of each of the last N hours that have any")
@_keep("daily", "the newest of each of the last N days that have any")
@_keep("weekly", "the newest of each of the last N weeks that have any")
@_keep("monthly", "the newest of each of the last N months that have any")
@_keep("yearly", "the newest of each of the last N years that have any")
@click.option("--keep-within", metavar="SPAN", help="Keep what is so much older than the newest at most: 2w, 36h.")
@click.option("--keep-tag", multiple=True, metavar="TAG[,TAG…]", help="Keep what has all of these; repeat for or.")
@click.option("--off", is_flag=True, help="No more scheduled checkpoints; those there are stay.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session, /, name: str | None, every: str | None, off: bool, as_json: bool, **given: Any
) -> None:
    """Take checkpoints of a VM regularly, and keep some of them: set, show or end its schedule.

    `blkckpt agent` does the work; the first checkpoint is taken at once. --every replaces the whole schedule. Times
    that were missed, because the VM or the agent did not run, are made good by one checkpoint. One that fails is
    tried again, after ever longer pauses. After each checkpoint the rules remove what none of them keeps, as `blkckpt
    prune VM` does, but never a checkpoint without the schedule's tags; without rules nothing is removed.
    """
    if name is None:
        if every is not None or off:
            raise errors.InputError("name the VM whose schedule is to be changed")
        _list(ours, as_json)
        return
    vm, _ = ours.vm(name)
    if off and every is not None:
        raise errors.InputError("--off and --every exclude each other")
    if off:
        schedule.remove(vm)
        _tell(ours)
    elif every is not None:
        schedule.save(vm, _made(vm, every, given))
        _tell(ours)
    found = schedule.load(vm)
    if as_json:
        output.write_json(keys(name, found))
    else:
        output.write(f"{name}: {_sentence(found)}")
        if every is not None and not service.runs(ours.home) and not ours.quiet:
            click.echo("blkckpt: no agent runs yet; start it: blkckpt agent run (or its systemd unit)", err=True)


def _made(vm: paths.VmPaths, every: str, given: Mapping[str, Any]) -> schedule.Schedule:
    interval, rate = _ns(every), given["rate"]
    counts = [(rule, given[f"keep_{rule}"]) for rule in (*schedule.COUNTS, schedule.WITHIN)]
    keep = [(rule, text) for rule, text in counts if text is not None]
    return schedule.Schedule(
        every_ns=interval,
        anchor_ns=_anchor(vm, interval),
        window_ns=0 if given["window"] is None else _ns(given["window"]),
        timeout_ns=_ns(given["timeout"]),
        disk_only=given["disk_only"],
        guest_agent=_path(given["guest_agent"]),
        qmp=_path(given["qmp"]),
        rate=None if rate is None else units.parse_size(rate),
        keep_memory=given["keep_memory"],
        tags=tuple(sorted(set(given["tags"]))),
        keep=(*keep, *((schedule.KEEP_TAG, text) for text in given["keep_tag"])),
    )


def _anchor(vm: paths.VmPaths, interval: int) -> int:
    """The times stay as they were unless the interval changes."""
    try:
        before = schedule.load(vm)
    except errors.CorruptError:
        before = None
    return before.anchor_ns if before is not None and before.every_ns == interval else time.time_ns()


def _ns(text: str) -> int:
    return round(units.parse_duration(text) * schedule.SECOND)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _tell(ours: session.Session) -> None:
    """Have the agent read it now; it would by itself in a while."""
    try:
        if service.runs(ours.home):
            service.ask(ours.home, "reload")
    except errors.BlkckptError as error:
        click.echo(f"blkckpt: the agent could not be told, and will see it by itself: {error}", err=True)


def _list(ours: session.Session, as_json: bool) -> None:
    found, damaged = _read(ours)
    if as_json:
        schedules = [keys(name, one) for name, one in found]
        output.write_json({"schedules": schedules, "damaged": damaged, "agent": service.runs(ours.home)})
    elif found:
        rows = [(name, _interval(one), _window(one), _kind(one), _rules(one)) for name, one in found]
        output.write(output.table(("VM", "EVERY", "WINDOW", "KIND", "KEEPS"), rows))
    else:
        output.write("no VM has a schedule; set one: blkckpt schedule VM --every 15m")
    if damaged:
        name, reason = next(iter(damaged.items()))
        raise errors.CorruptError(f"schedule of {name}: {reason} ({len(damaged)} in all)")


def _read(ours: session.Session) -> tuple[Sequence[tuple[str, schedule.Schedule]], Mapping[str, str]]:
    found, damaged = [], {}
    for name in ours.home.vm_names():
        try:
            one = schedule.load(ours.home.vm(name))
        except errors.CorruptError as error:
            damaged[name] = str(error)
            continue
        if one is not None:
            found.append((name, one))
    return found, damaged


def keys(name: str, one: schedule.Schedule | None) -> dict[str, Any]:
    """The JSON of a VM's schedule."""
    if one is None:
        return {"vm": name, "schedule": None}
    keep: dict[str, list[str]] = {}
    for rule, text in one.keep:
        keep.setdefault(rule, []).append(text)
    same = ("disk_only", "guest_agent", "qmp", "rate", "keep_memory")
    times = {name: getattr(one, f"{name}_ns") / schedule.SECOND for name in ("every", "window", "timeout")}
    body = {**times, **{key: getattr(one, key) for key in same}, "tags": list(one.tags), "keep": keep}
    return {"vm": name, "schedule": body}


def _sentence(one: schedule.Schedule | None) -> str:
    if one is None:
        return "no schedule"
    window = f", at a quiet moment within {_window(one)}" if one.window_ns else ""
    return f"a checkpoint ({_kind(one)}) every {_interval(one)}{window}; keeps {_rules(one)}"


def _interval(one: schedule.Schedule) -> str:
    return units.format_duration(one.every_ns / schedule.SECOND)


def _window(one: schedule.Schedule) -> str:
    return units.format_duration(one.window_ns / schedule.SECOND) if one.window_ns else "-"


def _kind(one: schedule.Schedule) -> str:
    if not one.disk_only:
        return "machine"
    return "disks, frozen by the guest agent" if one.guest_agent else "disks"


def _rules(one: schedule.Schedule) -> str:
    return ", ".join(f"{rule} {text}" for rule, text in one.keep) or "everything"

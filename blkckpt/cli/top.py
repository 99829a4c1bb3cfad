"""``blkckpt top``: watch the disks work."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from blkckpt import units
from blkckpt.cli import live, output, session, status, verb

_RATES = {
    "reads": "reads_per_second",
    "writes": "writes_per_second",
    "flushes": "flushes_per_second",
    "read_bytes": "read_bytes_per_second",
    "written_bytes": "written_bytes_per_second",
}
"""Counters of ``status`` and what their growth is called."""

_STATE = ("name", "size", "depth", "epoch", "in_flight", "overlay_bytes", "changed_bytes", "filled", "error")
_HEADERS = ("VM", "DISK", "DISKS ARE", "READ/s", "WRITE/s", "IN", "OUT", "FLIGHT", "DEPTH", "EPOCH", "OVERLAY")


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt top",
        "blkckpt top web --interval 500ms",
        "blkckpt top --once",
        "blkckpt top web --once --json | jq '.vms[0].disks[0].writes_per_second'",
    ),
    keys=(
        "seconds (between the two looks), vms: [{vm, state, phase, checkpoints: [{name, stage, copied}], job: null or "
        f"{{kind, state, done, total}}, warning, disks: [{{{', '.join(_STATE)}, {', '.join(_RATES.values())} (null: "
        "the server was started meanwhile)}]}]"
    ),
)
@click.argument("name", metavar="[VM]", required=False)
@click.option("--once", is_flag=True, help="Look twice, an interval apart, print the difference, and end.")
@live.interval_option
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, once: bool, interval: str, as_json: bool) -> None:
    """Show live what the disks of running VMs do, and how far copy, commit and fill are; until Ctrl-C.

    IN is what guests write, OUT what they read, a second. FLIGHT are requests being served, DEPTH the layers of a
    disk (1: its base alone), EPOCH how often a new view of its layers was put in force. --json implies --once.
    """
    if name is not None:
        ours.vm(name)
    wait = live.seconds(interval)
    watch = _Watch(ours, name)
    if not (once or as_json):
        live.show(lambda: _text(watch.look()), wait)
        return
    threading.Event().wait(wait)
    found = watch.look()
    if as_json:
        output.write_json(found)
    else:
        output.write(_text(found))


class _Watch:
    """Each look is compared with the one before."""

    def __init__(self, ours: session.Session, name: str | None) -> None:
        self._ours, self._name = ours, name
        self._at, self._before = time.monotonic(), status.look(ours, name)

    def look(self) -> dict[str, Any]:
        """The JSON of ``top``."""
        at, now = time.monotonic(), status.look(self._ours, self._name)
        found = compare(self._before, now, at - self._at)
        self._at, self._before = at, now
        return found


def compare(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What happened between two looks of ``status``.  Pure."""
    known = {one["vm"]: one for one in before}
    same = ("vm", "state", "phase", "checkpoints", "job", "warning")
    vms = []
    for one in now:
        old = known.get(one["vm"], {})
        counted = {disk["name"]: disk for disk in old.get("disks", ())} if old.get("server") == one["server"] else {}
        disks = [{**{key: disk.get(key) for key in _STATE}, **_rates(counted, disk, seconds)} for disk in one["disks"]]
        vms.append({**{key: one[key] for key in same}, "disks": disks})
    return {"seconds": seconds, "vms": vms}


def _rates(before: Mapping[str, Mapping[str, Any]], disk: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
    old = before.get(disk["name"])
    if old is None or seconds <= 0:
        return dict.fromkeys(_RATES.values())
    return {name: max((disk[key] or 0) - (old[key] or 0), 0) / seconds for key, name in _RATES.items()}


def _text(found: Mapping[str, Any]) -> str:
    none: Mapping[str, Any] = {}
    rows = [_row(one, disk) for one in found["vms"] for disk in one["disks"] or [none]]
    lines = [output.table(_HEADERS, rows, right=_HEADERS[3:])]
    for one in found["vms"]:
        doing = status.under_way(one)
        if doing != "-" or one["warning"]:
            names = ", ".join(each["name"] for each in one["checkpoints"])
            lines.append(f"{one['vm']}{f'@{names}' if names else ''}: {doing}  {one['warning'] or ''}".rstrip())
    return "\n".join(lines)


def _row(one: Mapping[str, Any], disk: Mapping[str, Any]) -> tuple[object, ...]:
    if not disk:
        return (one["vm"], "-", one["state"], *["-"] * (len(_HEADERS) - 3))

    def count(key: str) -> str:
        return "-" if disk[key] is None else f"{disk[key]:.0f}"

    def size(key: str) -> str:
        return "-" if disk[key] is None else units.format_size(disk[key])

    return (
        one["vm"],
        disk["name"],
        disk["error"] or one["phase"],
        count("reads_per_second"),
        count("writes_per_second"),
        size("written_bytes_per_second"),
        size("read_bytes_per_second"),
        count("in_flight"),
        count("depth"),
        count("epoch"),
        size("overlay_bytes"),
    )

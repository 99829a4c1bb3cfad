"""``blkckpt status``: what runs and what is under way."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import Any

import click

from blkckpt import errors, paths, units
from blkckpt.agent import rundir
from blkckpt.cli import live, output, run, session, verb
from blkckpt.control import client
from blkckpt.view import records

KEYS = (
    "vms: [{vm, state: running|serving|stopped, supervisor, server, machine, console, log, phase: "
    "rest|prepared|armed|switched|committing, checkpoint (the newest under way), "
    "checkpoints (all of them, oldest first: name, stage, copied), job: null or {kind, state, done, total}, warning, "
    "disks: [{name, path, size, uri, retained: [CKPT] (whose layers it keeps), overlay_bytes, depth, epoch, in_flight, "
    "filled, changed_bytes, reads, writes, read_bytes, written_bytes, fast_requests, flushes, error}]}]; "
    "null where a VM that does not run has no answer; "
    "fast_requests: of reads and writes, those that the C fast path served, null if it is not loaded"
)


_SAME = (
    "name", "path", "size", "filled", "changed_bytes", "reads", "writes", "read_bytes", "written_bytes", "epoch",
    "in_flight",
)  # fmt: skip


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt status",
        "blkckpt status web",
        "blkckpt status web --watch",
        "blkckpt status web --json | jq '.vms[0].phase'",
    ),
    keys=KEYS,
)
@click.argument("name", metavar="[VM]", required=False)
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@live.interval_option
@verb.json_option
@click.pass_obj
def command(ours: session.Session, name: str | None, watch: bool, interval: str, as_json: bool) -> None:
    """Show what runs, whether a checkpoint is under way, and how far it is; with a VM, its disks too."""
    if name is not None:
        ours.vm(name)
    if watch:
        if as_json:
            raise errors.InputError("--watch is for people; for a program call status --json as often as you like")
        live.show(lambda: _text(look(ours, name), name), live.seconds(interval))
        return
    found = look(ours, name)
    if as_json:
        output.write_json({"vms": found})
    else:
        output.write(_text(found, name))


def look(ours: session.Session, name: str | None) -> list[dict[str, Any]]:
    """What ``--json`` says of VM *name*, or of all."""
    return [_look(ours.home.vm(one)) for one in ([name] if name else ours.home.vm_names())]


def _text(found: list[dict[str, Any]], name: str | None) -> str:
    text = _overview(found)
    if name is not None and found[0]["disks"]:
        text += f"\n\n{_disks(found[0]['disks'])}"
    return text


def _look(vm: paths.VmPaths) -> dict[str, Any]:
    running = rundir.find(vm)
    if running is None:
        empty = dict.fromkeys(("supervisor", "server", "machine"))
        return {"vm": vm.name, "state": "stopped", **empty, **_files(vm), **_group(vm, {})}
    state = "running" if running.machine else "serving"
    return {**run.keys(vm, running), "state": state, **_group(vm, _ask(vm))}


def _files(vm: paths.VmPaths) -> dict[str, str]:
    return {"console": str(run.console(vm)), "log": str(vm.log / "nbdkit.log")}


def _ask(vm: paths.VmPaths) -> Mapping[str, Any]:
    """What the disk server says; nothing while it is being started again."""
    try:
        with client.Client.connect(vm.control_socket, name="blkckpt status") as peer:
            return peer.status()
    except (errors.StateError, client.GoneError):
        return {"warning": "the disk server is being started"}


def _group(vm: paths.VmPaths, status: Mapping[str, Any]) -> dict[str, Any]:
    job = status.get("job")
    said = (status.get("warning") or status.get("violation"), _memory(vm, running=bool(status)))
    return {
        "phase": status.get("state"),
        "checkpoint": status.get("checkpoint"),
        "checkpoints": [
            {"name": one["checkpoint"], "stage": one["stage"], "copied": one["copied"]}
            for one in status.get("rounds", ())
        ],
        "job": None if not job else {key: job.get(key) for key in ("kind", "state", "done", "total")},
        "warning": "; ".join(filter(None, said)) or None,
        "disks": [_disk(vm, disk) for disk in status.get("disks", ())],
    }


def _memory(vm: paths.VmPaths, *, running: bool) -> str | None:
    """What is to be said of a machine that reads its memory from a mount."""
    record = records.memory_of(paths.home(vm.root.parent.parent), vm.name) if running else None
    if record is None or record.prefetched:
        return None
    if not record.alive:
        return "the process it reads its memory from was killed: its QEMU will die of that"
    return f"its memory is read by pid {record.process.pid}, and QEMU dies with it until `blkckpt prefetch {vm.name}`"


def _disk(vm: paths.VmPaths, disk: Mapping[str, Any]) -> dict[str, Any]:
    socket = urllib.parse.quote(str(vm.nbd_socket))
    overlays = disk.get("overlays", ())
    return {
        **{key: disk.get(key) for key in _SAME},
        "uri": f"nbd+unix:///{disk.get('name')}?socket={socket}",
        "retained": [overlay["retained"] for overlay in reversed(overlays) if overlay.get("retained")],
        "overlay_bytes": sum(overlay.get("bytes", 0) for overlay in overlays),
        "depth": 1 + len(overlays),
        "fast_requests": disk.get("fast_requests"),
        "flushes": disk.get("flushes"),
        "error": disk.get("error"),
    }


def _overview(found: list[dict[str, Any]]) -> str:
    rows = [
        (
            one["vm"],
            one["state"],
            one["phase"] or "-",
            ", ".join(each["name"] for each in one["checkpoints"]) or "-",
            under_way(one),
            "; ".join(filter(None, (one["warning"], _retained(one)))),
        )
        for one in found
    ]
    return output.table(("VM", "STATE", "DISKS ARE", "CHECKPOINT", "UNDER WAY", "NOTE"), rows)


def _retained(one: Mapping[str, Any]) -> str | None:
    """Which checkpoints the disks keep."""
    kept = list(dict.fromkeys(name for disk in one["disks"] for name in disk["retained"]))
    return f"its disks keep {', '.join(kept)}" if kept else None


def under_way(one: Mapping[str, Any]) -> str:
    """The job, else the background fill of a restored VM's disks."""
    job = one["job"]
    if job is not None and job["state"] == "running":
        return _amount(job["kind"], job["done"], job["total"])
    filling = [disk for disk in one["disks"] if disk["filled"] is not None]
    if filling:
        return _amount("fill", sum(disk["filled"] for disk in filling), sum(disk["size"] for disk in filling))
    return "-"


def _amount(what: str, done: int, total: int) -> str:
    share = f" ({100 * done // total} %)" if total else ""
    return f"{what} {units.format_size(done)}{share}"


def _disks(disks: list[dict[str, Any]]) -> str:
    rows = [
        (
            disk["name"],
            units.format_size(disk["size"]),
            units.format_size(disk["overlay_bytes"]),
            "-" if disk["filled"] is None else units.format_size(disk["filled"]),
            units.format_size(disk["read_bytes"] or 0),
            units.format_size(disk["written_bytes"] or 0),
            _fast(disk),
            disk["error"] or disk["path"],
        )
        for disk in disks
    ]
    headers = ("DISK", "SIZE", "IN OVERLAYS", "FILLED", "READ", "WRITTEN", "FAST", "PATH")
    return output.table(headers, rows, right=headers[1:7])


def _fast(disk: Mapping[str, Any]) -> str:
    """The share of requests that the fast path served."""
    if disk["fast_requests"] is None:
        return "off"
    every = (disk["reads"] or 0) + (disk["writes"] or 0)
    return f"{100 * disk['fast_requests'] // every} %" if every else "on"

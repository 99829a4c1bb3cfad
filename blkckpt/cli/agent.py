"""``blkckpt agent``: the daemon that works off the schedules of this host."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from blkckpt import durable, errors, log, units
from blkckpt.cli import live, output, session, verb
from blkckpt.control import client
from blkckpt.daemon import packaged, service

_SHOWN = (
    "vm, doing, every, next (null: now), failures (in a row), running (null or a process id), problem: null or {at, "
    "kind, text}, success: null or {at, name, seconds, stopped_ms, added_bytes}"
)


@click.group(invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Take the checkpoints that schedules ask for: one agent for each home. Without a verb: `agent run`."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(run)


@command.command(
    cls=verb.Verb,
    examples=(
        "blkckpt agent run",
        "blkckpt agent run --metrics-port 9723 --log-format json",
    ),
)
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), metavar="PORT",
    help="Serve metrics on this port of 127.0.0.1 too (0: any). Every user of this machine can read it then.",
)  # fmt: skip
@click.option(
    "--at-once", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N",
    help="Take at most so many checkpoints at a time.",
)  # fmt: skip
@click.option(
    "--grace", default="20s", show_default=True, metavar="TIME",
    help="When told to stop, let a checkpoint under way go on for so long before it is taken back.",
)  # fmt: skip
@click.option(
    "--survey", default="1h", show_default=True, metavar="TIME", help="Time between two measurements of the stores."
)
@click.option(
    "--log-format", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True,
    help="auto: text on a terminal, else a JSON object a line.",
)  # fmt: skip
@click.pass_context
def run(ctx: click.Context, metrics_port: int | None, at_once: int, grace: str, survey: str, log_format: str) -> None:
    """Work off the schedules, in the foreground, until SIGTERM or Ctrl-C; SIGHUP reads them again.

    Checkpoints are processes of their own: an agent that is killed loses none, the next one takes over what is under
    way. Metrics (OpenMetrics) are on a unix socket that `blkckpt agent status` names. Under systemd it says when it
    is ready and that it lives (Type=notify, WatchdogSec).
    """
    ours: session.Session = ctx.obj
    verbose = logging.getLogger().level <= logging.DEBUG
    log.setup(logging.DEBUG if verbose else logging.INFO, as_json={"json": True, "text": False}.get(log_format))
    host: Any = importlib.import_module("blkckpt.daemon.host")  # with prometheus_client, which nothing else needs
    settings = host.Settings(metrics_port, at_once, units.parse_duration(grace), max(1.0, units.parse_duration(survey)))
    with host.Agent(ours.home, settings) as agent:
        agent.loop(lambda: _hint(ours))


def _hint(ours: session.Session) -> None:
    if not ours.quiet and sys.stderr.isatty():
        click.echo("blkckpt: the agent runs; in another terminal: blkckpt agent status --watch", err=True)


@command.command(
    cls=verb.Verb,
    examples=(
        "blkckpt agent status",
        "blkckpt agent status --watch",
        "blkckpt agent status --json | jq '.schedules[] | select(.failures > 0) | .problem.text'",
        "curl --unix-socket \"$(blkckpt agent status --json | jq -r '.metrics[0]')\" http://agent/metrics",
    ),
    keys=(
        "running, pid, started, metrics: [a socket's path, then a URL], schedules: "
        f"[{{{_SHOWN}}}], damaged: {{vm: reason}}"
    ),
)
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@live.interval_option
@verb.json_option
@click.pass_obj
def status(ours: session.Session, watch: bool, interval: str, as_json: bool) -> None:
    """Show each schedule's next and last checkpoint, and why the last one failed if it did."""
    if watch:
        if as_json:
            raise errors.InputError(
                "--watch is for people; for a program call agent status --json as often as you like"
            )
        live.show(lambda: _text(look(ours)), live.seconds(interval))
        return
    found = look(ours)
    if as_json:
        output.write_json(found)
    else:
        output.write(_text(found))


def look(ours: session.Session) -> dict[str, Any]:
    """The JSON of ``agent status``: the agent's word, or the files' where there is no agent."""
    said = _ask(ours)
    if said is not None:
        head = {"running": True, "pid": said["pid"], "started": output.timestamp(said["started_ns"])}
        shown, damaged = said["schedules"], said["damaged"]
        metrics = said["metrics"]
    else:
        head = {"running": False, "pid": None, "started": None}
        recorded, damaged = service.recorded(ours.home)
        shown, metrics = [asdict(one) for one in recorded], []
    return {**head, "metrics": metrics, "schedules": [_keys(one) for one in shown], "damaged": dict(damaged)}


def _ask(ours: session.Session) -> Mapping[str, Any] | None:
    """The agent's word; None when there is none, or while it begins or ends."""
    try:
        return service.ask(ours.home, "status")
    except (errors.StateError, client.GoneError):
        return None


def _keys(one: Mapping[str, Any]) -> dict[str, Any]:
    problem, success = one["problem"], one["success"]
    return {
        **{key: one[key] for key in ("vm", "doing", "failures", "running")},
        "every": one["every_ns"] / 10**9,
        "next": None if one["next_ns"] <= time.time_ns() else output.timestamp(one["next_ns"]),
        "problem": None if problem is None else _dated(problem),
        "success": None if success is None else _dated(success),
    }


def _dated(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"at": output.timestamp(body["at_ns"]), **{key: value for key, value in body.items() if key != "at_ns"}}


def _text(found: Mapping[str, Any]) -> str:
    head = f"the agent runs (process {found['pid']})" if found["running"] else "no agent runs: blkckpt agent run"
    lines = [head, *(f"metrics: {address}" for address in found["metrics"])]
    if found["schedules"]:
        headers = ("VM", "EVERY", "NEXT", "NEWEST", "STOPPED", "ADDED", "FAILURES", "DOES")
        rows = [_row(one) for one in found["schedules"]]
        lines += ["", output.table(headers, rows, right=("FAILURES",))]
    else:
        lines.append("no VM has a schedule; set one: blkckpt schedule VM --every 15m")
    lines += [
        f"{one['vm']}: failed {one['problem']['at']}: {output.printable(one['problem']['text'])}"
        for one in found["schedules"]
        if one["failures"]
    ]
    return "\n".join([*lines, *(f"{vm}: {output.printable(reason)}" for vm, reason in found["damaged"].items())])


def _row(one: Mapping[str, Any]) -> Sequence[object]:
    success = one["success"]
    stopped = success and success["stopped_ms"]
    return (
        one["vm"],
        units.format_duration(one["every"]),
        one["next"] or "now",
        success["name"] if success else "-",
        "-" if stopped is None else units.format_duration(stopped / 1000),
        units.format_size(success["added_bytes"]) if success else "-",
        one["failures"],
        one["doing"] or "-",
    )


@command.command(
    cls=verb.Verb,
    examples=("blkckpt agent now web", "blkckpt agent now web --json"),
    keys="vm, asked",
)
@verb.vm_argument
@verb.json_option
@click.pass_obj
def now(ours: session.Session, name: str, as_json: bool) -> None:
    """Have a scheduled checkpoint of a VM taken at once, as its schedule says; also ends the wait for a retry."""
    ours.vm(name)
    service.ask(ours.home, "run-now", {"vm": name})
    _say(as_json, {"vm": name, "asked": True}, f"asked for; watch it: blkckpt status {name} --watch")


@command.command(
    cls=verb.Verb,
    examples=("blkckpt agent reload", "blkckpt agent reload --json"),
    keys="schedules (how many there are now)",
)
@verb.json_option
@click.pass_obj
def reload(ours: session.Session, as_json: bool) -> None:
    """Have the agent read the schedules again; `blkckpt schedule` does that by itself."""
    said = service.ask(ours.home, "reload")
    _say(as_json, {"schedules": said["schedules"]}, f"{said['schedules']} schedules")


@command.command(
    cls=verb.Verb,
    examples=("blkckpt agent stop", "blkckpt agent stop --json"),
    keys="stopped (false: none ran)",
)
@verb.json_option
@click.pass_obj
def stop(ours: session.Session, as_json: bool) -> None:
    """Stop the agent as SIGTERM does: it lets what is under way finish, or takes it back."""
    ran = service.runs(ours.home)
    if ran:
        service.ask(ours.home, "shutdown")
    _say(as_json, {"stopped": ran}, "the agent stops" if ran else "no agent runs")


@command.command(
    cls=verb.Verb,
    examples=(
        "blkckpt agent files --directory /etc/systemd/system --unit",
        "blkckpt agent files --directory ~/.config/systemd/user --unit --user",
        "blkckpt agent files --directory .",
    ),
    keys="files: [path]",
)
@click.option(
    "--directory",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Made if need be.",
)
@click.option("--unit", is_flag=True, help="The systemd unit only.")
@click.option("--user", is_flag=True, help="The unit for a user's own service manager.")
@verb.json_option
@click.pass_obj
def files(ours: session.Session, directory: Path, unit: bool, user: bool, as_json: bool) -> None:
    """Write what comes with the agent: a systemd unit, a Grafana dashboard, alert rules for Prometheus."""
    written = {packaged.SYSTEM: packaged.unit(packaged.USER if user else packaged.SYSTEM)}
    if not unit:
        written |= {name: packaged.read(name) for name in (packaged.DASHBOARD, packaged.ALERTS)}
    directory.mkdir(parents=True, exist_ok=True)
    found = [directory / name for name in written]
    for path, text in zip(found, written.values(), strict=True):
        durable.write_file(path, text.encode(), 0o644)
    _say(as_json, {"files": [str(path) for path in found]}, "\n".join(map(str, found)))


def _say(as_json: bool, body: Mapping[str, Any], text: str) -> None:
    if as_json:
        output.write_json(body)
    else:
        output.write(text)

"""``blkckpt checkpoint``: take a checkpoint of a running VM.

The agent, and with it asyncio and QMP, is imported when its children have been started, which have as much to import:
0.2 s each.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from blkckpt import errors, paths, units
from blkckpt.agent import early, rundir
from blkckpt.agent import options as agent
from blkckpt.cli import describe, names, output, session, verb
from blkckpt.store import evidence, labels, manifest

if TYPE_CHECKING:
    from blkckpt.store import store

KEPT = 2
"""Memory images kept by default: restoring the newest two needs no unpacking."""


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt checkpoint web",
        "blkckpt checkpoint web --name before-upgrade --note 'kernel 6.1.90'",
        "blkckpt checkpoint web db --name nightly     both, stopped at the same time: a consistency group",
        "blkckpt checkpoint web --retain               the disks are not copied: fast, and made so later by flatten",
        "blkckpt checkpoint web --tag nightly --pin",
        "blkckpt checkpoint db --disk-only --guest-agent /run/db-qga.sock",
        "blkckpt checkpoint web --rate 50M --json | jq '.stopped_ms, .added_bytes'",
    ),
    keys=(
        f"{describe.KEYS}, stopped_ms (null: the guest was not stopped), seconds (all of it), "
        "added_bytes (what the store grew by); for several VMs checkpoints: [the same], spread_ms (between the stops "
        "of the first and the last guest)"
    ),
)
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
@click.option("--name", "checkpoint", metavar="CKPT", help="Its name [default: the time, UTC].")
@click.option("--note", "notes", multiple=True, metavar="TEXT", help="Kept with it and shown by list. Repeat for more.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag, for list and prune. Repeat for more.")
@click.option("--pin", "pinned", is_flag=True, help="Keep it from rm and prune until it is unpinned.")
@click.option(
    "--pause",
    type=click.Choice([agent.AUTO, agent.BARRIER, agent.EXPLICIT]),
    default=agent.AUTO,
    show_default=True,
    help="barrier: the disks switch inside QEMU's own stop of a few milliseconds; explicit: the guest is stopped "
    "while memory is set up or, where QEMU cannot do better, saved; auto: barrier where it works.",
)
@click.option("--disk-only", is_flag=True, help="No memory, no hypervisor: as if the power was cut (crash-consistent).")
@click.option(
    "--guest-agent",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="With --disk-only: freeze the guest's file systems for it, through the QEMU guest agent.",
)
@click.option("--screenshot", is_flag=True, help="Keep a picture of the guest's screen, taken just after it goes on.")
@click.option(
    "--retain", is_flag=True,
    help="Copy no disk: its frozen layers are kept as the checkpoint, and the VM goes on in a layer above them, until "
    "`flatten` or `commit`.",
)  # fmt: skip
@click.option("--qmp", type=click.Path(path_type=Path), metavar="SOCKET", help="QEMU's QMP socket, if not our own.")
@click.option(
    "--keep-memory", type=click.IntRange(0), default=KEPT, show_default=True, metavar="N",
    help="Keep the unpacked memory of the N newest checkpoints, for the quickest restore; 0 keeps none.",
)  # fmt: skip
@click.option(
    "--wait", type=click.FloatRange(0, 86400), default=0.0, show_default=True, metavar="SECONDS",
    help="Wait so long for another checkpoint of the VM whose memory is still being saved.",
)  # fmt: skip
@click.option("--rate", metavar="SIZE", help="Copy at most so many bytes of the disks a second, for example 50M.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    vms: tuple[str, ...],
    checkpoint: str | None,
    notes: tuple[str, ...],
    tags: tuple[str, ...],
    pinned: bool,
    pause: str,
    disk_only: bool,
    guest_agent: Path | None,
    screenshot: bool,
    retain: bool,
    qmp: Path | None,
    keep_memory: int,
    rate: str | None,
    wait: float,
    as_json: bool,
) -> None:
    """Take a checkpoint of a running VM: disks, memory and devices, all of one instant, while it runs on.

    Of several VMs, all of them are stopped at the same time, for as long as the slowest needs to get ready: what one
    has acknowledged to another is in that other's checkpoint. Interrupted, or failed at any point, it is taken back
    and nothing is left.
    """
    members = [ours.vm(name) for name in dict.fromkeys(vms)]
    options = agent.CheckpointOptions(
        name=None if checkpoint is None else names.check_new_checkpoint(checkpoint),
        pause=pause,
        disks_only=disk_only,
        guest_agent=None if guest_agent is None else guest_agent.absolute(),
        rate=None if rate is None else units.parse_size(rate),
        keep_memory=keep_memory,
        qmp=None if qmp is None else qmp.absolute(),
        notes=notes,
        wait=wait,
        labels=labels.Labels(pinned=pinned).tag(tags),
        screenshot=screenshot,
        retain=retain,
    )
    _check_choices(options, len(members))
    for vm, _ in members:
        _check_running(vm, options)
    with contextlib.ExitStack() as stack:
        alone = members[0][0] if len(members) == 1 and not disk_only else None
        started = stack.enter_context(_early_children(alone, options))
        runner = _runner()
        places = [stack.enter_context(ours.store_for_writing(vm.name)) for vm, _ in members]
        before = [stored(place) for place in places]
        with ours.reporter() as bars:
            if len(members) == 1:
                taken = [runner.take(*members[0], places[0], options, bars.update, started=started)]
            else:
                group = [(vm, wanted, place) for (vm, wanted), place in zip(members, places, strict=True)]
                taken = runner.take_group(group, options, bars.update)
        added = [stored(place) - size for place, size in zip(places, before, strict=True)]
        seen = [place.evidence(one) for place, one in zip(places, taken, strict=True)]
        if screenshot and not as_json and not all(one.screen for one in seen):
            click.echo("blkckpt: no screen: no picture was taken", err=True)
        _report(taken, options.labels, seen, added, as_json)


@contextlib.contextmanager
def _early_children(vm: paths.VmPaths | None, options: agent.CheckpointOptions) -> Iterator[early.Children | None]:
    """The children of a checkpoint of *vm*, which start while we import; ended with the block if they do nothing."""
    if vm is None:
        yield None
        return
    started = early.Children(str(options.qmp or vm.qmp_socket))
    try:
        yield started
    finally:
        started.discard()


def _runner() -> ModuleType:
    return importlib.import_module("blkckpt.agent.runner")


def _check_running(vm: paths.VmPaths, options: agent.CheckpointOptions) -> None:
    running = rundir.find(vm)
    if running is None:
        raise errors.StateError(
            f"VM {vm.name} does not run; start it first: blkckpt run {vm.name} -- qemu-system-x86_64 …"
        )
    if running.machine is None and options.qmp is None and not options.disks_only:
        raise errors.StateError(
            f"VM {vm.name} is served without a QEMU of ours: give QEMU's own socket with --qmp, or take --disk-only"
        )


def _check_choices(options: agent.CheckpointOptions, count: int) -> None:
    if count > 1 and (options.disks_only or options.qmp or options.pause == agent.BARRIER):
        raise errors.InputError(
            "a checkpoint of several VMs stops all of them at once, through the QEMU that blkckpt runs: "
            "leave out --disk-only, --qmp and --pause barrier"
        )
    if options.screenshot and options.disks_only:
        raise errors.InputError("--screenshot needs the hypervisor; leave out --disk-only")
    if options.guest_agent and not options.disks_only:
        raise errors.InputError("--guest-agent goes with --disk-only: a checkpoint with memory needs no freezing")
    if options.retain and options.rate is not None:
        raise errors.InputError("--rate is for copying the disks, and --retain copies none; leave one out")
    if options.rate is not None and options.rate < 1:
        raise errors.InputError("--rate must be at least one byte a second")


def stored(place: store.Store) -> int:
    """The bytes of the packs of *place*."""
    return sum(size for _, size in place.packs.ids())


def _report(
    taken: Sequence[manifest.Manifest],
    marked: labels.Labels,
    seen: Sequence[evidence.Evidence],
    added: Sequence[int],
    as_json: bool,
) -> None:
    """What was taken.  Of several VMs in one store *added* is what all of them brought."""
    group = taken[0].group
    if not as_json:
        for one, size in zip(taken, added, strict=True):
            output.write(_sentence(one, size))
        if group is not None:
            output.write(f"all of them stood still at one time, stopped within {units.format_duration(group.spread)}")
        return
    figures = [
        {**describe.keys(one, marked, sight), **_figures(one, size)}
        for one, sight, size in zip(taken, seen, added, strict=True)
    ]
    if group is None:
        output.write_json(figures[0])
    else:
        output.write_json({"checkpoints": figures, "spread_ms": group.spread * 1000})


def _figures(taken: manifest.Manifest, added: int) -> dict[str, Any]:
    stopped = taken.timings.get("stopped")
    return {
        "stopped_ms": None if stopped is None else stopped * 1000,
        "seconds": taken.timings.get("total", 0.0),
        "added_bytes": added,
    }


def _sentence(taken: manifest.Manifest, added: int) -> str:
    stopped = taken.timings.get("stopped")
    pause = (
        "the guest was not stopped" if stopped is None else f"the guest stopped for {units.format_duration(stopped)}"
    )
    kept = "; its disks are retained as layers of the VM" if taken.retained else ""
    return (
        f"{taken.vm}@{taken.name}: {pause}; {units.format_size(describe.size(taken))} saved in "
        f"{units.format_duration(taken.timings.get('total', 0.0))}, {units.format_size(added)} added to the store{kept}"
    )

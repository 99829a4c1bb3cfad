"""``blkckpt fork``: several new VMs from one checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import TYPE_CHECKING, Any

import click

from blkckpt import units
from blkckpt.agent import supervisor, template
from blkckpt.cli import names, output, restore, run, session, verb

if TYPE_CHECKING:
    from blkckpt.restore import fork as forking

NEW, KEEP = "new", "keep"
RECORDED, ISOLATED = "recorded", "isolated"
MAX_FORKS = 256
"""More is a slip of the finger: each takes a disk server and a QEMU."""


@click.command(
    cls=verb.Verb,
    context_settings={"ignore_unknown_options": True},
    examples=(
        "blkckpt fork ci@booted -n 8                        ci-1 to ci-8, all running",
        "blkckpt fork ci@booted -n 3 --as job --json | jq -r '.forks[].vm'",
        "blkckpt fork web@latest -n 2 --network isolated",
        "for vm in job-1 job-2 job-3; do blkckpt stop $vm; blkckpt vm rm $vm --yes; done",
    ),
    keys=(
        "checkpoint, seconds (until all went on), notes, forks: [{vm, supervisor, server, machine, console, log, "
        "cards: [{device, old, new (null: kept)}]}]"
    ),
)
@verb.target_argument
@click.option("-n", "--count", type=click.IntRange(1, MAX_FORKS), required=True, metavar="N", help="How many.")
@click.option(
    "--as", "prefix", metavar="PREFIX", help="They are called PREFIX-1, PREFIX-2, … [default: the VM's name]."
)
@click.option(
    "--mac",
    type=click.Choice([NEW, KEEP]),
    default=NEW,
    show_default=True,
    help="new: each network card gets an address of its own, which a guest takes when its driver is bound anew.",
)
@click.option(
    "--network",
    type=click.Choice([RECORDED, ISOLATED]),
    default=RECORDED,
    show_default=True,
    help="isolated: the cards stay, their networks lead nowhere.",
)
@verb.json_option
@click.argument("extra", nargs=-1, metavar="[-- ARGS…]", type=click.UNPROCESSED)
@click.pass_obj
def command(
    ours: session.Session,
    target: names.Target,
    count: int,
    prefix: str | None,
    mac: str,
    network: str,
    as_json: bool,
    extra: tuple[str, ...],
) -> None:
    """Start N new VMs from one checkpoint, side by side, in the background; the original may go on running.

    They share the memory image's page cache and the disks' chunks, and write to overlays of their own. All of them go
    on, or, after an error or Ctrl-C, none is left.
    """
    began = time.monotonic()
    wanted = tuple(units.check_name(f"{prefix or target.vm}-{number + 1}", "VM name") for number in range(count))
    with contextlib.ExitStack() as stack:
        # first of all: they load while the disks and the memory are being made
        loaded = stack.enter_context(_template(ours)) if count > 1 else None
        waiting = {name: stack.enter_context(supervisor.Detached(loaded)) for name in wanted}
        for name, detached in waiting.items():
            detached.expect(ours.home.vm(name))
        found = ours.checkpoint(target)
        chosen = restore.with_arguments(found.manifest, extra)
        with ours.reporter() as progress:
            module = _forks()
            request = module.Request(chosen, wanted, readdress=mac == NEW, isolated=network == ISOLATED)
            made = module.fork(ours.home, found.store, request, waiting, progress.update)
    seconds = time.monotonic() - began
    notes = made[0].prepared.notes
    for text in notes:
        restore.note(ours, text)
    if as_json:
        source = f"{chosen.vm}@{chosen.name}"
        output.write_json({"checkpoint": source, "seconds": seconds, "notes": list(notes), "forks": _keys(made)})
        return
    rows = [(one.prepared.vm.name, _pid(one), _addresses(one), run.console(one.prepared.vm)) for one in made]
    output.write(output.table(("VM", "PROCESS", "NETWORK", "CONSOLE"), rows, right=("PROCESS",)))
    output.write(f"{count} from {chosen.vm}@{chosen.name}, {units.format_duration(seconds)} after the call")


def _template(ours: session.Session) -> template.Template:
    """What the disk servers are forked from.  What each supervisor would load (15 ms) is loaded here, once."""
    made = template.Template(ours.home)
    importlib.import_module("blkckpt.control.client")
    return made


def _forks() -> Any:
    """:mod:`blkckpt.restore.fork`, loaded when the supervisors are under way."""
    return importlib.import_module("blkckpt.restore.fork")


def _keys(made: list[forking.Fork]) -> list[dict[str, Any]]:
    return [{**run.keys(one.prepared.vm, one.running), "cards": _cards(one)} for one in made]


def _cards(one: forking.Fork) -> list[dict[str, str | None]]:
    return [
        {"device": card.name, "old": card.old.hex(":"), "new": card.new.hex(":") if card.new else None}
        for card in one.prepared.cards or ()
    ]


def _pid(one: forking.Fork) -> int:
    return one.running.machine.pid if one.running.machine else one.running.supervisor.pid


def _addresses(one: forking.Fork) -> str:
    return " ".join(card["new"] or card["old"] or "" for card in _cards(one)) or "-"

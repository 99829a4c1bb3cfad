"""``blkckpt restore``: a new VM from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from typing import TYPE_CHECKING, Any

import click

from blkckpt import errors, units
from blkckpt.agent import supervisor
from blkckpt.cli import names, output, run, session, verb

if TYPE_CHECKING:
    from blkckpt.agent import rundir
    from blkckpt.restore import machine
    from blkckpt.store import manifest

LAZY, EAGER = "lazy", "eager"
RAW, FUSE = "raw", "fuse"
"""As :mod:`blkckpt.restore.machine` calls them."""

KEYS = (
    "vm, checkpoint, mode, seconds (until the guest went on), notes, supervisor, server, machine, console, log; "
    "with --print instead of the last five: command"
)

mode_option = click.option(
    "--mode",
    type=click.Choice([LAZY, EAGER]),
    default=LAZY,
    show_default=True,
    help="lazy: memory is read when the guest touches it; eager: all of it first.",
)
memory_option = click.option(
    "--memory",
    "source",
    type=click.Choice([RAW, FUSE]),
    default=RAW,
    show_default=True,
    help="Where lazy memory is read from. raw: the image kept with the checkpoint, made from the store if that is "
    "gone; fuse: the store itself, nothing is written.",
)
detach_option = click.option("--detach", is_flag=True, help="Return when the guest goes on.")


@click.command(
    cls=verb.Verb,
    context_settings={"ignore_unknown_options": True},
    examples=(
        "blkckpt restore web@before-upgrade --as web-copy --detach",
        "blkckpt restore ci@booted --as job-17 --detach --json",
        "blkckpt restore web@latest --mode eager",
        "blkckpt restore web@latest --as look --print",
        "blkckpt restore web@latest --as web-copy --detach -- -nic none",
    ),
    keys=KEYS,
)
@verb.target_argument
@click.option("--as", "new_name", metavar="NAME", help="The new VM's name [default: VM-CKPT].")
@mode_option
@memory_option
@click.option("--prefetch", is_flag=True, help="With --memory fuse: when the guest goes on, make its memory its own.")
@click.option(
    "--print", "print_only", is_flag=True, help="Prepare everything, print QEMU's command line, start nothing."
)
@detach_option
@verb.json_option
@click.argument("extra", nargs=-1, metavar="[-- ARGS…]", type=click.UNPROCESSED)
@click.pass_obj
def command(
    ours: session.Session,
    target: names.Target,
    new_name: str | None,
    mode: str,
    source: str,
    prefetch: bool,
    print_only: bool,
    detach: bool,
    as_json: bool,
    extra: tuple[str, ...],
) -> None:
    """Start a new VM from a checkpoint; the original may go on running.

    Its disks read from the store until they have been filled in the background; its memory is a private copy. To the
    network it is the same machine as the original: keep them apart. A checkpoint without memory is only served.
    """
    began = time.monotonic()
    _check(mode, source, prefetch=prefetch, print_only=print_only, detach=detach)
    with contextlib.ExitStack() as stack:
        # first of all: it loads while the disks and the memory of the new VM are being made
        background = stack.enter_context(supervisor.Detached()) if detach and not print_only else None
        name = new_name and units.check_name(new_name, "VM name")
        if name and background:
            background.expect(ours.home.vm(name))
        mount = stack.enter_context(_mount(ours, name, target.vm)) if name and source == FUSE else None
        found = ours.checkpoint(target)
        name = name or units.check_name(f"{target.vm}-{found.manifest.name}"[:64], "VM name")
        if source == FUSE and mount is None:
            mount = stack.enter_context(_mount(ours, name, target.vm))
        if mount is not None:
            mount.expect(found.store, found.manifest)
        with ours.reporter() as progress_:
            chosen = with_arguments(found.manifest, extra)
            prepared = _machines().restore(
                ours.home, found.store, chosen, name, mode=mode, mount=mount, progress=progress_.update
            )
            if print_only:
                _print(ours, prepared, mode, progress_.update, as_json)
                return
        go_on(ours, prepared, mode=mode, detach=detach, as_json=as_json, began=began, background=background)
    if prefetch and prepared.memory:
        with ours.reporter() as progress_:
            importlib.import_module("blkckpt.restore.prefetch").prefetch(ours.home, prepared.vm, progress_.update)


def _check(mode: str, source: str, *, prefetch: bool, print_only: bool, detach: bool) -> None:
    """Options that do not go together."""
    if source == FUSE and (mode == EAGER or print_only):
        raise errors.InputError("--memory fuse is for a lazy restore that blkckpt starts; leave out --mode and --print")
    if prefetch and (source != FUSE or not detach):
        raise errors.InputError("--prefetch goes with --memory fuse --detach; later it is: blkckpt prefetch VM")


def _mount(ours: session.Session, name: str, origin: str) -> Any:
    """The mount that VM *name* will have its memory from: its process loads while the rest is being prepared."""
    if name in ours.home.vm_names():
        raise errors.StateError(f"VM {name} exists already; choose another name or remove it: blkckpt vm rm {name}")
    return importlib.import_module("blkckpt.restore.fused").Mount(ours.home, ours.home.vm(name), origin)


def _machines() -> Any:
    """:mod:`blkckpt.restore.machine`, loaded when the supervisor is under way: it brings numpy and asyncio."""
    return importlib.import_module("blkckpt.restore.machine")


def with_arguments(one: manifest.Manifest, extra: tuple[str, ...]) -> manifest.Manifest:
    """*one* as if its machine had been started with *extra* arguments at the end."""
    if not extra:
        return one
    if one.machine is None:
        raise errors.InputError(f"{one.vm}@{one.name} has no machine to give arguments to; leave out what follows --")
    return dataclasses.replace(one, machine=dataclasses.replace(one.machine, argv=(*one.machine.argv, *extra)))


def go_on(
    ours: session.Session,
    prepared: machine.Prepared,
    *,
    mode: str,
    detach: bool,
    as_json: bool,
    began: float,
    background: supervisor.Detached | None = None,
) -> None:
    """Start what was prepared, in the background or in this process, and say how long it took."""
    for text in prepared.notes:
        note(ours, text)
    if detach:
        with ours.reporter() as progress_:
            running = _machines().start(prepared, progress_.update, background)
        _report(prepared, running, mode, time.monotonic() - began, as_json)
        return
    with contextlib.ExitStack() as stack:
        bars = stack.enter_context(ours.reporter())

        def ready(_: rundir.Running) -> None:
            stack.close()
            note(
                ours, f"VM {prepared.vm.name} goes on, {units.format_duration(time.monotonic() - began)} after the call"
            )

        code = _machines().run(prepared, bars.update, ready)
    click.get_current_context().exit(code)


def note(ours: session.Session, text: str) -> None:
    """Something worth knowing, on standard error."""
    if not ours.quiet:
        click.echo(f"blkckpt: {text}", err=True)


def _report(prepared: machine.Prepared, running: rundir.Running, mode: str, seconds: float, as_json: bool) -> None:
    if as_json:
        output.write_json({**_keys(prepared, mode), "seconds": seconds, **run.keys(prepared.vm, running)})
        return
    what = "goes on" if running.machine else "is served"
    output.write(
        f"VM {prepared.vm.name} {what} from {_source(prepared)}, {units.format_duration(seconds)} after the call; "
        f"console and messages: {run.console(prepared.vm)}"
    )


def _print(
    ours: session.Session, prepared: machine.Prepared, mode: str, progress: machine.Progress, as_json: bool
) -> None:
    if prepared.memory is None:
        raise errors.InputError(
            f"{_source(prepared)} holds disks only: there is no command to print; "
            f"VM {prepared.vm.name} is ready: blkckpt serve {prepared.vm.name}"
        )
    line = _machines().shell_line(prepared, progress)
    for text in prepared.notes:
        note(ours, text)
    note(ours, f"its disks must be served while it runs: blkckpt serve {prepared.vm.name} --detach")
    if as_json:
        output.write_json({**_keys(prepared, mode), "command": line})
    else:
        output.write(line)


def _keys(prepared: machine.Prepared, mode: str) -> dict[str, Any]:
    return {
        "vm": prepared.vm.name,
        "checkpoint": _source(prepared),
        "mode": mode if prepared.memory else None,
        "notes": list(prepared.notes),
    }


def _source(prepared: machine.Prepared) -> str:
    return f"{prepared.checkpoint.vm}@{prepared.checkpoint.name}"

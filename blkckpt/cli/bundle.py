"""``blkckpt bundle``: checkpoints into one file, for another host."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from blkckpt import durable, errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import packing

MAX_LIST = 64 << 20


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt bundle web@monday -o web.bundle",
        "blkckpt bundle web@tuesday web@wednesday --since web@monday -o week.bundle",
        "ssh far blkckpt list web --json > far.json; blkckpt bundle web@latest --have far.json -o new.bundle",
        "blkckpt bundle web@latest -o - | ssh far blkckpt unbundle -",
    ),
    keys="path, checkpoints: [VM@CKPT], needs: [VM@CKPT] (what the other side must have), chunks, bytes, seconds",
)
@click.argument("targets", metavar="VM@CKPT…", nargs=-1, required=True, callback=verb.targets)
@click.option("--output", "-o", "path", metavar="FILE", required=True, help="Where to; - is standard output.")
@click.option(
    "--since", multiple=True, metavar="VM@CKPT", callback=verb.targets,
    help="Leave out what this one has: the other side has it too. Repeat for more.",
)  # fmt: skip
@click.option(
    "--have",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="LIST",
    help="The other side's `blkckpt list --json`: what its newest common checkpoint has is left out.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    targets: tuple[names.Target, ...],
    path: str,
    since: tuple[names.Target, ...],
    have: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Put checkpoints into one file that `blkckpt unbundle` on another host makes checkpoints of again.

    Chunks are sent compressed, each once. With --since or --have only what the other side lacks; it checks that it
    has the rest, by the checkpoints' ids and every chunk's hash.

    Tags, notes, the screen's picture and the outcome of `verify --boot` go along. Pins do not: what the other side
    keeps is for it to say; and what it says of checkpoints that it has already stays as it is there.
    """
    if path == "-" and (as_json or sys.stdout.isatty()):
        raise errors.InputError("-o - writes the bundle to standard output: redirect that, without --json")
    found = [ours.checkpoint(target) for target in targets]
    place = found[0].store
    if any(one.store.path != place.path for one in found):
        raise errors.InputError("these checkpoints are in different stores; make a bundle of each store's")
    chosen = list({one.manifest.id: one.manifest for one in found}.values())
    bases = [ours.checkpoint(target).manifest for target in since]
    if have is not None:
        bases += packing.choose_bases(place.manifests(), chosen, _ids(have))
    began = time.monotonic()
    with ours.reporter() as bars, _target(path, force=force) as descriptor:

        def write(data: bytes | memoryview) -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

        packed = packing.pack(place, chosen, bases, write, lambda done, total: bars.update("bundle", done, total))
    if path != "-":
        _report(path, packed, time.monotonic() - began, as_json)


@contextlib.contextmanager
def _target(path: str, *, force: bool) -> Iterator[int]:
    if path == "-":
        try:
            yield sys.stdout.fileno()
        except BrokenPipeError:
            raise click.exceptions.Exit(output.PIPE_CLOSED) from None
        return
    file = Path(path).absolute()
    if (file.exists() or file.is_symlink()) and (not force or not file.is_file() or file.is_symlink()):
        raise errors.InputError(f"{file} exists already; --force replaces a regular file")
    try:
        with durable.new_file(file, replace=force) as (descriptor, _):
            yield descriptor
    except FileExistsError as error:
        raise errors.StateError(f"{file} has appeared meanwhile; it is left as it is") from error
    except OSError as error:
        raise errors.from_os_error(error, f"writing {file}") from error


def _ids(path: Path) -> list[str]:
    """The ids in another side's ``blkckpt list --json``."""
    with path.open("rb") as file:
        data = file.read(MAX_LIST + 1)
    try:
        if len(data) > MAX_LIST:
            raise ValueError("too long")
        return [str(one["id"]) for one in json.loads(data)["checkpoints"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise errors.InputError(f"{path} is not what `blkckpt list --json` prints") from error


def _report(path: str, packed: packing.Packed, seconds: float, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {"path": str(Path(path).absolute()), "checkpoints": list(packed.checkpoints)}
        output.write_json(
            {**body, "needs": list(packed.needs), "chunks": packed.chunks, "bytes": packed.bytes, "seconds": seconds}
        )
        return
    needs = f"; the other side needs {', '.join(packed.needs)}" if packed.needs else ""
    output.write(
        f"{', '.join(packed.checkpoints)} in {path}: {units.format_size(packed.bytes)}, "
        f"{units.format_duration(seconds)}{needs}"
    )

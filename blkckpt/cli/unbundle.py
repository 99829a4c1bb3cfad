"""``blkckpt unbundle``: checkpoints out of a bundle."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from blkckpt import errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import unpacking


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt unbundle web.bundle",
        "blkckpt unbundle web.bundle --rename web=web-of-far",
        "blkckpt unbundle web.bundle --rename web@monday=web@far-monday",
        "ssh far blkckpt bundle web@latest -o - | blkckpt unbundle - --json",
    ),
    keys="checkpoints: [VM@CKPT] (new), present: [VM@CKPT] (they were here), store, chunks, new_chunks, seconds",
)
@click.argument("path", metavar="FILE")
@click.option(
    "--rename", multiple=True, metavar="OLD=NEW",
    help="Give a VM, or one VM@CKPT, another name here. Repeat for more.",
)  # fmt: skip
@click.option(
    "--store", "store_path", type=click.Path(path_type=Path), metavar="DIR",
    help="Which store [default: the home's].",
)  # fmt: skip
@verb.json_option
@click.pass_obj
def command(ours: session.Session, path: str, rename: tuple[str, ...], store_path: Path | None, as_json: bool) -> None:
    """Make checkpoints of what `blkckpt bundle` wrote; - reads standard input.

    Every chunk is compared with its hash, and nothing is published before all of it has been. What is here already is
    not stored again, so an interrupted run can be repeated. A name that another checkpoint has is refused. Restoring
    a checkpoint means trusting who made it: hashes say that it is what was sent, not who sent it.
    """
    mapping = _renames(rename)
    began = time.monotonic()
    with (
        _source(path) as (descriptor, size),
        ours.open_or_make(store_path) as place,
        ours.reporter() as bars,
        os.fdopen(os.dup(descriptor), "rb", buffering=1 << 20) as file,
    ):
        done = unpacking.unpack(place, file.read, mapping, lambda position: bars.update("unbundle", position, size))
        where = str(place.path)
    seconds = time.monotonic() - began
    if as_json:
        output.write_json(
            {
                "checkpoints": list(done.checkpoints),
                "present": list(done.present),
                "store": where,
                "chunks": done.chunks,
                "new_chunks": done.new_chunks,
                "seconds": seconds,
            }
        )
        return
    lines = [f"{', '.join(done.present)}: here already"] if done.present else []
    if done.checkpoints:
        lines.append(
            f"{', '.join(done.checkpoints)}: {done.new_chunks} of {done.chunks} chunks were new; "
            f"{units.format_duration(seconds)}"
        )
    output.write("\n".join(lines))


@contextlib.contextmanager
def _source(path: str) -> Iterator[tuple[int, int | None]]:
    """A descriptor and, of a regular file, its size."""
    if path == "-":
        if sys.stdin.isatty():
            raise errors.InputError("standard input is a terminal; pipe a bundle into it, or name a file")
        yield sys.stdin.fileno(), None
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.from_os_error(error, f"opening the bundle {path}") from error
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise errors.InputError(f"{path} is a directory, not a bundle")
        yield descriptor, info.st_size if stat.S_ISREG(info.st_mode) else None
    finally:
        os.close(descriptor)


def _renames(texts: tuple[str, ...]) -> unpacking.Rename:
    found: dict[tuple[str, str | None], tuple[str, str | None]] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals:
            raise errors.InputError(f"--rename {text!r} has no '='; write OLD=NEW, for example web=web2")
        before, after = names.parse_vm_or_target(old), names.parse_vm_or_target(new)
        if (before.checkpoint is None) != (after.checkpoint is None):
            raise errors.InputError(f"--rename {text!r}: a VM becomes a VM, and VM@CKPT becomes VM@CKPT")
        if after.checkpoint is not None:
            names.check_new_checkpoint(after.checkpoint)
        found[before.vm, before.checkpoint] = (after.vm, after.checkpoint)
    return found

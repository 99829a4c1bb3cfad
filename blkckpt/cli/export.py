"""``blkckpt export``: a checkpoint's disk or memory as a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from blkckpt import errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import core, outward, qemuimg

PIPE = "-"
CORE_SUFFIXES = (".elf", ".core")


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt export web@before-upgrade -o web.raw",
        "blkckpt export db@latest --disk data -o data.qcow2 --compress",
        "blkckpt export web@latest --disk vda -o - | zstd > vda.raw.zst",
        "blkckpt export web@latest --memory -o ram.raw",
        "blkckpt export web@latest --memory -o core.elf && gdb vmlinux -c core.elf",
    ),
    keys="checkpoint, what (disk or RAM block), format, path, size, seconds; not with -o -",
)
@verb.target_argument
@click.option("--disk", metavar="ID", help="Which disk [default: the only one].")
@click.option("--memory", is_flag=True, help="Export guest memory instead of a disk.")
@click.option("--block", metavar="NAME", help="With --memory: another RAM block (`blkckpt show` lists them).")
@click.option("--output", "-o", "path", metavar="FILE", required=True, help="Where to; - is standard output (raw).")
@click.option(
    "--format",
    "kind",
    type=click.Choice([*qemuimg.FORMATS, *core.FORMATS]),
    help="[default: by FILE's suffix, else raw] Of memory: raw, the main RAM block as it is; elf, a core for "
    "debuggers; physical, raw with each part at its guest-physical address.",
)
@click.option("--compress", is_flag=True, help="Compress the data of a qcow2.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    target: names.Target,
    disk: str | None,
    memory: bool,
    block: str | None,
    path: str,
    kind: str | None,
    compress: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a disk, or the memory, of a checkpoint to a file.

    Raw files are sparse. Every byte has had its hash checked. The file appears when all of it is there, or not at
    all; nothing is written over without --force.
    """
    _check(disk, memory, block, path, as_json)
    found = ours.checkpoint(target)
    chosen = outward.main_memory(found.manifest, block) if memory else outward.disk(found.manifest, disk)
    wanted = kind or _by_suffix(path, memory=memory)
    size = chosen.size
    if compress and wanted != "qcow2":
        raise errors.InputError(f"--compress works for qcow2, not for {wanted}")
    if memory and wanted != "raw" and wanted not in core.FORMATS:
        raise errors.InputError(f"memory is exported as raw, {' or '.join(core.FORMATS)}, not as {wanted}")
    if wanted in core.FORMATS and (block or not memory):
        raise errors.InputError(f"{wanted} is all of a machine's memory: --memory, without --block")
    if path == PIPE and wanted != "raw":
        raise errors.InputError(f"only raw can be written to a pipe; {wanted} needs a file")
    began, file = time.monotonic(), Path(path).absolute()
    with ours.reporter() as bars:

        def advance(done: int, total: int) -> None:
            bars.update(chosen.name, done, total)

        if path == PIPE:
            _to_pipe(found, chosen.image, advance)
        elif wanted in core.FORMATS:
            size = core.to_file(found.store, found.manifest, wanted, file, advance, force=force)
        elif wanted == "raw":
            outward.to_file(found.store, chosen.image, file, advance, force=force)
        else:
            disk_ = outward.disk(found.manifest, disk)
            outward.convert(found.store, found.manifest, disk_, file, wanted, advance, compress=compress, force=force)
    if path == PIPE:
        return
    seconds = time.monotonic() - began
    if as_json:
        output.write_json(
            {
                "checkpoint": f"{found.manifest.vm}@{found.manifest.name}",
                "what": chosen.name,
                "format": wanted,
                "path": str(file),
                "size": size,
                "seconds": seconds,
            }
        )
    else:
        output.write(
            f"{chosen.name} of {found.manifest.vm}@{found.manifest.name} ({units.format_size(size)}) is in "
            f"{file}, {wanted}; {units.format_duration(seconds)}"
        )


def _by_suffix(path: str, *, memory: bool) -> str:
    if path == PIPE:
        return "raw"
    suffix = Path(path).suffix.lower()
    return ("elf" if suffix in CORE_SUFFIXES else "raw") if memory else qemuimg.SUFFIXES.get(suffix, "raw")


def _check(disk: str | None, memory: bool, block: str | None, path: str, as_json: bool) -> None:
    if memory and disk:
        raise errors.InputError("--disk and --memory exclude each other; export one after the other")
    if block and not memory:
        raise errors.InputError("--block goes with --memory")
    if path == PIPE and as_json:
        raise errors.InputError("--json and -o - both want standard output; write to a file")
    if path == PIPE and sys.stdout.isatty():
        raise errors.InputError("standard output is a terminal; redirect it, or write to a file with -o FILE")


def _to_pipe(found: session.Found, image: str, progress: outward.Progress) -> None:
    """A reader that goes away ends it quietly, as with every result."""
    try:
        outward.to_pipe(found.store, image, sys.stdout.fileno(), progress)
    except BrokenPipeError:
        raise click.exceptions.Exit(output.PIPE_CLOSED) from None

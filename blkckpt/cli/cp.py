"""``blkckpt cp``: copy a guest's files out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from blkckpt import errors, units
from blkckpt.cli import guestpath, output, progress, session, verb
from blkckpt.view import extract

SHOWN = 10
"""Problems that people are told; JSON has all."""


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt cp web@before:/etc/passwd .",
        "blkckpt cp -r web@before:/var/log ./logs-before",
        "blkckpt cp -r web@latest:vda:2:/home/ann /srv/rescue --replace",
    ),
    keys="files, directories, links, bytes, problems: [{path, why}]",
)
@click.argument("addresses", metavar=f"{guestpath.SYNTAX}…", nargs=-1, required=True)
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all that is in them.")
@click.option("--replace", is_flag=True, help="Replace files that are there, and copy into directories that are.")
@click.option(
    "--links",
    type=click.Choice([one.value for one in extract.Links]),
    default=extract.Links.INSIDE.value,
    show_default=True,
    help="Which symbolic links to copy: those that stay inside of what is copied, all, none.",
)
@guestpath.narrowing
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    addresses: tuple[str, ...],
    destination: Path,
    recursive: bool,
    replace: bool,
    links: str,
    disk: str | None,
    volume: str | None,
    as_json: bool,
) -> None:
    """Copy files of the guest to this machine. Nothing is mounted.

    DEST is a directory to copy into, or a new name. The guest is not trusted: nothing is written outside of DEST,
    set-user-id bits and owners are left out, devices are not made, and links that lead out are left out. Holes stay
    holes. Exit code 6 when something could not be copied; the rest was.
    """
    report = extract.Report()
    options = extract.Options(extract.Links(links), replace)
    with ours.reporter() as bars:
        for text in addresses:
            wanted = guestpath.narrowed(guestpath.parse(text), disk, volume)
            _copy(ours, wanted, _place(wanted, destination, len(addresses)), recursive, options, report, bars)
    _say(report, as_json)


def _place(wanted: guestpath.Address, destination: Path, count: int) -> tuple[Path, str | None]:
    """The directory to copy into, and the name of the copy if it is given."""
    if destination.is_dir():
        return destination, None
    if count > 1:
        raise errors.NotFoundError(f"several files are copied to {destination}, which is no directory; make it first")
    if destination.name in ("", "."):
        raise errors.NotFoundError(f"there is no directory {destination}")
    return destination.parent, destination.name


def _copy(
    ours: session.Session,
    wanted: guestpath.Address,
    place: tuple[Path, str | None],
    recursive: bool,
    options: extract.Options,
    report: extract.Report,
    bars: progress.Reporter,
) -> None:
    folder, name = place
    with guestpath.opened(ours, wanted.target, wanted.disk, wanted.volume) as places:
        found = guestpath.locate(wanted, places)
        entry = found.place.volume.stat(found.path)
        if entry.is_directory and not recursive:
            raise errors.InputError(f"{wanted} is a directory; add -r to copy it with all that is in it")
        chosen = name or wanted.path.rstrip("/").rpartition("/")[2] or f"{wanted.target}"
        if chosen in (".", ".."):
            chosen = found.path.rpartition("/")[2] or f"{wanted.target}"
        extract.copy(
            found.place.volume,
            found.path,
            folder,
            chosen,
            options,
            lambda done, total: bars.update("copied", done, total),
            report,
        )


def _say(report: extract.Report, as_json: bool) -> None:
    if as_json:
        output.write_json(
            {
                "files": report.files,
                "directories": report.directories,
                "links": report.links,
                "bytes": report.bytes,
                "problems": [{"path": one.path, "why": one.why} for one in report.problems],
            }
        )
    else:
        output.write(
            f"copied {report.files} files, {report.directories} directories, {report.links} links; "
            f"{units.format_size(report.bytes)}"
        )
        for one in report.problems[:SHOWN]:
            click.echo(f"blkckpt: left out: {output.printable(f'{one.path}: {one.why}')}", err=True)
    if report.problems:
        count = len(report.problems)
        raise errors.CorruptError(f"{count} {'file was' if count == 1 else 'files were'} not copied; the rest was")

"""``blkckpt ls``: the guest's files in a checkpoint."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import guestpath, names, output, session, verb
from blkckpt.view import volumes, walk


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt ls web@before                       # the volumes: partitions, LVM",
        "blkckpt ls -l web@before:/etc",
        "blkckpt ls -R web@latest:vda:2:/var/log --json | jq -r '.files[].path'",
    ),
    keys=f"disk, volume, files: [{{{guestpath.KEYS}}}]; without a path "
    "volumes: [{disk, volume, kind, label, size, problem}]",
)
@click.argument("address", metavar="VM@CKPT[:[DISK[:VOLUME]:]/PATH]")
@click.option("-l", "--long", is_flag=True, help="Permissions, owner, size and time as well.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below, too.")
@guestpath.narrowing
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    address: str,
    long: bool,
    recursive: bool,
    disk: str | None,
    volume: str | None,
    as_json: bool,
) -> None:
    """List a directory of the guest, or without a path the volumes that hold its files. Nothing is mounted.

    The shortest path will do when only one volume has it. Symbolic links on the way are followed inside of the
    volume. Names are shown with control characters escaped; --json has them as they are.
    """
    if ":" not in address:
        with guestpath.opened(ours, names.parse_target(address), disk, volume) as places:
            _volumes(places, as_json)
        return
    wanted = guestpath.narrowed(guestpath.parse(address), disk, volume)
    with guestpath.opened(ours, wanted.target, wanted.disk, wanted.volume) as places:
        found = guestpath.locate(wanted, places)
        files, problems = _files(found, recursive)
        if as_json:
            place = {"disk": found.place.disk, "volume": found.place.volume.name}
            output.write_json({**place, "files": [_keys(found, path, entry) for path, entry in files]})
        else:
            output.write(_text(found, files, long=long, paths=recursive))
    if problems:
        raise errors.CorruptError(f"not listed: {output.printable(problems[0].path)}: {problems[0].why}")


def _volumes(places: list[guestpath.Place], as_json: bool) -> None:
    if as_json:
        output.write_json(
            {
                "volumes": [
                    {
                        "disk": place.disk,
                        "volume": place.volume.name,
                        "kind": place.volume.kind,
                        "label": place.volume.label,
                        "size": place.volume.source.size,
                        "problem": place.volume.problem or None,
                    }
                    for place in places
                ]
            }
        )
        return
    rows = [
        (
            place.disk,
            output.printable(place.volume.name) or "-",
            place.volume.kind,
            units.format_size(place.volume.source.size),
            output.printable(place.volume.label),
            place.volume.problem,
        )
        for place in places
    ]
    output.write(output.table(("DISK", "VOLUME", "KIND", "SIZE", "LABEL", "NOT READ BECAUSE"), rows, right=("SIZE",)))


_Files = list[tuple[str, volumes.Entry]]


def _files(found: guestpath.Located, recursive: bool) -> tuple[_Files, list[walk.Problem]]:
    volume = found.place.volume
    entry = volume.stat(found.path)
    if not entry.is_directory:
        return [(found.path, entry)], []
    if not recursive:
        return [(f"{found.path.rstrip('/')}/{one.name}", one) for one in volume.list(found.path)], []
    steps = list(walk.walk(volume, found.path))
    return [one for one in steps if not isinstance(one, walk.Problem)], [
        one for one in steps if isinstance(one, walk.Problem)
    ]


def _target(found: guestpath.Located, path: str, entry: volumes.Entry) -> str | None:
    return found.place.volume.readlink(path) if entry.is_link else None


def _keys(found: guestpath.Located, path: str, entry: volumes.Entry) -> dict[str, Any]:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return {
        "name": entry.name,
        "path": path,
        "type": kinds.get(stat.S_IFMT(entry.mode), "other"),
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "size": entry.size,
        "modified": output.timestamp(_when(entry)),
        "uid": entry.uid,
        "gid": entry.gid,
        "inode": entry.inode,
        "links": entry.links,
        "target": _target(found, path, entry),
    }


def _when(entry: volumes.Entry) -> int:
    """The time of the last change, in the years 1 to 9998: a guest may claim any, a calendar has no more."""
    return min(max(entry.mtime_ns, -62_135_596_800 * 10**9), 253_370_764_800 * 10**9)


def _text(found: guestpath.Located, files: _Files, *, long: bool, paths: bool) -> str:
    if not long:
        return "\n".join(output.printable(path if paths else entry.name) for path, entry in files)
    return "\n".join(_aligned(list(_rows(found, files, paths))))


def _rows(found: guestpath.Located, files: _Files, paths: bool) -> Iterator[tuple[str, ...]]:
    for path, entry in files:
        name = output.printable(path if paths else entry.name)
        target = _target(found, path, entry)
        yield (
            stat.filemode(entry.mode),
            str(entry.links),
            str(entry.uid),
            str(entry.gid),
            str(entry.size),
            output.local_time(_when(entry)),
            name if target is None else f"{name} -> {output.printable(target)}",
        )


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Numbers to the right, words to the left, as ls has it."""
    widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)]
        yield f"{row[0]} {' '.join(cells[1:])} {row[6]}"

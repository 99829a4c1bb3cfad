"""``blkckpt diff``: what two checkpoints differ in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blkckpt import errors, lazy, units
from blkckpt.cli import names, output, progress, session, verb
from blkckpt.store import compare, images, layout
from blkckpt.view import changes, heatmap

if TYPE_CHECKING:
    from blkckpt.view import filediff, volumes, walk
else:
    filediff, volumes, walk = (lazy.Module(f"blkckpt.view.{name}") for name in ("filediff", "volumes", "walk"))

SHOWN = 1000
"""Extents of one disk that people are shown; JSON has all."""

STRIP = 48
"""Characters of a heat map in the table, where the terminal has room."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What comparing the files found."""

    steps: tuple[tuple[str, filediff.FileChange], ...]
    problems: tuple[tuple[str, walk.Problem], ...]


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt diff web@before web@after",
        "blkckpt diff web@latest                      # with the checkpoint before it",
        "blkckpt diff web@before web@after --files",
        "blkckpt diff web@before web@after --svg changed.svg",
        "blkckpt diff web@a web@b --extents --json | jq '.disks[0].extents'",
    ),
    keys=(
        "old, new, chunk, disks and memory: [{name, old_size, new_size, changed_bytes, filled_bytes, zeroed_bytes, "
        "exact_bytes (--exact), changed_pages (memory, --pages), extents (--extents): [{offset, length, state}]}], "
        "files (--files): [{disk, volume, path, what, how, old_size, new_size}], problems: [{disk, path, why}]"
    ),
)
@click.argument("targets", metavar="[VM@OLD] VM@NEW", nargs=-1, required=True, callback=verb.targets)
@click.option("--extents", is_flag=True, help="List the ranges that changed.")
@click.option("--files", is_flag=True, help="Name the guest's files that were added, removed or changed.")
@click.option("--pages", is_flag=True, help="Count the 4 KiB pages of memory that changed; reads the changed chunks.")
@click.option("--exact", is_flag=True, help="Count the single bytes that changed; reads the changed chunks.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write a heat map there.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write a heat map there.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    targets: tuple[names.Target, ...],
    extents: bool,
    files: bool,
    pages: bool,
    exact: bool,
    svg: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    """Show where two checkpoints differ: on each disk, in each block of memory.

    No data is read for that: the images' tables say which chunks of 64 KiB differ, exactly. CHANGED counts whole
    chunks, of which at least one byte differs; NEW and GONE are the part that was, or is, zeros. With one checkpoint
    it is compared with the one before it.
    """
    before, after = _sides(ours, targets)
    parts = changes.parts(before, after)
    with ours.reporter() as bars:
        counted = _count(parts, pages, exact, bars)
        found = _compare_files(parts, bars) if files else None
    title = f"{before} to {after}"
    if svg is not None:
        _save(svg, heatmap.svg(_maps(parts), title).encode())
    if png is not None:
        _save(png, heatmap.png(_maps(parts), title))
    if as_json:
        output.write_json(_keys(before, after, parts, counted, found, extents))
    else:
        output.write(_text(parts, counted, found, extents))
    if found is not None and found.problems:
        disk, problem = found.problems[0]
        raise errors.CorruptError(
            f"not compared: {disk} {output.printable(problem.path)}: {problem.why} ({len(found.problems)} in all)"
        )


def _sides(ours: session.Session, targets: Sequence[names.Target]) -> tuple[changes.Side, changes.Side]:
    """The two checkpoints; of one alone, its parent and itself."""
    if len(targets) > 2:
        raise errors.InputError(f"two checkpoints are compared, not {len(targets)}")
    found = [ours.checkpoint(target) for target in targets]
    if len(found) == 1:
        one = found[0].manifest
        if one.parent is None:
            raise errors.InputError(
                f"{targets[0]} is the first of its VM: say what to compare it with, blkckpt diff VM@OLD {targets[0]}"
            )
        found.insert(0, ours.checkpoint(names.Target(one.vm, one.parent)))
    before, after = (changes.Side(one.store, one.manifest) for one in found)
    return before, after


_Counted = dict[tuple[str, str], dict[str, int]]


def _count(parts: Sequence[changes.Part], pages: bool, exact: bool, bars: progress.Reporter) -> _Counted:
    """What takes reading: by kind and name, ``exact_bytes`` and ``changed_pages``."""
    found: _Counted = {}
    for part in parts:

        def advance(done: int, total: int, part: changes.Part = part) -> None:
            bars.update(f"reading {part.kind} {part.name}", done, total)

        one = found[part.kind, part.name] = {}
        if exact:
            one["exact_bytes"] = changes.changed_bytes(part, advance)
        if pages and part.kind == "memory":
            one["changed_pages"] = changes.changed_pages(part, advance)
    return found


def _compare_files(parts: Sequence[changes.Part], bars: progress.Reporter) -> _Files:
    steps: list[tuple[str, filediff.FileChange]] = []
    problems: list[tuple[str, walk.Problem]] = []
    for part in parts:
        if part.kind != "disk" or part.old is None or part.new is None:
            continue
        for step in _steps(part, part.old, part.new, bars):
            if isinstance(step, walk.Problem):
                problems.append((part.name, step))
            else:
                steps.append((part.name, step))
    return _Files(tuple(steps), tuple(problems))


def _steps(
    part: changes.Part, old: images.ImageReader, new: images.ImageReader, bars: progress.Reporter
) -> Iterator[filediff.Step]:
    def advance(count: int) -> None:
        bars.count(f"files of {part.name}", count)

    with volumes.Volumes(old) as before, volumes.Volumes(new) as after:
        yield from filediff.differences(before.all, after.all, part.difference, advance)


def _maps(parts: Sequence[changes.Part]) -> list[heatmap.Map]:
    return [part.map() for part in parts if part.difference.size]


def _save(path: Path, picture: bytes) -> None:
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path}") from error


def _keys(
    old: changes.Side,
    new: changes.Side,
    parts: Sequence[changes.Part],
    counted: _Counted,
    files: _Files | None,
    extents: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {"old": str(old), "new": str(new), "chunk": layout.CHUNK}
    for key, kind in (("disks", "disk"), ("memory", "memory")):
        result[key] = [_part_keys(part, counted, extents) for part in parts if part.kind == kind]
    if files is not None:
        result["files"] = [_file_keys(disk, one) for disk, one in files.steps]
        result["problems"] = [{"disk": disk, "path": one.path, "why": one.why} for disk, one in files.problems]
    return result


def _part_keys(part: changes.Part, counted: _Counted, extents: bool) -> dict[str, Any]:
    one = part.difference
    result: dict[str, Any] = {
        "name": part.name,
        "old_size": one.old_size if part.old else None,
        "new_size": one.new_size if part.new else None,
        "changed_bytes": one.bytes,
        "filled_bytes": one.bytes_of(compare.State.FILLED),
        "zeroed_bytes": one.bytes_of(compare.State.ZEROED),
        **counted[part.kind, part.name],
    }
    if extents:
        result["extents"] = [
            {"offset": each.offset, "length": each.length, "state": each.state.name.lower()} for each in one.extents()
        ]
    return result


def _file_keys(disk: str, one: filediff.FileChange) -> dict[str, Any]:
    return {
        "disk": disk,
        "volume": one.volume,
        "path": one.path,
        "what": one.what.value,
        "how": list(one.how),
        "old_size": one.old.size if one.old else None,
        "new_size": one.new.size if one.new else None,
    }


def _text(parts: Sequence[changes.Part], counted: _Counted, files: _Files | None, extents: bool) -> str:
    blocks = [_overview(parts, counted)]
    if extents:
        blocks += [_extents(part) for part in parts if len(part.difference.chunks)]
    if files is not None:
        blocks.append(_file_list(files))
    return "\n\n".join(blocks)


def _overview(parts: Sequence[changes.Part], counted: _Counted) -> str:
    extra = {"exact_bytes": "BYTES", "changed_pages": "PAGES"}
    used = [key for key in extra if any(key in one for one in counted.values())]
    numbers = ("SIZE", "CHANGED", "%", "NEW", "GONE", *(extra[key] for key in used))
    strip = STRIP if shutil.get_terminal_size().columns >= 100 + STRIP // 2 else STRIP // 2
    rows = []
    for part in parts:
        one = part.difference
        state = "added" if part.old is None else "removed" if part.new is None else ""
        rows.append(
            (
                part.kind,
                part.name,
                units.format_size(one.size),
                units.format_size(one.bytes),
                f"{100 * one.bytes / one.size:.1f}" if one.size else "-",
                units.format_size(one.bytes_of(compare.State.FILLED)),
                units.format_size(one.bytes_of(compare.State.ZEROED)),
                *(counted[part.kind, part.name].get(key, "-") for key in used),
                f"{heatmap.text(one.heat(strip))} {state}".rstrip(),
            )
        )
    return output.table(("WHAT", "NAME", *numbers, "WHERE"), rows, right=numbers)


def _extents(part: changes.Part) -> str:
    rows = [(f"{one.offset:#x}", one.length, one.state.name.lower()) for one in part.difference.extents()]
    head = f"{part.kind} {part.name}: {len(rows)} range{'s' if len(rows) > 1 else ''}"
    more = f"\nand {len(rows) - SHOWN} more (--json has all)" if len(rows) > SHOWN else ""
    return f"{head}\n{output.table(('OFFSET', 'BYTES', 'STATE'), rows[:SHOWN], right=('OFFSET', 'BYTES'))}{more}"


def _file_list(files: _Files) -> str:
    if not files.steps:
        return "no file changed"
    return "\n".join(_file_lines(files))


def _file_lines(files: _Files) -> Iterator[str]:
    marks = {filediff.What.ADDED: "+", filediff.What.REMOVED: "-", filediff.What.CHANGED: "~"}
    for disk, one in files.steps:
        how = f"  ({', '.join(one.how)})" if one.how else ""
        yield f"{marks[one.what]} {disk}:{one.volume}:{output.printable(one.path)}{how}"

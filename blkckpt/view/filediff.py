"""Which of the guest's files two checkpoints differ in: added, removed, changed, and in what.

Metadata is compared first.  The contents of a file of the same size are taken to be the same, without reading them,
when it lies in the same blocks of the disk and the images differ in none of them (``store.compare`` knows); else
they are read and compared.  A volume in whose partition nothing at all changed is not looked at.

Volumes belong together when disk, name and kind of file system are the same.  One that is only in one checkpoint is
a :class:`walk.Problem`, as is whatever cannot be read.
"""

from __future__ import annotations

import itertools
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from blkckpt import errors
from blkckpt.store import compare
from blkckpt.view import source as sources
from blkckpt.view import volumes, walk

_READ = 1 << 20

Progress = Callable[[int], None]


class What(StrEnum):
    """What became of a file."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that differs; *how* is, of a changed one, some of content, size, kind, permissions, owner, time,
    target, attributes."""

    volume: str
    path: str
    what: What
    old: volumes.Entry | None
    new: volumes.Entry | None
    how: tuple[str, ...] = ()


Step = FileChange | walk.Problem


@dataclass(slots=True)
class _Comparison:
    """Two volumes being compared.  *count* is the number of files looked at so far."""

    old: volumes.Volume
    new: volumes.Volume
    difference: compare.Difference
    progress: Progress
    count: int = 0
    seen: set[tuple[int, int]] = field(default_factory=set)


def differences(
    old: Sequence[volumes.Volume],
    new: Sequence[volumes.Volume],
    difference: compare.Difference,
    progress: Progress,
) -> Iterator[Step]:
    """The files in which the volumes of one disk differ, by volume and path.  *progress* is told how many it saw."""
    before, after = _by_key(old), _by_key(new)
    for key in dict.fromkeys((*before, *after)):
        left, right = before.get(key), after.get(key)
        if left is None or right is None:
            one = left or right
            assert one is not None
            yield walk.Problem("/", f"{one} is only in the {'old' if left else 'new'} checkpoint")
        elif not left.problem and not right.problem and _touched(right.source, difference):
            yield from _directory(_Comparison(left, right, difference, progress), "", 0)


def _by_key(found: Sequence[volumes.Volume]) -> Mapping[tuple[str, str], volumes.Volume]:
    return {(one.name, one.kind): one for one in found}


def _touched(source: sources.Source, difference: compare.Difference) -> bool:
    return any(difference.touches(*place) for place in sources.ranges(source, 0, source.size))


def _directory(both: _Comparison, path: str, depth: int) -> Iterator[Step]:
    """A directory that is in both."""
    try:
        left, right = ({one.name: one for one in side.list(path or "/")} for side in (both.old, both.new))
    except (errors.CorruptError, errors.StateError, errors.NotFoundError) as error:
        yield walk.Problem(path or "/", str(error))
        return
    if depth > walk.MAX_DEPTH:
        yield walk.Problem(path, f"deeper than {walk.MAX_DEPTH} directories")
        return
    for name in sorted({*left, *right}):
        both.count += 1
        both.progress(both.count)
        yield from _file(both, f"{path}/{name}", left.get(name), right.get(name), depth)


def _file(
    both: _Comparison, path: str, old: volumes.Entry | None, new: volumes.Entry | None, depth: int
) -> Iterator[Step]:
    if old is None or new is None or stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
        yield from _one_side(both, path, old, new)
        return
    try:
        how = tuple(_how(both, path, old, new))
    except (errors.CorruptError, errors.StateError) as error:
        yield walk.Problem(path, str(error))
        return
    if how:
        yield FileChange(both.new.name, path, What.CHANGED, old, new, how)
    if new.is_directory:
        key = (old.inode, new.inode)
        if key in both.seen:
            yield walk.Problem(path, "the directory occurs twice: the file system is damaged")
            return
        both.seen.add(key)
        yield from _directory(both, path, depth + 1)


def _one_side(both: _Comparison, path: str, old: volumes.Entry | None, new: volumes.Entry | None) -> Iterator[Step]:
    """What is in one only (or is another kind of file now), with all below it."""
    if old is not None and new is not None:
        yield FileChange(both.new.name, path, What.CHANGED, old, new, ("kind",))
    for volume, entry, what in ((both.old, old, What.REMOVED), (both.new, new, What.ADDED)):
        if entry is None:
            continue
        if old is None or new is None:
            yield _alone(volume, path, entry, what)
        if entry.is_directory:
            for step in walk.walk(volume, path):
                yield step if isinstance(step, walk.Problem) else _alone(volume, *step, what)


def _alone(volume: volumes.Volume, path: str, entry: volumes.Entry, what: What) -> FileChange:
    removed = what is What.REMOVED
    return FileChange(volume.name, path, what, entry if removed else None, None if removed else entry)


def _how(both: _Comparison, path: str, old: volumes.Entry, new: volumes.Entry) -> Iterator[str]:
    """In what a file that is in both differs."""
    if old.is_file and (old.size != new.size or not _same(both, path)):
        yield "content"
    if old.is_file and old.size != new.size:
        yield "size"
    if old.is_link and both.old.readlink(path) != both.new.readlink(path):
        yield "target"
    if old.mode != new.mode:
        yield "permissions"
    if (old.uid, old.gid) != (new.uid, new.gid):
        yield "owner"
    if old.is_directory:
        return  # its times tell what is in it
    if old.mtime_ns != new.mtime_ns:
        yield "time"
    elif old.ctime_ns != new.ctime_ns and old.mode == new.mode and (old.uid, old.gid) == (new.uid, new.gid):
        yield "attributes"


def _same(both: _Comparison, path: str) -> bool:
    """Whether the contents are the same."""
    left, right = both.old.open(path), both.new.open(path)
    if isinstance(left, sources.Runs) and isinstance(right, sources.Runs):
        places = list(sources.ranges(right, 0, right.size))
        if places == list(sources.ranges(left, 0, left.size)) and not any(
            both.difference.touches(*place) for place in places
        ):
            return True
    return all(left.read(offset, length) == right.read(offset, length) for offset, length in _blocks(left, right))


def _blocks(left: sources.Source, right: sources.Source) -> Iterator[tuple[int, int]]:
    """Where two files of one size have to be compared, in blocks: not where both have a hole."""
    edges = sorted({0, left.size, *_edges(left), *_edges(right)})
    for low, high in itertools.pairwise(edges):
        if _hole(left, low) and _hole(right, low):
            continue
        for at in range(low, high, _READ):
            yield at, min(_READ, high - at)


def _edges(source: sources.Source) -> Iterator[int]:
    if isinstance(source, sources.Runs):
        yield from (offset for offset, _, _ in source.extents(0, source.size))


def _hole(source: sources.Source, offset: int) -> bool:
    return isinstance(source, sources.Runs) and next(source.pieces(offset, 1))[0] is None

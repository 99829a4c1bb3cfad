"""Copying a guest's files to the host, where the guest must not get further than the place it is copied to.

The guest chose every name, every link and every byte.  Therefore:

* A name is one component (the parser leaves out others); each file is created relative to its directory's
  descriptor, never by a path; directories are opened with ``O_NOFOLLOW``.  So no link, ours or anybody's, leads a
  write elsewhere.
* A file is made new (``O_EXCL``).  What is there already is an error, or with *replace* is removed first; it is
  never written through.
* A symbolic link is copied if it is relative and stays inside of what is copied; others only on request
  (:class:`Links`): they would lead a later reader astray.
* Set-user-id, set-group-id and sticky bits are left out, as are owners; devices, pipes and sockets are not made.
* Depth, knots and damage: see :mod:`blkckpt.view.walk`.  A copy that fails leaves what it had finished, never half a
  file under its name.

Holes stay holes, and so do blocks of zeros.  Times and the nine permission bits (as the umask allows) are kept.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blkckpt import errors
from blkckpt.view import source as sources
from blkckpt.view import volumes, walk

_READ = 1 << 20
_BLOCK = 64 << 10
_ZERO = bytes(_BLOCK)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Progress = Callable[[int, int | None], None]


class TakenError(errors.StateError):
    """A name on the host that is taken."""


class Links(enum.StrEnum):
    """Which symbolic links are copied."""

    INSIDE = "inside"
    ALL = "all"
    NONE = "none"


@dataclass(slots=True)
class Report:
    """What was copied; *problems* are things that were not, and why."""

    files: int = 0
    directories: int = 0
    links: int = 0
    bytes: int = 0
    problems: list[walk.Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    """How to copy."""

    links: Links = Links.INSIDE
    replace: bool = False


def copy(
    volume: volumes.Volume, path: str, folder: Path, name: str, options: Options, progress: Progress, report: Report
) -> None:
    """Copy *path* (links in it are followed already) as *name* into the host's directory *folder*.

    A directory is copied with all that is in it.  Raises what makes going on senseless (no space, not permitted, a
    name that is taken); what is wrong with one file of many is in the report.
    """
    if not name or name in (".", "..") or "/" in name:
        raise errors.InputError(f"{name!r} is not a name for a copy")
    entry = volume.stat(path)
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.from_os_error(error, f"opening the directory {folder}") from error
    try:
        copier = _Copier(volume, options, progress, report)
        if entry.is_directory:
            copier.tree(path, entry, root, name, str(folder / name))
        else:
            copier.one(path, entry, root, name, 0, str(folder / name))
    finally:
        os.close(root)


class _Copier:
    """One copy under way."""

    def __init__(self, volume: volumes.Volume, options: Options, progress: Progress, report: Report) -> None:
        self._volume, self._options, self._progress, self._report = volume, options, progress, report

    def tree(self, path: str, entry: volumes.Entry, root: int, name: str, shown: str) -> None:
        """A directory and all below it.  *open* are the directories from the top to where the walk is."""
        top = path.rstrip("/")
        opened = [(top, *self._folder(root, name, shown, entry))]
        try:
            for step in walk.walk(self._volume, path):
                if isinstance(step, walk.Problem):
                    self._report.problems.append(step)
                    continue
                below, one = step
                parent, _, last = below.rpartition("/")
                while opened[-1][0] != parent:
                    self._leave(*opened.pop())
                here = shown + below[len(top) :]
                if one.is_directory:
                    opened.append((below, *self._folder(opened[-1][2], last, here, one)))
                else:
                    self.one(below, one, opened[-1][2], last, len(opened) - 1, here)
        finally:
            while opened:
                self._leave(*opened.pop())

    def one(self, path: str, entry: volumes.Entry, folder: int, name: str, depth: int, shown: str) -> None:
        """Anything but a directory; *depth* is how many directories of the copy it is below."""
        try:
            if entry.is_file:
                self._file(path, entry, folder, name, shown)
            elif entry.is_link:
                self._link(path, folder, name, depth, shown)
            else:
                self._skip(path, "devices, pipes and sockets are not copied")
        except TakenError:
            raise
        except (errors.CorruptError, errors.StateError) as error:
            self._skip(path, str(error))

    def _skip(self, path: str, why: str) -> None:
        self._report.problems.append(walk.Problem(path, why))

    def _folder(self, parent: int, name: str, shown: str, entry: volumes.Entry) -> tuple[volumes.Entry | None, int]:
        """The directory, opened; with the entry whose mode and times it gets at last, None if it was there."""
        made: volumes.Entry | None = entry
        with _saying(f"making {shown}"):
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not self._options.replace:
                    raise _taken(shown) from None
                made = None
            try:
                opened = os.open(name, _FOLDER, dir_fd=parent)
            except OSError as error:
                raise TakenError(f"{shown} is there and is no directory; remove it first") from error
        self._report.directories += 1
        return made, opened

    def _leave(self, _path: str, entry: volumes.Entry | None, folder: int) -> None:
        try:
            if entry is None:
                return
            os.fchmod(folder, _mode(entry) | stat.S_IRWXU)
            os.utime(folder, ns=_times(entry))
        except OSError:
            return  # a file system that keeps neither
        finally:
            os.close(folder)

    def _file(self, path: str, entry: volumes.Entry, folder: int, name: str, shown: str) -> None:
        source = self._volume.open(path)
        with _saying(f"writing {shown}"):
            descriptor = self._create(folder, name, shown)
            try:
                self._fill(descriptor, source, shown)
                os.fchmod(descriptor, _mode(entry))
                os.utime(descriptor, ns=_times(entry))
            except BaseException:
                os.unlink(name, dir_fd=folder)
                raise
            finally:
                os.close(descriptor)
        self._report.files += 1

    def _create(self, folder: int, name: str, shown: str) -> int:
        try:
            return os.open(name, _FILE, 0o600, dir_fd=folder)
        except FileExistsError:
            if not self._options.replace:
                raise _taken(shown) from None
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError as error:
            raise TakenError(f"{shown} is a directory; remove it first") from error
        return os.open(name, _FILE, 0o600, dir_fd=folder)

    def _fill(self, descriptor: int, source: sources.Source, shown: str) -> None:
        for offset, length in _data(source):
            for start in range(offset, offset + length, _READ):
                data = source.read(start, min(_READ, offset + length - start))
                _write(descriptor, start, data)
                self._report.bytes += len(data)
                self._progress(self._report.bytes, None)
        os.ftruncate(descriptor, source.size)

    def _link(self, path: str, folder: int, name: str, depth: int, shown: str) -> None:
        target = self._volume.readlink(path)
        if self._options.links is Links.NONE:
            return
        if self._options.links is Links.INSIDE and not stays_inside(target, depth):
            self._skip(path, f"the link leads out of what is copied ({target!r:.200}); --links all copies it")
            return
        with _saying(f"making the link {shown}"):
            try:
                os.symlink(target, name, dir_fd=folder)
            except FileExistsError:
                if not self._options.replace:
                    raise _taken(shown) from None
                os.unlink(name, dir_fd=folder)
                os.symlink(target, name, dir_fd=folder)
        self._report.links += 1


def stays_inside(target: str, depth: int) -> bool:
    """Whether a relative link in a directory *depth* below the top leads nowhere above it, by its text alone.

    ``a/../..`` may be higher than it looks when ``a`` is a link, so ``..`` is believed only at the beginning.
    """
    if target.startswith("/") or not target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = 0
    while up < len(parts) and parts[up] == "..":
        up += 1
    return up < depth and ".." not in parts[up:]


def _data(source: sources.Source) -> Iterator[tuple[int, int]]:
    """The ranges that are not holes."""
    if isinstance(source, sources.Runs):
        yield from ((offset, length) for offset, length, hole in source.extents(0, source.size) if not hole)
    elif source.size:
        yield 0, source.size


def _write(descriptor: int, offset: int, data: bytes) -> None:
    """Write *data*, leaving out blocks of zeros (the file is new: they are holes)."""
    view = memoryview(data)
    for at in range(0, len(data), _BLOCK):
        block = view[at : at + _BLOCK]
        if bytes(block) == _ZERO[: len(block)]:
            continue
        while block:
            done = os.pwrite(descriptor, block, offset + at)
            block, at = block[done:], at + done


def _mode(entry: volumes.Entry) -> int:
    return entry.mode & 0o777 & ~_umask()


def _umask() -> int:
    """The umask; it can only be read by setting it (or from /proc, which races with nobody)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def _times(entry: volumes.Entry) -> tuple[int, int]:
    """Access and modification time, within what the host can keep."""
    low, high = -(1 << 31) * 10**9, (1 << 33) * 10**9
    return min(max(entry.atime_ns, low), high), min(max(entry.mtime_ns, low), high)


def _taken(shown: str) -> TakenError:
    return TakenError(f"{shown} is there already; choose another place, or add --replace")


@contextmanager
def _saying(doing: str) -> Iterator[None]:
    """Give an OSError of the host the file's name."""
    try:
        yield
    except OSError as error:
        raise errors.from_os_error(error, doing) from error

"""The file systems on a disk of a checkpoint, and the guest's files in them.  No mount, no root, no loop device.

``filesystems(source)`` names what is on a disk: one :class:`Volume` for each partition that holds something known,
``"1"``, ``"2"``; for each logical volume, ``"vg-lv"``; ``""`` for a disk without a table.  A volume's files are
read by a process of its own (:mod:`blkckpt.view.parser`), started with the first question and confined; the bytes
of a file come straight from the source wherever the file system keeps them as they are, in any number of threads.

Paths are absolute within the volume; nothing follows a symbolic link but :meth:`Volume.resolve`, which stays inside.
Errors: NotFoundError (with ENOTDIR where it is that), InputError (EISDIR: not a regular file), CorruptError for a
damaged or made-up file system, StateError for what is recognised but cannot be read, MissingError when the optional
extra ``files`` is not installed.

What is read is what is on the disk.  In a checkpoint of a running guest that is what its kernel had written by then:
of ext3 and ext4 with what is in the journal (:mod:`blkckpt.view.jbd2`), as a mount would see it; the logs of XFS, Btrfs
and NTFS are not replayed, and what was in the page cache is not seen (``checkpoint --guest-agent`` has the guest
write all of it first).
"""

from __future__ import annotations

import errno
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from blkckpt import errors
from blkckpt.view import parsing, partitions, probe
from blkckpt.view import source as sources

HINT = "install blkckpt's extra 'files' (pip install 'blkckpt[files]') to read the files of guests"

MAX_LINKS = 40
"""Symbolic links followed for one path, as Linux has it."""

SECONDS = 20.0
"""Processor time a parser has for one question: a directory of 100,000 names takes a third of it."""

_END = 5.0
"""Seconds a parser has to end after its pipe was closed, before it is killed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the guest, of any kind.  Times are ns since 1970; names and numbers were written by the guest."""

    name: str
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    atime_ns: int
    uid: int
    gid: int
    inode: int
    links: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Volume:
    """One file system.  Thread-safe.  *problem* says why its files cannot be read, if that is known beforehand."""

    def __init__(self, name: str, found: probe.Found, source: sources.Source, problem: str = "") -> None:
        self.name, self.kind, self.label, self.source = name, found.kind, found.label, source
        self.problem = problem or probe.UNREADABLE.get(found.kind, "")
        self._parser: Parser | None = None
        self._lock = threading.RLock()

    def stat(self, path: str) -> Entry:
        """The file *path* itself, be it a symbolic link."""
        return Entry(*self._ask("stat", path, path=_normal(path)))

    def list(self, path: str) -> list[Entry]:
        """What is in the directory *path*, by name, without ``.`` and ``..``."""
        return [Entry(*one) for one in self._ask("list", path, path=_normal(path))]

    def readlink(self, path: str) -> str:
        """Where the symbolic link *path* leads, as the guest wrote it."""
        return str(self._ask("link", path, path=_normal(path)))

    def open(self, path: str) -> sources.Source:
        """The contents of the regular file *path*: a :class:`sources.Runs` over the volume, or one that is unpacked."""
        place = self._ask("map", path, path=_normal(path))
        size, runs = place["size"], place["runs"]
        if runs is not None:
            return sources.Runs(self.source, ((None if at is None else at, length) for at, length in runs), size)
        return Unpacked(self, _normal(path), size)

    def resolve(self, path: str) -> str:
        """*path* with every symbolic link and ``..`` followed inside of this volume; NotFoundError if that fails."""
        todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        done: list[str] = []
        left = MAX_LINKS
        while todo:
            part = todo.pop()
            if part == "..":
                del done[-1:]
                continue
            here = "/" + "/".join([*done, part])
            if not self.stat(here).is_link:
                done.append(part)
                continue
            left -= 1
            if left < 0:
                raise _not_found(f"{here}: too many symbolic links", errno.ELOOP)
            target = self.readlink(here)
            if target.startswith("/"):
                done = []
            todo += [one for one in reversed(target.split("/")) if one not in ("", ".")]
        return "/" + "/".join(done)

    def close(self) -> None:
        """End the parser; the next question starts another."""
        with self._lock:
            if self._parser is not None:
                self._parser.close()
                self._parser = None

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a file that is not kept as it is (compressed, or inside its inode); for :class:`Unpacked`."""
        return self._exchange("read", path, {"path": path, "offset": offset, "length": length})[1]

    def _ask(self, question: str, where: str, **what: Any) -> Any:
        return self._exchange(question, where, what)[0]

    def _exchange(self, question: str, where: str, what: dict[str, Any]) -> tuple[Any, bytes]:
        with self._lock:
            if self.problem:
                raise errors.StateError(f"the files of {self} cannot be read: {self.problem}")
            try:
                if self._parser is None or self._parser.gone:
                    self._parser = Parser(self.source)
                    self._parser.ask("open", {"kind": self.kind, "size": self.source.size})
                return self._parser.ask(question, what)
            except FailedError as failed:
                if question == "open" or failed.kind == "missing":
                    self.close()
                raise self._error(failed, where) from failed

    def _error(self, failed: FailedError, where: str) -> errors.BlkckptError:
        if failed.kind == "missing":
            return errors.MissingError(f"{HINT} ({failed.why} is not there)")
        if failed.kind == "nothing":
            return errors.NotFoundError(f"there is no {where} on {self}")
        if failed.kind == "no-directory":
            return _not_found(f"{where} on {self} is not a directory", errno.ENOTDIR)
        if failed.kind == "no-file":
            error = errors.InputError(f"{where} on {self} is not a file of that kind")
            error.errno = errno.EISDIR
            return error
        if failed.kind == "unsupported":
            return errors.StateError(f"{where} on {self} cannot be read: {failed.why}")
        return errors.CorruptError(f"{where} on {self} cannot be read, the file system is damaged: {failed.why}")

    def __str__(self) -> str:
        return f"volume {self.name} ({self.kind})" if self.name else f"the disk's {self.kind}"


class Unpacked:
    """A file whose bytes the parser has to make."""

    def __init__(self, volume: Volume, path: str, size: int) -> None:
        self._volume, self._path, self.size = volume, path, size

    def read(self, offset: int, length: int) -> bytes:
        end, parts = min(offset + length, self.size), []
        while offset < end:
            part = self._volume.read(self._path, offset, min(end - offset, parsing.READ_LIMIT))
            if not part:
                raise errors.CorruptError(f"{self._path} on {self._volume} ends at {offset}, not at {self.size}")
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class FailedError(Exception):
    """The parser's answer that there is none."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind, self.why = kind, why


class Parser:
    """A parser process and the volume it may ask about.  One question at a time."""

    def __init__(self, source: sources.Source) -> None:
        self._source = source
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "blkckpt.view.parser", str(SECONDS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise errors.from_os_error(error, "starting the reader of guest files") from error

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def ask(self, question: str, what: dict[str, Any]) -> tuple[Any, bytes]:
        """The answer; :class:`FailedError` if it is none, or if the parser died of the question."""
        assert self._process.stdin and self._process.stdout
        try:
            parsing.send(self._process.stdin, {"do": question, **what})
            while True:
                message, data = parsing.receive(self._process.stdout)
                if "read" not in message:
                    break
                self._serve(*message["read"])
        except (EOFError, OSError) as error:
            self.close()
            raise FailedError("damaged", "the process that read it died") from error
        except BaseException:  # the exchange is torn: what comes next would answer another question
            self.close()
            raise
        if "failed" in message:
            raise FailedError(str(message["failed"]), str(message.get("why", "")))
        return message.get("done"), data

    def _serve(self, offset: int, length: int) -> None:
        assert self._process.stdin
        if not 0 <= length <= parsing.READ_LIMIT or offset < 0:
            raise EOFError("the parser asks for what it may not")
        parsing.send(self._process.stdin, {}, self._source.read(offset, length))

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was buffered finds nobody
                    continue
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):  # else it was not started
            self.close()


class Volumes:
    """The volumes of one disk; a context manager that ends their parsers."""

    def __init__(self, source: sources.Source) -> None:
        self.all = filesystems(source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for volume in self.all:
            volume.close()


def filesystems(source: sources.Source) -> list[Volume]:
    """Every volume of a disk on which something is recognised, in the order of the partition table.

    Reads a few sectors; starts a parser only for LVM.  Without the extra ``files`` an LVM partition is one volume
    whose *problem* says so.
    """
    whole = probe.probe(source)
    if whole is not None and whole.kind != "raid":
        return list(_volumes("", whole, source))
    found: list[Volume] = []
    for partition in partitions.partitions(source):
        part = sources.Window(source, partition.offset, partition.length)
        known = probe.probe(part) if partition.kind != "extended" else None
        if known is not None:
            found += _volumes(str(partition.number), known, part)
    return found


def _volumes(name: str, found: probe.Found, source: sources.Source) -> Iterator[Volume]:
    if found.kind != probe.LVM:
        yield Volume(name, found, source)
        return
    parser = Parser(source)
    try:
        logical = parser.ask("lvm", {"size": source.size})[0]
    except FailedError as failed:
        yield Volume(name, found, source, HINT if failed.kind == "missing" else f"its LVM is damaged: {failed.why}")
        return
    finally:
        parser.close()
    for one in logical:
        yield _logical(str(one["name"]), one, source)


def _logical(name: str, one: dict[str, Any], source: sources.Source) -> Volume:
    if "problem" in one:
        return Volume(name, probe.Found(probe.LVM, ""), source, str(one["problem"]))
    size = sum(length for _, length in one["runs"])
    inner = sources.Runs(source, ((at, length) for at, length in one["runs"]), size)
    known = probe.probe(inner)
    if known is None:
        return Volume(name, probe.Found("unknown", ""), inner, "nothing known is on it")
    return Volume(name, known, inner)


def _normal(path: str) -> str:
    """``""`` for the root, else ``/a/b``; InputError for ``.``, ``..`` and what no path can hold."""
    parts = [part for part in path.split("/") if part]
    if any(part in (".", "..") or "\0" in part for part in parts):
        raise errors.InputError(f"{path!r} is not an absolute path without '.' and '..'")
    return "".join(f"/{part}" for part in parts)


def _not_found(text: str, number: int) -> errors.NotFoundError:
    error = errors.NotFoundError(text)
    error.errno = number
    return error

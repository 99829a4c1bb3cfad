"""The parser process: reads a guest's file system for another process, and can do nothing else.

Guests are hostile, and the libraries that parse their file systems bound neither time nor memory: a directory tree
that leads back into itself, a compressed block that unfolds to gigabytes.  So they run here, in a process with

* a bound of address space (:data:`MEMORY`): what asks for more gets a MemoryError, which is an answer, "damaged";
* a bound of processor time for each question (its argument, seconds), by a timer that raises in the middle of any loop;
* no file to write, no core dump, and no access to the store: it asks its client for the bytes of the volume.

It ends when its client has gone (end of file on standard input).  Protocol: :mod:`blkckpt.view.parsing`.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
from collections import OrderedDict
from types import FrameType
from typing import Any, BinaryIO

from blkckpt.view import guestfs, parsing

MEMORY = 1 << 30
"""Bytes of address space.  Listing a directory of a million names takes half of it."""

_LINE = 64 << 10
_LINES = 1024
"""The volume is read and kept in lines of 64 KiB (a chunk of the store), 64 MiB of them at most."""

_NAMES = 200_000
"""Names of listed directories that are kept."""


class TooLongError(Exception):
    """The question took more processor time than it may."""


class Volume:
    """The volume as a binary file: seek, tell, read.  Asks the client for what it has not."""

    def __init__(self, pipe: Pipe, size: int) -> None:
        self.size = size
        self._pipe = pipe
        self._position = 0
        self._lines: OrderedDict[int, bytes] = OrderedDict()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + position < 0:
            raise ValueError("a position before the beginning of the volume")
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, length: int = -1) -> bytes:
        end = self.size if length is None or length < 0 else min(self._position + length, self.size)
        parts = []
        while self._position < end:
            line, skip = divmod(self._position, _LINE)
            part = self._line(line)[skip : skip + end - self._position]
            parts.append(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _line(self, line: int) -> bytes:
        data = self._lines.get(line)
        if data is None:
            data = self._lines[line] = self._pipe.ask(line * _LINE, min(_LINE, self.size - line * _LINE))
            if len(self._lines) > _LINES:
                self._lines.popitem(last=False)
        else:
            self._lines.move_to_end(line)
        return data


class Pipe:
    """The two ends to the client."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink

    def ask(self, offset: int, length: int) -> bytes:
        """Bytes of the volume.  The timer is held: a reply half read would be lost."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        try:
            parsing.send(self._sink, {"read": [offset, length]})
            message, data = parsing.receive(self._source)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if len(data) != length:
            raise OSError(str(message.get("why", "the volume cannot be read there")))
        return data

    def question(self) -> dict[str, Any]:
        return parsing.receive(self._source)[0]

    def answer(self, message: dict[str, Any], data: bytes = b"") -> None:
        parsing.send(self._sink, message, data)


class Parser:
    """Answers questions about one volume."""

    def __init__(self, pipe: Pipe, seconds: float) -> None:
        self.seconds = seconds
        self._pipe = pipe
        self._listed: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._names = 0
        self._opened: tuple[str, Any] | None = None
        self._fs: guestfs.FileSystem

    def open(self, kind: str, size: int) -> None:
        self._fs = guestfs.open_filesystem(kind, Volume(self._pipe, size))

    def lvm(self, size: int) -> list[dict[str, Any]]:
        return guestfs.logical_volumes(Volume(self._pipe, size))

    def stat(self, path: str) -> list[Any]:
        return [path.rsplit("/", 1)[-1], *self._fs.stat(self._node(path))]

    def list(self, path: str) -> list[list[Any]]:
        return [[name, *self._fs.stat(node)] for name, node in sorted(self._children(path).items())]

    def link(self, path: str) -> str:
        node = self._node(path)
        mode, size = self._fs.stat(node)[:2]
        if not stat.S_ISLNK(mode):
            raise IsADirectoryError(path)
        if size > guestfs.MAX_LINK:
            raise guestfs.DamagedError(f"a symbolic link cannot have {size} bytes")
        return self._fs.link(node)

    def map(self, path: str) -> dict[str, Any]:
        node = self._regular(path)
        runs = self._fs.runs(node)
        if runs is not None and len(runs) > parsing.LIMIT // 64:
            raise guestfs.DamagedError(f"a file cannot have {len(runs)} runs")
        return {"size": self._fs.stat(node)[1], "runs": runs}

    def read(self, path: str, offset: int, length: int) -> bytes:
        if self._opened is None or self._opened[0] != path:
            self._opened = path, self._fs.open(self._regular(path))
        stream = self._opened[1]
        stream.seek(offset)
        return bytes(stream.read(min(length, parsing.READ_LIMIT)))

    def _regular(self, path: str) -> Any:
        node = self._node(path)
        if not stat.S_ISREG(self._fs.stat(node)[0]):
            raise IsADirectoryError(path)
        return node

    def _node(self, path: str) -> Any:
        parent, _, name = path.rpartition("/")
        if not name:
            return self._fs.root
        found = self._children(parent)
        if name in found:
            return found[name]
        if self._fs.folds_case:
            for other, node in found.items():
                if other.casefold() == name.casefold():
                    return node
        raise FileNotFoundError(path)

    def _children(self, path: str) -> dict[str, Any]:
        """The directory *path* (``""`` is the root), from what was listed lately if it can be."""
        path = path.rstrip("/")
        found = self._listed.get(path)
        if found is not None:
            self._listed.move_to_end(path)
            return found
        node = self._node(path)
        if not stat.S_ISDIR(self._fs.stat(node)[0]):
            raise NotADirectoryError(path)
        found = {name: child for name, child in self._fs.children(node) if guestfs.is_name(name)}
        self._listed[path] = found
        self._names += len(found)
        while self._names > _NAMES and len(self._listed) > 1:
            self._names -= len(self._listed.popitem(last=False)[1])
        return found


QUESTIONS = ("open", "lvm", "stat", "list", "link", "map", "read")


def answer(parser: Parser, question: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The answer to one question; every failure is one, too."""
    name = question.pop("do", None)
    if name not in QUESTIONS:
        return _failed("damaged", f"no such question: {name!r:.40}")
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, parser.seconds)
            result = getattr(parser, name)(**question)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except ModuleNotFoundError as error:
        return _failed("missing", str(error.name))
    except FileNotFoundError:
        return _failed("nothing", "")
    except NotADirectoryError:
        return _failed("no-directory", "")
    except IsADirectoryError:
        return _failed("no-file", "")
    except (guestfs.UnsupportedError, NotImplementedError) as error:
        return _failed("unsupported", str(error))
    except TooLongError:
        return _failed("damaged", f"reading it took longer than {parser.seconds:.0f} s of processor time")
    except MemoryError:
        return _failed("damaged", "reading it takes more memory than any file system should")
    except Exception as error:  # the libraries raise anything on what they did not expect
        return _failed("damaged", f"{type(error).__name__}: {error}"[:200])
    return ({"done": None}, result) if isinstance(result, bytes) else ({"done": result}, b"")


def _failed(kind: str, why: str) -> tuple[dict[str, Any], bytes]:
    return {"failed": kind, "why": why}, b""


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise TooLongError


def confine() -> None:
    """Give up what parsing does not need."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_long)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's; its end is ours


def main() -> None:
    """Serve standard input and output until the client has gone."""
    confine()
    pipe = Pipe(sys.stdin.buffer, sys.stdout.buffer)
    parser = Parser(pipe, float(sys.argv[1]))
    while True:
        try:
            pipe.answer(*answer(parser, pipe.question()))
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()

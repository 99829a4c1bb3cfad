"""FUSE: nothing but translation between the kernel's requests and :mod:`blkckpt.view.tree`.

The binding is mfusepy, libfuse's high-level interface through ctypes.  Its ``FUSE`` class is extended where the binding
has no method of its own, each time by the form that its neighbours have: ``lseek`` (holes), ``readdir`` with attributes
(one request for a directory instead of one for each entry) and ``read`` (pieces go to the kernel's buffer without being
joined, the path is not looked up).

Caching by the kernel.  Files do not change, so their pages are kept from one open to the next, unless the path was
another file at the last open: a checkpoint may be removed and another one get its name.  While the old one is still
open the two would share pages, so the new one is read past the page cache (``direct_io``); and so is a manifest,
which may be amended: the kernel would cut the new one to the size it knew.  Names are believed for a second.

Errors.  What is damaged is EIO and a line in the log that names the chunk; never bytes that are not the checkpoint's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import signal
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")  # before the import: the binding loads the library there

import mfusepy

from blkckpt import errors, log
from blkckpt.view import content, held, nodes, touched, tree

TYPE = "blkckpt"
"""The file system's type is ``fuse.blkckpt``."""

BLOCK_SIZE = 128 << 10
"""``st_blksize``: what ``cp`` and ``cat`` read at once; the kernel reads ahead as much."""

_FILL_PLUS = 2
_WANT_PLUS = 1
_CACHED = 1 << 16
"""Paths whose last file is remembered; the pages of one that is not are read anew."""

_SAID = 256
_REPEAT_SECONDS = 60.0

logger = log.get(__name__)


@dataclass(slots=True)
class _Handle:
    """An open file or directory."""

    path: str
    node: nodes.Node
    data: content.Content
    cursor: content.Cursor
    notes: touched.Notes | None = None


@dataclass(slots=True)
class _Listing:
    """An open directory: what it is, and once they have been asked for its names and what finds their attributes."""

    node: nodes.Directory
    names: list[str] | None = None
    look: Callable[[str], nodes.Node] | None = None


def ignore(count: int) -> None:
    """Nobody wants to know how many files are open."""


class Operations(mfusepy.Operations):  # type: ignore[misc]
    """The requests.  Called from libfuse's threads, several at a time."""

    use_ns = True
    flag_nopath = True
    flag_nullpath_ok = True

    def __init__(
        self,
        root: tree.Tree,
        pins: held.Held,
        ready: Callable[[], None],
        *,
        shared: bool = False,
        changed: Callable[[int], None] = ignore,
        first: touched.First | None = None,
    ) -> None:
        """*changed* is told how many files are open whenever that changes; *first* of images and what is read first."""
        self._first = first
        self._tree, self._pins, self._ready, self._changed = root, pins, ready, changed
        self._owner = (os.getuid(), os.getgid())
        self._rights = (0o444, 0o555) if shared else (0o400, 0o500)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.handles: dict[int, _Handle] = {}
        self._directories: dict[int, _Listing] = {}
        self._open: Counter[tuple[str, str]] = Counter()
        self._cached: OrderedDict[str, str] = OrderedDict()
        self._said: dict[str, float] = {}

    def init_with_config(self, conn_info: Any, config: Any) -> None:
        """The mount is usable from now on."""
        self._ready()

    # --- names

    def look(self, path: str | None, number: int | None) -> nodes.Attributes:
        """The attributes of a path, or of what is open under *number* if there is none."""
        try:
            if path is None and number is not None:
                opened = self.handles.get(number)
                if opened is not None:
                    return opened.node.attributes()
            return self._find(path).attributes()
        except errors.BlkckptError as error:
            raise self._translated(path, error) from error

    getattr = look
    """The binding looks for a callback of this name; what it calls is :meth:`_Fuse.getattr_fuse_3`."""

    def fill(self, entry: Any, found: nodes.Attributes, before: nodes.Attributes | None = None) -> None:
        """Put *found* into a ``struct stat``, whatever was in it, or what *before* put there."""
        mode = found.mode
        if found.owner is None:
            if not stat.S_ISLNK(mode):
                mode = stat.S_IFMT(mode) | self._rights[stat.S_ISDIR(mode)]
            entry.st_uid, entry.st_gid = self._owner
        else:
            entry.st_uid, entry.st_gid = found.owner
        entry.st_mode, entry.st_size, entry.st_blocks = mode, found.size, -(-found.used // 512)
        if before is not None and before.changed_ns == found.changed_ns:
            return
        entry.st_nlink, entry.st_blksize = 1, BLOCK_SIZE
        seconds, rest = divmod(found.changed_ns, 10**9)
        for when in (entry.st_atimespec, entry.st_mtimespec, entry.st_ctimespec):
            when.tv_sec, when.tv_nsec = seconds, rest

    def readlink(self, path: str) -> str:
        with self._errors(path):
            node = self._find(path)
            if not isinstance(node, nodes.Link):
                raise OSError(errno.EINVAL, "not a link")
            return node.target

    def opendir(self, path: str) -> int:
        try:
            node = self._find(path)
        except errors.BlkckptError as error:
            raise self._translated(path, error) from error
        if not nodes.is_directory(node):
            raise OSError(errno.ENOTDIR, "not a directory")
        number = next(self._numbers)
        self._directories[number] = _Listing(node)
        return number

    def readdir(self, path: str | None, fh: int) -> Any:
        with self._errors(path):
            return list(self._directories[fh].node.names())

    def entries(self, number: int, offset: int, *, plus: bool) -> Iterator[tuple[str, nodes.Attributes | None]]:
        """The names in an open directory from number *offset* on, as they were when it was first read.

        *plus*: with their attributes; None for what cannot be looked at.
        """
        listing = self._directories[number]
        if listing.names is None or not offset:  # the kernel asks until there is nothing more
            with self._errors(None):
                listing.names, listing.look = nodes.listing(listing.node)
        assert listing.look is not None
        for name in listing.names[offset:] if offset else listing.names:
            yield name, self._quietly(listing.look, name) if plus else None

    def _quietly(self, look: Callable[[str], nodes.Node], name: str) -> nodes.Attributes | None:
        try:
            return look(name).attributes()
        except errors.BlkckptError as error:
            self._tell(name, error)
            return None

    def releasedir(self, path: str | None, fh: int) -> int:
        self._directories.pop(fh, None)
        return 0

    def _find(self, path: str | None) -> nodes.Node:
        if path is None:
            raise OSError(errno.EBADF, "no such handle")
        return self._tree.find(path)

    # --- contents

    def open(self, path: str, flags: Any) -> int:
        """*flags* is the whole ``fuse_file_info``, into which the handle's number goes."""
        with self._errors(path):
            node = self._find(path)
            if not isinstance(node, nodes.File):
                raise OSError(errno.EISDIR if nodes.is_directory(node) else errno.EINVAL, "not a file")
            opened = node.open()
            if node.store is not None and opened.images:
                self._pins.take(node.store, opened.images)
            number = next(self._numbers)
            with self._lock:
                others = any(where == path and what != node.identity for where, what in self._open)
                self._open[path, node.identity] += 1
                if not others and not node.volatile:
                    flags.keep_cache = self._cached.pop(path, None) == node.identity
                    self._cached[path] = node.identity
                    if len(self._cached) > _CACHED:
                        self._cached.popitem(last=False)
                else:
                    flags.direct_io = 1
            notes = None
            if self._first is not None and isinstance(opened, content.Image):
                notes = self._first.opened(node.identity, opened.ahead_of)
            self.handles[number] = _Handle(path, node, opened, content.Cursor(opened), notes)
            flags.fh = number
            self._changed(len(self.handles))
            return 0

    def read_pieces(self, number: int, size: int, offset: int) -> list[bytes]:
        """The bytes of an open file, fewer than *size* at its end."""
        try:
            handle = self.handles[number]
            data = handle.data
            length = min(size, data.size - offset)
            if length <= 0:
                return []
            handle.cursor.note(offset, length)
            if handle.notes is not None:
                handle.notes.note(offset, length)
            return data.pieces(offset, length)
        except errors.BlkckptError as error:
            raise self._translated(self.handles[number].path, error) from error

    def read(self, path: str | None, size: int, offset: int, fh: Any) -> bytes:
        return b"".join(self.read_pieces(fh.fh, size, offset))

    def seek(self, number: int, offset: int, whence: int) -> int:
        """``SEEK_DATA`` and ``SEEK_HOLE``."""
        with self._errors(None):
            data = self.handles[number].data
            if offset >= data.size:
                raise OSError(errno.ENXIO, "beyond the end")
            if whence == os.SEEK_HOLE:
                return data.hole_at(offset)
            if whence != os.SEEK_DATA:
                raise OSError(errno.EINVAL, "the kernel does the others itself")
            found = data.data_at(offset)
            if found is None:
                raise OSError(errno.ENXIO, "no data from here on")
            return found

    lseek = seek
    """The binding looks for a callback of this name; what it calls is :meth:`_Fuse.lseek`."""

    def release(self, path: str | None, fh: Any) -> int:
        handle = self.handles.pop(fh.fh, None)
        if handle is None or not isinstance(handle.node, nodes.File):
            return 0
        node = handle.node
        if handle.notes is not None:
            handle.notes.close()
        with self._lock:
            self._open[handle.path, node.identity] -= 1
            if not self._open[handle.path, node.identity]:
                del self._open[handle.path, node.identity]
        if node.store is not None and handle.data.images:
            self._pins.release(node.store, handle.data.images)
        self._changed(len(self.handles))
        return 0

    # --- errors

    @contextlib.contextmanager
    def _errors(self, path: str | None) -> Any:
        try:
            yield
        except errors.BlkckptError as error:
            raise self._translated(path, error) from error

    def _translated(self, path: str | None, error: errors.BlkckptError) -> OSError:
        if not isinstance(error, errors.NotFoundError):
            self._tell(path, error)
        return OSError(error.errno, str(error))

    def _tell(self, path: str | None, error: errors.BlkckptError) -> None:
        """One line in the log; the same again after a minute at the earliest (kernels read again what failed)."""
        text, now = str(error), time.monotonic()
        with self._lock:
            if now - self._said.get(text, float("-inf")) < _REPEAT_SECONDS:
                return
            self._said[text] = now
            while len(self._said) > _SAID:
                del self._said[next(iter(self._said))]
        logger.error("cannot be read", extra={"fields": {"file": path, "error": text}})


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """The binding, with what it lacks."""

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        pieces = self.operations.read_pieces(fip.contents.fh, size, offset)
        if len(pieces) == 1:
            ctypes.memmove(buf, pieces[0], len(pieces[0]))
            return len(pieces[0])
        address = ctypes.cast(buf, ctypes.c_void_p).value or 0
        done = 0
        for piece in pieces:
            ctypes.memmove(address + done, piece, len(piece))
            done += len(piece)
        return done

    def lseek(self, path: bytes | None, offset: int, whence: int, fip: Any) -> int:
        return int(self.operations.seek(fip.contents.fh, offset, whence))

    def getattr_fuse_3(self, path: bytes | None, buf: Any, fip: Any) -> int:
        text = None if path is None else path.decode(self.encoding, self.errors)
        self.operations.fill(buf.contents, self.operations.look(text, fip.contents.fh if fip else None))
        return 0

    def readdir_fuse_3(self, path: bytes | None, buf: Any, filler: Any, offset: int, fip: Any, flags: int) -> int:
        """From the entry after *offset* on, until the kernel's buffer is full.

        libfuse takes attributes only with entries that have offsets, by which it asks for the rest.
        """
        plus = bool(flags & _WANT_PLUS)
        stats = mfusepy.c_stat()  # libfuse copies what it is given
        before: nodes.Attributes | None = None
        for number, (name, found) in enumerate(self.operations.entries(fip.contents.fh, offset, plus=plus), offset + 1):
            text = name.encode(self.encoding, self.errors)
            if found is None:
                full = filler(buf, text, None, number, 0)
            else:
                self.operations.fill(stats, found, before)
                before = found
                full = filler(buf, text, stats, number, _FILL_PLUS)
            if full:
                break
        return 0


def run(
    directory: Path,
    name: str,
    operations: Operations,
    *,
    threads: bool = False,
    shared: bool = False,
    writable: bool = False,
) -> None:
    """Mount on *directory* and answer until it is unmounted or a stop signal comes.  Raises OSError or RuntimeError.

    *name* is what stands as the source in the list of mounts.  *writable* lets files be opened for writing, which then
    fails (QEMU opens what it maps privately so).  ``auto_unmount`` lets fusermount3 clear up after us if
    we are killed.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # libfuse takes those that nobody else has taken
        signal.signal(number, signal.SIG_DFL)
    _Fuse(
        operations,
        str(directory),
        raw_fi=True,
        foreground=True,
        nothreads=not threads,
        fsname=name,
        subtype=TYPE,
        ro=not writable,
        nosuid=True,
        nodev=True,
        auto_unmount=True,
        **({"allow_other": True} if shared else {}),
    )

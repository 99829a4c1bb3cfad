"""What the read-only NBD server serves: images of a store, by name.

``plugins/nbdkit_blkckpt_image.py`` is the adapter that nbdkit sees.  Parameters, each as often as stated:

============  ==================================================================
``store``     once: the directory of the store
``image``     once or more: ``NAME:IMAGE``, an export and what it shows
``site``      once: where blkckpt is installed (used by the adapter)
``stay``      ``1``: stay though the parent ends
============  ==================================================================

Every byte that is sent has had its hash checked; a damaged or missing chunk is EIO for the client and a line in the
log that names it (rules S3 and D10).  A request of some size is decoded by several threads: hashes, lz4 and file
reads release the interpreter lock, and a client with one connection (``qemu-img``) profits too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass

from blkckpt import errors, log, units
from blkckpt.exchange import inuse
from blkckpt.store import images, layout
from blkckpt.store import store as stores

PIECE = 256 << 10
"""What one thread decodes of a larger request: 4 chunks, 0.2 ms; handing it over costs 0.05."""

MAX_EXTENTS = 1 << 15
"""Extents of one answer: NBD clients ask again from where the answer ends."""

_PR_SET_PDEATHSIG = 1
HOLE, ZERO = 1, 2
"""``NBD_STATE_HOLE``, ``NBD_STATE_ZERO`` of ``base:allocation``."""

logger = log.get(__name__)


class Exports:
    """All exports of one server."""

    def __init__(self, parameters: Iterable[tuple[str, str]]) -> None:
        self._store, self._images, self._stay = _parse(parameters)
        self._stack = contextlib.ExitStack()
        self._exports: dict[str, Export] = {}

    def get_ready(self) -> None:
        """Open and pin the images.  Starts no thread."""
        log.setup(as_json=True)
        try:
            place = self._stack.enter_context(stores.Store.open(self._store))
            self._stack.enter_context(inuse.using(place, self._images.values(), "nbd"))
            readers = {name: place.image(image) for name, image in self._images.items()}
        except errors.BlkckptError as error:
            fatal = {"type": type(error).__name__, "message": str(error)}
            logger.error("the images cannot be served", extra={"fields": {"fatal": fatal}})
            raise
        workers = min(len(os.sched_getaffinity(0)), 8)
        pool = self._stack.enter_context(futures.ThreadPoolExecutor(workers, "blkckpt-decode"))  # threads at first use
        self._exports = {name: Export(name, reader, pool) for name, reader in readers.items()}

    def after_fork(self) -> None:
        """Take back what nbdkit does of itself with an inherited socket: that it ends with its parent."""
        if self._stay:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)

    def close(self) -> None:
        """Let go of everything; nbdkit has closed its connections."""
        self._stack.close()

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of every export."""
        return [(name, f"disk {name}, image {image}") for name, image in self._images.items()]

    def default(self) -> str:
        """The export meant by an empty name: the only one, else nothing is meant."""
        if len(self._images) != 1:
            raise errors.NotFoundError(f"there are {len(self._images)} exports: {', '.join(self._images)}")
        return next(iter(self._images))

    def find(self, name: str) -> Export:
        """The export called *name*: looked up, never made part of a path."""
        found = self._exports.get(name or self.default())
        if found is None:
            raise errors.NotFoundError(f"there is no export {name[:80]!r}")
        return found


def _parse(parameters: Iterable[tuple[str, str]]) -> tuple[str, dict[str, str], bool]:
    place, images_, stay = "", {}, False
    for key, value in parameters:
        if key == "store" and not place:
            place = value
        elif key == "image":
            name, _, image = value.rpartition(":")
            images_[units.check_name(name, "export name")] = layout.check_id(image)
        elif key == "stay":
            stay = value == "1"
        elif key != "site":
            raise errors.InputError(f"unknown or repeated parameter {key}=")
    if not place or not images_:
        raise errors.InputError("parameters store= and image= are needed; use `blkckpt nbd`")
    return place, images_, stay


@dataclass(frozen=True, slots=True)
class Export:
    """One image.  Thread-safe."""

    name: str
    reader: images.ImageReader
    pool: futures.Executor

    @property
    def size(self) -> int:
        return self.reader.size

    def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill *buffer*; nothing refers to it afterwards (rule D6)."""
        with memoryview(buffer) as view:
            parts = _parts(offset, len(view))
            if len(parts) == 1:
                self._read(view, offset, offset)
                return
            with contextlib.ExitStack() as stack:
                views = [stack.enter_context(view[start - offset : end - offset]) for start, end in parts]
                jobs = [
                    self.pool.submit(self._read, piece, start, start)
                    for piece, (start, _) in zip(views, parts, strict=True)
                ]
                futures.wait(jobs)
            for job in jobs:
                job.result()

    def _read(self, view: memoryview, start: int, offset: int) -> None:
        try:
            view[:] = self.reader.read(offset, len(view))
        except errors.BlkckptError as error:
            logger.error("read failed", extra={"fields": {"export": self.name, "offset": start, "error": str(error)}})
            raise

    def extents(self, count: int, offset: int, *, one: bool = False) -> list[tuple[int, int, int]]:
        """``(offset, length, NBD state)`` from the image's table, at least one, as much as fits an answer."""
        end = min(offset + count, self.size)
        found = itertools.islice(self.reader.extents(offset, end - offset), 1 if one else MAX_EXTENTS)
        return [(start, length, HOLE | ZERO if zero else 0) for start, length, zero in found]


def _parts(offset: int, length: int) -> Sequence[tuple[int, int]]:
    """``(start, end)`` of the pieces of a request, cut at multiples of PIECE."""
    if length < 2 * PIECE:
        return [(offset, offset + length)]
    first = offset - offset % PIECE
    starts = [offset, *range(first + PIECE, offset + length, PIECE)]
    return list(itertools.pairwise([*starts, offset + length]))


def wire_error(error: BaseException) -> int:
    """The errno that a client is told."""
    number = getattr(error, "errno", None)
    return number if number in (errno.ENOMEM, errno.EINVAL) else errno.EIO

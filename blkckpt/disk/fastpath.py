"""The interpreter's side of the fast path: the C library of ``plugins/fastpath``, by ctypes.

nbdkit has loaded the library as a filter; opening it once more by its path gives the same instance, so what is
published here is what the filter serves from.  Without :func:`use` (no filter, ``BLKCKPT_FAST_PATH=off``, most unit
tests) every function here answers ``None`` and nothing else is different.  The rules that both sides keep are F1 to
F9 in :mod:`blkckpt.disk`.

Every object wraps one of C's and keeps alive what that one points to.  Calls that return at once keep the interpreter
lock (letting go of it costs more than they do); only :meth:`Library.settle`, which waits, lets go of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blkckpt import errors

ABI = 2
NOTES = 1024
_POINTER, _U64, _U32, _INT, _BOOL = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_bool

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fp_abi": (_INT, ()),
    "fp_disk_new": (_POINTER, (ctypes.c_char_p, _U64)),
    "fp_disk_forget": (None, (_POINTER,)),
    "fp_publish": (None, (_POINTER, _POINTER)),
    "fp_exclude": (None, (_POINTER, _POINTER, _U32)),
    "fp_include": (None, (_POINTER, _POINTER, _U32)),
    "fp_watch": (None, (_POINTER, _POINTER, _U32)),
    "fp_noted": (_U32, (_POINTER, _POINTER, _U32)),
    "fp_unwatch": (None, (_POINTER, _POINTER, _U32)),
    "fp_counters": (None, (_POINTER, _POINTER)),
    "fp_file_new": (_POINTER, (_INT,)),
    "fp_file_free": (None, (_POINTER,)),
    "fp_file_take_dirty": (_INT, (_POINTER,)),
    "fp_file_fail": (None, (_POINTER,)),
    "fp_map_new": (_POINTER, (_POINTER, _U64, _POINTER)),
    "fp_map_durable": (None, (_POINTER, _POINTER, _POINTER, _U32)),
    "fp_map_free": (None, (_POINTER,)),
    "fp_map_set": (None, (_POINTER, _U64, _U64)),
    "fp_map_clear": (None, (_POINTER, _U64, _U64)),
    "fp_map_merge": (None, (_POINTER, _U64, _POINTER, _U64)),
    "fp_map_take": (_INT, (_POINTER, _U64)),
    "fp_view_new": (_POINTER, (_U64, _U32, _POINTER, _POINTER, _POINTER, _POINTER, _U32, _U32, _BOOL, _BOOL)),
    "fp_view_free": (None, (_POINTER,)),
}


class Library:
    """The loaded library.  ``c`` has its functions under their names (see ``core.h``)."""

    def __init__(self, path: Path) -> None:
        try:
            self.c = ctypes.PyDLL(str(path))
            self._waiting = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
            settle = self._waiting.fp_settle
        except (OSError, AttributeError) as error:
            raise errors.MissingError(f"the fast path {path} cannot be loaded: {error}") from error
        settle.restype, settle.argtypes = _INT, (ctypes.c_int64,)
        self._settle = settle
        if self.c.fp_abi() != ABI:
            raise errors.MissingError(f"the fast path {path} is of another version; build it again")
        self.path = path

    def settle(self, seconds: float) -> bool:
        """Whether every request of the fast path that was in flight at the call has left within *seconds* (F1)."""
        return bool(self._settle(int(seconds * 1e6)))

    def made(self, pointer: int | None) -> int:
        if not pointer:
            raise MemoryError("the fast path is out of memory")
        return pointer


_library: Library | None = None


def use(path: Path) -> Library:
    """From now on maps, files and disks are made for the fast path too.  Once, before any is opened."""
    global _library  # one filter a process, like nbdkit's own callbacks
    _library = Library(path)
    return _library


def library() -> Library | None:
    return _library


@contextlib.contextmanager
def used(path: Path) -> Iterator[Library]:
    """:func:`use` for a while, for tests."""
    global _library
    before = _library
    try:
        yield use(path)
    finally:
        _library = before


def settle() -> None:
    """Wait until what was in flight at the call has left, however long that takes; at once without a fast path."""
    if _library is not None:
        while not _library.settle(1.0):
            pass


class File:
    """What the fast path knows of an open file."""

    __slots__ = ("_free", "_library", "pointer")

    def __init__(self, library: Library, descriptor: int) -> None:
        self._library = library
        self._free = library.c.fp_file_free
        self.pointer = library.made(library.c.fp_file_new(descriptor))

    def take_dirty(self) -> bool:
        """Whether the fast path has changed the file since the last call."""
        return bool(self._library.c.fp_file_take_dirty(self.pointer))

    def fail(self) -> None:
        self._library.c.fp_file_fail(self.pointer)

    def __del__(self) -> None:
        self._free(self.pointer)


class Map:
    """A live map, every change of which goes through here (F8).  *bits*, *backed* and the like are shared."""

    __slots__ = ("_c", "_held", "pointer")

    def __init__(self, library: Library, bits: memoryview, blocks: int, backed: bytearray) -> None:
        self._c = library.c
        self._held = [_address_of(bits), _address_of(backed)]
        self.pointer = library.made(self._c.fp_map_new(*self._held[:1], blocks, self._held[1]))

    def attach(self, reserved: bytearray, dirty: bytearray, slot_blocks: int) -> None:
        """Follow a durable map: pages set or cleared are marked in *dirty*."""
        self._held += [_address_of(reserved), _address_of(dirty)]
        self._c.fp_map_durable(self.pointer, *self._held[-2:], slot_blocks)

    def set(self, first: int, end: int) -> None:
        self._c.fp_map_set(self.pointer, first, end)

    def clear(self, first: int, end: int) -> None:
        self._c.fp_map_clear(self.pointer, first, end)

    def merge(self, start: int, bits: bytes) -> None:
        """Or *bits* in from byte *start*; both are multiples of 8."""
        self._c.fp_map_merge(self.pointer, start // 8, ctypes.c_char_p(bits), len(bits) // 8)

    def take(self, slot: int) -> bool:
        """Whether durable page *slot* was dirty; it is not any more."""
        return bool(self._c.fp_map_take(self.pointer, slot))

    def __del__(self) -> None:
        self._c.fp_map_free(self.pointer)


def _address_of(buffer: memoryview | bytearray) -> Any:
    """A pointer to *buffer*, which stays where it is as long as the pointer lives."""
    return (ctypes.c_char * len(buffer)).from_buffer(buffer)


class View:
    """What a view looks like to the fast path; kept, with what it names, until a settle after it was replaced (F2)."""

    __slots__ = ("_free", "_held", "pointer")

    def __init__(
        self,
        library: Library,
        size: int,
        layers: Sequence[tuple[File, Map]],
        floor: File | None,
        changed: Map,
        *,
        target: int,
        bottom: int,
        commit: bool,
        armed: bool,
    ) -> None:
        self._held = (tuple(layers), floor, changed)
        self._free = library.c.fp_view_free
        files, maps = _pointers([file for file, _ in layers]), _pointers([bits for _, bits in layers])
        self.pointer = library.made(
            library.c.fp_view_new(
                size, len(layers), files, maps, floor and floor.pointer, changed.pointer, target, bottom, commit, armed
            )
        )

    def __del__(self) -> None:
        self._free(self.pointer)


def _pointers(objects: Sequence[File | Map]) -> Any:
    return (ctypes.c_void_p * len(objects))(*(item.pointer for item in objects))


def _flat(runs: Sequence[tuple[int, int]]) -> Any:
    return (ctypes.c_uint64 * (2 * len(runs)))(*itertools.chain.from_iterable(runs))


class Disk:
    """A disk as the filter finds it, by its export's name.  It stays known to C as long as the process lives."""

    def __init__(self, library: Library, name: str, size: int) -> None:
        self._library = library
        self.pointer = library.made(library.c.fp_disk_new(name.encode(), size))
        self._view: View | None = None
        self._retired: list[View] = []
        self._lock = threading.Lock()

    def publish(self, view: View | None) -> None:
        """Requests see *view* from now on; with ``None`` the plugin gets them all."""
        self._library.c.fp_publish(self.pointer, view and view.pointer)
        with self._lock:
            if self._view is not None:
                self._retired.append(self._view)
            self._view = view

    def settle(self, seconds: float) -> bool:
        """:meth:`Library.settle`; views replaced before are let go of when it succeeds."""
        with self._lock:
            retired, self._retired = self._retired, []
        settled = self._library.settle(seconds)
        if not settled:
            with self._lock:
                self._retired += retired
        return settled

    def exclude(self, runs: Sequence[tuple[int, int]]) -> Any:
        """Turn away writes to *runs* of blocks; :meth:`settle` before relying on it (F5).  Returns what to include."""
        flat = _flat(runs)
        self._library.c.fp_exclude(self.pointer, flat, len(runs))
        return flat

    def include(self, excluded: Any) -> None:
        self._library.c.fp_include(self.pointer, excluded, len(excluded) // 2)

    def watch(self, runs: Sequence[tuple[int, int]]) -> Any:
        """Note who writes to *runs*, once it has settled.  One at a time.  Returns what to stop watching."""
        flat = _flat(runs)
        self._library.c.fp_watch(self.pointer, flat, len(runs))
        return flat

    def noted(self) -> list[tuple[int, int]]:
        """The writes noted, and maybe some elsewhere.  Only while what is watched is excluded, and settled."""
        out = (ctypes.c_uint64 * (2 * NOTES))()
        count = self._library.c.fp_noted(self.pointer, out, NOTES)
        assert count <= NOTES, "the library notes more than it can tell"
        return list(zip(out[0 : 2 * count : 2], out[1 : 2 * count : 2], strict=True))

    def unwatch(self, watched: Any) -> None:
        self._library.c.fp_unwatch(self.pointer, watched, len(watched) // 2)

    def counters(self) -> tuple[int, int, int, int]:
        """Reads, writes, bytes read, bytes written by the fast path."""
        out = (ctypes.c_uint64 * 4)()
        self._library.c.fp_counters(self.pointer, out)
        return out[0], out[1], out[2], out[3]

    def forget(self) -> None:
        """No new connection finds it, and nothing is served any more.  Settle before closing files."""
        self.publish(None)
        self._library.c.fp_disk_forget(self.pointer)

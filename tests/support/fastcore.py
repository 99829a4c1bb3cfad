"""The fast path's core in the test's own process: built with its system calls hooked, as it is or with a seeded defect.

:class:`Fast` does to a disk's requests what the filter does: each is offered to the core, and what it passes on goes
to the interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blkckpt.agent import fastfilter
from blkckpt.disk import disk, fastpath

HERE = Path(__file__).parent / "fastpath"
READ, WRITE, ZERO, CACHED = range(4)
WAIT = 20.0
PATIENT = ("HOLD_NS = 100000;", "HOLD_NS = 60000000000;")
"""For ``wire.c``: what is held waits as long as a test needs."""
_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def build(directory: Path, defect: tuple[str, str] | None = None) -> Path:
    """Compile the core with the hooks; with *defect* its only ``defect[0]`` is replaced by ``defect[1]``."""
    library = directory / "core.so"
    _compile(library, "hooks.c", fastfilter.FLAGS, defect)
    return library


def build_stress(directory: Path, sanitizer: str, defect: tuple[str, str] | None = None) -> Path:
    """Compile the program of ``stress.c`` with *sanitizer* (see gcc's ``-fsanitize``)."""
    program = directory / "stress"
    _compile(program, "stress.c", sanitized(sanitizer), defect)
    return program


def sanitized(sanitizer: str) -> Sequence[str]:
    """The compiler's flags for a program with *sanitizer*."""
    checks = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    return ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-pthread", *checks)


def build_passing(directory: Path, defect: tuple[str, str] | None = None) -> Path:
    """Compile the program of ``passing.c``."""
    program = directory / "passing"
    source = _seeded("filter.c", directory, [] if defect is None else [defect]).parent
    flags = ("-std=c11", "-O1", "-g", "-pthread", f"-I{source}", f"-I{fastfilter.source()}")
    others = [fastfilter.source() / "core.c", _seeded("wire.c", directory, [PATIENT])]
    subprocess.run(["gcc", *flags, "-o", program, HERE / "passing.c", *others], check=True)
    return program


def compile_wire(
    target: Path, flags: Sequence[str], defects: Sequence[tuple[str, str]] = (), harness: str | None = None
) -> None:
    """Compile ``wire.c``, with *defects* in it, by itself or into the program *harness*."""
    sources = [_seeded("wire.c", target.parent, defects), *([] if harness is None else [HERE / harness])]
    subprocess.run(["gcc", *flags, "-Wno-unused", f"-I{fastfilter.source()}", "-o", target, *sources], check=True)


def _seeded(name: str, directory: Path, defects: Sequence[tuple[str, str]]) -> Path:
    """A copy of the source *name* in *directory* in which the only ``defect[0]`` is replaced by ``defect[1]``."""
    text = (fastfilter.source() / name).read_text()
    for defect in defects:
        assert text.count(defect[0]) == 1, f"{name} has changed; seed the defect anew: {defect[0]!r}"
        text = text.replace(*defect)
    copy = directory / name
    copy.write_text(text)
    return copy


def _compile(target: Path, harness: str, flags: Sequence[str], defect: tuple[str, str] | None) -> None:
    source, made = _seeded("core.c", target.parent, [] if defect is None else [defect]), target.with_name("core.o")
    common = ["gcc", *flags, f"-I{fastfilter.source()}", f"-I{HERE}"]
    strict = ["-Werror"] if defect is None else []
    subprocess.run([*common, *strict, "-c", "-DFASTPATH_CORE", "-include", "hooks.h", "-o", made, source], check=True)
    wire = _seeded("wire.c", target.parent, [PATIENT])
    subprocess.run([*common, "-Werror", "-o", target, made, wire, HERE / harness], check=True)


class Held:
    """A system call of the core that waits."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.released = threading.Event()

    def wait(self) -> None:
        assert self.arrived.wait(WAIT), "the call to be held did not come"


class Core:
    """A loaded library and the hook in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.fp_disk_find.restype = ctypes.c_void_p
        self.c.hammer.restype = ctypes.c_uint64
        for name in ("fp_read", "fp_write"):
            getattr(self.c, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64)
        self.c.fp_zero.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_bool)
        self.c.hammer.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
        self._judges: list[Callable[[int, int, int, int], int]] = []
        self._hook = _HOOK(self._ask)

    def _ask(self, kind: int, fd: int, offset: int, length: int) -> int:
        for judge in list(self._judges):
            if error := judge(kind, fd, offset, length):
                return error
        return 0

    @contextlib.contextmanager
    def asked(self, judge: Callable[[int, int, int, int], int]) -> Iterator[None]:
        """*judge* is asked ``(kind, fd, offset, length)`` before every system call; it answers an errno or 0."""
        self._judges.append(judge)
        self.c.hook(self._hook)
        try:
            yield
        finally:
            self.c.hook(None)
            self._judges.remove(judge)

    @contextlib.contextmanager
    def held(self, wanted: int, block: int) -> Iterator[Held]:
        """Hold the first call of kind *wanted* at *block*, at the latest until the block ends."""
        held = Held()

        def judge(kind: int, fd: int, offset: int, length: int) -> int:
            if kind == wanted and offset == block * 4096 and not held.arrived.is_set():
                held.arrived.set()
                assert held.released.wait(WAIT)
            return 0

        with self.asked(judge):
            try:
                yield held
            finally:
                held.released.set()


class Fast:
    """One disk under the filter."""

    def __init__(self, core: Core, behind: disk.Disk) -> None:
        self._core = core
        self._behind = behind
        self.pointer = core.c.fp_disk_find(behind.name.encode())
        assert self.pointer

    # What the core does of it: whether it was served.

    def read(self, buf: bytearray, offset: int) -> bool:
        return bool(self._core.c.fp_read(self.pointer, _buffer(buf), len(buf), offset))

    def write(self, data: bytes, offset: int) -> bool:
        return bool(self._core.c.fp_write(self.pointer, data, len(data), offset))

    def zero(self, count: int, offset: int, may_trim: bool = True) -> bool:
        return bool(self._core.c.fp_zero(self.pointer, count, offset, may_trim))

    # What the guest sees.

    def pread(self, buf: bytearray, offset: int) -> None:
        if not self.read(buf, offset):
            self._behind.pread(buf, offset)

    def pwrite(self, data: bytes, offset: int, fua: bool = False) -> None:
        if fua or not self.write(data, offset):
            self._behind.pwrite(data, offset, fua)

    def punch(self, count: int, offset: int, may_trim: bool = True) -> None:
        if not self.zero(count, offset, may_trim):
            self._behind.zero(count, offset, may_trim=may_trim)


def _buffer(buf: bytearray) -> Any:
    return (ctypes.c_char * len(buf)).from_buffer(buf)


def later(work: Callable[[], object]) -> tuple[threading.Event, list[Any]]:
    """Do *work* in a thread; an event for its end, and what it returned or raised."""
    done, result = threading.Event(), list[Any]()

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done, result


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[Core]:
    """Disks that are opened meanwhile have the core at *path*."""
    with fastpath.used(path):
        yield Core(path)

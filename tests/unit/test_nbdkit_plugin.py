"""The nbdkit adapter, loaded with a made-up ``nbdkit`` module: rules D6 and D10, flags, names, the search path."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.control import host

PLUGIN = Path(__file__).resolve().parents[2] / "plugins/nbdkit_blkckpt.py"


class Nbdkit(ModuleType):
    FLAG_MAY_TRIM, FLAG_FUA, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8
    FUA_NONE, FUA_EMULATE, FUA_NATIVE = 0, 1, 2
    CACHE_NONE, CACHE_EMULATE, CACHE_NATIVE = 0, 1, 2
    THREAD_MODEL_PARALLEL = 3

    def __init__(self) -> None:
        super().__init__("nbdkit")
        self.told: list[int] = []
        self.name = "vda"

    def set_error(self, number: int) -> None:
        self.told.append(number)

    def export_name(self) -> str:
        return self.name

    def shutdown(self) -> None: ...


class Disk:
    """Notes its calls; fails on demand, holding slices of the buffer as real code does."""

    size = 1 << 20
    name = "vda"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None

    def pread(self, buf: Any, offset: int, flags: int = 0) -> None:
        part = memoryview(buf)[1:]
        self.check()
        buf[:] = b"x" * len(buf)
        self.calls.append(("pread", len(part), offset))

    def pwrite(self, buf: Any, offset: int, fua: bool = False) -> None:
        part = memoryview(buf)[1:]
        self.check()
        self.calls.append(("pwrite", len(part), offset, fua))

    def zero(self, *arguments: Any) -> None:
        self.check()
        self.calls.append(("zero", *arguments))

    def trim(self, *arguments: Any) -> None:
        self.calls.append(("trim", *arguments))

    def flush(self) -> None:
        self.check()

    def extents(self, count: int, offset: int) -> Iterator[tuple[int, int, int]]:
        yield (offset, count, 0)
        self.check()

    def check(self) -> None:
        if self.error:
            raise self.error


@pytest.fixture
def nbdkit(monkeypatch: pytest.MonkeyPatch) -> Nbdkit:
    module = Nbdkit()
    monkeypatch.setitem(sys.modules, "nbdkit", module)
    return module


@pytest.fixture
def plugin(nbdkit: Nbdkit) -> Any:
    spec = importlib.util.spec_from_file_location("plugin_under_test", PLUGIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("call", ["pread", "pwrite"])
@pytest.mark.parametrize("kind", [None, OSError, ValueError])
def test_no_buffer_outlives_its_callback(plugin: Any, call: str, kind: type[Exception] | None) -> None:
    """D6: a bytearray with a view on it cannot be resized."""
    disk, memory = Disk(), bytearray(64)
    disk.error = kind(errno.ENOSPC, "full") if kind else None
    caught: list[BaseException] = []
    try:
        getattr(plugin, call)(disk, memoryview(memory), 4096, 0)
    except OSError as told:
        caught.append(told.with_traceback(None))  # nbdkit formats it and drops it
    disk.error = None
    memory.append(0)
    assert len(caught) == (1 if kind else 0)


def test_the_buffer_is_held_while_the_original_error_lives() -> None:
    """Negative control of the test above: without the adapter, the error's frames do hold the buffer."""
    disk, memory = Disk(), bytearray(64)
    disk.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full") as caught:
        disk.pread(memoryview(memory), 0)
    with pytest.raises(BufferError):
        memory.append(0)
    del caught


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "full"), errno.EDQUOT),
        (OSError(errno.EROFS, "read-only"), errno.EROFS),
        (OSError(errno.EOPNOTSUPP, "slow"), errno.EOPNOTSUPP),
        (OSError(errno.ENOENT, "gone"), errno.EIO),
        (OSError("no number"), errno.EIO),
        (errors.NoSpaceError("full"), errno.ENOSPC),
        (errors.PoisonedError("fsync failed"), errno.EIO),
        (errors.StateError("busy"), errno.EIO),
        (ZeroDivisionError(), errno.EIO),
    ],
)
def test_the_guest_is_told_the_true_errno(plugin: Any, nbdkit: Nbdkit, error: BaseException, number: int) -> None:
    """D10: true where NBD can say it, EIO (not the guest's own mistake) where it cannot."""
    disk = Disk()
    disk.error = error
    for call, arguments in (
        (plugin.pread, (bytearray(8), 0, 0)),
        (plugin.pwrite, (bytearray(8), 0, 0)),
        (plugin.flush, (0,)),
        (plugin.zero, (8, 0, 0)),
        (plugin.extents, (8, 0, 0)),
    ):
        nbdkit.told.clear()
        with pytest.raises(OSError, match=r"\w"):
            call(disk, *arguments)
        assert nbdkit.told == [number]


def test_flags_become_arguments(plugin: Any) -> None:
    disk = Disk()
    plugin.pwrite(disk, bytearray(8), 16, Nbdkit.FLAG_FUA)
    plugin.pwrite(disk, bytearray(8), 16, 0)
    plugin.zero(disk, 8, 16, Nbdkit.FLAG_FUA)
    plugin.zero(disk, 8, 16, Nbdkit.FLAG_MAY_TRIM)
    plugin.zero(disk, 8, 16, Nbdkit.FLAG_FAST_ZERO)
    plugin.trim(disk, 8, 16, Nbdkit.FLAG_FUA)
    assert disk.calls == [
        ("pwrite", 7, 16, True),
        ("pwrite", 7, 16, False),
        ("zero", 8, 16, True, False, False),
        ("zero", 8, 16, False, True, False),
        ("zero", 8, 16, False, False, True),
        ("trim", 8, 16, True),
    ]
    assert plugin.extents(disk, 8, 16, 0) == [(16, 8, 0)]


def test_what_is_offered(plugin: Any) -> None:
    disk = Disk()
    assert plugin.API_VERSION == 2
    assert plugin.thread_model() == Nbdkit.THREAD_MODEL_PARALLEL
    assert plugin.can_fua(disk) == Nbdkit.FUA_NATIVE
    assert plugin.can_cache(disk) == Nbdkit.CACHE_EMULATE
    assert plugin.block_size(disk) == (1, 4096, 32 << 20)
    assert all(getattr(plugin, f"can_{name}")(disk) for name in ("write", "flush", "multi_conn", "zero", "fast_zero"))
    assert all(getattr(plugin, f"can_{name}")(disk) for name in ("trim", "extents"))


def test_parameters_are_known_and_come_once(plugin: Any) -> None:
    for name in host.PARAMETERS:
        plugin.config(name, "1")
    for name in ("home", "file", "../x"):
        with pytest.raises(ValueError, match="unknown or repeated"):
            plugin.config(name, "1")


def test_the_environments_packages_come_first(plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And those that a ``.pth`` file adds: an editable installation is one."""
    checkout, packages = tmp_path / "checkout", tmp_path / "venv/lib/packages"
    for directory in (checkout, packages):
        directory.mkdir(parents=True)
    (packages / "_editable.pth").write_text(f"{checkout}\n")
    monkeypatch.setattr(sys, "path", ["/usr/lib/python3", str(packages)])
    plugin._put_first(str(packages))
    assert sys.path == [str(packages), str(checkout), "/usr/lib/python3"]


def test_the_site_directory_follows_the_interpreter(plugin: Any) -> None:
    plugin.config("python", "/opt/venv/bin/python")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert plugin._site_directory() == f"/opt/venv/lib/{version}/site-packages"
    plugin.config("site", "/elsewhere")
    assert plugin._site_directory() == "/elsewhere"


def test_missing_or_wrong_parameters_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match=r"home= is missing.*blkckpt serve"):
        host.Host({}, lambda: None)
    parameters = {"home": str(tmp_path), "vm": "a", "python": sys.executable, "control_fd": "x"}
    with pytest.raises(errors.InputError, match="no inherited socket"):
        host.Host(parameters, lambda: None)
    read, write = os.pipe()
    try:
        with pytest.raises(errors.InputError, match="no inherited socket"):
            host.Host({**parameters, "control_fd": str(read)}, lambda: None)
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(errors.InputError, match="VM name"):
        host.Host({**parameters, "vm": "../x"}, lambda: None)

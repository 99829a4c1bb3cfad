"""nbdkit plugin of blkckpt: a thin adapter between nbdkit's callbacks and :mod:`blkckpt.control.host`.

Not started by hand: ``blkckpt serve`` and ``blkckpt run`` bind the sockets, clean the environment and give the
parameters ``home= vm= python= site= control_fd= fast=``, and ``start_fd=`` to wait for the word.  With
``template_fd=`` it serves nothing: the servers of many VMs are forked from it (:mod:`blkckpt.control.template`).

nbdkit embeds the distribution's interpreter, which knows nothing of the environment blkckpt is installed in; so
that environment's site directory is put *first* on ``sys.path``, before anything of blkckpt is imported.

Every callback that serves a request is wrapped by :func:`_told`, or does the same in place: nbdkit makes EIO of an
exception unless it is told the errno first (rule D10), and the exception that reaches it must not keep the traceback,
whose frames hold nbdkit's buffer (rule D6: a buffer given by nbdkit never outlives its callback).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import site
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import nbdkit

if TYPE_CHECKING:
    from blkckpt.control import host as hosts
    from blkckpt.disk import disk as disks

API_VERSION = 2
BLOCK_SIZES = (1, 4096, 32 << 20)
"""Smallest, preferred, largest request: any alignment works, 4 KiB costs nothing extra, nbdkit takes at most 64 MiB."""

F = TypeVar("F", bound=Callable[..., Any])

_parameters: dict[str, str] = {}
_kept: dict[int, int] = {}  # thread → how many of its connections keep its Python state
_host: hosts.Host


def _told(callback: F) -> F:
    """Tell nbdkit the errno of what *callback* raises, and raise it anew without its frames."""

    @functools.wraps(callback)
    def wrapped(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except Exception as error:
            told = _tell(error)
        raise told

    return wrapped  # type: ignore[return-value]


def _tell(error: Exception) -> OSError:
    """Tell nbdkit the errno of *error*; returns what to raise in its place."""
    number: int = sys.modules["blkckpt.control.host"].wire_error(error)
    nbdkit.set_error(number)
    return OSError(number, getattr(error, "strerror", None) or str(error) or type(error).__name__)


# Starting and stopping.


_KNOWN = frozenset({"home", "vm", "python", "site", "control_fd", "start_fd", "template_fd", "fast"})


def config(key: str, value: str) -> None:
    if key in _parameters or key not in _KNOWN:
        raise ValueError(f"unknown or repeated parameter {key}=")
    _parameters[key] = value


def config_complete() -> None:
    global _host  # nbdkit's callbacks are module functions; this is their only state
    _put_first(_site_directory())
    if "template_fd" in _parameters:  # from here on this is the server of one VM, in a fork
        importlib.import_module("blkckpt.control.template").become(_parameters)
    _host = importlib.import_module("blkckpt.control.host").Host(_parameters, nbdkit.shutdown)


def _site_directory() -> str:
    """Where the environment keeps its packages: as told, else where a venv of this Python version has them."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = os.path.dirname(os.path.dirname(_parameters.get("python", "/usr/bin/python3")))  # noqa: PTH120
    return _parameters.get("site") or os.path.join(prefix, "lib", version, "site-packages")  # noqa: PTH118


def _put_first(directory: str) -> None:
    """As ``site.addsitedir`` (``.pth`` files too: an editable install is one), but before everything else."""
    before = list(sys.path)
    sys.path[:] = []
    site.addsitedir(directory)
    sys.path += [entry for entry in before if entry not in sys.path]


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    _host.get_ready()


def after_fork() -> None:
    _host.after_fork()


def cleanup() -> None:
    _host.cleanup()


# Connections.


def _keep_thread_state() -> None:
    """Let this thread's Python state live as long as its connection.

    nbdkit takes the interpreter anew for every callback (``PyGILState_Ensure``).  A thread that has no state yet
    gets one made and destroyed each time, and with it (since Python 3.11) a stack of 16 KiB mapped, faulted in and
    unmapped: 10 of the 30 us that a callback which does nothing took.  One reference of our own keeps it.  With one
    thread a connection (``--threads=1``) this is the thread that serves the requests; with more it does no harm.
    """
    ctypes.pythonapi.PyGILState_Ensure()
    thread = threading.get_ident()
    _kept[thread] = _kept.get(thread, 0) + 1


def _let_thread_state_go() -> None:
    """Undo it; nbdkit's own reference, held by the callback that calls this, is the last."""
    thread = threading.get_ident()
    count = _kept.pop(thread, 0)
    if count > 1:
        _kept[thread] = count - 1
    if count:
        ctypes.pythonapi.PyGILState_Release(0)  # 0 is PyGILState_LOCKED, what Ensure returned


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return _host.exports()


@_told
def default_export(readonly: bool, is_tls: bool) -> str:
    return _host.default()


@_told
def open(readonly: bool) -> disks.Disk:  # noqa: A001  (the name nbdkit calls)
    found = _host.disk(nbdkit.export_name())
    _keep_thread_state()
    return found


def close(h: disks.Disk) -> None:
    _let_thread_state_go()


def export_description(h: disks.Disk) -> str:
    return dict(_host.exports())[h.name]


def get_size(h: disks.Disk) -> int:
    return h.size


def block_size(h: disks.Disk) -> tuple[int, int, int]:
    return BLOCK_SIZES


def is_rotational(h: disks.Disk) -> bool:
    return False


def _yes(h: disks.Disk) -> bool:
    return True


can_write = can_flush = can_trim = can_zero = can_fast_zero = can_extents = _yes

can_multi_conn = _yes  # a flush covers what every connection was answered (rule D3)


def can_fua(h: disks.Disk) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_cache(h: disks.Disk) -> int:
    return int(nbdkit.CACHE_EMULATE)


# Requests.  The two that come tens of thousands of times a second do what _told does by themselves.


def pread(h: disks.Disk, buf: Any, offset: int, flags: int) -> None:
    try:
        return h.pread(buf, offset)
    except Exception as error:
        told = _tell(error)
    raise told


def pwrite(h: disks.Disk, buf: Any, offset: int, flags: int) -> None:
    try:
        return h.pwrite(buf, offset, flags & _FUA != 0)
    except Exception as error:
        told = _tell(error)
    raise told


_FUA = int(nbdkit.FLAG_FUA)


@_told
def flush(h: disks.Disk, flags: int) -> None:
    h.flush()


@_told
def trim(h: disks.Disk, count: int, offset: int, flags: int) -> None:
    h.trim(count, offset, bool(flags & nbdkit.FLAG_FUA))


@_told
def zero(h: disks.Disk, count: int, offset: int, flags: int) -> None:
    fua, may_trim, fast = (bool(flags & bit) for bit in _ZERO_FLAGS)
    h.zero(count, offset, fua, may_trim, fast)


_ZERO_FLAGS = (nbdkit.FLAG_FUA, nbdkit.FLAG_MAY_TRIM, nbdkit.FLAG_FAST_ZERO)


@_told
def extents(h: disks.Disk, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    return list(h.extents(count, offset))

"""nbdkit plugin of blkckpt that serves images of a store, read-only: a thin adapter to :mod:`blkckpt.exchange.exports`.

Not started by hand: ``blkckpt nbd`` and ``blkckpt export`` bind the socket, clean the environment and give the
parameters.  About ``site=`` and ``_told`` see ``nbdkit_blkckpt.py``, which serves the disks of running VMs.
"""

from __future__ import annotations

import functools
import importlib
import site
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import nbdkit

if TYPE_CHECKING:
    from blkckpt.exchange import exports

API_VERSION = 2
BLOCK_SIZES = (1, 64 << 10, 32 << 20)
"""A chunk is decoded whole, so 64 KiB costs no more than a byte of it."""

F = TypeVar("F", bound=Callable[..., Any])

_parameters: list[tuple[str, str]] = []
_exports: exports.Exports


def _told(callback: F) -> F:
    """Tell nbdkit the errno of what *callback* raises, and raise it anew without its frames (rules D6, D10)."""

    @functools.wraps(callback)
    def wrapped(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except Exception as error:
            number, text = sys.modules["blkckpt.exchange.exports"].wire_error(error), str(error)
        nbdkit.set_error(number)
        raise OSError(number, text)

    return wrapped  # type: ignore[return-value]


def config(key: str, value: str) -> None:
    _parameters.append((key, value))


def config_complete() -> None:
    global _exports  # nbdkit's callbacks are module functions; this is their only state
    before = list(sys.path)
    sys.path[:] = []
    site.addsitedir(dict(_parameters)["site"])
    sys.path += [entry for entry in before if entry not in sys.path]
    _exports = importlib.import_module("blkckpt.exchange.exports").Exports(_parameters)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    _exports.get_ready()


def after_fork() -> None:
    _exports.after_fork()


def cleanup() -> None:
    _exports.close()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return _exports.names()


@_told
def default_export(readonly: bool, is_tls: bool) -> str:
    return _exports.default()


@_told
def open(readonly: bool) -> exports.Export:  # noqa: A001  (the name nbdkit calls)
    return _exports.find(nbdkit.export_name())


def export_description(h: exports.Export) -> str:
    return dict(_exports.names())[h.name]


def get_size(h: exports.Export) -> int:
    return h.size


def block_size(h: exports.Export) -> tuple[int, int, int]:
    return BLOCK_SIZES


def is_rotational(h: exports.Export) -> bool:
    return False


def can_extents(h: exports.Export) -> bool:
    return True


def can_multi_conn(h: exports.Export) -> bool:
    return True


def can_cache(h: exports.Export) -> int:
    return int(nbdkit.CACHE_EMULATE)


@_told
def pread(h: exports.Export, buf: Any, offset: int, flags: int) -> None:
    h.pread(buf, offset)


@_told
def extents(h: exports.Export, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    return h.extents(count, offset, one=bool(flags & nbdkit.FLAG_REQ_ONE))

"""The process of a mount: it answers the kernel until the mount ends.

Started by :mod:`blkckpt.view.starting` with a pipe for one answer, ``{"ready": true}`` when the mount is usable or the
error that it gave up with; or run in the caller's process (``--foreground``).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from blkckpt import errors, log, paths
from blkckpt.control import wire
from blkckpt.view import chunks, fuse, held, library, mounts, records, starting, touched, tree

FIRST_OPEN = 120.0
"""Seconds for a machine to open its memory: QEMU's start, on a busy host."""

LINGER = 0.5

_COLLECTIONS = (20_000, 20, 20)
"""Rarer than by default: what is kept lives long, and cycles are few."""

logger = log.get(__name__)


def serve(home: paths.Home, orders: starting.Orders, ready: Callable[[], None]) -> None:
    """Mount and answer until the mount ends; *ready* is called when it is usable."""
    with records.recorded(home, orders.directory, orders.vm, orders.user) as record, contextlib.ExitStack() as closing:
        books = library.Library(lambda: library.store_paths(home), chunks.Chunks(orders.cache))
        closing.callback(books.close)
        pins = held.Held(record.id)
        closing.callback(pins.close)
        root = tree.Tree(books, orders.vm)
        closing.callback(root.close)
        changed = _End(orders.directory).note if orders.user else fuse.ignore
        gc.freeze()
        gc.set_threshold(*_COLLECTIONS)
        first = touched.First(home) if orders.user else None
        operations = fuse.Operations(root, pins, ready, shared=orders.shared, changed=changed, first=first)
        try:
            fuse.run(
                Path(orders.directory), record.source, operations,
                threads=orders.threads, shared=orders.shared, writable=orders.user is not None,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            raise errors.BlkckptError(f"mounting on {orders.directory} failed ({error})") from error


class _End:
    """Takes a machine's memory mount away when the machine has gone: nothing open for :data:`LINGER` seconds."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._changed = threading.Condition()
        self._open = 0
        self._wait = FIRST_OPEN
        threading.Thread(target=self._run, name="view-end", daemon=True).start()

    def note(self, count: int) -> None:
        with self._changed:
            self._open, self._wait = count, LINGER
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while True:
                if self._open:
                    self._changed.wait()
                elif not self._changed.wait(self._wait):
                    break
        mounts.unmount(self._directory)


def main(arguments: Sequence[str]) -> int:
    """A program of its own: orders on standard input."""
    os.set_inheritable(int(arguments[0]), False)
    body = json.loads(sys.stdin.buffer.read())
    home = paths.home(body.pop("home"))
    return run(home, starting.Orders(**body), int(arguments[0]))


def run(home: paths.Home, orders: starting.Orders, answers: int) -> int:
    """The detached process, whichever way it was made; its exit code."""
    with os.fdopen(answers, "wb") as pipe:
        _take_output(home)
        log.setup(as_json=True)
        return _serve_and_tell(home, orders, pipe)


def _take_output(home: paths.Home) -> None:
    with open(os.devnull, "rb") as null, starting.open_log(home) as output:
        for ours, standard in ((null, 0), (output, 1), (output, 2)):
            os.dup2(ours.fileno(), standard)


def _serve_and_tell(home: paths.Home, orders: starting.Orders, pipe: IO[bytes]) -> int:
    def tell(body: dict[str, Any]) -> None:
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(json.dumps(body).encode())

    try:
        serve(home, orders, lambda: tell({"ready": True}))
        return 0
    except Exception as error:
        expected = isinstance(error, errors.BlkckptError)
        logger.error("not mounted", extra={"fields": {"error": str(error)}}, exc_info=not expected)
        failure = wire.failure_from(error)
        tell({"type": failure.kind, "message": failure.message})
        return wire.OWN_ERRORS - failure.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

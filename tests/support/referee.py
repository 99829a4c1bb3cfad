"""Holding and failing single system calls of a disk server, decided by the test that runs.

In the server (:func:`install`, see ``nbdkit_hooked``) every data-plane file becomes a :class:`RefereedFile`, which
asks over a unix socket before each operation.  In the test a :class:`Referee` answers: go on, fail with this errno,
or nothing at all until the test lets the operation go.  So a test holds a write in flight for exactly as long as it
needs to, without a sleep on either side.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blkckpt.disk import fileio

VARIABLE = "BLKCKPT_TEST_REFEREE"
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Operation:
    """What a server is about to do: ``read``, ``write``, ``zero`` or ``sync`` of a file."""

    kind: str
    path: str
    offset: int = 0
    length: int = 0

    @property
    def is_layer_data(self) -> bool:
        return self.path.endswith(".data")


@dataclass(eq=False)
class Held:
    """An operation that waits; ``arrived`` is set when it is there."""

    wanted: Callable[[Operation], bool]
    error: int = 0
    times: int = 1
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    operation: Operation | None = None

    def wait(self) -> Operation:
        assert self.arrived.wait(SECONDS), "the operation to be held did not come"
        assert self.operation is not None
        return self.operation


class Referee:
    """Listens at *path*; enter it before the server starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[Operation] = []
        self._lock = threading.Lock()
        self._rules: list[Held] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(128)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.released.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @contextmanager
    def hold(self, wanted: Callable[[Operation], bool]) -> Iterator[Held]:
        """Hold the first operation that *wanted* takes, at the latest until the block ends."""
        rule = Held(wanted)
        self._add(rule)
        try:
            yield rule
        finally:
            rule.released.set()
            self._remove(rule)

    @contextmanager
    def fail(self, wanted: Callable[[Operation], bool], error: int, times: int = 1 << 30) -> Iterator[Held]:
        """Fail the operations that *wanted* takes with *error*."""
        rule = Held(wanted, error, times)
        rule.released.set()
        self._add(rule)
        try:
            yield rule
        finally:
            self._remove(rule)

    def _add(self, rule: Held) -> None:
        with self._lock:
            self._rules.append(rule)

    def _remove(self, rule: Held) -> None:
        with self._lock:
            if rule in self._rules:
                self._rules.remove(rule)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as questions:
            for line in questions:
                error = self._judge(Operation(**json.loads(line)))
                try:
                    connection.sendall(b"%d\n" % error)
                except OSError:
                    return  # the server was killed while it waited

    def _judge(self, operation: Operation) -> int:
        with self._lock:
            self.seen.append(operation)
            rule = next((rule for rule in self._rules if rule.times and rule.wanted(operation)), None)
            if rule is None:
                return 0
            rule.times -= 1
            rule.operation = operation
        rule.arrived.set()
        assert rule.released.wait(SECONDS)
        return rule.error


class RefereedFile(fileio.File):
    """Asks before it acts.  One connection a thread."""

    _local = threading.local()

    def _ask(self, kind: str, offset: int = 0, length: int = 0) -> None:
        stream = getattr(self._local, "stream", None)
        if stream is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(os.environ[VARIABLE])
            stream = self._local.stream = connection.makefile("rwb")
        question = {"kind": kind, "path": str(self.path), "offset": offset, "length": length}
        stream.write(json.dumps(question).encode() + b"\n")
        stream.flush()
        if error := int(stream.readline() or b"0"):
            raise OSError(error, os.strerror(error))

    def pread_into(self, buf: Any, offset: int) -> None:
        self._ask("read", offset, len(buf))
        super().pread_into(buf, offset)

    def pread(self, length: int, offset: int) -> bytes:
        self._ask("read", offset, length)
        return super().pread(length, offset)

    def pwrite(self, buf: Any, offset: int) -> None:
        self._ask("write", offset, len(buf))
        super().pwrite(buf, offset)

    def pwritev(self, bufs: Any, offset: int) -> None:
        self._ask("write", offset, sum(map(len, bufs)))
        super().pwritev(bufs, offset)

    def zero(self, offset: int, length: int, *, punch: bool = True, fast: bool = False) -> None:
        self._ask("zero", offset, length)
        super().zero(offset, length, punch=punch, fast=fast)

    def sync_now(self) -> None:
        self._ask("sync")
        super().sync_now()


def install() -> None:
    """In the server: from now on every file asks."""
    fileio.factory = RefereedFile

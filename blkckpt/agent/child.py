"""A child process that is given orders on one pipe and answers on another, in a session of its own.

Its program is a module with ``main(arguments, orders, answers) -> status``, where orders are not buffered and answers
are; the end of the orders is the end of the parent.  A process that has one thread forks it, and it has loaded then
what the parent has: of the 0.3 s of processor time that a memory receiver needs to start, 0.1 s is left, while guest
and QEMU want the processors.  With more threads a fork would inherit their locks, so it is ``python -m MODULE``.

A Ctrl-C on the terminal does not reach it: that is the parent's to handle.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, TypeAlias

from blkckpt import childenv
from blkckpt.agent import forked

Main: TypeAlias = Callable[[Sequence[str], IO[bytes], IO[bytes]], int]


class Child:
    """The process; *kept* are descriptors that it gets beside its pipes, under their numbers."""

    def __init__(self, module: str, arguments: Sequence[str] = (), kept: Collection[int] = ()) -> None:
        theirs, ours = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self.orders: IO[bytes] = os.fdopen(theirs[1], "wb")
        self.answers: IO[bytes] = os.fdopen(ours[0], "rb")
        try:
            start = _fork if len(os.listdir("/proc/self/task")) == 1 else _program  # noqa: PTH208
            self.pid = start(module, arguments, kept, theirs[0], ours[1])
        except BaseException:
            self.close()
            raise
        finally:
            os.close(theirs[0])
            os.close(ours[1])
        self.status: int | None = None
        """Its exit status once it has been waited for; negative: the signal that ended it."""
        self._reaping = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; ``TimeoutError`` when it still runs after *timeout* seconds."""
        with self._reaping:
            if self.status is not None:
                return self.status
            descriptor = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise TimeoutError(f"process {self.pid} has not ended within {timeout:g} s")
        finally:
            os.close(descriptor)
        with self._reaping:
            if self.status is None:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.status

    def kill(self) -> None:
        """End it by force, and wait for that."""
        with self._reaping:
            if self.status is None:
                os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Close both pipes; a child that has gone may have left orders unread."""
        for pipe in (self.orders, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _fork(module: str, arguments: Sequence[str], kept: Collection[int], orders: int, answers: int) -> int:
    def run() -> int:
        Path("/proc/self/comm").write_text(".".join(module.split(".")[-2:]))  # what ps and top call it
        os.environ.update(childenv.computing())
        main: Main = importlib.import_module(module).main
        os._exit(main(arguments, os.fdopen(orders, "rb", buffering=0), os.fdopen(answers, "wb")))

    return forked.fork(run, {orders, answers, *kept})


def _program(module: str, arguments: Sequence[str], kept: Collection[int], orders: int, answers: int) -> int:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments], stdin=orders, stdout=answers, pass_fds=tuple(kept),
        env=childenv.computing(), start_new_session=True,
    )  # fmt: skip
    process.returncode = 0  # it is waited for by its number
    return process.pid

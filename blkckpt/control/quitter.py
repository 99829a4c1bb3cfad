"""Ending nbdkit although clients are connected.

nbdkit told to shut down waits for its connections, and a connection that is waiting for its client's next request
does not hear of it: an idle client (QEMU with a quiet guest) would hold the process for ever.  So a thread here
asks nbdkit to shut down and then shuts the *receiving* half of every NBD connection: the request being served is
finished and answered, the next read finds the end of the stream, nbdkit closes the connection and, when all are
closed, calls ``cleanup``.  It repeats that until then, for the connection that was just being accepted.

The same thread watches the launcher: the socket that it keeps open, else the process that is our parent.  When that
dies, QEMU may live on, and the next launcher can serve it only after this process has let go of the disks (rule D12).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blkckpt import log

AGAIN_SECONDS = 0.2

logger = log.get(__name__)


class Quitter:
    """*shutdown* is nbdkit's, asynchronous; *address* is the NBD socket's path; *leash* ends with the launcher."""

    def __init__(self, address: Path, shutdown: Callable[[], None], leash: socket.socket | None = None) -> None:
        self._address = os.fspath(address)
        self._shutdown = shutdown
        self._leash = leash
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quitter", daemon=True)

    def start(self) -> None:
        """Watch the launcher from now on.  Call it after every fork."""
        self._thread.start()

    def quit(self) -> None:
        """Begin to end the process; returns at once."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """nbdkit has closed every connection."""
        self._ended.set()
        self.quit()
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        self._wait()
        if self._ended.is_set():
            return
        self._shutdown()
        while True:
            for connection in _connections(self._address):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
            if self._ended.wait(AGAIN_SECONDS):
                return

    def _wait(self) -> None:
        """Until somebody calls :meth:`quit` or the launcher ends."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        launcher = os.dup(self._leash.fileno()) if self._leash else os.pidfd_open(os.getppid())
        try:
            poller.register(launcher, select.POLLIN)
            if all(descriptor != self._wake for descriptor, _ in poller.poll()):
                logger.warning("the launcher is gone; stopping")
        finally:
            os.close(launcher)


def _connections(address: str) -> Iterator[socket.socket]:
    """Duplicates of this process's accepted sockets whose own address is *address*; nbdkit does not give them out."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (descriptors, not files)
        with contextlib.ExitStack() as stack:
            try:
                duplicate = os.dup(int(name))
                stack.callback(os.close, duplicate)
                if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
                    continue
                connection = socket.socket(fileno=duplicate)
                stack.pop_all()
                stack.enter_context(connection)
                listening = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if connection.family == socket.AF_UNIX and connection.getsockname() == address and not listening:
                    yield connection
            except OSError:
                continue  # closed meanwhile

"""A QMP session: blocking calls with deadlines over qemu.qmp's asyncio client, and a socket that can be left unread.

The client runs in an event loop in a thread of its own.  Every call here is made from another thread, waits at
most as long as it says (rule A2) and raises our errors only:

===============================================  ========================================================
nothing listens at the path                      :class:`errors.HypervisorError`
something listens that is not QMP                :class:`errors.ProtocolError`
silence instead of a greeting                    :class:`errors.DeadlineError` (QEMU greets one client at a time)
QEMU refuses a command                           :class:`RefusedError`, a HypervisorError with QEMU's words
QEMU goes away                                   :class:`errors.HypervisorError`
===============================================  ========================================================

Reading paused.  Between :meth:`QmpSession.pause_reading` and :meth:`QmpSession.resume_reading` nobody reads the
socket; what QEMU writes stays in its receive queue, where :mod:`blkckpt.vm.barrier` looks at it through a
duplicate of the descriptor.  The pause begins with the queue empty and at the border of a message.  Commands can
be sent meanwhile (:meth:`QmpSession.submit`); their replies are found after reading is resumed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu import qmp as qemu_qmp
from qemu.qmp.message import Message

from blkckpt import errors

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 30.0
"""QMP commands are answered at once unless QEMU's main loop is busy (draining a slow disk)."""
CLOSE_TIMEOUT = 5.0
MAX_EVENTS = 4096
"""Events remembered; a checkpoint causes about ten."""
MAX_PATH = 107
"""``sun_path`` is 108 bytes with its end."""


class RefusedError(errors.HypervisorError):
    """QEMU answered with an error; *error_class* is its class, such as ``GenericError``."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Event:
    """One QMP event.  *stamp_us*: QEMU's own clock, microseconds; *received*: our monotonic clock, seconds."""

    name: str
    data: Mapping[str, Any]
    stamp_us: int
    received: float


class Reply:
    """The answer to a submitted command."""

    def __init__(self, command: str, future: concurrent.futures.Future[object]) -> None:
        self._command = command
        self._future = future

    def result(self, timeout: float = COMMAND_TIMEOUT) -> Any:
        """What QEMU returned; raises :class:`RefusedError` or another of the module's errors."""
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            self._future.cancel()
            raise errors.DeadlineError(f"QEMU did not answer {self._command} within {timeout:g} s") from error
        except qemu_qmp.ExecuteError as error:
            words = _one_line(error)
            raise RefusedError(f"QEMU refused {self._command}: {words}", error.error_class) from error
        except (qemu_qmp.QMPError, OSError, EOFError, concurrent.futures.CancelledError) as error:
            raise errors.HypervisorError(f"QEMU went away during {self._command}") from error


class _Client(qemu_qmp.QMPClient):
    """The client with its events observed and its transport within reach."""

    def __init__(self, observe: Callable[[Message], None]) -> None:
        super().__init__("blkckpt")
        self._observe = observe

    def _cb_inbound(self, msg: Message) -> Message:
        if "event" in msg:
            self._observe(msg)
        return super()._cb_inbound(msg)

    def transport(self) -> asyncio.Transport:
        if self._writer is None or self._writer.is_closing():
            raise EOFError
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        return transport

    def at_border(self) -> bool:
        """Nothing received is waiting to be parsed."""
        return not getattr(self._reader, "_buffer", b"")


class QmpSession:
    """One connection to QEMU's monitor.  A context manager; every method may be called from any thread."""

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = CONNECT_TIMEOUT) -> None:
        """Connect, check the greeting and negotiate."""
        _quieten()
        self.path = os.fspath(path)
        self._paused = False
        self._events: list[Event] = []
        self._forgotten = 0
        self._lost = False
        self._changed = threading.Condition()
        self._socket = _connect(self.path, timeout)
        self.peer_pid = _peer_pid(self._socket)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._client = _Client(self._record)
        try:
            self._establish(timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> QmpSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and end the thread; idempotent.  QEMU goes on."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):
            # A session that ended by itself raises its reason here; whoever cared has met it already.
            self._wait(self._disconnect(), CLOSE_TIMEOUT, "closing")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT)
        if not self._thread.is_alive():
            self._loop.close()
        self._socket.close()

    # --- commands ---

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Run *command* and return its ``return`` value."""
        return self.submit(command, arguments).result(timeout)

    def submit(self, command: str, arguments: Mapping[str, object] | None = None) -> Reply:
        """Send *command*; works while reading is paused."""
        return Reply(command, asyncio.run_coroutine_threadsafe(self._client.execute(command, arguments), self._loop))

    def send_fd(self, name: str, descriptor: int, *, timeout: float = COMMAND_TIMEOUT) -> None:
        """Give QEMU a duplicate of *descriptor*, to be used as ``fd:NAME``."""

        async def send() -> object:
            self._client.send_fd_scm(descriptor)
            return await self._client.execute("getfd", {"fdname": name})

        Reply("getfd", asyncio.run_coroutine_threadsafe(send(), self._loop)).result(timeout)

    @property
    def version(self) -> str:
        """QEMU's version from the greeting, ``7.2.22 (Debian 1:7.2…)``."""
        greeting = self._client.greeting
        assert greeting is not None
        info: Any = greeting.QMP.version
        number = info.get("qemu") if isinstance(info, dict) else None
        if not isinstance(number, dict):
            return "unknown"
        text = ".".join(str(number.get(key, "?")) for key in ("major", "minor", "micro"))
        package = str(info.get("package") or "")
        return f"{text} ({package})" if package else text

    # --- events ---

    def mark(self) -> int:
        """A position in the sequence of events; pass it to :meth:`events` and :meth:`wait_event`."""
        with self._changed:
            return self._forgotten + len(self._events)

    def events(self, since: int = 0) -> list[Event]:
        """The remembered events from position *since* on."""
        with self._changed:
            return self._events[max(0, since - self._forgotten) :]

    def wait_event(self, matches: Callable[[Event], bool], *, since: int, timeout: float) -> Event:
        """The first event from *since* on that *matches*; raises when QEMU goes away or the time is over."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for event in self._events[max(0, since - self._forgotten) :]:
                    if matches(event):
                        return event
                left = deadline - time.monotonic()
                if self._lost:
                    raise errors.HypervisorError("QEMU closed its QMP connection")
                if left <= 0:
                    raise errors.DeadlineError(f"QEMU did not send the awaited event within {timeout:g} s")
                self._changed.wait(left)

    @property
    def lost(self) -> bool:
        """Whether QEMU has closed the connection (not noticed while reading is paused)."""
        return self._lost

    # --- the armed window ---

    def duplicate(self) -> int:
        """A duplicate of the connection's descriptor (close-on-exec); the caller owns it."""
        return fcntl.fcntl(self._socket.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)

    def pause_reading(self, *, timeout: float = 5.0) -> None:
        """Drain the socket, then leave it unread."""
        self._wait(self._pause(timeout), timeout + 1, "draining the QMP socket")
        self._paused = True

    def resume_reading(self) -> None:
        """Read again; idempotent.  What came meanwhile is handled now."""
        if not self._paused:
            return

        async def resume() -> None:
            with contextlib.suppress(EOFError):
                self._client.transport().resume_reading()

        self._wait(resume(), CLOSE_TIMEOUT, "reading the QMP socket again")
        self._paused = False

    async def _pause(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        transport = self._client.transport()
        while True:
            transport.pause_reading()
            if _queued(self._socket) == 0 and self._client.at_border():
                return
            transport.resume_reading()
            if time.monotonic() > deadline:
                raise errors.DeadlineError(f"the QMP socket did not fall silent within {timeout:g} s")
            await asyncio.sleep(0.002)

    # --- inside ---

    def _establish(self, timeout: float) -> None:
        # qemu.qmp's transport owns its socket and closes it; ours stays for descriptors and counting.
        try:
            self._wait(self._client.connect(self._socket.dup()), timeout, "greeting")
        except errors.DeadlineError as error:
            raise errors.DeadlineError(
                f"{self.path} did not greet within {timeout:g} s: it is no QMP socket, or another program is connected "
                "to it (QEMU talks to one at a time); give blkckpt a QMP socket of its own"
            ) from error
        except errors.HypervisorError as error:
            raise errors.ProtocolError(
                f"{self.path} is not a QMP socket of QEMU ({_one_line(error.__cause__)})"
            ) from error
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def _watch(self) -> None:
        while self._client.runstate is qemu_qmp.Runstate.RUNNING:
            await self._client.runstate_changed()
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    async def _disconnect(self) -> None:
        if self._client.runstate is not qemu_qmp.Runstate.IDLE:
            await self._client.disconnect()

    def _wait(self, coroutine: Coroutine[Any, Any, T], timeout: float, doing: str) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise errors.DeadlineError(f"QMP {self.path}: {doing} took more than {timeout:g} s") from error
        except (qemu_qmp.QMPError, OSError, EOFError) as error:
            raise errors.HypervisorError(f"QMP {self.path}: {doing} failed: {_one_line(error)}") from error

    def _record(self, message: Message) -> None:
        stamp: Any = message.get("timestamp")
        data = message.get("data")
        try:
            micro = int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])
        except (TypeError, KeyError, ValueError):
            micro = 0
        event = Event(str(message["event"]), data if isinstance(data, dict) else {}, micro, time.monotonic())
        with self._changed:
            self._events.append(event)
            if len(self._events) > MAX_EVENTS:
                del self._events[: MAX_EVENTS // 2]
                self._forgotten += MAX_EVENTS // 2
            self._changed.notify_all()


def listener(path: str | os.PathLike[str], *, timeout: float = CONNECT_TIMEOUT) -> int:
    """The process that listens at *path*, which need not answer."""
    with _connect(os.fspath(path), timeout) as connection:
        return _peer_pid(connection)


def _one_line(error: object) -> str:
    """What was said, without its line ends and without end."""
    return " ".join(str(error).split())[:300]


def _quieten() -> None:
    """qemu.qmp logs what it also raises; said once, by whoever handles it, is enough."""
    logger = logging.getLogger("qemu.qmp")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)


def _connect(path: str, timeout: float) -> socket.socket:
    if len(os.fsencode(path)) > MAX_PATH:
        raise errors.InputError(f"QMP socket {path[:120]}: a socket's path has at most {MAX_PATH} bytes")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise _connect_error(path, error) from error
    return connection


def _connect_error(path: str, error: OSError) -> errors.BlkckptError:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        kind = "is no socket" if Path(path).exists() and not Path(path).is_socket() else "has no QEMU behind it"
        return errors.HypervisorError(
            f"QMP socket {path} {kind}: start the guest with `blkckpt run`, or give QEMU -qmp unix:…,server=on,wait=off"
        )
    return errors.from_os_error(error, f"connecting to QMP socket {path}")


def _peer_pid(connection: socket.socket) -> int:
    """The process that listens at the other end (it may have got the socket from its parent)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid


def _queued(connection: socket.socket) -> int:
    """Bytes in the receive queue."""
    count: int = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0]
    return count

"""A short QMP dialogue without an event loop: for a QEMU that was started just now and is to go on from a state.

:mod:`blkckpt.vm.qmp` is the session for a machine that runs: it follows events from a thread and can leave its socket
unread.  Loading asyncio and its client costs 0.1 s of processor time, while a guest that is being restored waits.
Here one thread asks and reads until it has the answer; events that come meanwhile are kept for
:meth:`Dialogue.wait_event`.  Every wait has a deadline (rule A2); what QEMU refuses, or says that is no QMP, and a
QEMU that goes away, are :class:`errors.HypervisorError`, :class:`errors.ProtocolError` and
:class:`errors.DeadlineError`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Self

from blkckpt import errors

GREETING_SECONDS = 30.0
"""QEMU greets when it has opened its disks."""
COMMAND_SECONDS = 30.0
MAX_EVENTS = 4096
MAX_LINE = 1 << 20


class Dialogue:
    """One connection to QEMU's monitor; a context manager.  Not thread safe."""

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = GREETING_SECONDS) -> None:
        """Connect, wait for the greeting, negotiate."""
        self.path = os.fspath(path)
        self._received = b""
        self._events: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=MAX_EVENTS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect(timeout)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, descriptors: Collection[int] = ()
    ) -> Any:
        """Run *command* and return its ``return`` value; *descriptors* go with it (``getfd``)."""
        request = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        self._socket.settimeout(COMMAND_SECONDS)
        try:
            sent = socket.send_fds(self._socket, [request], list(descriptors)) if descriptors else 0
            self._socket.sendall(request[sent:])
        except OSError as error:
            raise errors.HypervisorError(f"QEMU went away before {command}") from error
        deadline = time.monotonic() + COMMAND_SECONDS
        while "return" not in (answer := self._message(deadline, command)):
            if "error" in answer:
                words = answer["error"].get("desc") if isinstance(answer["error"], dict) else answer["error"]
                raise errors.HypervisorError(f"QEMU refused {command}: {' '.join(str(words).split())[:300]}")
        return answer["return"]

    def wait_event(self, name: str, key: str, values: Collection[str], *, timeout: float) -> str:
        """Wait for event *name* whose datum *key* is one of *values*, and return that; earlier events are passed."""
        deadline = time.monotonic() + timeout
        while True:
            while self._events:
                event, data = self._events.popleft()
                if event == name and data.get(key) in values:
                    return str(data[key])
            self._message(deadline, f"the event {name}")

    def _connect(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            raise errors.HypervisorError(f"QMP socket {self.path} has no QEMU behind it: {error.strerror}") from error
        if "QMP" not in self._message(deadline, "the greeting"):
            raise errors.ProtocolError(f"{self.path} is not a QMP socket of QEMU")
        self.execute("qmp_capabilities")

    def _message(self, deadline: float, what: str) -> Mapping[str, Any]:
        """The next message; an event is remembered too."""
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise errors.DeadlineError(f"QEMU is silent on {self.path}, where {what} was awaited") from error
            except OSError as error:
                raise errors.HypervisorError(f"QEMU went away during {what}") from error
            if not data:
                raise errors.HypervisorError(f"QEMU went away during {what}")
            self._received += data
            if len(self._received) > MAX_LINE:
                raise errors.ProtocolError(f"{self.path} is not a QMP socket of QEMU: it talks without end")
        line, _, self._received = self._received.partition(b"\n")
        try:
            message: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise errors.ProtocolError(f"{self.path} is not a QMP socket of QEMU") from error
        if not isinstance(message, dict):
            raise errors.ProtocolError(f"{self.path} is not a QMP socket of QEMU")
        if "event" in message:
            details = message.get("data")
            self._events.append((str(message["event"]), details if isinstance(details, dict) else {}))
        return message

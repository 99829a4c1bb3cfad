"""A QMP server of a few lines: greets, answers from a table, sends events when told, takes descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 9}, "package": "fake"}, "capabilities": ["oob"]}
}

Handler = Callable[[dict[str, Any]], Any]


class Refusal(Exception):  # noqa: N818  (what QEMU calls an error reply)
    """Raised by a handler: the command is answered by an error."""


class FakeQmp:
    """Serves one client on *path*.  ``answers`` maps commands to a value, or to a function of the arguments."""

    def __init__(self, path: Path, greeting: bytes | None = None) -> None:
        self.answers: dict[str, Any] = {"qmp_capabilities": {}}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.descriptors: list[int] = []
        self.connection: socket.socket | None = None
        self._greeting = json.dumps(GREETING).encode() + b"\r\n" if greeting is None else greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def commands(self) -> list[str]:
        return [name for name, _ in self.seen]

    def event(self, name: str, seconds: int = 0, micro: int = 0, **data: object) -> None:
        """Send an event."""
        message: dict[str, object] = {"timestamp": {"seconds": seconds, "microseconds": micro}, "event": name}
        self.send(message | ({"data": data} if data else {}))

    def send(self, message: dict[str, object]) -> None:
        assert self.connection is not None
        self.connection.sendall(json.dumps(message).encode() + b"\r\n")

    def drop(self) -> None:
        """End the connection, as a QEMU that dies does."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.drop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        for descriptor in self.descriptors:
            os.close(descriptor)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connection, _ = self._listener.accept()
                with self.connection:
                    self.connection.sendall(self._greeting)
                    self._talk(self.connection)

    def _talk(self, connection: socket.socket) -> None:
        pending = b""
        decoder = json.JSONDecoder()
        while True:
            data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            self.descriptors += descriptors
            if not data:
                return
            pending = (pending + data).lstrip()
            while pending:
                try:
                    message, end = decoder.raw_decode(pending.decode())
                except ValueError:
                    break
                pending = pending[end:].lstrip()
                self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        name = message.get("execute") or message.get("exec-oob", "")
        arguments = message.get("arguments", {})
        self.seen.append((name, arguments))
        answer = self.answers.get(name, Refusal(f"The command {name} has not been found"))
        try:
            if isinstance(answer, Refusal):
                raise answer
            result = answer(arguments) if callable(answer) else answer
        except Refusal as refusal:
            self.send({"error": {"class": "GenericError", "desc": str(refusal)}, "id": message.get("id")})
            return
        if result is not None:  # None: no answer at all
            self.send({"return": result, "id": message.get("id")})

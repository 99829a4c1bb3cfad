"""The QEMU guest agent (``qemu-ga``), as far as a filesystem-consistent checkpoint needs it.

The agent is reached through the unix socket of the guest's virtio-serial port.  It speaks JSON lines without a
greeting.  Answers to somebody else's or an earlier, abandoned command may still be in the pipe, so every command is
preceded by ``guest-sync-delimited``: a 0xFF byte resets the agent's parser, and its answer, with our number in it,
follows a 0xFF byte of its own.

A freeze that is not answered in time may still happen later: whoever tried to freeze must thaw (rule A1).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from typing import Any, Self

from blkckpt import errors

SYNC_TIMEOUT = 5.0
FREEZE_TIMEOUT = 30.0
"""The guest writes out everything dirty first."""
THAW_TIMEOUT = 10.0
MAX_ANSWER = 1 << 20


class GuestAgent:
    """One connection to the agent; a context manager.  Not thread safe."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Connect; the agent itself is asked with the first command."""
        self.path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(SYNC_TIMEOUT)
        self._received = b""
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            reason = error.strerror or "no answer"
            raise errors.HypervisorError(
                f"guest agent socket {self.path}: {reason}; give the one of qga's chardev"
            ) from (error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ping(self, timeout: float) -> None:
        """Raises unless the agent answers within *timeout* seconds."""
        self._sync(timeout)

    def freeze(self) -> int:
        """Freeze the guest's file systems; returns how many.  Thaw even when this fails."""
        count = self._execute("guest-fsfreeze-freeze", FREEZE_TIMEOUT)
        if not isinstance(count, int) or count < 1:
            raise errors.HypervisorError("the guest agent froze no file system; is any mounted that can be frozen?")
        return count

    def thaw(self) -> None:
        """Thaw; no error when nothing is frozen.  Raises when the guest may still be frozen."""
        self._execute("guest-fsfreeze-thaw", THAW_TIMEOUT)
        if self.frozen():
            raise errors.HypervisorError("the guest agent thawed, but file systems are still frozen")

    def frozen(self) -> bool:
        """Whether the agent has file systems frozen."""
        return bool(self._execute("guest-fsfreeze-status", SYNC_TIMEOUT) == "frozen")

    def _execute(self, command: str, timeout: float) -> Any:
        self._sync(SYNC_TIMEOUT)
        self._send(json.dumps({"execute": command}).encode() + b"\n")
        answer = self._answer(command, time.monotonic() + timeout, b"\n")
        if "error" in answer:
            error = answer["error"]
            words = str(error.get("desc", error) if isinstance(error, dict) else error)[:300]
            raise errors.HypervisorError(f"the guest agent refused {command}: {' '.join(words.split())}")
        if "return" not in answer:
            raise errors.ProtocolError(f"the guest agent's answer to {command} is none")
        return answer["return"]

    def _sync(self, timeout: float) -> None:
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._send(b"\xff" + json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            self._until(b"\xff", deadline, "guest-sync-delimited")
            with contextlib.suppress(errors.ProtocolError):
                if self._answer("guest-sync-delimited", deadline, b"\n").get("return") == number:
                    return

    def _answer(self, command: str, deadline: float, end: bytes) -> dict[str, Any]:
        line = self._until(end, deadline, command)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise errors.ProtocolError(f"{self.path} does not talk like a guest agent") from error
        if not isinstance(answer, dict):
            raise errors.ProtocolError(f"{self.path} does not talk like a guest agent")
        return answer

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(SYNC_TIMEOUT)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise errors.HypervisorError(f"guest agent socket {self.path}: {error.strerror or 'stuck'}") from error

    def _until(self, end: bytes, deadline: float, command: str) -> bytes:
        """What comes before the next *end* (taken off)."""
        while end not in self._received:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise errors.DeadlineError(
                    f"the guest agent did not answer {command}; is qemu-ga running in the guest, and nobody else "
                    f"connected to {self.path}?"
                ) from error
            except OSError as error:
                raise errors.HypervisorError(f"guest agent socket {self.path}: {error.strerror}") from error
            if not data:
                raise errors.HypervisorError(f"guest agent socket {self.path} was closed during {command}")
            self._received += data
            if len(self._received) > MAX_ANSWER:
                raise errors.ProtocolError(f"{self.path} answers without end; it is no guest agent")
        found, _, self._received = self._received.partition(end)
        return found

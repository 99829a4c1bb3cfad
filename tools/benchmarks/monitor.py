"""A QMP monitor of the bench's own, beside the one that the product uses: commands, and every event with its time.

Pauses are taken from QEMU's own event timestamps (microseconds of the host's clock), so neither our scheduling nor
the socket is in them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import context

MAX_BANDWIDTH = 1 << 40
"""QEMU's migration is throttled by default; nobody is measured throttled."""


class Monitor:
    """A connected and greeted monitor.  Events are collected by a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._changed = threading.Condition()
        self._answers: list[dict[str, Any]] = []
        self._closed = False
        self.events: list[tuple[str, float, dict[str, Any]]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # QEMU may have gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # QEMU has ended with an answer of ours unread
            self._read_lines()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read_lines(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                with self._changed:
                    if "event" in message:
                        stamp = message["timestamp"]
                        at = stamp["seconds"] + stamp["microseconds"] / 1e6
                        self.events.append((message["event"], at, message.get("data", {})))
                    elif "QMP" not in message:
                        self._answers.append(message)
                    self._changed.notify_all()

    def execute(self, command: str, timeout: float = 120, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        with self._changed:
            if not self._changed.wait_for(lambda: self._answers or self._closed, timeout) or not self._answers:
                raise context.BenchError(f"QEMU does not answer {command}")
            answer = self._answers.pop(0)
        if "error" in answer:
            raise context.BenchError(f"QEMU refuses {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def pauses(self, start: int = 0) -> list[float]:
        """Milliseconds of every STOP→RESUME among the events from number *start* on."""
        found, stopped = [], None
        for name, at, _ in self.events[start:]:
            if name == "STOP":
                stopped = at
            elif name == "RESUME" and stopped is not None:
                found.append((at - stopped) * 1e3)
                stopped = None
        return found

    def only_pause(self, start: int) -> float:
        """The one pause since event *start*; there must be exactly one."""
        with self._changed:
            self._changed.wait_for(lambda: self.pauses(start), 10)
        found = self.pauses(start)
        if len(found) != 1:
            raise context.BenchError(f"{len(found)} pauses where one was expected")
        return found[0]

    def background_snapshot(self, target: str) -> tuple[float, float]:
        """QEMU's own background snapshot into *target*: ``(pause in ms, whole time in s)``."""
        start = len(self.events)
        self.capability("background-snapshot", True)
        self.execute("migrate-set-parameters", **{"max-bandwidth": MAX_BANDWIDTH})
        began = time.monotonic()
        self.execute("migrate", uri=target)
        self._wait_migrated(300)
        took = time.monotonic() - began
        self.capability("background-snapshot", False)
        return self.only_pause(start), took

    def savevm(self, tag: str) -> float:
        """``savevm`` and how long the guest stood still for it, in ms.  The snapshot is removed again."""
        start = len(self.events)
        complaint = self.execute("human-monitor-command", timeout=600, **{"command-line": f"savevm {tag}"})
        if complaint:
            raise context.BenchError(f"savevm: {complaint.strip()}")
        pause = self.only_pause(start)
        self.execute("human-monitor-command", timeout=600, **{"command-line": f"delvm {tag}"})
        return pause

    def capability(self, name: str, state: bool) -> None:
        self.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])

    def _wait_migrated(self, timeout: float) -> None:
        limit = time.monotonic() + timeout
        while (info := self.execute("query-migrate")).get("status") != "completed":
            if info.get("status") in ("failed", "cancelled") or time.monotonic() > limit:
                raise context.BenchError(f"QEMU's own background snapshot: {info}")
            time.sleep(0.01)

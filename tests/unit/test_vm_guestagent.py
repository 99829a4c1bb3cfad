"""The guest agent's protocol against a fake one, stale answers and silence included."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.vm import guestagent


class FakeAgent:
    """qemu-ga in a few lines: one client, fsfreeze and sync."""

    def __init__(self, path: Path) -> None:
        self.frozen = False
        self.systems = 2
        self.stuck: set[str] = set()
        self.silent: set[str] = set()
        self.refuses: dict[str, str] = {}
        self.greeting = b""
        self.seen: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rwb", buffering=0) as file:
                    file.write(self.greeting)
                    while line := file.readline():
                        file.write(self._answer(json.loads(line.lstrip(b"\xff"))))

    def _answer(self, message: dict[str, Any]) -> bytes:
        command = message["execute"]
        self.seen.append(command)
        if command in self.silent:
            return b""
        if command in self.refuses:
            return json.dumps({"error": {"class": "GenericError", "desc": self.refuses[command]}}).encode() + b"\n"
        result: Any = {}
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n"
        if command == "guest-fsfreeze-freeze":
            self.frozen, result = True, self.systems
        elif command == "guest-fsfreeze-thaw":
            self.frozen, result = command in self.stuck, self.systems
        elif command == "guest-fsfreeze-status":
            result = "frozen" if self.frozen else "thawed"
        return json.dumps({"return": result}).encode() + b"\n"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "ga")
    yield fake
    fake.close()


@pytest.fixture
def agent(fake: FakeAgent, tmp_path: Path) -> Iterator[guestagent.GuestAgent]:
    with guestagent.GuestAgent(tmp_path / "ga") as agent:
        yield agent


def test_freeze_and_thaw(fake: FakeAgent, agent: guestagent.GuestAgent) -> None:
    assert not agent.frozen()
    assert agent.freeze() == 2
    assert fake.frozen
    assert agent.frozen()
    agent.thaw()
    assert not fake.frozen


def test_stale_answers_are_skipped(fake: FakeAgent, tmp_path: Path) -> None:
    """What an earlier client left in the pipe, a torn line included, is not taken for our answer."""
    fake.greeting = b'{"return": "frozen"}\n\xff{"return": 7}\n{"torn'
    with guestagent.GuestAgent(tmp_path / "ga") as agent:
        assert not agent.frozen()


def test_a_refusal_keeps_the_words(fake: FakeAgent, agent: guestagent.GuestAgent) -> None:
    fake.refuses["guest-fsfreeze-freeze"] = "The command guest-fsfreeze-freeze has been\ndisabled"
    with pytest.raises(errors.HypervisorError, match=r"refused guest-fsfreeze-freeze: .* been disabled"):
        agent.freeze()


def test_nothing_frozen_is_an_error(fake: FakeAgent, agent: guestagent.GuestAgent) -> None:
    fake.systems = 0
    with pytest.raises(errors.HypervisorError, match="froze no file system"):
        agent.freeze()


def test_a1_a_thaw_that_did_not_help_is_said(fake: FakeAgent, agent: guestagent.GuestAgent) -> None:
    agent.freeze()
    fake.stuck.add("guest-fsfreeze-thaw")
    with pytest.raises(errors.HypervisorError, match="still frozen"):
        agent.thaw()


def test_a2_silence(fake: FakeAgent, agent: guestagent.GuestAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """No qemu-ga in the guest; then it starts, and an abandoned answer does no harm."""
    monkeypatch.setattr(guestagent, "SYNC_TIMEOUT", 0.2)
    fake.silent.add("guest-sync-delimited")
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError, match="is qemu-ga running"):
        agent.freeze()
    assert time.monotonic() - start < 3
    fake.silent.clear()
    assert not agent.frozen()


def test_a_freeze_that_hangs_can_be_thawed(
    fake: FakeAgent, agent: guestagent.GuestAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestagent, "FREEZE_TIMEOUT", 0.2)
    fake.silent.add("guest-fsfreeze-freeze")
    with pytest.raises(errors.DeadlineError):
        agent.freeze()
    fake.frozen = True  # it happened later
    agent.thaw()
    assert not fake.frozen


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(errors.HypervisorError, match="guest agent socket"):
        guestagent.GuestAgent(tmp_path / "none")


@pytest.mark.parametrize("noise", [b"\xffSSH-2.0\n", b"\xff[1]\n"])
def test_a2_something_else(fake: FakeAgent, tmp_path: Path, noise: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestagent, "SYNC_TIMEOUT", 0.3)
    fake.greeting = noise
    fake.silent.add("guest-sync-delimited")
    with guestagent.GuestAgent(tmp_path / "ga") as agent, pytest.raises(errors.DeadlineError):
        agent.frozen()


def test_endless_noise_is_bounded(fake: FakeAgent, tmp_path: Path) -> None:
    fake.greeting = bytes(guestagent.MAX_ANSWER + 100)
    with guestagent.GuestAgent(tmp_path / "ga") as agent, pytest.raises(errors.ProtocolError, match="without end"):
        agent.frozen()


def test_a_ping_waits_as_long_as_it_is_told(fake: FakeAgent, agent: guestagent.GuestAgent) -> None:
    agent.ping(5)
    fake.silent.add("guest-sync-delimited")
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError):
        agent.ping(0.1)
    assert time.monotonic() - start < 3

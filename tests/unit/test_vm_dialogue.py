"""The short QMP dialogue against a fake server: every failure is one of our errors, every wait ends (rule A2)."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.vm import dialogue
from tests.support import fake_qmp


@pytest.fixture
def server(tmp_path: Path) -> Iterator[fake_qmp.FakeQmp]:
    server = fake_qmp.FakeQmp(tmp_path / "q")
    yield server
    server.close()


@pytest.fixture
def session(server: fake_qmp.FakeQmp, tmp_path: Path) -> Iterator[dialogue.Dialogue]:
    with dialogue.Dialogue(tmp_path / "q", timeout=5) as session:
        yield session


def test_commands_and_refusals(server: fake_qmp.FakeQmp, session: dialogue.Dialogue) -> None:
    server.answers["echo"] = lambda arguments: arguments
    assert session.execute("echo", {"a": [1]}) == {"a": [1]}
    with pytest.raises(errors.HypervisorError, match="QEMU refused nonsense: The command nonsense"):
        session.execute("nonsense")
    assert session.execute("echo", {"b": 2}) == {"b": 2}


def test_events_are_kept_while_commands_are_answered(server: fake_qmp.FakeQmp, session: dialogue.Dialogue) -> None:
    def answer(_: object) -> object:
        server.event("MIGRATION", status="setup")
        server.event("STOP")
        server.event("MIGRATION", status="failed")
        return {}

    server.answers["migrate-incoming"] = answer
    session.execute("migrate-incoming")
    assert session.wait_event("MIGRATION", "status", ("completed", "failed"), timeout=5) == "failed"


def test_a2_an_event_that_does_not_come(session: dialogue.Dialogue) -> None:
    began = time.monotonic()
    with pytest.raises(errors.DeadlineError, match="the event MIGRATION"):
        session.wait_event("MIGRATION", "status", ("completed",), timeout=0.1)
    assert time.monotonic() - began < 5


def test_a_descriptor_goes_along(server: fake_qmp.FakeQmp, session: dialogue.Dialogue) -> None:
    server.answers["getfd"] = {}
    reader, writer = os.pipe()
    session.execute("getfd", {"fdname": "x"}, descriptors=[writer])
    os.close(writer)
    os.write(server.descriptors[0], b"through")
    assert os.read(reader, 16) == b"through"
    os.close(reader)


def test_qemu_goes_away(server: fake_qmp.FakeQmp, session: dialogue.Dialogue) -> None:
    server.drop()
    with pytest.raises(errors.HypervisorError, match="went away"):
        session.wait_event("MIGRATION", "status", ("completed",), timeout=5)
    with pytest.raises(errors.HypervisorError, match="went away"):
        session.execute("cont")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(errors.HypervisorError, match="no QEMU behind it"):
        dialogue.Dialogue(tmp_path / "q")


@pytest.mark.parametrize(
    "said",
    [b"220 mail\n", b"[1]\n", b"{}\n", b"\xff\n", b"x" * (2 << 20)],
    ids=["mail", "list", "none", "bytes", "endless"],
)
def test_something_else_listens(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen(1)

        def talk() -> None:
            with listener.accept()[0] as connection:
                try:
                    connection.sendall(said)
                    connection.recv(1)
                except OSError:
                    return

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        with pytest.raises(errors.ProtocolError, match="not a QMP socket"):
            dialogue.Dialogue(tmp_path / "q", timeout=5)
        thread.join(5)

"""The socket server and its client with a made-up handler: who is let in, what is bounded, what is closed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.control import client, messages, server, wire


class Fake:
    """Verbs that show what the server does; ``hold`` blocks until ``release``."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.ended: list[server.Session] = []
        self.heard_from: list[server.Session] = []
        self.sessions: list[server.Session] = []
        self.someone_left = threading.Event()
        self.received: list[tuple[int, int]] = []

    @property
    def verbs(self) -> Mapping[str, server.Verb]:
        empty = messages.Empty.decode
        return {
            "status": server.Verb(empty, lambda session, params, fds: self.note(session)),
            "hold": server.Verb(empty, lambda session, params, fds: self.hold()),
            "fail": server.Verb(empty, self.fail),
            "crash": server.Verb(empty, self.crash),
            "huge": server.Verb(empty, lambda session, params, fds: Huge()),
            "arm": server.Verb(messages.Arm.decode, lambda session, params, fds: self.take(fds), 1),
        }

    def note(self, session: server.Session) -> messages.Empty:
        self.sessions.append(session)
        return messages.Empty()

    def hold(self) -> messages.Empty:
        assert self.release.wait(20)
        return messages.Empty()

    def fail(self, session: server.Session, params: Any, fds: list[int]) -> messages.Empty:
        raise errors.NoSpaceError("copying vda: the store is full; free some space")

    def crash(self, session: server.Session, params: Any, fds: list[int]) -> messages.Empty:
        raise ZeroDivisionError("a defect")

    def take(self, fds: list[int]) -> messages.Empty:
        for descriptor in fds:
            info = os.fstat(descriptor)
            self.received.append((info.st_dev, info.st_ino))
            os.close(descriptor)
        return messages.Empty()

    def welcome(self) -> messages.Welcome:
        return messages.Welcome(messages.VERSION, "test", "vm", os.getpid(), {"vda": 1 << 20})

    def heard(self, session: server.Session) -> None:
        self.heard_from.append(session)

    def gone(self, session: server.Session) -> None:
        self.ended.append(session)
        self.someone_left.set()


class Huge:
    def encode(self) -> dict[str, Any]:
        return {"text": "x" * wire.MAX_MESSAGE}


Start = Callable[..., server.Server]


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def fake() -> Iterator[Fake]:
    handler = Fake()
    yield handler
    handler.release.set()


@pytest.fixture
def listener(address: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(address))
        bound.listen(64)
        yield bound


@pytest.fixture
def start(listener: socket.socket, fake: Fake) -> Iterator[Start]:
    running = []

    def begin(**options: Any) -> server.Server:
        instance = server.Server(listener, fake, **options)
        instance.start()
        running.append(instance)
        return instance

    yield begin
    fake.release.set()
    for instance in running:
        instance.close()


def raw(address: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(address))
    return connection


def answer(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as lines:
        result: dict[str, Any] = json.loads(lines.readline())
        return result


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_hello_then_calls(start: Start, address: Path, fake: Fake) -> None:
    start()
    with client.Client.connect(address, name="unit test") as peer:
        assert peer.welcome == fake.welcome()
        assert peer.status() == {}
        assert fake.sessions[0].client == "unit test"
        assert fake.sessions[0].peer_pid == os.getpid()
        assert fake.heard_from == fake.sessions
    assert fake.someone_left.wait(10)
    assert fake.ended == fake.sessions


def test_errors_keep_their_class_and_the_connection(start: Start, address: Path) -> None:
    start()
    with client.Client.connect(address) as peer:
        with pytest.raises(errors.NoSpaceError, match="the store is full"):
            peer.call("fail", {})
        with pytest.raises(errors.BlkckptError, match="a defect"):
            peer.call("crash", {})
        with pytest.raises(errors.InputError, match="no verb 'dance'"):
            peer.call("dance", {})
        with pytest.raises(errors.InputError, match="unknown member"):
            peer.call("status", {"extra": 1})
        with pytest.raises(errors.ProtocolError, match="cannot be sent"):
            peer.call("huge", {})
        assert peer.status() == {}


def test_an_unknown_method_has_the_standard_code(start: Start, address: Path) -> None:
    start()
    with raw(address) as connection:
        connection.sendall(wire.encode_request(wire.Request("hello", messages.Hello(1, "x").encode(), 1)))
        answer(connection)
        connection.sendall(wire.encode_request(wire.Request("dance", {}, "two")))
        response = answer(connection)
        assert (response["id"], response["error"]["code"]) == ("two", wire.METHOD_NOT_FOUND)


def test_another_version_is_refused_with_a_reason(start: Start, address: Path, fake: Fake) -> None:
    start()
    with raw(address) as connection:
        connection.sendall(wire.encode_request(wire.Request("hello", {"version": 2, "client": "new", "more": 1}, 1)))
        response = answer(connection)
        assert response["error"]["data"]["type"] == "ProtocolError"
        assert "control protocol 2 is not spoken here but 1" in response["error"]["message"]
        assert connection.recv(1) == b""
    assert fake.ended == []


def test_hello_comes_first(start: Start, address: Path, fake: Fake) -> None:
    start()
    with raw(address) as connection:
        connection.sendall(wire.encode_request(wire.Request("status", {}, 1)))
        assert "must be hello" in answer(connection)["error"]["message"]
        assert connection.recv(1) == b""
    assert fake.sessions == []


def test_another_uid_is_refused(start: Start, address: Path, fake: Fake) -> None:
    start(credentials=lambda _: (1234, os.geteuid() + 1))
    with pytest.raises(errors.AccessError, match="belongs to uid"):
        client.Client.connect(address)
    assert fake.sessions == []


def test_credentials_are_the_kernels(start: Start, address: Path, listener: socket.socket) -> None:
    with raw(address):
        accepted, _ = listener.accept()
        with accepted:
            assert server.peer_of(accepted) == (os.getpid(), os.geteuid())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"\0" * 100 + b"\n", b"{}\n"])
def test_garbage_is_answered_once_and_closed(start: Start, address: Path, garbage: bytes) -> None:
    start()
    with raw(address) as connection:
        connection.sendall(garbage)
        response = answer(connection)
        assert (response["id"], response["error"]["code"]) == (None, wire.PARSE_ERROR)
        assert connection.recv(1) == b""


def test_an_endless_message_is_cut_off_at_the_bound(start: Start, address: Path) -> None:
    start()
    with raw(address) as connection:
        with pytest.raises(OSError, match=r"(?i)pipe|reset"):
            for _ in range(64):
                connection.sendall(b"x" * (64 << 10))
        assert "bound" in answer(connection)["error"]["message"]


def test_connections_are_bounded(start: Start, address: Path) -> None:
    start()
    peers = [client.Client.connect(address) for _ in range(server.MAX_CONNECTIONS)]
    try:
        with pytest.raises(errors.StateError, match="32 control connections"):
            client.Client.connect(address)
        peers.pop().close()
        wait_until(lambda: connects(address), "a place is free after one has left")
        assert peers[0].status() == {}
    finally:
        for peer in peers:
            peer.close()


def connects(address: Path) -> bool:
    try:
        client.Client.connect(address).close()
    except errors.StateError:
        return False
    return True


def test_descriptors_reach_the_verb_that_wants_them(start: Start, address: Path, fake: Fake, tmp_path: Path) -> None:
    start()
    with open(tmp_path / "file", "wb") as file, client.Client.connect(address) as peer:
        info = os.fstat(file.fileno())
        peer.arm(file.fileno(), 5)
        assert fake.received == [(info.st_dev, info.st_ino)]
        with pytest.raises(errors.InputError, match="1 descriptor"):
            peer.call("arm", {"deadline": 5})
        peer.arm(file.fileno(), 5)


def test_descriptors_nobody_asked_for_are_closed(start: Start, address: Path, tmp_path: Path) -> None:
    start()
    with open(tmp_path / "file", "wb") as file, client.Client.connect(address) as peer:
        peer.status()
        before = open_descriptors()
        for _ in range(20):
            peer.call("status", {}, descriptors=[file.fileno()] * 5)
            peer.call("arm", {"deadline": 5}, descriptors=[file.fileno()] * 3)
        peer.status()
        wait_until(lambda: open_descriptors() == before, "no descriptor is left")


def test_descriptors_are_bounded(start: Start, address: Path, tmp_path: Path) -> None:
    start()
    with client.Client.connect(address):  # its two ends are open, and the acceptor has all of its own
        before = open_descriptors() - 2
    with (
        open(tmp_path / "file", "wb") as file,
        client.Client.connect(address) as peer,
        pytest.raises(errors.ProtocolError, match="descriptors were sent"),
    ):
        peer.call("status", {}, descriptors=[file.fileno()] * 40)
    wait_until(lambda: open_descriptors() == before, "no descriptor is left")


def test_a_verb_that_waits_holds_up_only_its_own_connection(start: Start, address: Path, fake: Fake) -> None:
    start()
    with client.Client.connect(address) as waiting, client.Client.connect(address) as other:
        thread = threading.Thread(target=lambda: waiting.call("hold", {}))
        thread.start()
        assert other.status() == {}
        fake.release.set()
        thread.join(10)
        assert not thread.is_alive()


def test_a_call_has_a_deadline_and_then_the_connection_is_over(start: Start, address: Path, fake: Fake) -> None:
    start()
    with client.Client.connect(address) as peer:
        with pytest.raises(errors.DeadlineError, match=r"did not answer hold within 0\.1 s"):
            peer.call("hold", {}, timeout=0.1)
        with pytest.raises(client.GoneError):
            peer.status()


def test_a_closing_server_ends_its_connections_and_leaves_the_listener(
    start: Start, address: Path, fake: Fake, listener: socket.socket
) -> None:
    first = start()
    with client.Client.connect(address) as peer:
        first.close()
        assert len(fake.ended) == 1
        with pytest.raises(client.GoneError):
            peer.status()
    early = socket.socket(socket.AF_UNIX)
    early.connect(str(address))  # between two servers: waits in the listener's queue
    start()
    late = client.Client(early)
    assert late.greet("patient").vm == "vm"
    late.close()


def test_nobody_listening(tmp_path: Path, address: Path) -> None:
    with pytest.raises(errors.StateError, match="blkckpt run"):
        client.Client.connect(address)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(address))
    with pytest.raises(errors.StateError, match="blkckpt run"):
        client.Client.connect(address)
    with pytest.raises(errors.InputError, match="107"):
        client.Client.connect(tmp_path / ("x" * 120))


def test_a_server_that_never_answers_is_a_deadline(address: Path, listener: socket.socket) -> None:
    with pytest.raises(errors.DeadlineError):
        client.Client.connect(address, timeout=0.2)


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b'{"jsonrpc":"2.0","id":99,"result":{}}\n', b'{"jsonrpc":"2.0","id":1,"result":[]}\n', b""],
)
def test_a_server_that_breaks_the_protocol(address: Path, listener: socket.socket, line: bytes) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(line)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(errors.ProtocolError if line else client.GoneError):
        client.Client.connect(address)
    thread.join(10)


def test_the_answer_of_an_interrupted_request_is_passed_over(address: Path, listener: socket.socket) -> None:
    """Rule A3: after Ctrl-C during a request, the requests that take everything back still get their answers."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for stale in (b"", b'{"jsonrpc":"2.0","id":0,"result":{"stale":true}}\n'):
                identity = json.loads(connection.recv(1000))["id"]
                body = {"version": 1, "server": "s", "vm": "vm", "pid": 1, "disks": {}}
                connection.sendall(
                    stale + json.dumps({"jsonrpc": "2.0", "id": identity, "result": body}).encode() + b"\n"
                )

    thread = threading.Thread(target=serve)
    thread.start()
    with client.Client.connect(address) as connected:
        assert "stale" not in connected.status()
    thread.join(10)

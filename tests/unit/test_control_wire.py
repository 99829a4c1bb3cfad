"""Framing and messages of the control socket: round trips, and everything a peer may send that is none."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.control import messages, wire

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def request(method: str = "status", params: object = None, identity: object = 1) -> bytes:
    body = {"jsonrpc": "2.0", "method": method, "params": {} if params is None else params, "id": identity}
    return json.dumps(body).encode() + b"\n"


@given(
    st.lists(st.tuples(st.text(max_size=10), st.dictionaries(st.text(max_size=6), JSON, max_size=4)), max_size=5),
    st.integers(1, 40),
)
def test_requests_survive_any_fragmentation(calls: list[tuple[str, dict[str, object]]], piece: int) -> None:
    sent = [wire.Request(method, params, number) for number, (method, params) in enumerate(calls)]
    stream = b"".join(wire.encode_request(item) for item in sent)
    decoder, received = wire.Decoder(), []
    for start in range(0, len(stream), piece):
        decoder.feed(stream[start : start + piece])
        while (message := decoder.next()) is not None:
            received.append(wire.request_of(message))
    assert received == sent
    assert decoder.pending == 0


@given(JSON)
def test_results_survive(result: object) -> None:
    line = wire.encode_response(wire.Response(7, result))
    assert line.count(b"\n") == 1
    assert wire.response_of(wire.parse(line[:-1])) == wire.Response(7, result)


@pytest.mark.parametrize(
    "kind",
    [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.BlkckptError)],
)
def test_errors_come_back_as_their_class(kind: type[errors.BlkckptError]) -> None:
    original = kind("copying vda: it did not work; do this")
    original.errno = errno.ENOSPC
    failure = wire.failure_from(original)
    assert failure.code == -32000 - kind.exit_code
    line = wire.encode_response(wire.Response(1, failure=failure))
    received = wire.response_of(wire.parse(line[:-1])).failure
    assert received is not None
    restored = wire.error_from(received)
    assert type(restored) is kind
    assert (str(restored), restored.errno) == (str(original), errno.ENOSPC)


def test_an_unexpected_error_is_told_as_the_base_class_with_its_errno() -> None:
    failure = wire.failure_from(OSError(errno.EIO, "broken"))
    assert (failure.kind, failure.number, failure.code) == ("BlkckptError", errno.EIO, -32001)


def test_a_failure_naming_something_else_of_the_errors_module_makes_no_foreign_class() -> None:
    for name in ("annotations", "from_os_error", "errno", "__name__", "Exception"):
        assert type(wire.error_from(wire.Failure(-32001, "x", name))) is errors.BlkckptError


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'"hello"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_message_is_a_typed_error(line: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        wire.parse(line)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_typed_error(data: bytes) -> None:
    decoder = wire.Decoder()
    decoder.feed(data + b"\n")
    try:
        while decoder.next() is not None:
            pass
    except errors.ProtocolError:
        pass


def test_an_unended_message_costs_at_most_its_bound() -> None:
    decoder = wire.Decoder(limit=1000)
    decoder.feed(b"x" * 1000)
    with pytest.raises(errors.ProtocolError, match="bound"):
        decoder.feed(b"x")


def test_a_long_message_is_refused_even_when_it_has_ended() -> None:
    decoder = wire.Decoder(limit=100)
    decoder.feed(request(params={"a": "x" * 100}))
    with pytest.raises(errors.ProtocolError, match="bound"):
        decoder.next()


def test_the_largest_message_is_the_bound_exactly() -> None:
    empty = len(wire.encode_response(wire.Response(1, "")))
    line = wire.encode_response(wire.Response(1, "x" * (wire.MAX_MESSAGE - empty)))
    assert len(line) == wire.MAX_MESSAGE
    decoder = wire.Decoder()
    decoder.feed(line)
    assert decoder.next() is not None
    with pytest.raises(errors.ProtocolError, match="cannot be sent"):
        wire.encode_response(wire.Response(1, "x" * (wire.MAX_MESSAGE - empty + 1)))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"jsonrpc": "1.0", "method": "a", "id": 1},
        {"jsonrpc": "2.0", "method": 1, "id": 1},
        {"jsonrpc": "2.0", "method": "notification"},
        {"jsonrpc": "2.0", "method": "a", "id": [1]},
        {"jsonrpc": "2.0", "method": "a", "id": True},
        {"jsonrpc": "2.0", "method": "a", "id": 1.5},
        {"jsonrpc": "2.0", "method": "a", "id": 1, "params": [1]},
    ],
)
def test_objects_that_are_no_requests(body: dict[str, object]) -> None:
    with pytest.raises(errors.ProtocolError):
        wire.request_of(body)


@pytest.mark.parametrize(
    "body",
    [
        {"jsonrpc": "2.0", "id": 1},
        {"jsonrpc": "2.0", "id": 1, "result": 1, "error": {"code": 1, "message": ""}},
        {"jsonrpc": "2.0", "id": 1, "error": "no"},
        {"jsonrpc": "2.0", "id": 1, "error": {"code": "1", "message": ""}},
        {"id": 1, "result": 1},
    ],
)
def test_objects_that_are_no_responses(body: dict[str, object]) -> None:
    with pytest.raises(errors.ProtocolError):
        wire.response_of(body)


def test_parameters_survive() -> None:
    for value in (
        messages.Empty(),
        messages.Hello(1, "test"),
        messages.Prepare("monday"),
        messages.Arm(2.5),
        messages.Switch("barrier"),
        messages.Copy("/store", {"vda": None, "vdb": "abc"}, 1 << 20),
        messages.Wait("a3", 30),
    ):
        assert type(value).decode(json.loads(json.dumps(value.encode()))) == value


def test_results_survive_and_tolerate_more() -> None:
    for value in (
        messages.Welcome(1, "blkckpt 0.1", "vm", 12, {"vda": 4096}),
        messages.Switched(True, False, None, 123),
        messages.Switched(False, False, "two STOP events"),
        messages.Started("a1"),
        messages.JobState("a1", "running", 5, 10),
        messages.JobState("a1", "failed", 5, 10, None, messages.JobFailure("NoSpaceError", "full", errno.ENOSPC)),
    ):
        assert type(value).decode({**json.loads(json.dumps(value.encode())), "newer": 1}) == value


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (messages.Empty, {"a": 1}),
        (messages.Prepare, {}),
        (messages.Prepare, {"checkpoint": "../up"}),
        (messages.Prepare, {"checkpoint": "a/b"}),
        (messages.Prepare, {"checkpoint": 5}),
        (messages.Prepare, {"checkpoint": "a", "force": True}),
        (messages.Arm, {"deadline": -1}),
        (messages.Arm, {"deadline": 1e9}),
        (messages.Arm, {"deadline": True}),
        (messages.Arm, {"deadline": "5"}),
        (messages.Switch, {"mode": "later"}),
        (messages.Copy, {"store": "relative", "parents": {}}),
        (messages.Copy, {"store": "/a\0b", "parents": {}}),
        (messages.Copy, {"store": "/a", "parents": []}),
        (messages.Copy, {"store": "/a", "parents": {"../x": None}}),
        (messages.Copy, {"store": "/a", "parents": {"vda": 5}}),
        (messages.Copy, {"store": "/a", "parents": {}, "rate": 0}),
        (messages.Copy, {"store": "/a", "parents": {str(i): None for i in range(2000)}}),
        (messages.Wait, {"job": "a", "timeout": 31}),
        (messages.Wait, {"job": "a" * 65, "timeout": 1}),
        (messages.Wait, {"job": 1.0, "timeout": 1}),
        (messages.Hello, {"version": "1", "client": "x"}),
    ],
)  # fmt: skip
def test_wrong_parameters_are_bad_input(kind: type[messages.Empty], body: dict[str, object]) -> None:
    with pytest.raises(errors.InputError):
        kind.decode(body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (messages.Started, {"job": 1}),
        (messages.Started, []),
        (messages.Switched, {"switched": 1, "waiting": False}),
        (messages.JobState, {"job": "a", "state": "lost", "progress": {"done": 0, "total": 0}}),
        (messages.JobState, {"job": "a", "state": "done"}),
        (messages.Welcome, {"version": 1, "server": "", "vm": "", "pid": 1, "disks": {"vda": 5}}),
    ],
)  # fmt: skip
def test_wrong_results_are_protocol_errors(kind: type[messages.Started], body: dict[str, object]) -> None:
    with pytest.raises(errors.ProtocolError):
        kind.decode(body)

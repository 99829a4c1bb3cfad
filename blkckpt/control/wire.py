"""JSON-RPC 2.0 in lines: the framing of the control socket.  Pure: bytes in, messages out.

A message is one JSON object in UTF-8 and one newline.  Between them no newline occurs: the encoder writes none
(JSON escapes it in strings), and the decoder takes the first one as the end.

=================  ===============================================================================
bound              why
=================  ===============================================================================
``MAX_MESSAGE``    1 MiB with the newline: the longest legitimate one, the status of a VM with many
                   disks, is a few hundred KiB; a peer that sends more without a newline is cut off
                   having cost one such buffer
nesting            what ``json`` itself allows; deeper is a typed error, not a crash
numbers            no ``NaN`` or ``Infinity``, which are not JSON; no duplicate keys, which two readers
                   could read differently
=================  ===============================================================================

Descriptors travel beside the bytes (``SCM_RIGHTS``) and are no part of the frame; which message may claim them
is said in :mod:`blkckpt.control.server`.

Source: JSON-RPC 2.0 specification, https://www.jsonrpc.org/specification.  Batches are not spoken here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blkckpt import errors

MAX_MESSAGE = 1 << 20

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
OWN_ERRORS = -32000
"""Our own codes are ``OWN_ERRORS - exit_code``: -32001 to -32010, inside the specification's server range."""

RequestId = int | str | None


@dataclass(frozen=True, slots=True)
class Request:
    """A call.  ``identity`` comes back in its answer."""

    method: str
    params: Mapping[str, Any]
    identity: RequestId


@dataclass(frozen=True, slots=True)
class Failure:
    """The ``error`` member of an answer."""

    code: int
    message: str
    kind: str = ""
    """The class's name in :mod:`blkckpt.errors`."""
    number: int | None = None
    """Its errno."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: ``failure`` is set or ``result`` counts."""

    identity: RequestId
    result: Any = None
    failure: Failure | None = None


class Decoder:
    """Cuts a byte stream into messages.  Not thread-safe: one per connection and direction.

    After it has raised, the stream has no meaning any more: close the connection.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0

    @property
    def pending(self) -> int:
        """Bytes of a message that has not ended yet, or of complete ones not yet taken."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add received bytes.  Raises :class:`errors.ProtocolError` when an unended message is past the limit."""
        self._buffer += data
        if len(self._buffer) > self._limit and self._newline() < 0:
            raise errors.ProtocolError(
                f"a message of more than {self._limit} bytes was sent; the bound is {self._limit}"
            )

    def next(self) -> dict[str, Any] | None:
        """The next complete message, or None.  Raises :class:`errors.ProtocolError` when it is none."""
        end = self._newline()
        if end < 0:
            return None
        if end >= self._limit:
            raise errors.ProtocolError(f"a message of {end + 1} bytes was sent; the bound is {self._limit}")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return parse(line)

    def _newline(self) -> int:
        """Where the first newline is; remembers what was searched, so that a trickle costs no quadratic time."""
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
        return end


def parse(line: bytes) -> dict[str, Any]:
    """One line without its newline, as an object.  Raises :class:`errors.ProtocolError`."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise errors.ProtocolError(f"a message that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise errors.ProtocolError(f"a message that is no JSON object but a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with the same key twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def request_of(message: Mapping[str, Any]) -> Request:
    """Read *message* as a call.  Raises :class:`errors.ProtocolError` when it is none."""
    method, params, identity = message.get("method"), message.get("params", {}), message.get("id")
    if message.get("jsonrpc") != "2.0" or not isinstance(method, str) or "id" not in message:
        raise errors.ProtocolError("a message that is no JSON-RPC 2.0 request with an id")
    if not isinstance(params, dict):
        raise errors.ProtocolError("params that are no object; they go by name here")
    if not _is_identity(identity):
        raise errors.ProtocolError("a request id that is neither a number nor a string")
    return Request(method, params, identity)


def response_of(message: Mapping[str, Any]) -> Response:
    """Read *message* as an answer.  Raises :class:`errors.ProtocolError` when it is none."""
    identity, failure = message.get("id"), message.get("error")
    if message.get("jsonrpc") != "2.0" or not _is_identity(identity) or ("result" in message) == ("error" in message):
        raise errors.ProtocolError("a message that is no JSON-RPC 2.0 response")
    if "error" not in message:
        return Response(identity, message["result"])
    if not isinstance(failure, dict):
        raise errors.ProtocolError("a response whose error is no object")
    return Response(identity, failure=_failure_of(failure))


def _failure_of(failure: Mapping[str, Any]) -> Failure:
    code, message, data = failure.get("code"), failure.get("message"), failure.get("data")
    if not isinstance(code, int) or not isinstance(message, str):
        raise errors.ProtocolError("a response whose error has no code or message")
    data = data if isinstance(data, dict) else {}
    kind, number = data.get("type"), data.get("errno")
    return Failure(code, message, kind if isinstance(kind, str) else "", number if isinstance(number, int) else None)


def _is_identity(value: Any) -> bool:
    return value is None or type(value) in (int, str)


def encode_request(request: Request) -> bytes:
    """*request* as a line."""
    return _line({
        "jsonrpc": "2.0",
        "method": request.method,
        "params": dict(request.params),
        "id": request.identity,
    })  # fmt: skip


def encode_response(response: Response) -> bytes:
    """*response* as a line.  Raises :class:`errors.ProtocolError` when its result is past the bound."""
    body: dict[str, Any] = {"jsonrpc": "2.0", "id": response.identity}
    if response.failure is None:
        return _line({**body, "result": response.result})
    failure = response.failure
    data = {"type": failure.kind, "errno": failure.number}
    return _line({**body, "error": {"code": failure.code, "message": failure.message, "data": data}})


def _line(message: Mapping[str, Any]) -> bytes:
    line = json.dumps(message, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise errors.ProtocolError(f"a message of {len(line)} bytes cannot be sent; the bound is {MAX_MESSAGE}")
    return line


def failure_from(error: BaseException, code: int | None = None) -> Failure:
    """How *error* is told: an expected one by its class, any other as the plain base class."""
    expected = error if isinstance(error, errors.BlkckptError) else None
    kind = _public_class(type(expected)) if expected else errors.BlkckptError
    number = expected.errno if expected else getattr(error, "errno", None)
    message = str(error) if expected else f"an unexpected failure: {type(error).__name__}: {error}"
    return Failure(OWN_ERRORS - kind.exit_code if code is None else code, message[:4096], kind.__name__, number)


def _public_class(kind: type[errors.BlkckptError]) -> type[errors.BlkckptError]:
    """The nearest class that :mod:`blkckpt.errors` has: subclasses elsewhere are not known to the peer."""
    for base in kind.__mro__:
        if issubclass(base, errors.BlkckptError) and base.__module__ == errors.__name__:
            return base
    return errors.BlkckptError


def error_from(failure: Failure) -> errors.BlkckptError:
    """The exception that *failure* tells of: the same class, message and errno."""
    kind = getattr(errors, failure.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.BlkckptError)):
        kind = errors.ProtocolError if failure.code in (PARSE_ERROR, INVALID_REQUEST) else errors.BlkckptError
    result: errors.BlkckptError = kind(failure.message)
    if failure.number is not None:
        result.errno = failure.number
    return result

"""The socket server: accepts, checks who calls, cuts messages, calls handlers, answers.  Knows no verb but ``hello``.

One thread accepts, one thread serves each connection: the verbs that wait (``wait``, ``prepare``) hold up their
own connection only, and ``switch`` is answered by a thread that was already waiting for it.  Threads are few
(``MAX_CONNECTIONS``) and asleep.

A connection goes through these states; every arrow out of them ends in *closed*::

    accepted ── uid is ours ──> silent ── hello, same version ──> greeted ── requests, one answer each …
        │ another uid             │ anything else, or 5 s            │ bytes that are no message
        v                         v                                  v
     refused                   refused                            refused            (each with an error line)

**Descriptors.**  They arrive with the bytes of the message they belong to.  A verb declares how many it takes
(:class:`Verb.descriptors`); a message that brings fewer is an error, and whatever is left when no complete message
is waiting is closed: a peer cannot fill our table.  The handler owns those it is given and must close them.

**The listening socket is not ours alone**: the launcher holds it too and hands it to the next server, so it is
polled and never shut down, and a client that connects between two servers waits in its queue.

Two kinds of errors.  A message that is none, or too long: answered with id null, then closed, as the stream has
lost its meaning.  A request that fails: answered by class and message, the connection goes on.
"""

from __future__ import annotations

import array
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from blkckpt import errors, log
from blkckpt.control import messages, wire

MAX_CONNECTIONS = 32
"""An agent, a few watchers, a forgotten shell loop; each costs a thread."""
MAX_DESCRIPTORS = 8
"""Descriptors that may wait on one connection; one message brings at most one today."""
HELLO_SECONDS = 5.0
"""A hello is the first thing a client sends.  Shorter than a QMP client waits for its greeting: one that takes us
for a monitor sees us hang up, and says so."""
SEND_SECONDS = 10.0
"""A peer that does not read its answers for so long is dropped."""
RECEIVE_SIZE = 64 << 10

logger = log.get(__name__)


@dataclass(slots=True, eq=False)
class Session:
    """One greeted connection, as handlers see it.  Its identity is the lease's owner."""

    number: int
    peer_pid: int
    client: str = ""
    greeted: bool = False


class Result(Protocol):
    def encode(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Verb:
    """One method: how its parameters are read, what it does, how many descriptors come with it."""

    decode: Callable[[Mapping[str, Any]], Any]
    run: Callable[[Session, Any, list[int]], Result]
    descriptors: int = 0


class Handler(Protocol):
    """What the server serves.  All of it is called from connection threads, several at once."""

    @property
    def verbs(self) -> Mapping[str, Verb]: ...

    def welcome(self) -> messages.Welcome:
        """Answer a hello of the right version."""

    def heard(self, session: Session) -> None:
        """A message came in: the peer lives."""

    def gone(self, session: Session) -> None:
        """The connection has ended; called once for each greeted session."""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel noted them at connect."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", data)
    return pid, uid


class Server:
    """Serves *listener*, an already listening unix socket, until :meth:`close`.

    *credentials* gives (pid, uid) of a connection's peer; replaceable for tests.  *what* it calls itself in errors.
    """

    def __init__(
        self,
        listener: socket.socket,
        handler: Handler,
        *,
        credentials: Callable[[socket.socket], tuple[int, int]] = peer_of,
        what: str = "disk server",
    ) -> None:
        self._listener = listener
        self._handler = handler
        self._credentials = credentials
        self._what = what
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._numbers = 0
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept_all, name="control", daemon=True)

    def start(self) -> None:
        """Begin to accept.  Call it after every fork."""
        self._listener.setblocking(False)
        self._acceptor.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop accepting, end every connection, wait for their threads.  The listening socket stays."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            connections = list(self._connections.values())
        os.eventfd_write(self._wake, 1)
        for connection in connections:
            connection.stop()
        for thread in [self._acceptor, *(connection.thread for connection in connections)]:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout)
        if not self._acceptor.is_alive():
            os.close(self._wake)

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing:
                if any(key.fileobj is self._listener for key, _ in selector.select()):
                    self._accept()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("accept failed", extra={"fields": {"error": str(error)}})
            self._pause_after_failure()
            return
        refusal: errors.BlkckptError | None = None
        pid, uid = self._credentials(peer)
        if uid != os.geteuid():
            refusal = errors.AccessError(f"this {self._what} belongs to uid {os.geteuid()}, not to uid {uid}")
        with self._lock:
            if refusal is None and len(self._connections) >= MAX_CONNECTIONS:
                refusal = errors.StateError(f"{MAX_CONNECTIONS} control connections are open already; close some")
            if refusal is None and not self._closing:
                self._numbers += 1
                connection = _Connection(peer, Session(self._numbers, pid), self._handler, self._forget)
                self._connections[self._numbers] = connection
                connection.thread.start()
                return
        _refuse(peer, refusal)

    def _pause_after_failure(self) -> None:
        """Out of descriptors, say: the connection stays in the queue, so wait a little unless we are closing."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.select(0.1)

    def _forget(self, session: Session) -> None:
        with self._lock:
            self._connections.pop(session.number, None)


def _refuse(peer: socket.socket, reason: errors.BlkckptError | None) -> None:
    with peer:
        if reason is None:
            return
        logger.warning("control connection refused", extra={"fields": {"reason": str(reason)}})
        peer.settimeout(0)
        try:
            peer.send(wire.encode_response(wire.Response(None, failure=wire.failure_from(reason))))
        except OSError:
            return  # it does not listen; it has been refused all the same


class _Connection:
    """One connection and its thread."""

    def __init__(
        self, peer: socket.socket, session: Session, handler: Handler, forget: Callable[[Session], None]
    ) -> None:
        self._socket = peer
        self._session = session
        self._handler = handler
        self._forget = forget
        self._decoder = wire.Decoder()
        self._descriptors: list[int] = []
        self.thread = threading.Thread(target=self._serve, name=f"control-{session.number}", daemon=True)

    def stop(self) -> None:
        """Make its thread end after the request it is serving."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            return  # it has ended already

    def _serve(self) -> None:
        try:
            self._socket.settimeout(HELLO_SECONDS)
            while self._receive():
                while (message := self._decoder.next()) is not None:
                    self._answer(message)
                    if not self._session.greeted:
                        return  # it has been told why
                self._close_descriptors()
        except errors.ProtocolError as error:
            self._send_quietly(wire.Response(None, failure=wire.failure_from(error, wire.PARSE_ERROR)))
        except OSError as error:
            logger.info("control connection lost", extra={"fields": {"error": str(error)}})
        except Exception:
            logger.exception("control connection failed")
        finally:
            self._end()

    def _end(self) -> None:
        self._close_descriptors()
        self._socket.close()
        self._forget(self._session)
        if self._session.greeted:
            self._handler.gone(self._session)

    def _receive(self) -> bool:
        """Read once; False at the end of the stream.  Descriptors go to their queue."""
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        data, control, flags, _ = self._socket.recvmsg(RECEIVE_SIZE, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, body in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
            raise errors.ProtocolError(f"more than {MAX_DESCRIPTORS} descriptors were sent")
        if data:
            self._decoder.feed(data)
        return bool(data)

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _answer(self, message: Mapping[str, Any]) -> None:
        request = wire.request_of(message)
        try:
            result = self._perform(request)
            line = wire.encode_response(wire.Response(request.identity, result.encode()))
        except Exception as error:
            if not isinstance(error, errors.BlkckptError):
                logger.exception("control request failed", extra={"fields": {"method": request.method[:80]}})
            code = wire.METHOD_NOT_FOUND if isinstance(error, _NoSuchVerbError) else None
            line = wire.encode_response(wire.Response(request.identity, failure=wire.failure_from(error, code)))
        self._send(line)

    def _perform(self, request: wire.Request) -> Result:
        if not self._session.greeted:
            return self._greet(request)
        self._handler.heard(self._session)
        if request.method == "hello":
            return self._handler.welcome()
        verb = self._handler.verbs.get(request.method)
        if verb is None:
            raise _NoSuchVerbError(f"no verb {request.method[:80]!r}; there are {', '.join(self._handler.verbs)}")
        params = verb.decode(request.params)
        if len(self._descriptors) < verb.descriptors:
            raise errors.InputError(f"{request.method} needs {verb.descriptors} descriptor(s) sent with it")
        taken = [self._descriptors.pop(0) for _ in range(verb.descriptors)]
        return verb.run(self._session, params, taken)

    def _greet(self, request: wire.Request) -> Result:
        if request.method != "hello":
            raise errors.ProtocolError(f"the first message must be hello, not {request.method[:80]!r}")
        hello = messages.Hello.decode(request.params)
        if hello.version != messages.VERSION:
            raise errors.ProtocolError(
                f"control protocol {hello.version} is not spoken here but {messages.VERSION}: "
                "the server and this command are of different releases; restart the VM's server"
            )
        result = self._handler.welcome()
        self._session.client = hello.client
        self._session.greeted = True
        self._socket.settimeout(None)
        return result

    def _send(self, line: bytes) -> None:
        """Send all of it; OSError when the peer takes nothing for ``SEND_SECONDS``."""
        self._socket.settimeout(SEND_SECONDS)
        self._socket.sendall(line)
        self._socket.settimeout(None if self._session.greeted else HELLO_SECONDS)

    def _send_quietly(self, response: wire.Response) -> None:
        try:
            self._send(wire.encode_response(response))
        except OSError:
            return  # the peer is gone, which is what was about to happen to it


class _NoSuchVerbError(errors.InputError):
    """A method that nobody serves."""

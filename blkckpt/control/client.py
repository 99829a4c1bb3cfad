"""The blocking client of the control socket: one method a verb, a deadline on each, descriptors where one goes along.

Errors come back as the class that the server raised (:func:`wire.error_from`).  A connection that ends, or an
answer that does not come in time, raises and closes: the answer to a request must never be taken for another's.
After that every call raises :class:`GoneError`; connect again.

The connection that called ``prepare`` holds the lease (rule D7): closing it takes the checkpoint back, unless the
commit has begun.  One thread at a time may call; the methods lock.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blkckpt import errors
from blkckpt.control import messages, wire

MAX_SOCKET_PATH = 107
"""``sun_path`` has 108 bytes, one of them for the final NUL."""
CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0
"""Longest that a verb may take that only changes state; ``prepare`` writes and syncs a few small files."""
MARGIN_SECONDS = 10.0
"""How much longer than the wait it asked for a client waits for the answer."""


class GoneError(errors.BlkckptError):
    """The disk server closed the connection, or is not there any more."""


class Client:
    """A greeted connection.  Make one with :meth:`connect`; close it, or use it as a context manager."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket: socket.socket | None = connection
        self._decoder = wire.Decoder()
        self._lock = threading.Lock()
        self._identity = 0
        self.welcome = messages.Welcome(0, "", "", 1, {})

    @classmethod
    def connect(cls, path: Path, *, name: str = "blkckpt", timeout: float = CONNECT_SECONDS) -> Self:
        """Connect to the server at *path* and greet it.

        Raises :class:`errors.StateError` when nobody listens there, :class:`errors.AccessError` when the server
        is somebody else's, :class:`errors.DeadlineError` when it does not answer within *timeout* seconds.
        """
        client = cls(open_socket(path, timeout))
        try:
            client.greet(name, timeout)
        except BaseException:
            client.close()
            raise
        return client

    def fileno(self) -> int:
        """The socket's descriptor, for polling: readable means an answer has come or the server is gone."""
        return self._socket.fileno() if self._socket else -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection (and with it the lease it may hold).  No error if it has ended."""
        connection, self._socket = self._socket, None
        if connection:
            connection.close()

    # One method a verb.

    def greet(self, name: str, timeout: float = CONNECT_SECONDS) -> messages.Welcome:
        """Say hello; :meth:`connect` does it."""
        body = self.call("hello", messages.Hello(messages.VERSION, name).encode(), timeout=timeout)
        self.welcome = messages.Welcome.decode(body)
        if self.welcome.version != messages.VERSION:
            raise errors.ProtocolError(f"the disk server speaks control protocol {self.welcome.version}, we 1")
        return self.welcome

    def status(self) -> dict[str, Any]:
        """The group's status as the server tells it (see :mod:`blkckpt.control`)."""
        body = self.call("status", {})
        if not isinstance(body, dict):
            raise errors.ProtocolError("answer to status: no object")
        return body

    def prepare(self, checkpoint: str, *, retain: bool = False) -> None:
        """Step 802: make the overlays; this connection holds the lease from here on."""
        self.call("prepare", messages.Prepare(checkpoint, retain).encode())

    def arm(self, qmp: int, deadline: float) -> None:
        """Watch the QMP socket *qmp* (a descriptor; it is duplicated) for at most *deadline* seconds."""
        self.call("arm", messages.Arm(deadline).encode(), descriptors=[qmp], timeout=messages.FLUSH_SECONDS)

    def switch(self, mode: str = messages.SWITCH_NOW) -> messages.Switched:
        """Step 810, or whether the barrier has passed (mode ``barrier``)."""
        return messages.Switched.decode(self.call("switch", messages.Switch(mode).encode()))

    def disarm(self) -> None:
        """Stop watching; the overlays stay prepared."""
        self.call("disarm", {})

    def copy(self, store: Path, parents: Mapping[str, str | None], rate: int | None = None) -> str:
        """Step 830: start copying the frozen chains into *store*; returns the job."""
        body = self.call("copy", messages.Copy(str(store), parents, rate).encode())
        return messages.Started.decode(body).job

    def retain(self, store: Path, checkpoint_id: str, images: Mapping[str, str]) -> str:
        """Instead of 830: the frozen chains stay where they are, as those *images* of *store*; returns the job."""
        body = self.call("retain", messages.Retain(str(store), checkpoint_id, images).encode())
        return messages.Started.decode(body).job

    def flatten(self, checkpoint: str, rate: int | None = None) -> str:
        """Copy a retained checkpoint into its store; returns the job, which ends with this connection."""
        return messages.Started.decode(self.call("flatten", messages.Flatten(checkpoint, rate).encode())).job

    def review(self) -> str:
        """Say that a retained checkpoint has been flattened or removed: its layers are let go; returns the job."""
        return messages.Started.decode(self.call("review", {})).job

    def commit(self) -> str:
        """Step 834, after the manifest is durable; returns the job."""
        return messages.Started.decode(self.call("commit", {})).job

    def abort(self) -> str:
        """Take the checkpoint under way back, from any state; returns the job."""
        return messages.Started.decode(self.call("abort", {})).job

    def wait(self, job: str, timeout: float = messages.MAX_WAIT) -> messages.JobState:
        """Wait at most *timeout* (30) seconds for *job*; it may still run."""
        body = self.call("wait", messages.Wait(job, timeout).encode(), timeout=timeout + MARGIN_SECONDS)
        return messages.JobState.decode(body)

    def finish(self, job: str, deadline: float) -> messages.JobState:
        """Wait for the end of *job*, *deadline* seconds in all; raises what it failed with."""
        end = time.monotonic() + deadline
        while True:
            left = end - time.monotonic()
            state = self.wait(job, max(0.0, min(left, messages.MAX_WAIT)))
            if state.failure:
                failure = state.failure
                raise wire.error_from(wire.Failure(0, failure.message, failure.kind, failure.number))
            if state.state == messages.DONE:
                return state
            if left <= 0:
                raise errors.DeadlineError(f"job {job} of the disk server did not end within {deadline:g} s")

    def shutdown(self) -> None:
        """Ask the server to stop; it does so after the answer."""
        self.call("shutdown", {})

    # The call itself.

    def call(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        descriptors: Sequence[int] = (),
        timeout: float = CALL_SECONDS,
    ) -> Any:
        """Send one request and return the ``result`` of its answer, raising its ``error``."""
        with self._lock:
            self._identity += 1
            request = wire.Request(method, params, self._identity)
            try:
                response = self._exchange(request, descriptors, time.monotonic() + timeout)
            except TimeoutError as error:
                self.close()
                raise errors.DeadlineError(f"the disk server did not answer {method} within {timeout:g} s") from error
            except OSError as error:
                self.close()
                raise GoneError(f"the disk server closed the connection during {method}") from error
            except errors.BlkckptError:
                self.close()
                raise
        if response.failure:
            raise wire.error_from(response.failure)
        return response.result

    def _exchange(self, request: wire.Request, descriptors: Sequence[int], deadline: float) -> wire.Response:
        if self._socket is None:
            raise GoneError("the connection to the disk server has ended")
        line = wire.encode_request(request)
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sent = socket.send_fds(self._socket, [line], list(descriptors)) if descriptors else 0
            self._socket.sendall(line[sent:])
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused at the door: the reason is there to be read
        while True:
            response = self._receive(request.method, deadline)
            if response.identity == request.identity or (response.identity is None and response.failure):
                return response
            asked, answered = request.identity, response.identity
            if not isinstance(answered, int) or not isinstance(asked, int) or answered > asked:
                raise errors.ProtocolError(
                    f"the disk server answered request {response.identity}, not {request.identity}"
                )
            # the answer to a request whose caller was interrupted (Ctrl-C) before it came

    def _receive(self, method: str, deadline: float) -> wire.Response:
        assert self._socket is not None
        while (message := self._decoder.next()) is None:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                raise GoneError(f"the disk server closed the connection during {method}")
            self._decoder.feed(data)
        return wire.response_of(message)


def check_path(path: Path) -> None:
    """Raise :class:`errors.InputError` when *path* is too long for a unix socket."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise errors.InputError(
            f"socket path {path} has {length} bytes and the kernel takes {MAX_SOCKET_PATH}; use a shorter VM name, "
            "or a shorter run directory (XDG_RUNTIME_DIR)"
        )


def open_socket(path: Path, timeout: float = CONNECT_SECONDS) -> socket.socket:
    """Connect to the unix socket at *path*.  Raises the errors of :meth:`Client.connect`."""
    check_path(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        raise errors.StateError(f"no disk server listens at {path}; start the VM with `blkckpt run`") from error
    except (TimeoutError, BlockingIOError) as error:
        connection.close()
        raise errors.DeadlineError(f"the disk server at {path} does not accept connections") from error
    except OSError as error:
        connection.close()
        raise errors.from_os_error(error, f"connecting to {path}") from error
    return connection

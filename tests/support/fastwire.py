"""The fast path's sockets (``wire.c``) in the test's own process: a library's calls, and a client and its server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.support import fastcore

MORE = socket.MSG_MORE


class Wire:
    """The library, its calls by their libc names."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path), use_errno=True)
        for name in ("fp_wire_read", "fp_wire_send"):
            getattr(self.c, name).restype = ctypes.c_ssize_t
        self.c.fp_wire_holds.restype = ctypes.c_bool

    def read(self, fd: int, length: int) -> bytes:
        buf = ctypes.create_string_buffer(max(length, 1))
        got = self.c.fp_wire_read(fd, buf, ctypes.c_size_t(length))
        return buf.raw[: self._checked(got)]

    def send(self, fd: int, data: bytes, flags: int = 0) -> int:
        return self._checked(self.c.fp_wire_send(fd, data, ctypes.c_size_t(len(data)), flags))

    def close(self, fd: int) -> None:
        self._checked(self.c.fp_wire_close(fd))

    def _checked(self, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    @property
    def counters(self) -> list[int]:
        """Reads asked for and made, sends asked for and made."""
        found = (ctypes.c_uint64 * 4)()
        self.c.fp_wire_counters(found)
        return list(found)


class Pair:
    """A client, and the server's end as nbdkit has it: one that has gathered its greeting."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.client, server = socket.socketpair()
        self.client.settimeout(fastcore.WAIT)
        self.fd = server.detach()
        self.send(b"hel", MORE)
        self.send(b"lo")
        assert self.client.recv(100) == b"hello"

    def read(self, length: int) -> bytes:
        return self.wire.read(self.fd, length)

    def send(self, data: bytes, flags: int = 0) -> int:
        return self.wire.send(self.fd, data, flags)

    def arrived(self) -> bytes:
        """What the client has, without waiting."""
        self.client.settimeout(0)
        try:
            return self.client.recv(1 << 20)
        except BlockingIOError:
            return b""
        finally:
            self.client.settimeout(fastcore.WAIT)

    def hold(self, reply: bytes = b"r") -> None:
        """Two requests of a byte came, one was read, its reply waits."""
        self.client.sendall(b"ab")
        assert self.read(1) == b"a"
        self.send(reply)
        assert self.arrived() == b"" and self.wire.c.fp_wire_holds(), "nothing is held"

    def close(self) -> None:
        self.wire.close(self.fd)
        self.client.close()


@contextlib.contextmanager
def paired(wire: Wire) -> Iterator[Pair]:
    pair = Pair(wire)
    try:
        yield pair
    finally:
        pair.close()

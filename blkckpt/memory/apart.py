"""The intake in a process of its own, and what it tells the process that stores.

One interpreter would do, but its lock is handed from thread to thread with every system call and every chunk hashed,
and each time the intake waits for it QEMU may meet a full pipe (1.2 ms after an empty one).  So the intake has an
interpreter to itself, forked before there are threads; it and the store share the raw images and the state of their
pages (:class:`blkckpt.memory.assemble.Block`), so nothing is copied between them.

It tells what it did by datagrams of JSON on a socket pair, its descriptors beside them::

    {"block": {"name", "size", "page_size", "temporary"}}         raw image, state of its pages; once a main block
    {"blocks": {"total", "page_size"}}                            no more of these; bytes of RAM
    {"done": pages, "chunks": [[block, low, high], …]}            chunks that are whole
    {"end": {"pages", "zeros", "bytes", "seconds"}}               the skeleton's file; the last message
    {"error": {"type", "message", "errno"}}                       the last message

Telling never waits for the other process (rule M1): what the socket has no room for is gathered, and told later.

Ends.  The intake stops when the socket is shut or its other end has died, so that no stream is read for nobody.  The
storing process sees the socket end without a last message when the intake has died, which is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blkckpt import errors
from blkckpt.control import wire
from blkckpt.memory import assemble, image, intake, records, skeleton, stream

_MESSAGE = 128 << 10
"""Longest message; a socket's buffer takes one, whatever the limits of this machine."""
_RANGES = 2048
"""Runs of chunks in one message."""
_EVERY = 0.02
"""Seconds between messages.  One after every read costs both processes and the feeder a tenth of their time more."""

Completed = Callable[[assemble.Block, int, int], None]


@dataclass(frozen=True, slots=True)
class Taken:
    """What the intake had at the stream's end."""

    skeleton: bytes
    pages: int
    zeros: int
    bytes: int
    seconds: float


# --- the process that stores


class Intake:
    """The running process.  :meth:`listen` belongs to one thread, :meth:`stop` to any."""

    def __init__(self, descriptor: int, directory: Path, *, once: bool, closed: tuple[int, ...] = ()) -> None:
        """Fork; *descriptor* is the stream's, the caller closes its own.  *closed* are not the child's to hold."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _run(theirs, descriptor, directory, once=once, closed=closed)
        theirs.close()
        self._socket = ours
        self._once = once
        self._ended = False
        self.main: list[assemble.Block] = []
        self.page_size = 0
        self.total = 0
        self.pages = 0

    def listen(self, completed: Completed) -> Taken:
        """Take what it tells until the stream's end; *completed* is told of every run of whole chunks."""
        while True:
            message, descriptors = self._receive()
            kind = next(iter(message))
            body = message[kind]
            if kind == "done":
                self.pages = body
                for number, low, high in message["chunks"]:
                    self.main[number].given(low, high)
                    completed(self.main[number], low, high)
            elif kind == "block":
                self._add(body, *descriptors)
            elif kind == "blocks":
                self.page_size, self.total = body["page_size"], body["total"]
            elif kind == "end":
                with os.fdopen(descriptors[0], "rb") as file:
                    return Taken(file.read(), **body)
            else:
                raise wire.error_from(wire.Failure(0, body["message"], body["type"], body["errno"]))

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE, 2)
        except OSError:
            data, descriptors = b"", []
        if not data:
            raise errors.BlkckptError("memory receiver: the process that reads the stream has ended too early")
        message: dict[str, Any] = json.loads(data)
        return message, descriptors

    def _add(self, body: Mapping[str, Any], raw: int, state: int) -> None:
        info = records.Block(body["name"], body["size"], body["page_size"], None)
        temporary = Path(body["temporary"]) if body["temporary"] else None
        writer = image.RawWriter.adopt(raw, info.size, temporary)
        self.main.append(assemble.Block(info, writer, once=self._once, state=state))

    def hang_up(self) -> None:
        """The intake stops, and :meth:`listen` with an error if it has not returned."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def stop(self, patience: float) -> None:
        """End it, by force after *patience* seconds; drop what was not published."""
        self.hang_up()
        self._reap(patience)
        for block in self.main:
            block.close()
        self._socket.close()

    def _reap(self, patience: float) -> None:
        if self._ended:
            return
        deadline = time.monotonic() + patience
        descriptor = os.pidfd_open(self.pid)
        try:
            poll = intake.poll_for(descriptor)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        finally:
            os.close(descriptor)
        self._ended = True


# --- the intake's process


class _Link:
    """The intake's end of the socket: a reason to stop, and a place to tell."""

    def __init__(self, connection: socket.socket, parser: Callable[[], stream.Parser]) -> None:
        self._connection, self._parser = connection, parser
        self._numbers: dict[int, int] = {}
        self._waiting: list[list[int]] = []
        self._told = 0.0

    @property
    def fd(self) -> int:
        return self._connection.fileno()

    def check(self) -> None:
        """The other end never speaks: its descriptor is readable when it is gone."""
        raise errors.StateError("memory receiver: nobody wants the stream any more")

    def last(self, message: Mapping[str, Any], *descriptors: int) -> None:
        """Tell what there is, however long it takes, and then *message*."""
        while self._waiting:
            self._send(0)
        self.say(message, *descriptors)

    def say(self, message: Mapping[str, Any], *descriptors: int) -> None:
        socket.send_fds(self._connection, [json.dumps(message).encode()], list(descriptors))

    def blocks(self, assembler: assemble.Assembler) -> None:
        """Hand over the main blocks, which have just been made."""
        for number, block in enumerate(assembler.main):
            self._numbers[id(block)] = number
            temporary = str(block.raw.temporary) if block.raw.temporary else None
            info = block.info
            body = {"name": info.name, "size": info.size, "page_size": info.page_size, "temporary": temporary}
            self.say({"block": body}, block.raw.descriptor, block.state)
        assert assembler.ram is not None
        self.say({"blocks": {"total": assembler.total, "page_size": assembler.ram.page_size}})

    def completed(self, block: assemble.Block, low: int, high: int) -> None:
        number = self._numbers[id(block)]
        last = self._waiting[-1] if self._waiting else None
        if last and last[0] == number and last[2] == low:
            last[2] = high
        else:
            self._waiting.append([number, low, high])

    def tell(self) -> None:
        """After every read: tell what is whole, if it is time and the socket has room."""
        now = time.monotonic()
        if now - self._told > _EVERY:
            self._told = now
            with contextlib.suppress(BlockingIOError):
                self._send(socket.MSG_DONTWAIT)

    def _send(self, flags: int) -> None:
        parser = self._parser()
        message = {"done": parser.pages + parser.zeros, "chunks": self._waiting[:_RANGES]}
        self._connection.send(json.dumps(message).encode(), flags)
        del self._waiting[:_RANGES]


def _run(
    connection: socket.socket, descriptor: int, directory: Path, *, once: bool, closed: tuple[int, ...]
) -> NoReturn:
    """The forked process; nothing of the storing process's is touched on the way out."""
    status = 1
    try:
        _let_go(closed)
        with contextlib.suppress(OSError):  # nobody is there to be told
            _take(connection, descriptor, directory, once=once)
            status = 0
    finally:
        os._exit(status)


def _let_go(closed: tuple[int, ...]) -> None:
    """Hold nothing by which others tell that the storing process has ended, and none of its signal handlers."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in closed:
        os.dup2(null, descriptor, inheritable=False)
    os.close(null)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.current_thread().name = "intake"
    sys.setswitchinterval(1.0)


def _take(connection: socket.socket, descriptor: int, directory: Path, *, once: bool) -> None:
    assembler = assemble.Assembler(directory, once=once)
    link = _Link(connection, lambda: receiver.parser)
    receiver = intake.Receiver(descriptor, assembler, link)
    try:
        assembler.made = lambda: link.blocks(assembler)
        parts = receiver.run(link.completed, link.tell)
        os.close(descriptor)
        end = {"pages": parts.pages, "zeros": parts.zeros, "bytes": receiver.bytes, "seconds": receiver.seconds}
        link.last({"end": end}, _skeleton(assembler, parts))
    except OSError as error:
        link.last({"error": errors.describe(errors.from_os_error(error, "memory receiver"))})
    except Exception as error:
        link.last({"error": errors.describe(error, "memory receiver: ")})
    finally:
        assembler.close()


def _skeleton(assembler: assemble.Assembler, parts: stream.Parts) -> int:
    """The skeleton's file, in memory, open at its beginning."""
    ram = assembler.ram
    assert ram is not None
    data = skeleton.encode(
        skeleton.Skeleton(ram.section, ram.page_size, ram.blocks, parts.head, parts.live, parts.tail, assembler.small())
    )
    file = os.memfd_create("skeleton", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file

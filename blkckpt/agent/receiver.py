"""The agent's end of the memory receiver (:mod:`blkckpt.memory.receive`, where the protocol is described).

The child gets the read end of the stream's pipe, and then its job; a thread takes its answers.  The end of its orders
ends it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blkckpt import errors
from blkckpt.agent import child
from blkckpt.control import wire
from blkckpt.store import manifest

STOP_SECONDS = 30.0
"""It gives its threads 20 s to end."""
MAX_LINE = 4 << 20
PIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """What to receive, for the child's standard input."""

    store: Path
    label: str
    parents: Mapping[str, str | None]
    raw_dir: Path
    keep_raw: bool
    once: bool = False

    def encode(self, descriptor: int) -> bytes:
        job = {
            "version": 1,
            "stream_fd": descriptor,
            "store": str(self.store),
            "label": self.label,
            "parents": dict(self.parents),
            "raw_dir": str(self.raw_dir),
            "keep_raw": self.keep_raw,
            "once": self.once,
        }
        return json.dumps(job).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Received:
    """What was stored."""

    memory: manifest.MemoryImage
    new: int
    stream_bytes: int
    seconds: float
    stream_seconds: float

    @classmethod
    def decode(cls, body: Any) -> Received:
        try:
            blocks = tuple(
                manifest.RamBlock(str(b["name"]), int(b["size"]), int(b["page_size"]), str(b["image"]))
                for b in body["blocks"]
            )
            image = manifest.MemoryImage(blocks, str(body["skeleton"]), int(body["skeleton_size"]))
            return cls(
                image,
                int(body["new"]),
                int(body["stream_bytes"]),
                float(body["seconds"]),
                float(body["stream_seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise errors.ProtocolError(f"the memory receiver's result cannot be understood: {error}") from error


class Receiver:
    """The child.

    It is started without its job, for which it waits: its imports take as long as the agent's, and run beside them if
    it is started early.  ``stream`` is the read end of its pipe, ``sink`` the end that QEMU gets; both are the caller's
    from :meth:`begin` on.
    """

    def __init__(self) -> None:
        self.stream, self.sink = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the limit of unprivileged users; the default works too
            fcntl.fcntl(self.sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            self._process = child.Child("blkckpt.memory.receive", kept=[self.stream])
        except BaseException:
            os.close(self.stream)
            os.close(self.sink)
            raise
        self._begun = False
        self._ended = threading.Event()
        self._received: Received | None = None
        self._error: errors.BlkckptError | None = None
        self.progress = (0, 0)
        self._thread = threading.Thread(target=self._listen, name="memory receiver", daemon=True)

    def begin(self, job: Job) -> None:
        """Give it its job, once."""
        self._begun = True
        self._thread.start()
        try:
            self._process.orders.write(job.encode(self.stream))
            self._process.orders.flush()
        except BaseException:
            self.stop()
            raise

    def discard(self) -> None:
        """End a child that got no job, and the pipe with it; nothing for one that did."""
        if self._begun:
            return
        self._begun = True
        self._process.kill()  # it has nothing
        self._process.close()
        os.close(self.stream)
        os.close(self.sink)

    def wait(self, timeout: float) -> Received | None:
        """What was received, None when it is still at work after *timeout* seconds; raises what it failed with."""
        if not self._ended.wait(timeout):
            return None
        if self._error is not None:
            raise self._error
        return self._received

    def stop(self) -> None:
        """End it; what is not finished is gone.  Idempotent."""
        with contextlib.suppress(OSError):
            self._process.orders.close()
        try:
            self._process.wait(STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
        self._thread.join()
        self._process.close()

    def _listen(self) -> None:
        try:
            self._take_answers()
        except errors.BlkckptError as error:
            self._error = error
        if self._received is None and self._error is None:
            code = self._process.wait()
            self._error = errors.BlkckptError(f"the memory receiver ended without a result (status {code})")
        self._ended.set()

    def _take_answers(self) -> None:
        while line := self._process.answers.readline(MAX_LINE):
            try:
                message = json.loads(line)
                kind, body = next(iter(message.items()))
            except (ValueError, AttributeError, StopIteration) as error:
                raise errors.ProtocolError(f"the memory receiver said {line[:80]!r}") from error
            if kind == "progress":
                self.progress = (int(body["done"]), int(body["total"]))
            elif kind == "result":
                self._received = Received.decode(body)
                self._ended.set()  # it has yet to end, which nobody needs to wait for
            elif kind == "error":
                text, number = str(body.get("message")), body.get("errno")
                self._error = wire.error_from(wire.Failure(0, text, str(body.get("type")), number))

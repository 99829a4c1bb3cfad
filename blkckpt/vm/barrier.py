"""The resume barrier: has the guest been resumed yet?  Asked of the QMP socket's receive queue, by peeking.

While a checkpoint is armed nobody reads the QMP socket.  QEMU writes ``STOP`` after it has stopped the virtual
CPUs, then drains and flushes the disks, and writes ``RESUME`` before any virtual CPU runs again.  A write to a
unix socket is in the receiver's queue when it returns.  So a disk request that the guest issued after the resume
is seen here after ``RESUME`` is in the queue, and a request seen while ``RESUME`` is not in the queue was issued
before the stop.  That one sentence is the checkpoint's consistency; everything below keeps it true.

States::

    WAITING ──(setup, active, STOP, RESUME, in this order)──> PASSED       final
       └──────(anything else)───────────────────────────────> VIOLATED     final, with a reason

What is seen is a sequence of whole JSON lines.  An incomplete last line waits for its rest; a line is judged by
its parsed keys, so text that a guest can influence (a device name, a path) inside a string decides nothing.

==========================================  =========================================================
line                                        effect
==========================================  =========================================================
``MIGRATION`` ``setup``, ``active``         the next two steps
``STOP``, ``RESUME``                        the next two steps; out of turn: VIOLATED (a ``stop`` from
                                            another monitor, a guest that was stopped before)
``MIGRATION`` anything else                 VIOLATED (``failed``, ``cancelling``)
reply with ``return``                       ignored: this connection is ours alone, so it answers us
reply with ``error``                        VIOLATED with QEMU's words (``migrate`` was refused)
an event in :data:`HARMLESS`                ignored
any other event, any other line             VIOLATED
==========================================  =========================================================

Bounds.  When the queue is full QEMU keeps events back and the sentence above no longer holds.  The kernel
charges each message's bytes plus about 768 bytes against the sender's buffer (212,992 bytes by default); an
undisturbed window shows five lines of together 600 bytes.  At :data:`MAX_BYTES` or :data:`MAX_LINES`, where less
than half of the buffer can be charged, the barrier is VIOLATED, long before anything is held back.

What the window cannot show: a ``stop`` and ``cont`` by another monitor between ``active`` and QEMU's own stop looks
like the real pair.  The real one follows, so whoever reads the events later sees a second RESUME before the
migration's end and must refuse the checkpoint (:meth:`blkckpt.agent.machine.Machine.check_completed`).

The prefix already judged is compared at every poll: if it changed, somebody read from the socket.

Source: QEMU 7.2 ``migration/migration.c`` (``bg_migration_thread``), ``softmmu/cpus.c`` (``vm_prepare_start``),
``monitor/monitor.c``; Linux ``net/unix/af_unix.c``.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from blkckpt.disk import barrier

WAITING: Final = barrier.BarrierState.WAITING
PASSED: Final = barrier.BarrierState.PASSED
VIOLATED: Final = barrier.BarrierState.VIOLATED

MAX_BYTES = 32 << 10
MAX_LINES = 64

HANGUP_INTERVAL = 0.05
"""Seconds between looks for a closed peer: a dead QEMU sends no requests, so only the agent's poll needs it."""

HARMLESS = frozenset({
    # They neither stop nor start the guest, and are caused by a guest or a user at any time.
    "ACPI_DEVICE_OST", "BALLOON_CHANGE", "BLOCK_WRITE_THRESHOLD", "DEVICE_DELETED", "DEVICE_TRAY_MOVED",
    "DEVICE_UNPLUG_GUEST_ERROR", "MEMORY_DEVICE_SIZE_CHANGE", "MEM_UNPLUG_ERROR", "NIC_RX_FILTER_CHANGED",
    "RTC_CHANGE", "VSERPORT_CHANGE",
    # A power button: the guest decides later.  A guest's reset keeps the order of STOP and RESUME.
    "POWERDOWN", "RESET",
    # Displays and background jobs.
    "JOB_STATUS_CHANGE", "MIGRATION_PASS", "SPICE_CONNECTED", "SPICE_DISCONNECTED", "SPICE_INITIALIZED",
    "VNC_CONNECTED", "VNC_DISCONNECTED", "VNC_INITIALIZED",
})  # fmt: skip
"""Events that may appear in the armed window.  An event not listed here (SHUTDOWN, GUEST_PANICKED, WATCHDOG,
BLOCK_IO_ERROR, SUSPEND, an unknown one) may change what runs, so it makes the checkpoint invalid."""

_STEPS: Final = (("MIGRATION", "setup"), ("MIGRATION", "active"), ("STOP", None), ("RESUME", None))


@dataclass(frozen=True, slots=True)
class EventTimes:
    """QEMU's own times of the events seen, microseconds since the epoch of its clock; None: not seen."""

    active_us: int | None = None
    stop_us: int | None = None
    resume_us: int | None = None

    @property
    def stopped_seconds(self) -> float | None:
        """How long the guest was stopped."""
        if self.stop_us is None or self.resume_us is None:
            return None
        return (self.resume_us - self.stop_us) / 1e6


class Judge:
    """The pure half: lines in, state out.  Not thread safe."""

    def __init__(self) -> None:
        self.state = WAITING
        self.reason = ""
        self.lines = 0
        self._step = 0
        self._times: dict[str, int] = {}

    @property
    def times(self) -> EventTimes:
        return EventTimes(self._times.get("active"), self._times.get("STOP"), self._times.get("RESUME"))

    def line(self, text: bytes) -> None:
        """Judge one complete line.  Lines after a final state change nothing."""
        if self.state is not WAITING:
            return
        self.lines += 1
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.violate(f"QMP sent something that is not a message: {text[:80]!r}")
        elif "event" in message:
            self._event(message)
        elif "error" in message:
            self.violate(f"QEMU refused: {_words(message['error'])}")
        elif "return" not in message:
            self.violate(f"QMP sent an unexpected message: {text[:80]!r}")
        elif self.lines > MAX_LINES:
            self.violate(f"more than {MAX_LINES} QMP messages came while armed")

    def violate(self, reason: str) -> None:
        """Final: the instant cannot be told any more."""
        self.state = VIOLATED
        self.reason = reason

    def _event(self, message: Mapping[str, Any]) -> None:
        name = str(message["event"])
        status = _status(message) if name == "MIGRATION" else None
        if (name, status) == _STEPS[self._step]:
            self._times[status or name] = _microseconds(message)
            self._step += 1
            if self._step == len(_STEPS):
                self.state = PASSED
        elif name not in HARMLESS:
            expected = " ".join(filter(None, _STEPS[self._step]))
            seen = " ".join(filter(None, (name[:80], status)))
            self.violate(f"expected {expected} from QEMU, saw {seen}{_hint(name)}")
        elif self.lines > MAX_LINES:
            self.violate(f"more than {MAX_LINES} QMP messages came while armed")


def _hint(name: str) -> str:
    if name in ("STOP", "RESUME"):
        return ": somebody else stopped or continued the guest"
    return ""


def _status(message: Mapping[str, Any]) -> str | None:
    data = message.get("data")
    status = data.get("status") if isinstance(data, dict) else None
    return status if isinstance(status, str) else None


def _microseconds(message: Mapping[str, Any]) -> int:
    stamp = message.get("timestamp")
    if not isinstance(stamp, dict):
        return 0
    seconds, micro = stamp.get("seconds"), stamp.get("microseconds")
    return seconds * 1_000_000 + micro if isinstance(seconds, int) and isinstance(micro, int) else 0


def _words(error: object) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return str(text)[:300] if text else "an error without a description"


class ResumeBarrier:
    """The :class:`~blkckpt.disk.barrier.Barrier` over a duplicate of the QMP connection's descriptor.

    Owns the descriptor; :meth:`close` it after disarming.  Any thread may :meth:`poll`; nothing is ever read from
    the socket.  The queue must have been drained before arming: what is in it belongs to the armed window.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes *descriptor* over.  Raises ``OSError`` when it is not a stream socket."""
        self._socket = socket.socket(fileno=descriptor)
        if self._socket.type != socket.SOCK_STREAM:
            self._socket.close()
            raise OSError(errno.EPROTOTYPE, "the QMP descriptor is not a stream socket")
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLRDHUP)
        self._lock = threading.Lock()
        self._judge = Judge()
        self._state = WAITING
        self._buffer = bytearray(MAX_BYTES)
        self._view = memoryview(self._buffer)
        self._length = 0
        self._judged = b""
        self._next_hangup = 0.0
        self._epoll: select.epoll | None = None

    @property
    def reason(self) -> str:
        return self._judge.reason

    @property
    def times(self) -> EventTimes:
        """QEMU's times of the events judged so far."""
        with self._lock:
            return self._judge.times

    def poll(self) -> barrier.BarrierState:
        """Look once.  One system call when nothing new has come; never waits."""
        if self._state is not WAITING:
            return self._state
        with self._lock:
            if self._state is WAITING:
                self._look_locked()
                self._state = self._judge.state
            return self._state

    def wait(self, timeout: float) -> None:
        """Until something new is in the queue or the peer has hung up, *timeout* seconds at most; for one thread.

        Edge-triggered: each arrival wakes once, though nothing is read; one since the last wait does at once.
        """
        if self._epoll is None:
            self._epoll = select.epoll()
            self._epoll.register(self._socket, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self._epoll.poll(timeout)

    def close(self) -> None:
        """Give the descriptor up.  A barrier closed while WAITING is VIOLATED: it cannot know any more."""
        with self._lock:
            if self._state is WAITING:
                self._judge.violate("the barrier was closed before the guest was resumed")
                self._state = VIOLATED
            if self._epoll is not None:
                self._epoll.close()
            self._socket.close()

    def _look_locked(self) -> None:
        try:
            length = self._socket.recv_into(self._view, MAX_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            length = None
        except OSError as error:
            self._judge.violate(f"the QMP socket failed: {error.strerror}")
            return
        if length is None and not self._length:
            return
        if not length:
            self._judge.violate("QEMU closed its QMP connection" if length == 0 else _SOMEBODY_READ)
        elif length < self._length or not self._buffer.startswith(self._judged):
            self._judge.violate(_SOMEBODY_READ)
        elif length == self._length:
            self._check_hangup_locked()
        else:
            self._take_locked(length)

    def _take_locked(self, length: int) -> None:
        """Judge the complete lines that have come since the last look."""
        self._length = length
        end = self._buffer.rfind(b"\n", len(self._judged), length) + 1
        if end:
            fresh = bytes(self._view[len(self._judged) : end])
            self._judged += fresh
            for line in filter(None, map(bytes.strip, fresh.split(b"\n"))):
                self._judge.line(line)
        if length >= MAX_BYTES and self._judge.state is WAITING:
            self._judge.violate(f"{length} bytes of QMP messages came while armed; QEMU may hold events back")

    def _check_hangup_locked(self) -> None:
        """Bytes in the queue hide the end of file; ask for it now and then."""
        now = time.monotonic()
        if now < self._next_hangup:
            return
        self._next_hangup = now + HANGUP_INTERVAL
        if self._poller.poll(0):
            self._judge.violate("QEMU closed its QMP connection")


_SOMEBODY_READ: Final = "somebody read from the QMP socket while it was armed"

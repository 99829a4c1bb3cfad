"""The words of the data plane's boundary: values and protocols, no behaviour.

Everything here may be imported by the control socket, the agent and the plugin without importing the data plane.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A disk image in a checkpoint store: the read-only bottom of a restored disk."""

    store: str
    image: str


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk of a VM.  *path* is the raw base; with a *source* it is created and filled from that image."""

    name: str
    path: str
    size: int
    source: ImageRef | None = None


class Source(Protocol):
    """An immutable image below a restored disk.  Called from any thread, several at once."""

    @property
    def size(self) -> int: ...

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill *buf* with what is at *offset*; all of it is inside the image."""

    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        """Yield ``(offset, length, is_zero)``, ascending and without gaps."""


class State(enum.Enum):
    """Where the disks of a VM are in the procedure (see :mod:`blkckpt.disk`)."""

    REST = "rest"
    PREPARED = "prepared"
    ARMED = "armed"
    SWITCHED = "switched"
    COMMITTING = "committing"


@dataclass(frozen=True, slots=True)
class ArmState:
    """Outcome of arming so far.  *instant* is ``time.monotonic_ns()`` of the switch."""

    switched: bool
    waiting: bool
    violation: str | None
    instant: int | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A copy, commit or abort.  *state* is ``running``, ``done`` or ``failed``; *done* and *total* are bytes."""

    id: str
    kind: str
    state: str
    done: int
    total: int
    result: Mapping[str, Any] | None
    error: str | None
    error_type: str | None


@dataclass(frozen=True, slots=True)
class OverlayStatus:
    """An overlay and how many bytes of the disk it holds.

    *retained* is the checkpoint whose disk is all that is below it, if that is kept so.
    """

    id: str
    bytes: int
    retained: str | None


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """One disk.  *filled* is ``None`` unless it is a restored disk that still reads from its *source*."""

    name: str
    path: str
    size: int
    overlays: tuple[OverlayStatus, ...]
    source: ImageRef | None
    filled: int | None
    changed_since: str | None  # image id; None: not known, the next checkpoint compares everything (D13)
    changed_bytes: int
    reads: int
    writes: int
    read_bytes: int
    written_bytes: int
    flushes: int
    copy_ups: int
    fast_requests: int | None  # of reads and writes, those that the C fast path served; None: it is not loaded
    epoch: int  # how often a new view was put in force since the start
    in_flight: int  # requests inside, of all epochs
    waits: int  # requests (812) and windows of a commit that had to wait for one in flight
    drains: int  # how often requests in flight were waited for, to leave a layer
    drain_seconds: float
    error: str | None  # a failed fsync (D9)


@dataclass(frozen=True, slots=True)
class RoundStatus:
    """A checkpoint under way.  *stage* is ``preparing``, ``prepared``, ``armed`` or ``switched``."""

    checkpoint: str
    stage: str
    instant: int | None
    copied: bool
    copy: JobStatus | None


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """All disks of a VM.

    *rounds* are the checkpoints under way, oldest first; *state*, *checkpoint*, *violation* and *instant* are those of
    the newest.
    """

    state: State
    checkpoint: str | None
    violation: str | None
    instant: int | None
    rounds: tuple[RoundStatus, ...]
    job: JobStatus | None
    warning: str | None  # what background work is waiting for, e.g. space in the base
    disks: tuple[DiskStatus, ...]

"""What is said on the control socket: the parameters and results of each verb, typed and checked.  Pure.

Each class knows both directions: ``encode()`` gives the JSON object, ``decode(object)`` checks one that a peer
sent.  Parameters are strict, as they may do something: a missing, unknown or wrong one is an
:class:`errors.InputError`.  Results are lenient, as a newer server may say more: unknown keys are ignored, but a
known key of the wrong type is an :class:`errors.ProtocolError`.

Every number is bounded before it is used.  Names are checked with :func:`units.check_name`; paths must be
absolute, as the server's working directory is ``/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from blkckpt import errors, units

VERSION = 1
"""The protocol's version, said by both in ``hello``.  It changes when an old peer would misunderstand a new one."""

MAX_WAIT = 30.0
"""Seconds that ``wait`` may hold its answer back: well below the lease, so a waiting driver keeps it."""
MAX_DEADLINE = 600.0
"""Seconds a group may stay armed."""
FLUSH_SECONDS = 600.0
"""How long ``arm`` may flush: all that the page cache holds of the layers, to a slow disk."""
MAX_TEXT = 4096
MAX_ID = 64
MAX_DISKS = 1024

SWITCH_NOW = "now"
SWITCH_BARRIER = "barrier"

RUNNING = "running"
DONE = "done"
FAILED = "failed"

T = TypeVar("T")


class _Reader:
    """Takes checked members out of a JSON object."""

    def __init__(self, body: Mapping[str, Any], what: str, kind: type[errors.BlkckptError]) -> None:
        self._body, self._what, self._kind = body, what, kind

    def only(self, names: Iterable[str]) -> None:
        for name in self._body:
            if name not in names:
                raise self._kind(f"{self._what}: unknown member {name[:80]!r}")

    def fail(self, name: str, wanted: str) -> errors.BlkckptError:
        if name not in self._body:
            return self._kind(f"{self._what}: {name!r} is missing")
        return self._kind(f"{self._what}: {name!r} must be {wanted}")

    def text(self, name: str, limit: int = MAX_TEXT) -> str:
        value = self._body.get(name)
        if not isinstance(value, str) or len(value) > limit:
            raise self.fail(name, f"a string of at most {limit} characters")
        return value

    def name(self, name: str) -> str:
        return units.check_name(self.text(name), name)

    def path(self, name: str) -> str:
        value = self.text(name)
        if not value.startswith("/") or "\0" in value:
            raise self.fail(name, "an absolute path")
        return value

    def identity(self, name: str) -> str:
        value = self.text(name, 32)
        if len(value) != 32 or not set(value) <= set("0123456789abcdef"):
            raise self.fail(name, "32 hexadecimal digits")
        return value

    def choice(self, name: str, values: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in values:
            raise self.fail(name, "one of " + ", ".join(values))
        return value

    def integer(self, name: str, low: int = 0, high: int = 1 << 63) -> int:
        value = self._body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(name, f"a whole number from {low} to {high}")
        return value

    def seconds(self, name: str, high: float) -> float:
        value = self._body.get(name)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not 0 <= value <= high
        ):
            raise self.fail(name, f"a number of seconds from 0 to {high:g}")
        return float(value)

    def truth(self, name: str) -> bool:
        value = self._body.get(name)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._body.get(name)
        if not isinstance(value, dict) or len(value) > MAX_DISKS:
            raise self.fail(name, f"an object of at most {MAX_DISKS} members")
        return value

    def optional(self, name: str, take: Callable[[str], T]) -> T | None:
        """None when the member is missing or null, else what *take* makes of it."""
        return None if self._body.get(name) is None else take(name)


def _params(verb: str, body: Mapping[str, Any], names: Iterable[str]) -> _Reader:
    reader = _Reader(body, verb, errors.InputError)
    reader.only(names)
    return reader


def _result(verb: str, body: Any) -> _Reader:
    if not isinstance(body, dict):
        raise errors.ProtocolError(f"answer to {verb}: no object")
    return _Reader(body, f"answer to {verb}", errors.ProtocolError)


@dataclass(frozen=True, slots=True)
class Empty:
    """No parameters; or, as a result, nothing to say but "done"."""

    def encode(self) -> dict[str, Any]:
        return {}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Empty:
        _params("parameters", body, ())
        return cls()


@dataclass(frozen=True, slots=True)
class Hello:
    """``hello``: the first call of every connection.  *client* is told in logs only."""

    version: int
    client: str

    def encode(self) -> dict[str, Any]:
        return {"version": self.version, "client": self.client}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Hello:
        reader = _Reader(body, "hello", errors.InputError)  # not strict: a newer client must hear about its version
        return cls(reader.integer("version"), reader.text("client", 200))


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to ``hello``: who serves which disks (name → size in bytes)."""

    version: int
    server: str
    vm: str
    pid: int
    disks: Mapping[str, int]

    def encode(self) -> dict[str, Any]:
        disks = {name: {"size": size} for name, size in self.disks.items()}
        return {"version": self.version, "server": self.server, "vm": self.vm, "pid": self.pid, "disks": disks}

    @classmethod
    def decode(cls, body: Any) -> Welcome:
        reader = _result("hello", body)
        disks = {
            name: _result(f"hello, disk {name[:80]!r}", disk).integer("size")
            for name, disk in reader.mapping("disks").items()
        }
        return cls(reader.integer("version"), reader.text("server"), reader.text("vm"), reader.integer("pid", 1), disks)


@dataclass(frozen=True, slots=True)
class Prepare:
    """``prepare``: step 802 for the checkpoint of this name; takes the lease.  *retain*: it will not be copied."""

    checkpoint: str
    retain: bool = False

    def encode(self) -> dict[str, Any]:
        more = {"retain": True} if self.retain else {}  # a server that does not know it must not take it for a copy
        return {"checkpoint": self.checkpoint, **more}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Prepare:
        reader = _params("prepare", body, ("checkpoint", "retain"))
        return cls(reader.name("checkpoint"), reader.optional("retain", reader.truth) or False)


@dataclass(frozen=True, slots=True)
class Arm:
    """``arm``: watch the QMP socket that comes along as a descriptor, for at most *deadline* seconds."""

    deadline: float

    def encode(self) -> dict[str, Any]:
        return {"deadline": self.deadline}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Arm:
        return cls(_params("arm", body, ("deadline",)).seconds("deadline", MAX_DEADLINE))


@dataclass(frozen=True, slots=True)
class Switch:
    """``switch``: step 810, *mode* ``now``, or ``barrier`` to ask whether the resume barrier has passed."""

    mode: str

    def encode(self) -> dict[str, Any]:
        return {"mode": self.mode}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Switch:
        return cls(_params("switch", body, ("mode",)).choice("mode", (SWITCH_NOW, SWITCH_BARRIER)))


@dataclass(frozen=True, slots=True)
class Switched:
    """The answer to ``switch``.  *instant* is CLOCK_MONOTONIC in nanoseconds, the same clock in every process."""

    switched: bool
    waiting: bool
    violation: str | None = None
    instant: int | None = None

    def encode(self) -> dict[str, Any]:
        return {
            "switched": self.switched,
            "waiting": self.waiting,
            "violation": self.violation,
            "instant": self.instant,
        }

    @classmethod
    def decode(cls, body: Any) -> Switched:
        reader = _result("switch", body)
        return cls(
            reader.truth("switched"),
            reader.truth("waiting"),
            reader.optional("violation", reader.text),
            reader.optional("instant", reader.integer),
        )


@dataclass(frozen=True, slots=True)
class Copy:
    """``copy``: step 830 into *store*; *parents* gives each disk's previous image, *rate* bytes a second at most."""

    store: str
    parents: Mapping[str, str | None]
    rate: int | None = None

    def encode(self) -> dict[str, Any]:
        return {"store": self.store, "parents": dict(self.parents), "rate": self.rate}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Copy:
        reader = _params("copy", body, ("store", "parents", "rate"))
        parents = reader.mapping("parents")
        inner = _Reader(parents, "copy, parents", errors.InputError)
        images = {units.check_name(name, "disk name"): inner.optional(name, inner.text) for name in parents}
        return cls(reader.path("store"), images, reader.optional("rate", lambda name: reader.integer(name, 1)))


@dataclass(frozen=True, slots=True)
class Retain:
    """``retain``, instead of ``copy``: the frozen chains are the disks of the checkpoint *id* in *store*.

    *images* gives the image that stands for each disk there.  The result is as a copy's.
    """

    store: str
    id: str
    images: Mapping[str, str]

    def encode(self) -> dict[str, Any]:
        return {"store": self.store, "id": self.id, "images": dict(self.images)}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Retain:
        reader = _params("retain", body, ("store", "id", "images"))
        images = reader.mapping("images")
        inner = _Reader(images, "retain, images", errors.InputError)
        found = {units.check_name(name, "disk name"): inner.identity(name) for name in images}
        return cls(reader.path("store"), reader.identity("id"), found)


@dataclass(frozen=True, slots=True)
class Flatten:
    """``flatten``: copy the retained *checkpoint* into its store, *rate* bytes a second at most; a job.

    It is given up when the connection ends.
    """

    checkpoint: str
    rate: int | None = None

    def encode(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "rate": self.rate}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Flatten:
        reader = _params("flatten", body, ("checkpoint", "rate"))
        return cls(reader.name("checkpoint"), reader.optional("rate", lambda name: reader.integer(name, 1)))


@dataclass(frozen=True, slots=True)
class Started:
    """The answer to ``copy``, ``commit``, ``abort`` and the like: the job to ``wait`` for."""

    job: str

    def encode(self) -> dict[str, Any]:
        return {"job": self.job}

    @classmethod
    def decode(cls, body: Any) -> Started:
        return cls(_result("job", body).text("job", MAX_ID))


@dataclass(frozen=True, slots=True)
class Wait:
    """``wait``: for the end of *job*, *timeout* seconds at most; a job still running is a normal answer."""

    job: str
    timeout: float

    def encode(self) -> dict[str, Any]:
        return {"job": self.job, "timeout": self.timeout}

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Wait:
        reader = _params("wait", body, ("job", "timeout"))
        return cls(reader.text("job", MAX_ID), reader.seconds("timeout", MAX_WAIT))


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed: the class in :mod:`blkckpt.errors`, its message, its errno."""

    kind: str
    message: str
    number: int | None = None

    def encode(self) -> dict[str, Any]:
        return {"type": self.kind, "message": self.message, "errno": self.number}


@dataclass(frozen=True, slots=True)
class JobState:
    """The answer to ``wait``.  *result* is the job's own (a copy's images by disk), *done* of *total* bytes."""

    job: str
    state: str
    done: int = 0
    total: int = 0
    result: Any = None
    failure: JobFailure | None = None

    def encode(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "state": self.state,
            "progress": {"done": self.done, "total": self.total},
            "result": self.result,
            "error": self.failure.encode() if self.failure else None,
        }

    @classmethod
    def decode(cls, body: Any) -> JobState:
        reader = _result("wait", body)
        progress = _result("wait, progress", reader.mapping("progress"))
        return cls(
            reader.text("job", MAX_ID),
            reader.choice("state", (RUNNING, DONE, FAILED)),
            progress.integer("done"),
            progress.integer("total"),
            body.get("result"),
            reader.optional("error", lambda name: _job_failure(reader.mapping(name))),
        )


def _job_failure(body: Mapping[str, Any]) -> JobFailure:
    reader = _result("wait, error", dict(body))
    return JobFailure(reader.text("type"), reader.text("message"), reader.optional("errno", reader.integer))

"""What became of a VM's schedule so far: the file ``scheduled.json``, which makes it survive restarts.

Format (UTF-8 JSON, one object; replaced atomically)::

    key       value
    --------  ------------------------------------------------------------------------------------
    magic     "blkckpt-scheduled"
    version   1
    record    settled_ns    wall clock; every time of the schedule up to here is dealt with.  null: none
              failures      attempts in a row that failed
              retry_ns      wall clock; not before then the next attempt after a failure.  null: none waits
              problem       null or {at_ns, kind, text}: the newest failure
              success       null or {at_ns, name, seconds, stopped_ms, added_bytes}: the newest success
              running       null or {pid, start, boot, began_ns}: the attempt under way

``settled_ns`` and ``running`` are written together, when the process of an attempt has been made.  An agent that is
killed after that finds its child again; one that is killed just before leaves a child that nobody knows: the next
attempt is told that a checkpoint is being taken already, and is repeated.

The file says when to work next, not what exists: one that cannot be read is as good as none, and costs one checkpoint
more.  Pure but for :func:`load` and :func:`save`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blkckpt import durable, errors, log, paths

MAGIC = "blkckpt-scheduled"
VERSION = 1
MAX_FILE = 1 << 20
MAX_TEXT = 2000

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """A failure: *kind* is a short word for metrics, *text* one line for people."""

    at_ns: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Success:
    """A checkpoint that was taken."""

    at_ns: int
    name: str
    seconds: float
    stopped_ms: float | None
    added_bytes: int


@dataclass(frozen=True, slots=True)
class Child:
    """The process of an attempt, told from a later one with its pid (``start``: clock ticks since *boot*)."""

    pid: int
    start: int
    boot: str
    began_ns: int


@dataclass(frozen=True, slots=True)
class Record:
    """See the module."""

    settled_ns: int | None = None
    failures: int = 0
    retry_ns: int | None = None
    problem: Problem | None = None
    success: Success | None = None
    running: Child | None = None


def path(vm: paths.VmPaths) -> Path:
    return vm.root / "scheduled.json"


def save(vm: paths.VmPaths, record: Record) -> None:
    """Replace the record of *vm*, durably.  Makes no directory: a VM that was removed stays removed."""
    body = {"magic": MAGIC, "version": VERSION, "record": asdict(record)}
    try:
        durable.write_file(path(vm), json.dumps(body).encode() + b"\n")
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path(vm)}") from error


def load(vm: paths.VmPaths) -> Record:
    """The record of *vm*; an empty one if there is none or it cannot be read, which is logged."""
    if not path(vm).exists():
        return Record()
    try:
        return decode(durable.read_small(path(vm), "schedule record", MAX_FILE))
    except (errors.BlkckptError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("a schedule begins anew", extra={"fields": {"vm": vm.name, "error": str(error)}})
        return Record()


def decode(data: bytes) -> Record:
    """Parse ``scheduled.json``; raises one of the errors that :func:`load` knows."""
    document = json.loads(data)
    if document["magic"] != MAGIC or document["version"] != VERSION:
        raise ValueError("foreign, or of a newer version")
    body = document["record"]
    problem, success, running = body["problem"], body["success"], body["running"]
    found = Record(
        settled_ns=_whole(body["settled_ns"]),
        failures=int(body["failures"]),
        retry_ns=_whole(body["retry_ns"]),
        problem=None if problem is None else Problem(**problem),
        success=None if success is None else Success(**success),
        running=None if running is None else Child(**running),
    )
    for one in (found.problem, found.success):
        if one is not None:
            _whole(one.at_ns)
    return found


def _whole(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{value!r} is no whole number")
    return value

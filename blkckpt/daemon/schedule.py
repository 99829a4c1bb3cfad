"""When checkpoints of a VM are taken and which are kept: the file ``schedule.json`` beside the VM's definition.

Format (UTF-8 JSON, one object; replaced atomically)::

    key       value
    --------  ----------------------------------------------------------------------------------
    magic     "blkckpt-schedule"
    version   1.  A larger number is refused: a newer blkckpt wrote it.
    schedule  every_ns, anchor_ns, window_ns, timeout_ns, disk_only, guest_agent, qmp, rate,
              keep_memory, tags: [tag], keep: [[rule, text]] (rules and texts as ``prune`` has
              them).  Unknown keys are refused.

All times are whole nanoseconds: sums of them are exact.  ``anchor_ns`` (wall clock) is when the schedule began; its
times are ``anchor + n * every``.  So they do not drift, a restart does not move them, and VMs whose schedules were
made at different moments do not all fire at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blkckpt import durable, errors, paths, units
from blkckpt.store import retention

MAGIC = "blkckpt-schedule"
VERSION = 1
MAX_FILE = 1 << 20

SECOND = 10**9
SHORTEST = SECOND
"""Between two checkpoints.  One that takes longer than that simply makes the next one late."""
LONGEST = 366 * 86400 * SECOND
TIMEOUT = 6 * 3600 * SECOND
"""The whole of one checkpoint.  The checkpoint itself ends when nothing moves for five minutes (rule A2); this is for
one that moves and never arrives."""
TURN_SECONDS = 60
"""For a checkpoint of somebody else to have its memory saved."""
TAG = "scheduled"
"""What scheduled checkpoints are tagged with by default, so that keep rules leave those alone that people took."""

COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
WITHIN = "within"
KEEP_TAG = "tag"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One VM's.  *keep* are rules of :mod:`retention` as ``(rule, text)``; none: nothing is ever removed."""

    every_ns: int
    anchor_ns: int
    window_ns: int = 0
    timeout_ns: int = TIMEOUT
    disk_only: bool = False
    guest_agent: str | None = None
    qmp: str | None = None
    rate: int | None = None
    keep_memory: int = 2
    tags: tuple[str, ...] = (TAG,)
    keep: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Raises :class:`errors.InputError` for what makes no sense."""
        _check_times(self)
        _check_paths(self)
        for name, value, low in (("rate", self.rate, 1), ("keep_memory", self.keep_memory, 0)):
            if value is not None and (not _is_whole(value) or value < low):
                raise errors.InputError(f"{name} {value!r} is not a whole number of at least {low}")
        for tag in self.tags:
            units.check_name(tag, "tag")
        _check_keep(self)

    def checkpoint_words(self, vm: str) -> list[str]:
        """The command line of one checkpoint, after ``blkckpt``."""
        words = ["checkpoint", vm, "--json", "--wait", str(TURN_SECONDS), "--keep-memory", str(self.keep_memory)]
        words += ["--disk-only"] if self.disk_only else []
        for option, value in (("guest-agent", self.guest_agent), ("qmp", self.qmp), ("rate", self.rate)):
            words += [] if value is None else [f"--{option}", str(value)]
        return words + [word for tag in self.tags for word in ("--tag", tag)]

    def prune_words(self, vm: str) -> list[str] | None:
        """The command line that applies the keep rules to this schedule's checkpoints; None when there are none."""
        if not self.keep:
            return None
        words = ["prune", vm, "--json", "--yes", *(word for tag in self.tags for word in ("--tag", tag))]
        return words + [word for rule, text in self.keep for word in (f"--keep-{rule}", text)]


def _check_times(one: Schedule) -> None:
    for name in ("every_ns", "anchor_ns", "window_ns", "timeout_ns"):
        if not _is_whole(getattr(one, name)) or getattr(one, name) < 0:
            raise errors.InputError(f"{name} {getattr(one, name)!r} is not a number of nanoseconds")
    if not SHORTEST <= one.every_ns <= LONGEST:
        raise errors.InputError("a checkpoint can be taken every 1s to every 366d")
    if one.window_ns >= one.every_ns:
        raise errors.InputError("the window must be shorter than the time between two checkpoints")
    if not SECOND <= one.timeout_ns <= LONGEST:
        raise errors.InputError("the timeout must be 1s to 366d")


def _check_paths(one: Schedule) -> None:
    for name, value in (("guest agent", one.guest_agent), ("QMP", one.qmp)):
        if value is not None and (not isinstance(value, str) or not Path(value).is_absolute() or "\0" in value):
            raise errors.InputError(f"{name} socket {value!r} is not an absolute path")
    if one.guest_agent is not None and not one.disk_only:
        raise errors.InputError("--guest-agent goes with --disk-only: a checkpoint with memory needs no freezing")


def _check_keep(one: Schedule) -> None:
    for rule, text in one.keep:
        if rule in COUNTS:
            retention.parse_count(text)
        elif rule == WITHIN:
            retention.parse_duration(text)
        elif rule == KEEP_TAG:
            for tag in text.split(","):
                units.check_name(tag.strip(), "tag")
        else:
            raise errors.InputError(f"there is no rule --keep-{rule}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- the file ---


def path(vm: paths.VmPaths) -> Path:
    return vm.root / "schedule.json"


def save(vm: paths.VmPaths, one: Schedule) -> None:
    """Make *one* the schedule of *vm*, durably."""
    try:
        durable.write_file(path(vm), encode(one))
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path(vm)}") from error


def remove(vm: paths.VmPaths) -> bool:
    """Whether there was one."""
    there = path(vm).exists()
    if there:
        durable.remove(path(vm))
    return there


def load(vm: paths.VmPaths) -> Schedule | None:
    """The schedule of *vm*, if it has one; :class:`errors.CorruptError` when it cannot be read."""
    file = path(vm)
    if not file.exists():
        return None
    try:
        return decode(durable.read_small(file, "schedule", MAX_FILE), os.fspath(file))
    except errors.NotFoundError:  # taken away just now
        return None


def encode(one: Schedule) -> bytes:
    """The bytes of ``schedule.json``."""
    return json.dumps({"magic": MAGIC, "version": VERSION, "schedule": asdict(one)}, indent=2).encode() + b"\n"


def decode(data: bytes, where: str) -> Schedule:
    """Parse ``schedule.json``; :class:`errors.CorruptError` naming *where* for anything torn, foreign or newer."""
    try:
        document = json.loads(data)
        if document["magic"] != MAGIC or document["version"] != VERSION:
            raise ValueError(f"magic {document['magic']!r}, version {document['version']!r}")
        return _from_body(document["schedule"])
    except errors.InputError as error:
        raise errors.CorruptError(f"{where}: {error}; set the schedule again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.CorruptError(f"{where} cannot be read as a schedule ({error}); set the schedule again") from error


def _from_body(body: Mapping[str, Any]) -> Schedule:
    if unknown := set(body) - {field.name for field in fields(Schedule)}:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    if not isinstance(body["disk_only"], bool):
        raise TypeError("disk_only is neither true nor false")
    keep = tuple((str(rule), str(text)) for rule, text in body["keep"])
    return Schedule(**{**body, "tags": tuple(body["tags"]), "keep": keep})

"""The mark of a VM that must not be served: a restore or revert of it is under way, or was interrupted.

``vms/NAME/unfinished.json`` is written, durably, before the first byte of the VM's disks is touched and removed
after the last one is durable.  So a VM whose disks are half one state and half another always bears it, and
whoever would serve a VM calls :func:`check` first.

Format (UTF-8 JSON, one object)::

    key         value
    ----------  -------------------------------------------------------------------------------
    magic       "blkckpt-unfinished"
    version     1
    what        "restore" (the VM is being made) or "revert" (its disks are being taken back)
    checkpoint  the checkpoint, VM@NAME
    pid, start  the process at work and its start time (``/proc/PID/stat`` field 22)
    boot        the kernel's boot id, without which a pid means nothing

The process tells whether work is still going on: the same pid with the same start time on the same boot.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from blkckpt import durable, errors, paths

MAGIC = "blkckpt-unfinished"
VERSION = 1
RESTORE = "restore"
REVERT = "revert"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_FILE = 64 << 10


@dataclass(frozen=True, slots=True)
class Mark:
    """What is, or was, being done to a VM."""

    what: str
    checkpoint: str
    pid: int
    start: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether the process that set the mark still runs."""
        return self.boot == _boot() and self.start == _start_of(self.pid)


def path(vm: paths.VmPaths) -> Path:
    """Where the mark of *vm* is kept."""
    return vm.root / "unfinished.json"


def write(vm: paths.VmPaths, what: str, checkpoint: str) -> None:
    """Mark *vm*, durably.  The caller holds whatever keeps two of them apart."""
    pid = os.getpid()
    mark = Mark(what, checkpoint, pid, _start_of(pid) or 0, _boot())
    document = {"magic": MAGIC, "version": VERSION, **asdict(mark)}
    durable.write_file(path(vm), json.dumps(document).encode() + b"\n")


def clear(vm: paths.VmPaths) -> None:
    """Take the mark away, durably; no error if there is none."""
    durable.remove(path(vm))


def read(vm: paths.VmPaths) -> Mark | None:
    """The mark of *vm*, if it bears one.  A damaged one is an error: it still says "do not serve"."""
    file = path(vm)
    if not file.exists():
        return None
    try:
        document = json.loads(durable.read_small(file, "mark", _MAX_FILE))
        if document.pop("magic") != MAGIC or document.pop("version") != VERSION:
            raise ValueError("foreign, or of a newer version")
        mark = Mark(**document)
        if mark.what not in (RESTORE, REVERT):
            raise ValueError(f"unknown kind {mark.what!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.CorruptError(f"{file} cannot be read ({error}); the disks of {vm.name} may be half-way") from error
    return mark


def check(vm: paths.VmPaths) -> None:
    """Raise :class:`errors.StateError` with the way out if *vm* bears a mark."""
    mark = read(vm)
    if mark is None:
        return
    if mark.alive:
        raise errors.StateError(f"VM {vm.name}: a {mark.what} from {mark.checkpoint} is under way (process {mark.pid})")
    if mark.what == RESTORE:
        raise errors.StateError(f"VM {vm.name} was not restored to the end; remove it: blkckpt vm rm {vm.name}")
    raise errors.StateError(
        f"the disks of VM {vm.name} are half-way to {mark.checkpoint}: a revert was interrupted; "
        f"finish it first: blkckpt revert {mark.checkpoint}"
    )


def _boot() -> str:
    return _BOOT_ID.read_text().strip()


def _start_of(pid: int) -> int | None:
    """When process *pid* started, in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None

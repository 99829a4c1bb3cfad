"""What a VM's disks descend from, where that is not simply its last checkpoint: the file ``lineage.json``.

A VM that was reverted, or made from a checkpoint, goes on from there; its next checkpoint's parent is that one, and the
line that a revert leaves stays as a branch.  Written when the disks are what the checkpoint holds; afterwards the
parent of a checkpoint is the last one of the VM *since* then, if there is one.

Format (UTF-8 JSON, one object)::

    key         value
    ----------  -------------------------------------------------------------------------------
    magic       "blkckpt-lineage"
    version     1
    checkpoint  VM@NAME
    since_ns    when the VM went on from there: nanoseconds of CLOCK_REALTIME

A VM without the file has never been anywhere else.  A damaged file costs the line on the tree, nothing more, so it
is read as "not known" and not as an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

from blkckpt import durable, errors, log, paths

MAGIC = "blkckpt-lineage"
VERSION = 1
_MAX_FILE = 4096

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Lineage:
    """The VM went on from *checkpoint* (``VM@NAME``, empty: not known) at *since_ns*."""

    checkpoint: str
    since_ns: int


def write(vm: paths.VmPaths, checkpoint: str) -> None:
    """*vm* goes on from *checkpoint* (``VM@NAME``) from now on; durable when this returns."""
    document = {"magic": MAGIC, "version": VERSION, "checkpoint": checkpoint, "since_ns": time.time_ns()}
    durable.write_file(vm.root / "lineage.json", json.dumps(document).encode() + b"\n")


def read(vm: paths.VmPaths) -> Lineage:
    """Where *vm* went on from; the beginning of time if it never was anywhere else."""
    file = vm.root / "lineage.json"
    if not file.exists():
        return Lineage("", 0)
    try:
        document = json.loads(durable.read_small(file, "lineage", _MAX_FILE))
        if document["magic"] != MAGIC or document["version"] != VERSION:
            raise ValueError("foreign, or of a newer version")
        return Lineage(str(document["checkpoint"]), int(document["since_ns"]))
    except (ValueError, KeyError, TypeError, errors.BlkckptError) as error:
        _log.warning("a lineage cannot be read", extra={"fields": {"path": str(file), "error": str(error)}})
        return Lineage("", 0)


def parent(vm: str, lineage: Lineage, checkpoints: Iterable[tuple[int, str]], before_ns: int) -> str | None:
    """The parent of a checkpoint of *vm* at *before_ns*, given the others as ``(created_ns, name)``; pure.

    ``NAME`` of the same VM, or ``VM@NAME``.
    """
    line = [(when, name) for when, name in checkpoints if lineage.since_ns <= when < before_ns]
    if line:
        return max(line)[1]
    return lineage.checkpoint.removeprefix(f"{vm}@") or None

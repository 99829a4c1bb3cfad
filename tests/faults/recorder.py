"""Run a program with ``recorder.c`` preloaded and read back the log of what it did to its files."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_HEAD = struct.Struct("=IIIIQQQ")

_LIMITED = """\
import faulthandler, runpy, sys
faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
module, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_module(module, run_name="__main__")
"""

CREATE, MKDIR, RENAME, LINK, UNLINK, RMDIR, WRITE, TRUNCATE, ZERO, ALLOCATE, SYNC, SYNC_ALL, MARK = range(1, 14)


@dataclass(frozen=True, slots=True)
class Event:
    """One recorded call; which fields count depends on *kind* (see ``recorder.c``)."""

    kind: int
    name: str = ""
    target: str = ""
    inode: int = 0
    offset: int = 0
    count: int = 0
    data: bytes = b""

    @property
    def mark(self) -> dict[str, Any]:
        value = json.loads(self.data)
        assert isinstance(value, dict)
        return value


def build(directory: Path) -> Path:
    """Compile the recorder into *directory*; returns the shared object."""
    library = directory / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-o", library, source, "-ldl", "-lpthread"], check=True
    )
    return library


def run(library: Path, root: Path, log: Path, module: str, *arguments: str, timeout: float = 120) -> list[Event]:
    """Run ``python -m MODULE ARGUMENTS`` recording what happens below *root* (a real path); returns the log.

    After *timeout* seconds it tells where each of its threads is, and fails.
    """
    environment = {**os.environ, "LD_PRELOAD": str(library), "RECORD_ROOT": str(root), "RECORD_LOG": str(log)}
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(timeout), module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout + 30,
        check=False,
    )
    assert result.returncode == 0, f"{module} {' '.join(arguments)}:\n{result.stdout}{result.stderr}"
    return list(parse(log.read_bytes()))


def parse(data: bytes) -> Iterator[Event]:
    at = 0
    while at < len(data):
        kind, name1, name2, _, inode, offset, count = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = os.fsdecode(data[at : at + name1])
        target = os.fsdecode(data[at + name1 : at + name1 + name2])
        at += name1 + name2
        length = count if kind in (WRITE, MARK) else 0
        yield Event(kind, name, target, inode, offset, count, data[at : at + length])
        at += length


class Marker:
    """In the recorded program: remarks that appear in the log in order with the calls.  No-op if not recorded."""

    def __init__(self) -> None:
        self._put = getattr(ctypes.CDLL(None), "record_mark", None)

    def __call__(self, **fields: Any) -> None:
        if self._put is not None:
            text = json.dumps(fields).encode()
            self._put(text, ctypes.c_size_t(len(text)))


# ---- Seeded bugs: the log that a careless implementation would have produced ----


def without_syncs(events: list[Event], inodes: set[int] | None = None) -> list[Event]:
    """The same run with the syncs of *inodes* (default: all files and directories) never issued."""
    return [event for event in events if not (event.kind == SYNC and (inodes is None or event.inode in inodes))]


def syncs_after(events: list[Event], early: set[int], late: set[int]) -> list[Event]:
    """The same run with each sync of a file in *early* put off until after the next sync of one in *late*.

    This is "map first, then data": everything is still synced before the caller is answered, in the wrong order.
    """
    result: list[Event] = []
    held: list[Event] = []
    for event in events:
        if event.kind == MARK and event.mark.get("ack"):
            result += held
            held = []
        if event.kind == SYNC and event.inode in early:
            held.append(event)
            continue
        result.append(event)
        if event.kind == SYNC and event.inode in late:
            result += held
            held = []
    return result + held

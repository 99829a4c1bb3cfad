"""The deduplicating backup programs that the store is measured against, and our copy child, one interface.

Each keeps its repository, caches and configuration below a directory of its own, on the same file system as ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import context
from blkckpt.store import frozen, lowly, manifest, store

OURS, BY_MAP, BORG, RESTIC = "blkckpt", "blkckpt, by the map", "borg", "restic"
PACKAGES = {BORG: "borgbackup", RESTIC: "restic"}


class Peer(Protocol):
    """Stores one image again and again.  The seconds are until it is safe on the disk.

    *changed*: the blocks of 4 KiB that have changed since the time before, as a map; for whom it is of use.
    """

    def put(self, image: Path, changed: bytes | None = None) -> float: ...
    def size(self) -> int: ...


def install() -> None:
    """The Debian packages of the peers, if they are not there."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise context.BenchError(f"{' and '.join(missing)} cannot be installed: {done.stderr.strip()[-200:]}")


def make(name: str, root: Path) -> Peer:
    """A new, empty repository below *root*."""
    root.mkdir()
    return {OURS: Blkckpt, BY_MAP: ByMap, BORG: Borg, RESTIC: Restic}[name](root)


def timed(command: Sequence[str], *, cwd: Path, env: dict[str, str]) -> float:
    """Seconds that *command* takes, until everything it wrote is on the disk; dirty pages of others are not its."""
    context.settle()
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    os.sync()
    took = time.monotonic() - began
    if done.returncode:
        raise context.BenchError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return took


def disk_usage(root: Path) -> int:
    """The bytes that the files below *root* occupy."""
    return sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))


class Borg:
    """``borg create --compression lz4`` without encryption."""

    def __init__(self, root: Path) -> None:
        self._root, self._count = root, 0
        self._env = {
            "BORG_BASE_DIR": str(root / "own"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }  # fmt: skip
        timed(["borg", "init", "-e", "none", str(root / "repo")], cwd=root, env=self._env)

    def put(self, image: Path, changed: bytes | None = None) -> float:
        self._count += 1
        archive = f"{self._root / 'repo'}::a{self._count}"
        command = ["borg", "create", "--compression", "lz4", archive, image.name]
        return timed(command, cwd=image.parent, env=self._env)

    def size(self) -> int:
        return disk_usage(self._root / "repo")


class Restic:
    """``restic backup``; it always encrypts."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._env = {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(root / "cache")}
        timed(["restic", "-q", "init", "-r", str(root / "repo")], cwd=root, env=self._env)

    def put(self, image: Path, changed: bytes | None = None) -> float:
        command = ["restic", "-q", "backup", "-r", str(self._root / "repo"), image.name]
        return timed(command, cwd=image.parent, env=self._env)

    def size(self) -> int:
        return disk_usage(self._root / "repo")


class Blkckpt:
    """The copy child of a checkpoint, as the disk server starts it, and the manifest."""

    def __init__(self, root: Path) -> None:
        self._root, self._count = root, 0
        self._parent: str | None = None
        store.Store.init(root / "store").close()

    def put(self, image: Path, changed: bytes | None = None) -> float:
        """With the image before as parent; every byte is read and compared."""
        return self._put(image, None)

    def _put(self, image: Path, changed: bytes | None) -> float:
        context.settle()
        began = time.monotonic()
        with store.Store.open(self._root / "store") as place, place.hold():
            made = self._copy(image, changed)
            disk = manifest.DiskImage("vda", made["image"], made["size"])
            self._count += 1
            name = f"c{self._count}"
            place.put_manifest(manifest.Manifest("bench", name, uuid.uuid4().hex, time.time_ns(), (disk,)))
        os.sync()
        self._parent = made["image"]
        return time.monotonic() - began

    def _copy(self, image: Path, changed: bytes | None) -> dict[str, Any]:
        with image.open("rb") as source, tempfile.TemporaryFile(dir=self._root) as marked:
            marked.write(frozen.MAP_MAGIC.ljust(frozen.MAP_HEADER, b"\0") + (changed or b""))
            marked.flush()
            job = {
                "version": 1, "disk": "vda", "size": image.stat().st_size,
                "layers": [{"kind": "raw", "fd": source.fileno()}],
                "changed": None if changed is None else {"map_fd": marked.fileno()},
                "store": str(self._root / "store"), "parent": self._parent, "rate": None, "label": "bench",
            }  # fmt: skip
            child = subprocess.Popen(
                lowly.command(sys.executable, "blkckpt.store.ingest"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pass_fds=[source.fileno(), marked.fileno()],
            )  # fmt: skip
            assert child.stdin is not None and child.stdout is not None
            with child, child.stdin, child.stdout:
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
                message = json.loads(child.stdout.readlines()[-1])
        if "result" not in message:
            raise context.BenchError(f"our copy failed: {message}")
        return dict(message["result"])

    def size(self) -> int:
        return disk_usage(self._root / "store")


class ByMap(Blkckpt):
    """The same, but only the changed blocks are read, as a checkpoint does it."""

    def put(self, image: Path, changed: bytes | None = None) -> float:
        return self._put(image, changed)

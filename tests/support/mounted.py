"""Checkpoints mounted for a test, and the programs of others that look at them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import guest


@contextlib.contextmanager
def mounted(box: guest.Sandbox, directory: Path, *words: str) -> Iterator[Path]:
    """``blkckpt mount DIRECTORY WORDS``; unmounted in the end, whatever has become of it."""
    directory.mkdir(parents=True, exist_ok=True)
    box.run("mount", directory, *words)
    try:
        yield directory
    finally:
        subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True, check=False)


def run(*command: str | Path, code: int = 0, timeout: float = 120.0) -> str:
    """Run a program; its output.  Another exit code is an error."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == code, f"{command}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def log(box: guest.Sandbox) -> str:
    """What mounts of this home have said."""
    path = box.home / "log" / "mount.log"
    return path.read_text() if path.exists() else ""


def extents(path: Path) -> list[tuple[int, int]]:
    """``(start, end)`` of the data, by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    at = 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return found
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))


def eventually(test: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """The first true result of *test*, for what another process does without telling."""
    deadline = time.monotonic() + seconds
    while not (result := test()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)
    return result

"""Small file systems that fill up or fail, mounted for one test and gone after it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def _mount(*words: str | Path) -> None:
    try:
        _run("mount", *words)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', error)}")


@contextlib.contextmanager
def tmpfs(path: Path, size: int, inodes: int | None = None) -> Iterator[Path]:
    """A tmpfs of *size* bytes (and room for *inodes* files) on *path*."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={size},mode=0700" + (f",nr_inodes={inodes}" if inodes else "")
    _mount("-t", "tmpfs", "-o", options, "blkckpt-test", path)
    try:
        yield path
    finally:
        _run("umount", "--lazy", path)


def grow(path: Path, size: int) -> None:
    """Give the tmpfs on *path* more room."""
    _run("mount", "-o", f"remount,size={size}", path)


def fill(path: Path, leave: int = 0) -> Path:
    """Use up the space on *path* but for *leave* bytes; returns the file that does it."""
    filler = path / "filler"
    free = os.statvfs(path)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 1))
    return filler


@contextlib.contextmanager
def thin_ext4(directory: Path, backing: int, promised: int) -> Iterator[Path]:
    """An ext4 that promises more than there is behind it: writes succeed, and then their fsync fails with EIO.

    It lies on a sparse loop file of *promised* bytes on a tmpfs of *backing* bytes, like a thin volume whose pool
    is full.  Nothing is simulated: the error is the kernel's own, told once (rule D9).
    """
    with tmpfs(directory / "pool", backing) as pool:
        image = pool / "image"
        with image.open("wb") as file:
            file.truncate(promised)
        _run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", "-m", "0", image)
        mounted = directory / "thin"
        mounted.mkdir()
        _mount("-o", "loop,errors=continue", image, mounted)
        try:
            yield mounted
        finally:
            _run("umount", "--lazy", mounted)

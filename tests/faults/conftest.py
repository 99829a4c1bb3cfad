"""Fixtures of the fault tests: a directory on tmpfs, where a thousand syncs cost nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import paths


@pytest.fixture
def shm() -> Iterator[Path]:
    """A fresh directory on tmpfs, removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="blkckpt-faults-", dir=paths.LIVE_ROOT)).resolve()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Was ``--full`` given?"""
    return bool(request.config.getoption("--full"))

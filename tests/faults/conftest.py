"""Fixtures of the fault tests: a directory on tmpfs, where a thousand syncs cost nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import paths
from tests.faults import recorder


@pytest.fixture
def shm() -> Iterator[Path]:
    """A fresh directory on tmpfs, removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="blkckpt-faults-", dir=paths.LIVE_ROOT)).resolve()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[paths.Home]:
    """A home whose run and live directories, which are outside of *tmp_path*, go with the test."""
    place = paths.home(tmp_path / "home")
    yield place
    shutil.rmtree(place.run, ignore_errors=True)
    shutil.rmtree(place.live, ignore_errors=True)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder, compiled."""
    return recorder.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Was ``--full`` given?"""
    return bool(request.config.getoption("--full"))

"""Fixtures of the fault tests: a directory on tmpfs, where a thousand syncs cost nothing."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from blkckpt import paths
from tests.faults import recorder

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture
def shm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A fresh directory on tmpfs, removed afterwards.  Of a test that failed it is kept in *tmp_path*."""
    directory = Path(tempfile.mkdtemp(prefix="blkckpt-faults-", dir=paths.LIVE_ROOT)).resolve()
    yield directory
    try:
        if request.node.stash.get(_failed, False):
            shutil.copytree(directory, tmp_path / "evidence", symlinks=True, ignore=_special)
    finally:
        shutil.rmtree(directory)


def _special(directory: str, names: list[str]) -> list[str]:
    """Sockets and the like, which cannot be copied."""
    kinds = {name: stat.S_IFMT((Path(directory) / name).lstat().st_mode) for name in names}
    return [name for name, kind in kinds.items() if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)]


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

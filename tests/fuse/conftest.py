"""Every test here mounts checkpoints with the product's own command and looks at them with what others wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest, mounted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None
    for item in items:
        if here in item.path.parents and missing:
            item.add_marker(pytest.mark.skip(reason="no /dev/fuse or no fusermount3; blkckpt doctor says what to do"))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[guest.Sandbox]:
    """A home for all tests of a module."""
    with guest.Sandbox(tmp_path_factory.mktemp("box")) as box:
        yield box


@pytest.fixture
def view(box: guest.Sandbox, tmp_path: Path) -> Iterator[Path]:
    """The module's checkpoints, mounted."""
    with mounted.mounted(box, tmp_path / "view") as directory:
        yield directory

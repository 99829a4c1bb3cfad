"""Every test here boots a real guest under emulation; ``tools/guest-image`` makes it.

One guest serves all tests of a module where they can share it: a boot costs 3 s and two cores are all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import guest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.qemu)
            if not guest.ready():
                item.add_marker(pytest.mark.skip(reason="no guest image; run tools/guest-image"))


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[guest.Sandbox]:
    with guest.Sandbox(tmp_path) as box:
        yield box


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[guest.Sandbox]:
    """A home for all tests of a module."""
    with guest.Sandbox(tmp_path_factory.mktemp("box")) as box:
        yield box


@pytest.fixture(scope="module")
def writer(box: guest.Sandbox) -> guest.Console:
    """VM "v": a guest that writes, reads back and compares as fast as it is told to."""
    box.create("v", {"vda": 96 << 20})
    return box.boot("v", "writer", memory=192, rate=1500)

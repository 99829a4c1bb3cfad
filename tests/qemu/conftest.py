"""Every test here boots a real guest under emulation; ``tools/guest-image`` makes it."""

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

"""Fixtures of the tests that run against a real nbdkit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import referee, server

MIB = 1 << 20
SIZES = {"vda": 4 * MIB, "vdb": MIB + 1234}
"""The second one ends inside a block (D11)."""


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[server.Stand]:
    """A started server with two disks."""
    with server.Stand(tmp_path, SIZES) as made:
        yield made.start()


@pytest.fixture
def refereed(tmp_path: Path) -> Iterator[tuple[server.Stand, referee.Referee]]:
    """The same, with every file operation in the test's hand."""
    with server.refereed(tmp_path, SIZES) as both:
        yield both

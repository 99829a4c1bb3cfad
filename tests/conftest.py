"""Options of the whole suite."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("machine")
"""How long data takes to be made says what else the machine does, not whether the code is right."""


signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell has what it runs in the background ignore Ctrl-C, and so would what the tests start and interrupt."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long versions of the randomised tests as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="long; run with --full")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(skip)

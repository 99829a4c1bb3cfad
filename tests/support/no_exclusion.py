"""Hook (see ``nbdkit_hooked``): a defect on purpose, for negative controls.  Tickets never exclude each other (D4)."""

from __future__ import annotations

from typing import Any

from blkckpt.disk import epoch
from tests.support import referee


def _never(gate: epoch.Gate[Any], ticket: epoch.Ticket[Any]) -> bool:
    return False


def install() -> None:
    referee.install()
    epoch.Gate._blocked_locked = _never  # type: ignore[method-assign,assignment]

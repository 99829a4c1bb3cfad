"""The question the disks ask before every mutating request while they are armed.

The disk layer knows no hypervisor: it only asks a :class:`Barrier` whether the instant of the checkpoint has
passed.  :mod:`blkckpt.vm.barrier` answers by looking at the QMP socket; a test answers from a variable.

========  =====================================================================================
WAITING   not yet: the request belongs to the checkpoint, apply it to the old layer
PASSED    the guest has been resumed: move every disk to its new layer, then apply the request
VIOLATED  the instant cannot be told any more (``reason`` says why): disarm and abort
========  =====================================================================================

PASSED and VIOLATED are final.
"""

from __future__ import annotations

import enum
from typing import Protocol


class BarrierState(enum.Enum):
    """What a barrier answers."""

    WAITING = "waiting"
    PASSED = "passed"
    VIOLATED = "violated"


class Barrier(Protocol):
    """Answers from any thread, at once, without waiting for anybody."""

    def poll(self) -> BarrierState:
        """The state as of now."""

    @property
    def reason(self) -> str:
        """Why it was VIOLATED, one line; empty otherwise."""

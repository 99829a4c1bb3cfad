"""Checkpoints under way: one :class:`Round` each, from prepare until its overlays have no claim to stay.

::

    PREPARING ──> PREPARED ──arm──> ARMED ──barrier──> SWITCHED ──(copied)── commit ──> OVER
                     │  <──disarm, violation──┘             │                             ▲
                     ├──────────── switch ──────────────────┘                             │
                     └───────────────────── abort, lease over ────────────────────────────┘

Only the newest may be before its switch: an overlay that takes no writes yet must be on top.  Any number may be
SWITCHED; they are copied one after the other, in their order, so that each is relative to the one before it.  They
end in any order.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping

from blkckpt import errors
from blkckpt.disk import api, barrier, job, member

MAX_OVERLAYS = 8
"""A read looks at one map after the other, and each overlay has files and a mapping; eight are a checkpoint every few
seconds onto a store that stalls for half a minute."""


class Stage(enum.Enum):
    """Where a checkpoint is."""

    PREPARING = "preparing"
    PREPARED = "prepared"
    ARMED = "armed"
    SWITCHED = "switched"
    OVER = "over"


class Round:
    """One checkpoint.  Its stage, barrier and instant are guarded by the group's gate lock.

    *settled* is set when later ones need not wait for its copy any more: it succeeded, or the checkpoint is over.
    *left* is set when it is over, and nothing of it but overlays is left.  *stacked*: it was begun while another was
    under way, so its driver could not know the image that its changes are relative to.
    """

    def __init__(self, number: int, checkpoint: str, lease: float | None, *, stacked: bool = False) -> None:
        self.number = number
        self.checkpoint = checkpoint
        self.lease = lease
        self.stacked = stacked
        self.stage = Stage.PREPARING
        self.parts: Mapping[str, member.Part] = {}
        self.barrier: barrier.Barrier | None = None
        self.deadline: float | None = None
        self.violation: str | None = None
        self.instant: int | None = None
        self.copying: job.Job | None = None
        self.store: str | None = None
        self.images: Mapping[str, str] | None = None
        self.settled = threading.Event()
        self.left = threading.Event()

    @property
    def outcome(self) -> api.ArmState:
        """How arming went so far."""
        switched, waiting = self.stage is Stage.SWITCHED, self.stage is Stage.ARMED
        return api.ArmState(switched, waiting, self.violation, self.instant)

    @property
    def status(self) -> api.RoundStatus:
        copying = self.copying.status() if self.copying is not None else None
        return api.RoundStatus(self.checkpoint, self.stage.value, self.instant, self.images is not None, copying)

    def overlays(self) -> frozenset[str]:
        return frozenset(part.overlay.id for part in self.parts.values())

    def require(self, stage: Stage, doing: str) -> None:
        """StateError unless the checkpoint is at *stage*."""
        if self.stage is not stage:
            raise errors.StateError(
                f"cannot {doing}: checkpoint {self.checkpoint} is {self.stage.value}, not {stage.value}"
            )

    def await_turn(self, earlier: list[Round], stop: threading.Event) -> None:
        """Wait until the copies of *earlier* ones are settled; StateError when stopped."""
        for one in earlier:
            while not one.settled.wait(0.1):
                if stop.is_set():
                    raise errors.StateError("the copy was stopped")

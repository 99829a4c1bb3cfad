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
import time
from collections.abc import Mapping, Sequence

from blkckpt import errors
from blkckpt.disk import api, barrier, job, member, statefile
from blkckpt.disk import format as formats

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
    under way, so its driver could not know the image that its changes are relative to.  *retain*: it is not copied
    (:mod:`blkckpt.disk.retaining`).
    """

    def __init__(
        self, number: int, checkpoint: str, lease: float | None, *, stacked: bool = False, retain: bool = False
    ) -> None:
        self.number = number
        self.checkpoint = checkpoint
        self.lease = lease
        self.stacked = stacked
        self.retain = retain
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


class UnderWay:
    """The checkpoints under way, oldest first, guarded by the group's gate *lock*."""

    REMEMBERED = 256
    """Images of past checkpoints whose number is known."""

    def __init__(self, lock: threading.Lock) -> None:
        self.rounds: list[Round] = []
        self._lock = lock
        self._number = 0
        self._origins: dict[str, tuple[int, str]] = {}

    def begin(self, checkpoint: str, lease: float | None, *, retain: bool = False) -> Round:
        """A new one; *lease* is seconds."""
        until = None if lease is None else time.monotonic() + lease
        with self._lock:
            self._number += 1
            one = Round(self._number, checkpoint, until, stacked=bool(self.rounds), retain=retain)
            self.rounds.append(one)
        return one

    def check_begin(self, checkpoint: str, members: Sequence[member.Member]) -> None:
        """StateError unless a checkpoint of that name may begin."""
        doing = f"prepare checkpoint {checkpoint}"
        with self._lock:
            rounds = list(self.rounds)
        if rounds and rounds[-1].instant is None:
            raise errors.StateError(f"cannot {doing}: checkpoint {rounds[-1].checkpoint} has not switched yet")
        if any(one.checkpoint == checkpoint for one in rounds):
            raise errors.StateError(f"cannot {doing}: one of that name is under way")
        depth = max((item.passing for item in members), default=0)
        if depth >= MAX_OVERLAYS:
            raise errors.StateError(
                f"cannot {doing}: {depth} overlays are still to be saved or committed; wait until there are fewer "
                f"(`blkckpt status {members[0].place.vm.name}`)"
            )

    def find(self, checkpoint: str | None, doing: str) -> Round:
        """The checkpoint of that name, else the newest; StateError if it is not under way."""
        with self._lock:
            found = self.named_locked(checkpoint)
        if found:
            return found[-1]
        which = f"checkpoint {checkpoint} is not" if checkpoint else "no checkpoint is"
        raise errors.StateError(f"cannot {doing}: {which} under way")

    def named_locked(self, checkpoint: str | None) -> list[Round]:
        """The checkpoint of that name, or all."""
        return [one for one in self.rounds if checkpoint in (None, one.checkpoint)]

    def names(self) -> frozenset[str]:
        """The checkpoints under way; costs nothing, unlike a status, which counts every map's bits."""
        with self._lock:
            return frozenset(one.checkpoint for one in self.rounds)

    def before(self, one: Round) -> list[Round]:
        """Those that are older than *one*."""
        with self._lock:
            return [other for other in self.rounds if other.number < one.number]

    def remove(self, one: Round) -> None:
        """*one* is over: its overlays are free."""
        with self._lock:
            one.stage = Stage.OVER
            self.rounds.remove(one)
        one.settled.set()
        one.left.set()

    def held_locked(self) -> frozenset[str]:
        """The overlays that checkpoints under way need where they are."""
        return frozenset[str]().union(*(one.overlays() for one in self.rounds))

    def next_time(self) -> float | None:
        """When the first lease or deadline ends."""
        with self._lock:
            return min(
                (when for one in self.rounds for when in (one.deadline, one.lease) if when is not None), default=None
            )

    def take_silent(self, now: float) -> list[Round]:
        """Those whose lease is over; they have none any more."""
        with self._lock:
            silent = [one for one in self.rounds if one.lease is not None and now >= one.lease]
            for one in silent:
                one.lease = None
        return silent

    # ---- what images are of ----

    def remember(self, one: Round) -> None:
        """*one* is durable: its images may be what later changes are relative to."""
        assert one.images is not None and one.store is not None
        for image in one.images.values():
            self._origins[image] = (one.number, one.store)
        while len(self._origins) > self.REMEMBERED:
            del self._origins[next(iter(self._origins))]

    def origin(self, image: str | None) -> tuple[int, str | None]:
        """The number of the checkpoint that *image* is of (0: not of this server's) and the store it is in."""
        return self._origins.get(image or "", (0, None))


# ---- 802 ----

Made = Mapping[str, tuple[member.Part, formats.DiskState]]


def make_overlays(members: Mapping[str, member.Member], file: statefile.StateFile, one: Round) -> Made:
    """802: the overlays of *one*, empty, durable and in the state file; nothing is left of them when that fails."""
    made: dict[str, tuple[member.Part, formats.DiskState]] = {}
    try:
        for name, item in members.items():
            made[name] = item.make_overlay(one.number)
        file.sync_layers()
        file.save({name: state for name, (_, state) in made.items()}, may_spend=False)
    except BaseException as error:
        for name, (part, _) in made.items():
            members[name].drop_overlay(part)
        file.sweep()
        if isinstance(error, OSError):
            raise errors.from_os_error(error, f"preparing checkpoint {one.checkpoint}") from error
        raise
    return made


def put_overlays_locked(members: Mapping[str, member.Member], one: Round, made: Made) -> None:
    """Put them on top of the disks."""
    for name, (part, state) in made.items():
        members[name].put_overlay_locked(part, state)
    one.parts = {name: part for name, (part, _) in made.items()}
    one.stage = Stage.PREPARED

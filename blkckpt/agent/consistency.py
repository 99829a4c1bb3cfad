"""Consistency groups: one checkpoint of several VMs, all of them stopped at the same time.

Each VM is taken by a plan of its own in a thread of its own; they meet at three points (:class:`Meeting`)::

    SWITCHING    everyone's guest is stopped          so nobody's disks switch while another guest still runs
    RESUMING     everyone's disks have switched       so nobody's guest goes on before
    PUBLISHING   everyone is saved                    so there is a checkpoint of all or of none

Whoever fails ends the meeting, and the others take back what they have (A3).  Between the last stop and the first
resume all guests stood still; every checkpoint's disks, memory and devices are of that time, since a stopped guest
neither runs nor takes anything from a device.  So what one guest has acknowledged to another is in that other's
checkpoint, provided the acknowledgement is sent after the receipt.  Bytes on their way between them (in a socket's
buffer) are in neither, as on a network that lost them.

The *spread* is the time from the first guest's stop to the last one's, by QEMU's own event times.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

from blkckpt import errors
from blkckpt.agent import plan
from blkckpt.store import manifest

POINTS = frozenset({plan.State.SWITCHING, plan.State.RESUMING, plan.State.PUBLISHING})
MODES = frozenset({plan.Mode.EXPLICIT, plan.Mode.STOPPED})
"""With the barrier each guest is stopped inside its own QEMU's window, which cannot be held for another's."""

MEET_SECONDS = 3600.0
"""How long the quickest waits for the slowest to be saved."""
STOPPED_SECONDS = 60.0
"""How long a stopped guest waits for another to be stopped or switched: it stands still meanwhile."""


class Meeting:
    """Where the members of a group wait for each other.  Thread-safe."""

    def __init__(self, members: Sequence[str]) -> None:
        """*members*: ``VM@NAME`` of each."""
        self.id = secrets.token_hex(16)
        self._members = tuple(members)
        self._barrier = threading.Barrier(len(members))
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[int, int]] = {}
        self._failure: str | None = None

    def meet(self, state: plan.State) -> None:
        """Wait until all have come to *state*, if it is one where they meet; StateError if one fails."""
        if state not in POINTS:
            return
        seconds = MEET_SECONDS if state is plan.State.PUBLISHING else STOPPED_SECONDS
        try:
            self._barrier.wait(seconds)
        except threading.BrokenBarrierError as error:
            reason = self._failure or f"another was not there within {seconds:g} s"
            raise errors.StateError(f"the group's checkpoint was taken back: {reason}") from error

    def fail(self, member: str, error: BaseException) -> None:
        """*member* does not go on: nobody does."""
        with self._lock:
            self._failure = self._failure or f"{member}: {error or type(error).__name__}"
        self._barrier.abort()

    def check(self) -> None:
        """StateError if somebody has failed: called while one's own work goes on, which would be in vain."""
        if self._barrier.broken:
            raise errors.StateError(f"the group's checkpoint was taken back: {self._failure or 'interrupted'}")

    def note(self, member: str, stop_us: int, resume_us: int) -> None:
        """When *member*'s guest was stopped and resumed, microseconds of QEMU's clock."""
        with self._lock:
            self._windows[member] = (stop_us, resume_us)

    def info(self) -> manifest.GroupInfo:
        """What each member's manifest says of the group; StateError if the guests were not stopped at one time."""
        with self._lock:
            windows = dict(self._windows)
        missing = set(self._members) - windows.keys()
        if missing:
            raise errors.StateError(f"when {', '.join(sorted(missing))} stopped is not known")
        first, last = min(stop for stop, _ in windows.values()), max(stop for stop, _ in windows.values())
        if last >= min(resume for _, resume in windows.values()):
            raise errors.StateError("the guests of the group were not all stopped at the same time")
        return manifest.GroupInfo(self.id, self._members, (last - first) / 1e6)


def together(takers: Mapping[str, Callable[[], manifest.Manifest]], meeting: Meeting) -> list[manifest.Manifest]:
    """Run every member's *taker* (``VM@NAME`` → function) at once; their manifests, in order.

    Raises the first error, after all have taken back what they had.
    """
    taken: dict[str, manifest.Manifest] = {}
    failed: list[BaseException] = []

    def run(member: str, take: Callable[[], manifest.Manifest]) -> None:
        try:
            taken[member] = take()
        except BaseException as error:
            failed.append(error)
            meeting.fail(member, error)

    threads = [threading.Thread(target=run, args=pair, name=f"checkpoint {pair[0]}") for pair in takers.items()]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        meeting.fail("the group", error)
        for thread in threads:
            thread.join()
        if not taken:
            raise
    if failed:
        raise failed[0]
    return [taken[member] for member in takers]

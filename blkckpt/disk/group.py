"""All disks of one VM.  (Interface; the body follows.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from blkckpt import paths
from blkckpt.disk import api, disk, job
from blkckpt.disk import barrier as barriers


class DiskGroup:
    """All disks of one VM; one state file, so that all change state in one atomic replace."""

    disks: Mapping[str, disk.Disk]

    @classmethod
    def create(cls, vm: paths.VmPaths, vm_id: str, disks: Sequence[api.DiskSpec]) -> None:
        """Write the first state.json (and the files of disks with a source)."""
        raise NotImplementedError

    @classmethod
    def open(cls, vm: paths.VmPaths, *, open_image: Callable[[api.ImageRef], api.Source]) -> DiskGroup:
        """Lock, load, recover; starts no thread (D12)."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the background work.  Call after nbdkit's fork."""
        raise NotImplementedError

    def prepare(self, checkpoint: str, lease: float | None = None) -> None:
        """802.  StateError if a checkpoint is under way.  *lease*: seconds until the disks abort by themselves (D7)."""
        raise NotImplementedError

    def renew(self, lease: float) -> None:
        """The driver is alive: *lease* more seconds from now.  No effect when nothing is under way."""
        raise NotImplementedError

    def arm(self, barrier: barriers.Barrier, deadline: float) -> None:
        """Flush, then let *barrier* decide when to switch.  *deadline* is a ``time.monotonic()`` value."""
        raise NotImplementedError

    def switch(self) -> api.ArmState:
        """810 now, all disks at one instant.  Idempotent."""
        raise NotImplementedError

    def poll_barrier(self) -> api.ArmState:
        """Ask the barrier; switch if it has been passed."""
        raise NotImplementedError

    def disarm(self) -> None:
        """Back to PREPARED if ARMED; no effect otherwise."""
        raise NotImplementedError

    def start_copy(
        self,
        store: str,
        parents: Mapping[str, str | None],
        *,
        rate: int | None = None,
        label: str = "",
        command: Sequence[str] | None = None,
    ) -> job.Job:
        """830.  Result: ``{"disks": {name: {"image", "size", "read", "new", "chunks", "seconds"}}}``."""
        raise NotImplementedError

    def commit(self) -> job.Job:
        """834, when the manifest is durable.  StateError unless the copy succeeded."""
        raise NotImplementedError

    def abort(self) -> job.Job:
        """From any state back to rest.  A commit that has begun is not undone: its job is returned."""
        raise NotImplementedError

    def job(self, job_id: str) -> job.Job:
        """The job with that id (the last of each kind is remembered); NotFoundError."""
        raise NotImplementedError

    def status(self) -> api.GroupStatus:
        raise NotImplementedError

    def close(self) -> None:
        """Clean stop: durable maps, clean flag, changed bits trusted (D13).  Idempotent."""
        raise NotImplementedError

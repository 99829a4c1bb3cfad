"""Retained checkpoints become ordinary ones, or are given up, while the VM runs or while it does not.

Phases of flattening::

    copy      the disk server's copy child reads the retained layers; each image takes the place of its reference
    publish   the manifest says that the checkpoint is not retained any more, by one rename (S1)
    commit    the disk server is told, lets go of the layers, and commits the overlay above them

Interrupted before *publish* nothing has changed but for images that are made already, which the next time finds.  After
it the checkpoint is an ordinary one, and the disk server lets go by itself at its next start at the latest.  As long as
somebody still reads the layers (a disk that is being restored from them, an export) they stay, and go when the last
one has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from blkckpt import errors, paths
from blkckpt.control import client, messages
from blkckpt.disk import group
from blkckpt.restore import atrest
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.vm import definition

Progress = Callable[[str, int, int | None], None]

STALL_SECONDS = 300.0
"""Nothing moved for so long: a dead disk or store."""


class _Disks(Protocol):
    """The disks of a VM, served or not."""

    def flatten(self, checkpoint: str, rate: int | None) -> str: ...

    def review(self) -> str: ...

    def look(self, job: str) -> messages.JobState:
        """How far it is, after a second at most; raises what it failed with."""

    def retained(self) -> set[str]:
        """The checkpoints whose layers they keep."""


class _Served:
    """By a disk server."""

    def __init__(self, peer: client.Client) -> None:
        self._peer = peer
        self.flatten, self.review = peer.flatten, peer.review

    def look(self, job: str) -> messages.JobState:
        state = self._peer.wait(job, 1.0)
        return self._peer.finish(job, 1.0) if state.failure else state

    def retained(self) -> set[str]:
        overlays = [one for disk in self._peer.status()["disks"] for one in disk["overlays"]]
        return {str(one["retained"]) for one in overlays if one["retained"]}


class _AtRest:
    """By nobody: opened in this process."""

    def __init__(self, ours: group.DiskGroup) -> None:
        self._ours = ours

    def flatten(self, checkpoint: str, rate: int | None) -> str:
        return self._ours.flatten(checkpoint, rate=rate).id

    def review(self) -> str:
        return self._ours.review().id

    def look(self, job: str) -> messages.JobState:
        found = self._ours.job(job)
        if found.wait(1.0):
            found.outcome()
        state = found.status()
        return messages.JobState(job, state.state, state.done, state.total)

    def retained(self) -> set[str]:
        overlays = [one for disk in self._ours.status().disks for one in disk.overlays]
        return {one.retained for one in overlays if one.retained}


@contextlib.contextmanager
def _reach(vm: paths.VmPaths, owner: definition.VmDefinition, doing: str) -> Iterator[_Disks]:
    """The disks of *vm*; what was begun there ends with the block."""
    try:
        peer = client.Client.connect(vm.control_socket, name=doing)
    except errors.StateError:
        with atrest.opened(vm, owner) as ours:
            yield _AtRest(ours)
        return
    with peer:
        yield _Served(peer)


def flatten(
    vm: paths.VmPaths,
    owner: definition.VmDefinition,
    store: stores.Store,
    checkpoint: manifest.Manifest,
    rate: int | None,
    progress: Progress,
) -> bool:
    """Make the retained *checkpoint* of *vm* an ordinary one; whether its layers have been let go.

    False if somebody still reads them.  Raises what failed; the checkpoint is then retained as before.
    """
    with _reach(vm, owner, f"flatten {checkpoint.name}") as disks:
        _follow(disks, disks.flatten(checkpoint.name, rate), "disks", progress)
        store.amend_manifest(dataclasses.replace(checkpoint, retained=False))
        return _settle(disks, checkpoint.name, progress)


def settle(vm: paths.VmPaths, owner: definition.VmDefinition, checkpoint: str, progress: Progress) -> bool:
    """*checkpoint*, retained, has been removed: the disks let go of it; whether they have."""
    with _reach(vm, owner, f"commit {checkpoint}") as disks:
        return _settle(disks, checkpoint, progress)


def _settle(disks: _Disks, checkpoint: str, progress: Progress) -> bool:
    _follow(disks, disks.review(), "commit", progress)
    return checkpoint not in disks.retained()


def _follow(disks: _Disks, job: str, stage: str, progress: Progress) -> None:
    """Wait for the end of *job*; DeadlineError when it has not moved for a long time."""
    moved, before = time.monotonic(), -1
    while (state := disks.look(job)).state == messages.RUNNING:
        progress(stage, state.done, state.total)
        if state.done != before:
            moved, before = time.monotonic(), state.done
        if time.monotonic() - moved > STALL_SECONDS:
            raise errors.DeadlineError(f"nothing has moved for {STALL_SECONDS:g} s (stage: {stage})")
    progress(stage, state.total, state.total)

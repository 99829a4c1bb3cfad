"""A VM's disks while nobody serves them: opened here, alone, with nothing under way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from blkckpt import errors, paths
from blkckpt.disk import api, group
from blkckpt.store import images, keeping
from blkckpt.store import store as stores
from blkckpt.vm import definition

REST_SECONDS = 3600.0
"""How long to wait for a commit that a crash interrupted: it moves at most the disk once."""


@contextlib.contextmanager
def opened(vm: paths.VmPaths, owner: definition.VmDefinition) -> Iterator[group.DiskGroup]:
    """The disks of *vm*, at rest; StateError when somebody serves them."""
    known: dict[str, stores.Store] = {}

    def open_image(ref: api.ImageRef) -> images.ImageReader:
        if ref.store not in known:
            known[ref.store] = stores.Store.open(ref.store)
        return known[ref.store].image(ref.image)

    try:
        ours = group.DiskGroup.open(vm, open_image=open_image, wanted=functools.partial(keeping.wanted, vm.name))
    except errors.StateError as error:
        raise errors.StateError(f"{error}; stop VM {owner.name} first: blkckpt stop {owner.name}") from error
    try:
        ours.start()
        _wait_for_rest(ours, owner.name)
        yield ours
    finally:
        ours.close()


def _wait_for_rest(ours: group.DiskGroup, name: str) -> None:
    status = ours.status()
    if status.job is not None:
        job = ours.job(status.job.id)
        if not job.wait(REST_SECONDS):
            raise errors.DeadlineError(f"VM {name}: the commit of an interrupted checkpoint does not end")
        job.outcome()
    if ours.status().state is not api.State.REST:
        raise errors.StateError(f"VM {name}: a checkpoint is under way; wait for it or abort it")

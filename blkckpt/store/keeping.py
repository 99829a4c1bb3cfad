"""Retained checkpoints between a VM's disks and the store: what stands for them there, and whether they are kept."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from blkckpt import durable, errors, lazy, paths
from blkckpt.store import manifest, reference, store

if TYPE_CHECKING:
    from blkckpt.disk import format as formats
    from blkckpt.store import retained
else:  # a checkpoint that retains nothing needs neither
    formats, retained = (lazy.Module(name) for name in ("blkckpt.disk.format", "blkckpt.store.retained"))


def refer(vm: paths.VmPaths, place: store.Store, built: manifest.Manifest, claims: contextlib.ExitStack) -> None:
    """Put the references of *built*, about to be published, and claim what they stand for until *claims* end.

    StateError if the disks do not keep it: they have been given up, and nothing may be published.
    """
    vm_id = formats.decode_state(durable.read_small(vm.state, "the disks' state"), vm.state).vm_id
    home = str(vm.root.parent.parent)
    for disk in built.disks:
        found = reference.Reference(disk.image, home, vm.name, vm_id, disk.name, disk.size, built.name)
        claims.callback(os.close, retained.hold(found))
        place.put_reference(found)


def wanted(vm: str, mark: formats.Retained) -> bool:
    """Whether *mark* is of a checkpoint of *vm* that is there and retained, or whose disk somebody has pinned.

    Raises what keeps this from being known: the store is not there, the manifest is damaged.
    """
    with store.Store.open(mark.store) as place:
        try:
            found = place.manifest(vm, mark.checkpoint)
            if found.id == mark.id:
                return found.retained
        except errors.NotFoundError:
            pass
        return needed(place, mark.image)


def needed(place: store.Store, image: str) -> bool:
    """Whether a disk restored from the retained *image* still reads it."""
    if not any(image in pinned for pinned in place.pins().values()):
        return False
    try:
        return place.reference(image) is not None
    except errors.NotFoundError:
        return False

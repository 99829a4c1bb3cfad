"""A new VM's disks, made from a checkpoint: an empty overlay over each image, filled in the background.

Nothing is copied here.  The disk layer reads what the guest asks for from the store and fills the raw file of each
disk meanwhile; when it is full the store is no longer needed.

Write order: the VM's directory (an exclusive ``mkdir`` reserves the name), the *unfinished* mark, the disks' state,
the caller's own preparations, ``vm.json``; then the mark goes.  A crash before that leaves a directory that is not
listed and not served; the next restore under that name clears it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator

from blkckpt import errors, paths
from blkckpt.disk import api, group
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.vm import definition, lineage, unfinished


@contextlib.contextmanager
def reserved(vm: paths.VmPaths, store: stores.Store, checkpoint: str) -> Iterator[None]:
    """Hold the name of *vm*, new, marked as unfinished; if the body fails everything below it is removed."""
    _reserve(vm, checkpoint)
    try:
        yield
        unfinished.clear(vm)
    except BaseException:
        with contextlib.suppress(errors.BlkckptError):
            store.unpin(definition.load(vm).id)
        remove(vm)
        raise


def create(vm: paths.VmPaths, store: stores.Store, checkpoint: manifest.Manifest) -> definition.VmDefinition:
    """Make and define the disks of *vm*, inside :func:`reserved`.

    The new VM keeps its own checkpoints in *store* too, so that they share chunks with the one it came from.  The
    images are pinned there under the new VM's id (rule R5).
    """
    place = str(store.path.resolve())
    described = [
        definition.disk(
            disk.name,
            vm.root / "disks" / f"{disk.name}.raw",
            disk.size,
            definition.ImageSource(place, disk.image),
        )
        for disk in checkpoint.disks
    ]
    paths.private_directory(vm.root / "disks")
    vm_id = secrets.token_hex(16)
    store.pin(vm_id, [disk.image for disk in checkpoint.disks])
    try:
        made = definition.create(vm, described, store=place, vm_id=vm_id)
        group.DiskGroup.create(vm, made.id, [_spec(disk) for disk in described])
        lineage.write(vm, f"{checkpoint.vm}@{checkpoint.name}")
    except BaseException:
        store.unpin(vm_id)
        raise
    return made


def remove(vm: paths.VmPaths) -> None:
    """Everything of a VM that never came to be."""
    for directory in (vm.root, vm.run, vm.live):
        shutil.rmtree(directory, ignore_errors=True)


def _spec(disk: definition.DiskDefinition) -> api.DiskSpec:
    assert disk.source is not None
    return api.DiskSpec(disk.name, disk.path, disk.size, api.ImageRef(disk.source.store, disk.source.image))


def _reserve(vm: paths.VmPaths, checkpoint: str) -> None:
    if vm.root.is_dir():
        _clear_leftover(vm)
    paths.private_directory(vm.root.parent)
    try:
        vm.root.mkdir(mode=0o700)
    except FileExistsError as error:
        raise errors.StateError(f"VM {vm.name} is just being made by somebody else; choose another name") from error
    except OSError as error:
        raise errors.from_os_error(error, f"creating {vm.root}") from error
    unfinished.write(vm, unfinished.RESTORE, checkpoint)


def _clear_leftover(vm: paths.VmPaths) -> None:
    """Remove what an interrupted restore left under this name; refuse anything else."""
    mark = unfinished.read(vm)
    if mark is not None and mark.what == unfinished.RESTORE and not mark.alive:
        remove(vm)
        return
    if mark is None and not any(vm.root.iterdir()):
        vm.root.rmdir()
        return
    raise errors.StateError(f"VM {vm.name} exists already; choose another name or remove it: blkckpt vm rm {vm.name}")

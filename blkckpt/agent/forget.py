"""Forgetting a VM: its definition, its layers, its kept memory, its run directory.

Nothing of what the guest wrote may be lost by it.  While a checkpoint is under way, or after one was interrupted, the
newest writes are in an overlay and not yet in the base file; such a VM is refused until it has been served once, which
brings its disks to rest.  A restored VM's disk files are its own and go with it, as do its pins in the store.

The run directory's lock is held throughout, so nobody starts the VM meanwhile.  ``vm.json`` goes first: what is
interrupted after that leaves a directory that is no VM, and that forgetting once more removes.
"""

from __future__ import annotations

import contextlib
import shutil

from blkckpt import durable, errors, paths
from blkckpt.agent import rundir
from blkckpt.disk import format as formats
from blkckpt.store import store as stores
from blkckpt.vm import definition, unfinished

MAX_STATE = 16 << 20


def forget(vm: paths.VmPaths) -> None:
    """Remove what the home has of *vm*.

    Raises :class:`errors.NotFoundError` when there is nothing, :class:`errors.StateError` when the VM runs, when
    something is under way, or when its base files lack writes that an overlay holds.
    """
    if not vm.root.is_dir():
        raise errors.NotFoundError(f"there is no VM {vm.name}; `blkckpt vm list` shows those there are")
    run = rundir.RunDirectory(vm)
    try:
        _check_machine(vm)
        _check_unfinished(vm)
        _check_at_rest(vm)
        _unpin(vm)
        try:
            durable.remove(vm.definition)
            shutil.rmtree(vm.root)
        except OSError as error:
            raise errors.from_os_error(error, f"removing {vm.root}") from error
    finally:
        run.close()
    for directory in (vm.run, vm.live):
        shutil.rmtree(directory, ignore_errors=True)


def let_go(home: paths.Home) -> None:
    """Unpin the images of restored VMs whose disks have been filled meanwhile: a collection may have them."""
    for name in home.vm_names():
        vm = home.vm(name)
        with contextlib.suppress(errors.BlkckptError):  # a VM that cannot be read keeps what it has pinned
            if not any(disk.source for disk in _state(vm).disks):
                _unpin(vm)


def _unpin(vm: paths.VmPaths) -> None:
    """Let go of the images that a restored disk reads from; a store that is gone holds nothing."""
    if not vm.definition.exists():
        return
    known = definition.load(vm)
    for path in {disk.source.store for disk in known.disks if disk.source}:
        with contextlib.suppress(errors.NotFoundError), stores.Store.open(path) as store:
            store.unpin(known.id)


def _check_machine(vm: paths.VmPaths) -> None:
    before = rundir.read(vm)
    if before and before.machine and before.machine.alive:
        raise errors.StateError(
            f"QEMU of VM {vm.name} (pid {before.machine.pid}) still runs without a supervisor; end it first"
        )


def _check_unfinished(vm: paths.VmPaths) -> None:
    """Half-restored and half-reverted VMs may go; those somebody is at work on may not."""
    mark = unfinished.read(vm)
    if mark is not None and mark.alive:
        unfinished.check(vm)


def _check_at_rest(vm: paths.VmPaths) -> None:
    if not vm.definition.exists() or not vm.state.exists():
        return
    state = _state(vm)
    marks = [item.retained for disk in state.disks for item in disk.overlays if item.retained]
    if marks:
        kept = ", ".join(dict.fromkeys(mark.checkpoint for mark in marks))
        raise errors.StateError(
            f"the disks of VM {vm.name} keep its retained checkpoints ({kept}); flatten them (blkckpt flatten "
            f"{vm.name}) or give them up (blkckpt commit {vm.name}) first"
        )
    held = [disk.name for disk in state.disks if disk.overlays and disk.source is None]
    if held:
        raise errors.StateError(
            f"the newest writes to {', '.join(held)} of VM {vm.name} are not in its base file yet (a checkpoint was "
            f"interrupted); serve it until `blkckpt status {vm.name}` shows it at rest: blkckpt serve {vm.name}"
        )


def _state(vm: paths.VmPaths) -> formats.GroupState:
    return formats.decode_state(durable.read_small(vm.state, "disk state", MAX_STATE), vm.state)

"""The state file of a VM's disks, and the lock of whoever writes it (rule D12)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blkckpt import durable, errors, paths, units
from blkckpt.disk import api, fileio, stack
from blkckpt.disk import format as formats

_WHAT = "the disks' state"
RESERVE = "reserve"
RESERVE_BYTES = 256 << 10
"""Kept allocated beside the state file and given up when saving meets a full file system: an overlay that has filled
the home must not keep the disks from going back to rest, which is what empties it (D10)."""


class StateFile:
    """The lock, held until :meth:`close`, and the state as last saved."""

    def __init__(self, vm: paths.VmPaths) -> None:
        """Lock, load, make the directories.  StateError if somebody else serves the VM."""
        if not vm.root.is_dir():
            raise errors.NotFoundError(f"there is no VM {vm.name} ({vm.root})")
        self._vm = vm
        self._saving = threading.Lock()
        self._descriptor = _lock(vm)
        try:
            self.state = self._read()
            paths.private_directory(vm.layers)
            paths.private_directory(vm.live)
        except BaseException:
            self.close()
            raise

    def _read(self) -> formats.GroupState:
        return formats.decode_state(durable.read_small(self._vm.state, _WHAT), self._vm.state)

    def save(self, changes: Mapping[str, formats.DiskState], *, may_spend: bool = True, **fields: Any) -> None:
        """Replace the disks in *changes* and the other *fields*, in one atomic and durable step.

        Whoever begins something says that it *may* not *spend* the reserve.
        """
        with self._saving:
            disks = tuple(changes.get(entry.name, entry) for entry in self.state.disks)
            state = dataclasses.replace(self.state, disks=disks, **fields)
            data = formats.encode_state(state)
            try:
                self._replace(data, may_spend=may_spend)
            except OSError as error:
                raise errors.from_os_error(error, f"writing {self._vm.state}") from error
            self.state = state

    def _replace(self, data: bytes, *, may_spend: bool) -> None:
        """Write the file; on a full file system by way of the reserve, if that is allowed."""
        reserve = self._vm.root / RESERVE
        try:
            durable.write_file(self._vm.state, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not may_spend or not reserve.exists():
                raise
            reserve.unlink()
            durable.write_file(self._vm.state, data)
            return
        _keep_reserve(reserve)

    def sync_layers(self) -> None:
        """Make the names of layer files durable, before a state names them."""
        durable.sync_directory(self._vm.layers)

    def sweep(self) -> None:
        """Remove layer files that no state names: neither the one saved last nor the one on disk.

        The two differ when saving failed after its rename.
        """
        with self._saving, contextlib.suppress(errors.BlkckptError, OSError):
            stack.sweep(self._vm, (*self.state.disks, *self._read().disks))

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def create(vm: paths.VmPaths, vm_id: str, disks: Sequence[api.DiskSpec]) -> None:
    """Write the first state file.  Bases are checked; those of disks with a source are created."""
    paths.private_directory(vm.root)
    paths.private_directory(vm.layers)
    if vm.state.exists():
        raise errors.StateError(f"VM {vm.name} has disks already ({vm.state})")
    states = tuple(_new_disk(vm, spec) for spec in disks)
    durable.sync_directory(vm.layers)
    try:
        durable.create_file(vm.state, formats.encode_state(formats.GroupState(vm_id, states)))
    except OSError as error:
        raise errors.from_os_error(error, f"writing {vm.state}") from error


def _new_disk(vm: paths.VmPaths, spec: api.DiskSpec) -> formats.DiskState:
    units.check_name(spec.name, "disk name")
    if spec.size <= 0:
        raise errors.InputError(f"disk {spec.name}: a size of {spec.size} bytes is not possible")
    changed = formats.ChangedState(stack.new_id())
    if spec.source is None:
        fileio.open_base(Path(spec.path), spec.size).close()
        return formats.DiskState(spec.name, spec.path, spec.size, changed)
    place, fill_id = stack.Place(vm, spec.name, spec.size, ""), stack.new_id()
    fileio.create_base(Path(spec.path), spec.size)
    stack.create_map(place.map(fill_id), fill_id, spec.size)
    stack.create_map(place.changed(changed.id), changed.id, spec.size)
    since = dataclasses.replace(changed, since=spec.source.image)
    return formats.DiskState(spec.name, spec.path, spec.size, since, source=spec.source, fill=fill_id)


def _keep_reserve(path: Path) -> None:
    """Make the reserve if it is not there; without the space for it things go on as well as they can."""
    if path.exists():
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        except OSError:
            path.unlink()
        finally:
            os.close(descriptor)


def _lock(vm: paths.VmPaths) -> int:
    try:
        descriptor = os.open(vm.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"locking VM {vm.name}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise errors.StateError(f"the disks of VM {vm.name} are being served already") from error
    return descriptor

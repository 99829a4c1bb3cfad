"""An image file becomes a VM's disk, or a checkpoint in the store.

A raw file is read as it is; every other format goes through qemu-img (:mod:`blkckpt.exchange.qemuimg` says why its
format is never guessed and backing files are refused).  For a checkpoint a converted image waits in a file without a
name, so that nothing is left of it whatever happens.

Write order of a checkpoint: the images (packs, tables), then the manifest, under the store's hold.  Of a VM: the
name is reserved, the disks are written and synced, ``vm.json``; see :mod:`blkckpt.restore.disks`.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blkckpt import durable, errors, paths, units
from blkckpt.disk import api, group
from blkckpt.exchange import qemuimg
from blkckpt.restore import disks as restored
from blkckpt.store import ingest, layout, manifest
from blkckpt.store import store as stores
from blkckpt.vm import definition, lineage

Progress = Callable[[str, int, int | None], None]
"""Called with (disk, bytes done, bytes in all)."""

_COPY = 64 << 20

_QEMU_WRITES = 101
"""The byte of an image that a QEMU which may write to it holds locked (block/file-posix.c: 100 for the permissions in
use, and 1 for ``BLK_PERM_WRITE``)."""


@dataclass(frozen=True, slots=True)
class Source:
    """An image file to be imported as disk *name*; *size* is that of the disk the guest will see."""

    name: str
    path: Path
    format: str
    size: int


def look(name: str, path: Path, kind: str | None) -> Source:
    """Find out what *path* is; *kind* None: by its first bytes, and then it may not name a backing file."""
    found = kind or qemuimg.sniff(path)
    if found == "raw":  # qemu-img looks itself, at the others
        _check_settled(path)
        return Source(name, path, found, _check_size(path, _raw_size(path)))
    told = qemuimg.info(path, found)
    if told.backing is not None and kind is None:
        raise errors.InputError(
            f"{path} reads from another file, {told.backing[:200]!r}: if you trust who made it, say --format {found}"
        )
    return Source(name, path, found, _check_size(path, told.size))


def to_checkpoint(
    home: paths.Home,
    place: stores.Store,
    vm: str,
    name: str,
    sources: Sequence[Source],
    progress: Progress,
    notes: Sequence[str] = (),
) -> manifest.Manifest:
    """Store *sources* as checkpoint *name* of *vm*, which need not be defined here."""
    if (vm, name) in place.names(vm):
        raise errors.StateError(f"{vm} has a checkpoint {name} already; choose another name")
    with place.hold():
        disks = tuple(_store(home, place, f"{vm}@{name}", source, progress) for source in sources)
        made = manifest.Manifest(
            vm=vm,
            name=name,
            id=uuid.uuid4().hex,
            created_ns=time.time_ns(),
            disks=disks,
            notes=(
                *notes,
                *(f"{source.name} imported from {source.path.name} ({source.format})" for source in sources),
            ),
        )
        _leave_the_line(home, place, made)
        place.put_manifest(made)
    return made


def _leave_the_line(home: paths.Home, place: stores.Store, made: manifest.Manifest) -> None:
    """What the VM's disks, if it is defined here, descend from stays what it is: not *made*."""
    vm = home.vm(made.vm)
    if vm.root.is_dir():
        others = [(one.created_ns, one.name) for one in place.manifests(made.vm)]
        before = lineage.parent(made.vm, lineage.read(vm), others, made.created_ns)
        lineage.write(vm, "" if before is None else before if "@" in before else f"{made.vm}@{before}")


def to_vm(
    home: paths.Home,
    place: stores.Store,
    name: str,
    sources: Sequence[Source],
    progress: Progress,
    *,
    directory: Path | None = None,
) -> definition.VmDefinition:
    """Define VM *name* over raw copies of *sources*, made in *directory*, else in the VM's own, with which they go."""
    vm = home.vm(name)
    with restored.reserved(vm, place, f"import of {sources[0].path.name}"):
        target = directory or paths.private_directory(vm.root / "disks")
        described = []
        for source in sources:
            path = target / f"{source.name}.raw"
            _copy(source, path, progress)
            described.append(definition.disk(source.name, path, source.size))
        made = definition.create(vm, described)
        _make_group(vm, made)
    return made


def in_place(home: paths.Home, name: str, sources: Sequence[Source]) -> definition.VmDefinition:
    """Define VM *name* over raw files as they are; nothing is written to them."""
    for source in sources:
        if source.format != "raw":
            raise errors.InputError(
                f"{source.path} is {source.format}: only a raw image can be used in place; leave --in-place out"
            )
    vm = home.vm(name)
    described = [definition.disk(source.name, source.path, source.size) for source in sources]
    made = definition.create(vm, described)
    try:
        _make_group(vm, made)
    except BaseException:
        shutil.rmtree(vm.root)
        raise
    return made


def _make_group(vm: paths.VmPaths, made: definition.VmDefinition) -> None:
    group.DiskGroup.create(vm, made.id, [api.DiskSpec(disk.name, disk.path, disk.size) for disk in made.disks])


def _check_settled(path: Path) -> None:
    """Refuse an image that a QEMU writes to: a copy of it would be of no one time."""
    descriptor = _open(path)
    try:
        written = definition.is_locked(descriptor, _QEMU_WRITES, 1)
    finally:
        os.close(descriptor)
    if written:
        raise errors.StateError(f"a running QEMU writes to {path}; stop it first, or import a copy made meanwhile")


def _raw_size(path: Path) -> int:
    descriptor = _open(path)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def _check_size(path: Path, size: int) -> int:
    if not 0 < size <= layout.MAX_IMAGE:
        raise errors.InputError(
            f"{path} holds a disk of {units.format_size(size)}; possible are up to "
            f"{units.format_size(layout.MAX_IMAGE)}, and more than nothing"
        )
    return size


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.from_os_error(error, f"opening {path}") from error


def _store(home: paths.Home, place: stores.Store, label: str, source: Source, progress: Progress) -> manifest.DiskImage:
    descriptor = _open(source.path) if source.format == "raw" else _converted(home, source, progress)
    try:
        job = ingest.Job(
            size=source.size,
            layers=(ingest.Layer("raw", fd=descriptor),),
            changed_fd=None,
            store=str(place.path),
            parent=None,
            rate=None,
            label=label,
        )
        image = ingest.run(job, lambda done, total: progress(source.name, done, total))["image"]
    finally:
        os.close(descriptor)
    return manifest.DiskImage(source.name, str(image), source.size)


def _converted(home: paths.Home, source: Source, progress: Progress) -> int:
    """The raw contents of *source* in a file without a name; its descriptor."""
    try:
        descriptor = os.open(paths.private_directory(home.root), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"making a temporary file in {home.root}") from error
    try:
        os.ftruncate(descriptor, source.size)
        _convert(source, f"/proc/{os.getpid()}/fd/{descriptor}", progress, ("-n", "--target-is-zero"))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _convert(source: Source, target: str, progress: Progress, options: Sequence[str] = ()) -> None:
    def advance(done: int, total: int) -> None:
        progress(f"convert {source.name}", done, total)

    qemuimg.convert(str(source.path.absolute()), source.format, target, "raw", source.size, advance, options)


def _copy(source: Source, path: Path, progress: Progress) -> None:
    """A raw, sparse copy of *source* at *path*, durable."""
    try:
        with durable.new_file(path) as (descriptor, temporary):
            if source.format == "raw":
                _copy_raw(source, descriptor, progress)
            else:
                _convert(source, str(temporary), progress)
            os.ftruncate(descriptor, source.size)
    except FileExistsError as error:
        raise errors.StateError(f"{path} exists already; choose another --directory") from error
    except OSError as error:
        raise errors.from_os_error(error, f"copying {source.path} to {path}") from error


def _copy_raw(source: Source, target: int, progress: Progress) -> None:
    origin = _open(source.path)
    try:
        position = 0
        while position < source.size:
            start, end = _next_data(origin, position, source.size)
            while start < end:
                start += _copy_some(origin, target, start, min(end - start, _COPY), source)
                progress(source.name, start, source.size)
            position = end
    finally:
        os.close(origin)


def _next_data(descriptor: int, position: int, size: int) -> tuple[int, int]:
    """The next run of data at or after *position*; everything, where holes cannot be asked for."""
    try:
        start = os.lseek(descriptor, position, os.SEEK_DATA)
        return start, min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
    except OSError as error:
        return (size, size) if error.errno == errno.ENXIO else (position, size)


def _copy_some(origin: int, target: int, offset: int, length: int, source: Source) -> int:
    """Copy at most *length* bytes, by the file system itself where it can."""
    try:
        done = os.copy_file_range(origin, target, length, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        done = os.pwrite(target, os.pread(origin, min(length, 1 << 20), offset), offset)
    if not done:
        raise errors.CorruptError(f"{source.path} has become shorter while it was being copied")
    return done

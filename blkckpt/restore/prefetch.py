"""A machine's memory becomes its own: the end of its dependence on a mount (:mod:`blkckpt.restore.fused`).

Reading the file brings all of it into the page cache, without a pause; but a page there may be dropped again.
Therefore QEMU is then told to make every page its own (property ``prealloc`` of the memory back-end:
MADV_POPULATE_WRITE, which breaks the sharing without changing a byte).  That takes as much memory as the guest has, and
QEMU's main loop waits for it: processors go on, devices wait.  A page that the guest gives back later (balloon) and
takes again would be read from the file again.

Source: QEMU 7.2 ``backends/hostmem.c`` ``host_memory_backend_set_prealloc``, ``util/oslib-posix.c``; madvise(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blkckpt import durable, errors, paths
from blkckpt.view import records
from blkckpt.vm import qmp

Progress = Callable[[str, int, int | None], None]

_PIECE = 4 << 20
POPULATE_SECONDS = 600.0
"""For QEMU to copy all pages: 1 TiB."""


def prefetch(home: paths.Home, vm: paths.VmPaths, progress: Progress) -> records.Record:
    """Make the memory of the running VM *vm* its own; StateError if it is not read from a mount, or is already."""
    record = records.memory_of(home, vm.name)
    if record is None:
        raise errors.StateError(f"the memory of VM {vm.name} is not read from a mount; there is nothing to fetch")
    if not record.alive:
        raise errors.StateError(f"the mount that VM {vm.name} has its memory from was killed; restore it again")
    if record.prefetched:
        return record
    with qmp.QmpSession(vm.qmp_socket) as session:
        backends = [one for one in _backends(session) if str(one[1]).startswith(record.directory + "/")]
        if not backends:
            raise errors.HypervisorError(f"QEMU of VM {vm.name} has no memory from {record.directory}")
        total = sum(path.stat().st_blocks * 512 for _, path in backends)
        done = 0
        for _, path in backends:
            done = _read(path, done, total, progress)
        for name, _ in backends:
            arguments = {"path": f"/objects/{name}", "property": "prealloc", "value": True}
            session.execute("qom-set", arguments, timeout=POPULATE_SECONDS)
    records.note_prefetched(home, record)
    return record


def _backends(session: qmp.QmpSession) -> list[tuple[str, Path]]:
    """``(object, file)`` of QEMU's memory back-ends that are files."""
    found = []
    for one in session.execute("qom-list", {"path": "/objects"}):
        if one["type"] == "child<memory-backend-file>":
            path = session.execute("qom-get", {"path": f"/objects/{one['name']}", "property": "mem-path"})
            found.append((str(one["name"]), Path(path)))
    return found


def _read(path: Path, done: int, total: int, progress: Progress) -> int:
    """Bring what is not a hole of *path* into the page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, length in durable.extents(descriptor):
            for start in range(offset, offset + length, _PIECE):
                got = len(os.pread(descriptor, min(_PIECE, offset + length - start), start))
                done += got
                progress("memory", min(done, total), total)
    except OSError as error:
        raise errors.from_os_error(error, f"reading {path}") from error
    finally:
        os.close(descriptor)
    return done

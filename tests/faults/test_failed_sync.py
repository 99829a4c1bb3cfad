"""Rule D9 on a real file system that loses writes: a failed fsync is final, and is not forgotten by the next one.

The file system promises more than there is behind it (as a thin volume over a full pool does).  Writes go to the page
cache and succeed; writeback fails; the kernel tells one fsync, drops the pages, and lets the next fsync succeed.  A
server that believed that second fsync would have acknowledged data that is nowhere.
"""

from __future__ import annotations

import errno
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.disk import api, disk, group, layer
from tests.faults import disk_workload
from tests.support import mounts

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def thin(shm: Path) -> Iterator[Path]:
    with mounts.thin_ext4(shm, 6 * MIB, 64 * MIB) as mounted:
        yield mounted


def machine(home: Path, base: Path, live: Path) -> tuple[paths.VmPaths, group.DiskGroup]:
    base.touch()
    os.truncate(base, SIZE)
    vm = paths.VmPaths("vm", home / "vm", home / "run", live)
    paths.private_directory(vm.root)
    group.DiskGroup.create(vm, uuid.uuid4().hex, [api.DiskSpec("vda", str(base), SIZE)])
    opened = group.DiskGroup.open(vm, open_image=disk_workload.no_image)
    opened.start()
    return vm, opened


def write_more_than_there_is(target: disk.Disk) -> None:
    rng = random.Random(9)
    for offset in range(0, SIZE // 2, MIB):
        target.pwrite(rng.randbytes(MIB), offset, False)


def refuses(action: object, *arguments: object) -> None:
    """EIO, to the guest."""
    assert callable(action)
    with pytest.raises((OSError, errors.BlkckptError)) as caught:
        action(*arguments)
    assert getattr(caught.value, "errno", None) == errno.EIO, caught.value


def test_this_kernel_forgets_a_failed_fsync(thin: Path) -> None:
    """The ground of D9: one fsync fails, a later one succeeds, and the data is not there."""
    descriptor = os.open(thin / "file", os.O_RDWR | os.O_CREAT, 0o600)
    data = random.Random(1).randbytes(MIB)
    try:
        for _ in range(16):
            os.write(descriptor, data)
        with pytest.raises(OSError) as caught:
            os.fsync(descriptor)
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)  # loop devices tell the latter
        assert any(syncs(descriptor) for _ in range(5)), "this kernel does not forget"
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, 16 * MIB, 0) != data * 16
    finally:
        os.close(descriptor)


def syncs(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("where", ["base", "overlay"])
def test_d9_a_failed_fsync_is_final(thin: Path, tmp_path: Path, shm: Path, where: str) -> None:
    """D9: the flush fails; then reads go on, writes and flushes get EIO, no checkpoint is acknowledged."""
    home, base = (tmp_path, thin / "vda.raw") if where == "base" else (thin, tmp_path / "vda.raw")
    _, opened = machine(home, base, shm / "live")
    target = opened.disks["vda"]
    try:
        if where == "overlay":
            opened.prepare("c")
            opened.switch()
        write_more_than_there_is(target)
        refuses(target.flush)
        refuses(target.flush)
        refuses(target.pwrite, bytes(4096), 0, False)
        refuses(target.pwrite, bytes(4096), SIZE - 4096, True)
        refuses(target.trim, 4096, 0, False)
        target.pread(bytearray(4096), SIZE - 4096)
        assert opened.status().disks[0].error is not None
        if where == "base":
            with pytest.raises(errors.BlkckptError):
                opened.prepare("c")
        else:
            with pytest.raises(errors.BlkckptError):
                copying = opened.start_copy("/nonexistent", {"vda": None}, command=disk_workload.STAND_IN)
                copying.wait(30)
                copying.outcome()
                opened.commit()
    finally:
        refuses(opened.close)  # a clean stop would be a lie


def test_d9_a_commit_over_a_failed_fsync_clears_nothing(thin: Path, tmp_path: Path, shm: Path) -> None:
    """D8, D9: the base's fsync fails in the commit: every flushed block is still in the overlay after a restart."""
    vm, opened = machine(tmp_path, thin / "vda.raw", shm / "live")
    target = opened.disks["vda"]
    opened.prepare("c")
    opened.switch()
    write_more_than_there_is(target)
    target.flush()
    before = bytearray(SIZE)
    target.pread(before, 0)
    ending = opened.abort()
    ending.wait(5)
    assert not (not ending.running and ending.status().error is None), "the commit claims to have succeeded"
    refuses(opened.close)
    again = group.DiskGroup.open(vm, open_image=disk_workload.no_image)
    try:
        after = bytearray(SIZE)
        again.disks["vda"].pread(after, 0)
        assert after == before
    finally:
        again.close()


def test_d9_a_server_killed_before_it_takes_back_loses_nothing(
    thin: Path, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D8, D9: the base's fsync fails, and kill -9 comes before the bits are taken back: the next server does it."""
    base, data = thin / "vda.raw", random.Random(5).randbytes(MIB)
    vm, opened = machine(tmp_path, base, shm / "live")
    opened.close()
    child = os.fork()
    if not child:
        monkeypatch.setattr(layer.Overlay, "take_back", lambda overlay: os._exit(9 if overlay.empty else 8))
        try:
            _commit_more_than_there_is(vm, data)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "killed when every bit was clear"
    with base.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    again = group.DiskGroup.open(vm, open_image=disk_workload.no_image)
    try:
        for offset in range(0, SIZE // 2, MIB):
            found = bytearray(MIB)
            again.disks["vda"].pread(found, offset)
            assert found == data, f"D9: flushed data at {offset} is lost"
    finally:
        again.close()


def _commit_more_than_there_is(vm: paths.VmPaths, data: bytes) -> None:
    opened = group.DiskGroup.open(vm, open_image=disk_workload.no_image)
    opened.start()
    opened.prepare("c")
    opened.switch()
    for offset in range(0, SIZE // 2, MIB):
        opened.disks["vda"].pwrite(data, offset, False)
    opened.disks["vda"].flush()
    opened.abort().wait(30)

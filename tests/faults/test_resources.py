"""What a server that runs for months must not gather: mappings, descriptors, threads."""

from __future__ import annotations

import gc
import threading
import time
import uuid
from pathlib import Path

import pytest

from blkckpt import paths
from blkckpt.disk import api, group
from tests.faults import disk_workload

CYCLES = 6


def held(vm: paths.VmPaths) -> tuple[int, int, int]:
    """Mappings of live maps, open descriptors, threads."""
    mapped = sum(str(vm.live) in line for line in Path("/proc/self/maps").read_text().splitlines())
    return mapped, sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count()


def settled(vm: paths.VmPaths, before: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is held when threads that are just ending have ended."""
    limit = time.monotonic() + 5
    while (found := held(vm))[2] > before[2] and time.monotonic() < limit:
        time.sleep(0.05)
    return found


def cycle(opened: group.DiskGroup, number: int, *, commit: bool) -> None:
    """A checkpoint from rest to rest."""
    opened.prepare(f"c{number}")
    opened.switch()
    opened.disks["vda"].pwrite(bytes(4096), 4096 * number, False)
    if commit:
        copying = opened.start_copy("/nonexistent", {"vda": None}, command=disk_workload.STAND_IN)
        assert copying.wait(30)
    ending = opened.commit() if commit else opened.abort()
    assert ending.wait(30)
    ending.outcome()


@pytest.mark.parametrize("commit", [False, True], ids=["abort", "commit"])
def test_checkpoints_leave_nothing_behind_in_the_server(tmp_path: Path, home: paths.Home, commit: bool) -> None:
    """Resources go when a checkpoint ends, not when the garbage collector happens to run."""
    base = tmp_path / "vda.raw"
    base.write_bytes(bytes(1 << 20))
    vm = home.vm("vm")
    paths.private_directory(vm.root)
    group.DiskGroup.create(vm, uuid.uuid4().hex, [api.DiskSpec("vda", str(base), 1 << 20)])
    opened = group.DiskGroup.open(vm, open_image=disk_workload.no_image)
    gc.disable()
    try:
        opened.start()
        cycle(opened, 0, commit=commit)
        before = held(vm)
        for number in range(1, CYCLES):
            cycle(opened, number, commit=commit)
        after = settled(vm, before)
        assert after[0] <= before[0], "mappings of live maps were gathered"
        assert after[1] <= before[1], "descriptors were gathered"
        assert after[2] <= before[2], "threads were gathered"
    finally:
        gc.enable()
        opened.close()

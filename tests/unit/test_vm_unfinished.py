"""The mark that keeps half-made and half-reverted VMs from being served (rule R1)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.vm import unfinished


@pytest.fixture
def vm(tmp_path: Path) -> paths.VmPaths:
    vm = paths.home(tmp_path).vm("web")
    paths.private_directory(vm.root)
    return vm


def write_from_another_process(vm: paths.VmPaths, what: str) -> None:
    """A mark of a process that has ended."""
    code = (
        "import sys; from blkckpt import paths; from blkckpt.vm import unfinished;"
        "unfinished.write(paths.home(sys.argv[1]).vm('web'), sys.argv[2], 'web@c')"
    )
    subprocess.run([sys.executable, "-c", code, str(vm.root.parent.parent), what], check=True, timeout=30)


def test_no_mark_is_no_objection(vm: paths.VmPaths) -> None:
    assert unfinished.read(vm) is None
    unfinished.check(vm)


def test_work_under_way_is_told_from_work_interrupted(vm: paths.VmPaths) -> None:
    unfinished.write(vm, unfinished.REVERT, "web@c")
    with pytest.raises(errors.StateError, match=f"under way .process {os.getpid()}"):
        unfinished.check(vm)
    write_from_another_process(vm, unfinished.REVERT)
    with pytest.raises(errors.StateError, match="blkckpt revert web@c"):
        unfinished.check(vm)
    write_from_another_process(vm, unfinished.RESTORE)
    with pytest.raises(errors.StateError, match="blkckpt vm rm web"):
        unfinished.check(vm)
    unfinished.clear(vm)
    unfinished.check(vm)
    unfinished.clear(vm)


@pytest.mark.parametrize("field", ["start", "boot"])
def test_a_pid_used_again_is_not_the_old_process(vm: paths.VmPaths, field: str) -> None:
    unfinished.write(vm, unfinished.REVERT, "web@c")
    body = json.loads(unfinished.path(vm).read_bytes())
    body[field] = "another boot" if field == "boot" else body[field] + 1
    unfinished.path(vm).write_text(json.dumps(body))
    mark = unfinished.read(vm)
    assert mark is not None
    assert not mark.alive


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b"{}", b'{"magic": "blkckpt-unfinished", "version": 2}', b"\xff" * 100],
)
def test_a_damaged_mark_still_says_do_not_serve(vm: paths.VmPaths, damage: bytes) -> None:
    unfinished.write(vm, unfinished.REVERT, "web@c")
    unfinished.path(vm).write_bytes(damage)
    with pytest.raises(errors.CorruptError, match="half-way"):
        unfinished.check(vm)

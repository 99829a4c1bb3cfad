"""A VM goes back to one of its own checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.restore import revert
from blkckpt.store import store as stores
from blkckpt.vm import definition, unfinished
from tests.support import guest

INTERRUPTED = """
import os, sys
from blkckpt import paths
from blkckpt.restore import revert
from blkckpt.store import store
from blkckpt.vm import definition

def write_half(target, reader, plan, progress):
    write(target, reader, plan[: len(plan) // 2], progress)
    os._exit(77)

write, revert._write = revert._write, write_half
vm = paths.home(sys.argv[1]).vm("v")
place = store.Store.open(sys.argv[2])
revert.disks(vm, definition.load(vm), place, place.manifest("v", sys.argv[3]), lambda *_: None)
"""
"""A revert that dies, as by power cut of the machine, when half of the disk has been written."""


@pytest.fixture(scope="module")
def token(box: guest.Sandbox, writer: guest.Console) -> str:
    """Two checkpoints, ``v@c1`` and ``v@c2``, of the writing guest; its boot token."""
    for name in ("c1", "c2"):
        writer.beat()
        box.run("checkpoint", "v", "--name", name)
    return writer.beat().token


def running(box: guest.Sandbox) -> guest.Console:
    """The console of the "v" that runs now."""
    return next(console for console in reversed(box.serial.consoles) if not console.closed)


def check_is_back(console: guest.Console, token: str, newer: guest.Beat) -> None:
    beat = console.beat()
    assert beat.token == token
    assert beat.seq < newer.seq, "it went on from where it was, not from the checkpoint"
    assert console.sweep() == 0, console.complaints()
    console.check()


def test_a_running_vm_is_not_reverted_unasked(box: guest.Sandbox, writer: guest.Console, token: str) -> None:
    assert "--yes" in box.run("revert", "v@c1", code=3)
    vm = paths.home(box.home).vm("v")
    with stores.Store.open(box.home / "store") as store, pytest.raises(errors.StateError, match="stop"):
        revert.disks(vm, definition.load(vm), store, store.manifest("v", "c1"), lambda *_: None)
    assert unfinished.read(vm) is None
    writer.beat()


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_back_to_an_older_checkpoint(box: guest.Sandbox, token: str, mode: str) -> None:
    newer = running(box).beat()
    box.run("revert", "v@c1", "--yes", "--detach", "--mode", mode)
    console = box.serial.accept()
    check_is_back(console, token, newer)
    # The changed-block tracking followed: the next checkpoint is whole too.
    box.run("checkpoint", "v", "--name", f"after-{mode}")
    copy = box.restore(f"v@after-{mode}", f"copy-{mode}")
    assert copy.beat().token == token
    assert copy.sweep() == 0, copy.complaints()
    box.stop(f"copy-{mode}")
    box.remove(f"copy-{mode}")


def test_an_interrupted_revert_is_refused_then_redone(box: guest.Sandbox, token: str) -> None:
    """R1: disks half-way are never served."""
    newer = running(box).beat()
    box.stop("v")
    store = box.home / "store"
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, str(box.home), str(store), "c2"], timeout=60)
    assert result.returncode == 77
    vm = paths.home(box.home).vm("v")
    assert unfinished.read(vm) is not None
    assert "revert v@c2" in box.run("serve", "v", "--detach", code=5)
    box.run("revert", "v@c2", "--yes", "--detach")
    check_is_back(box.serial.accept(), token, newer)
    assert unfinished.read(vm) is None


def test_only_what_differs_is_written(box: guest.Sandbox, token: str, tmp_path: Path) -> None:
    box.stop("v")
    first = box.json("revert", "v@c1", "--disks-only", "--yes")
    again = box.json("revert", "v@c1", "--disks-only", "--yes")
    assert first["disks"][0]["written"] > 0
    assert again["disks"][0]["written"] == 0
    with stores.Store.open(box.home / "store") as store:
        (disk,) = store.manifest("v", "c1").disks
        wanted = store.image(disk.image)
        with (box.root / "v-vda.raw").open("rb") as file:
            for offset in range(0, disk.size, 1 << 20):
                length = min(1 << 20, disk.size - offset)
                assert file.read(length) == wanted.read(offset, length), f"at {offset}"

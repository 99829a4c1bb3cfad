"""Full file systems, each a real one: the overlay's, the base's, the live map's, the store's, home and run directory.

Rule D10: the guest gets ENOSPC, and nothing that was acknowledged is damaged.  Rule A3: a checkpoint that failed
leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.disk import api, group, statefile
from blkckpt.store import store
from tests.faults import disk_workload, store_workload
from tests.support import mounts

MIB = 1 << 20
SIZE = 8 * MIB


class Machine:
    """One disk whose home, base and live maps are where a test puts them; knows what it must read."""

    def __init__(self, home: Path, base: Path, live: Path) -> None:
        self.vm = paths.VmPaths("vm", home / "vms" / "vm", home / "run", live)
        self.spare = home / "spare"
        base.touch()
        os.truncate(base, SIZE)
        paths.private_directory(self.vm.root)
        group.DiskGroup.create(self.vm, uuid.uuid4().hex, [api.DiskSpec("vda", str(base), SIZE)])
        self.model = bytearray(SIZE)
        self.rng = random.Random(str(home))
        self.group = self.open()

    def open(self) -> group.DiskGroup:
        self.group = group.DiskGroup.open(self.vm, open_image=disk_workload.no_image)
        self.group.start()
        return self.group

    def write(self, offset: int, length: int = 65536) -> None:
        """A write; the model takes it only if it was acknowledged."""
        data = self.rng.randbytes(length)
        self.group.disks["vda"].pwrite(data, offset, False)
        self.model[offset : offset + length] = data

    def write_until_full(self) -> int:
        """64 KiB after 64 KiB until ENOSPC; the offset of the write that failed."""
        for offset in range(0, SIZE, 65536):
            try:
                self.write(offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return offset
        raise AssertionError("the disk did not fill up")

    def check(self, doubtful: int | None = None) -> None:
        """Every acknowledged byte reads back; of the write at *doubtful*, any part may have happened."""
        found = bytearray(SIZE)
        self.group.disks["vda"].pread(found, 0)
        if doubtful is not None:
            self.model[doubtful : doubtful + 65536] = found[doubtful : doubtful + 65536]
        assert found == self.model

    def wait_for_warning(self) -> None:
        limit = time.monotonic() + 20
        while self.group.status().warning is None:
            assert time.monotonic() < limit, f"no warning: {self.group.status()}"
            time.sleep(0.01)

    def wait_for_rest(self) -> None:
        limit = time.monotonic() + 30
        while self.group.status().state is not api.State.REST:
            assert time.monotonic() < limit, f"not at rest: {self.group.status()}"
            time.sleep(0.01)


@pytest.fixture
def live(shm: Path) -> Path:
    return shm / "live"


@pytest.fixture
def full_overlay(tmp_path: Path, live: Path) -> Iterator[Machine]:
    """The home has room for half of the disk."""
    with mounts.tmpfs(tmp_path / "home", SIZE // 2) as home:
        (home / "spare").write_bytes(bytes(256 << 10))
        machine = Machine(home, tmp_path / "vda.raw", live)
        yield machine
        machine.spare.unlink(missing_ok=True)
        machine.group.close()


def test_d10_disk_full_in_the_overlay(full_overlay: Machine) -> None:
    """D10: ENOSPC, nothing acknowledged is lost, and the disks go back to rest, which empties the overlay."""
    machine = full_overlay
    machine.write(SIZE - 65536)
    machine.group.prepare("c")
    machine.group.switch()
    failed = machine.write_until_full()
    machine.check(failed)
    machine.group.disks["vda"].flush()
    machine.group.abort()
    machine.wait_for_rest()
    machine.check()
    assert (machine.vm.root / statefile.RESERVE).stat().st_size == statefile.RESERVE_BYTES


def test_d10_no_reserve_left(full_overlay: Machine) -> None:
    """D10: what waits for space says so, and space ends the wait."""
    machine = full_overlay
    machine.group.prepare("c")
    machine.group.switch()
    (machine.vm.root / statefile.RESERVE).unlink()
    failed = machine.write_until_full()
    machine.check(failed)
    machine.group.abort()
    machine.wait_for_warning()  # the state file cannot be written
    machine.check()
    machine.spare.unlink()
    machine.wait_for_rest()
    machine.check()
    machine.group.close()
    machine.open()
    machine.check()
    assert not list(machine.vm.layers.glob("*.data"))


def test_d10_disk_full_in_the_overlay_survives_a_kill_and_power_loss(full_overlay: Machine) -> None:
    """D2, D10: what was flushed before the disk was full is there after the live maps are gone."""
    machine = full_overlay
    machine.group.prepare("c")
    machine.group.switch()
    failed = machine.write_until_full()
    machine.group.disks["vda"].flush()
    machine.check(failed)
    machine.group.abandon()
    for path in machine.vm.live.iterdir():
        path.unlink()
    machine.open()
    machine.check()
    machine.wait_for_rest()
    machine.check()


def test_a3_no_space_to_prepare(full_overlay: Machine) -> None:
    """A3: prepare fails by name, the disks stay at rest and serve."""
    machine = full_overlay
    filler = mounts.fill(machine.vm.root)
    with pytest.raises(errors.NoSpaceError):
        machine.group.prepare("c")
    assert machine.group.status().state is api.State.REST
    machine.write(0)
    machine.check()
    filler.unlink()
    assert not list(machine.vm.layers.glob("*.data"))
    machine.group.prepare("c")
    machine.group.abort()
    machine.wait_for_rest()


def test_d10_disk_full_in_the_base(tmp_path: Path, live: Path) -> None:
    """D10 at rest: the guest's ENOSPC; what was acknowledged stays."""
    with mounts.tmpfs(tmp_path / "bases", SIZE // 2) as bases:
        machine = Machine(tmp_path / "home", bases / "vda.raw", live)
        failed = machine.write_until_full()
        machine.check(failed)
        machine.group.disks["vda"].flush()
        machine.group.close()


def test_d8_a_commit_into_a_full_base_waits_and_says_so(tmp_path: Path, live: Path) -> None:
    """D8, D10: no space to commit: the overlay keeps serving, a warning is shown, and space ends the wait."""
    with mounts.tmpfs(tmp_path / "bases", SIZE // 4) as bases:
        machine = Machine(tmp_path / "home", bases / "vda.raw", live)
        machine.group.prepare("c")
        machine.group.switch()
        for offset in range(0, SIZE // 2, 65536):
            machine.write(offset)
        ending = machine.group.abort()
        machine.wait_for_warning()
        machine.check()
        assert ending.running
        mounts.grow(bases, 2 * SIZE)
        machine.wait_for_rest()
        machine.check()
        machine.group.close()


def test_d10_live_directory_full(tmp_path: Path) -> None:
    """D10: no room for a page of the live map is the guest's ENOSPC, not the server's death by SIGBUS."""
    with mounts.tmpfs(tmp_path / "live", 64 << 10) as live:
        machine = Machine(tmp_path / "home", tmp_path / "vda.raw", live)
        machine.group.prepare("c")
        machine.group.switch()
        filler = mounts.fill(live)
        with pytest.raises(OSError) as caught:
            machine.write(0)
        assert caught.value.errno == errno.ENOSPC
        machine.check()
        filler.unlink()
        machine.write(0)
        machine.check()
        machine.group.abort()
        machine.wait_for_rest()
        machine.group.close()


# ---- the store ----


def test_a3_disk_full_in_the_store(tmp_path: Path) -> None:
    """A3, S1: an image that does not fit is an error by name; no manifest, no residue, older checkpoints whole."""
    rng = random.Random(1)
    with mounts.tmpfs(tmp_path / "store", 6 * MIB) as directory, store.Store.init(directory / "s") as where:
        store_workload.take(where, "vm", 1, rng, {})
        with pytest.raises(errors.NoSpaceError), where.image_writer(16 * MIB) as writer:
            for offset in range(0, 16 * MIB, MIB):
                writer.write(offset, rng.randbytes(MIB))
            writer.finish()
        assert where.names() == [("vm", "c1")]
        where.collect()
        assert not list((directory / "s").rglob("*.part")) + list((directory / "s").rglob(".tmp-*"))
        assert read_back(where, 1)
        store_workload.take(where, "vm", 2, rng, {})
        assert read_back(where, 2)


def test_s1_no_space_for_the_manifest(tmp_path: Path) -> None:
    """S1, A3: the images fit, the manifest does not: there is no checkpoint."""
    rng = random.Random(2)
    with mounts.tmpfs(tmp_path / "store", 12 * MIB) as directory, store.Store.init(directory / "s") as where:
        store_workload.take(where, "vm", 1, rng, {})
        original = where.put_manifest

        def put(manifest: object) -> None:
            mounts.fill(directory)
            original(manifest)  # type: ignore[arg-type]

        where.put_manifest = put  # type: ignore[method-assign, assignment]
        with pytest.raises(errors.NoSpaceError):
            store_workload.take(where, "other", 2, rng, {})
        assert where.names() == [("vm", "c1")]
        assert read_back(where, 1)


def read_back(where: store.Store, number: int) -> bool:
    """Does checkpoint *number* of the VM hold what it must?"""
    found = where.manifest("vm", f"c{number}")
    assert found.memory is not None
    ids = (found.disks[0].image, found.memory.blocks[0].image, found.memory.skeleton)
    contents = store_workload.images_of(number)
    return all(where.image(i).read(0, len(c)) == c for i, c in zip(ids, contents, strict=True))


# ---- the command line ----


def blkckpt(home: paths.Home, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blkckpt.cli.main", *words],
        env={**os.environ, "BLKCKPT_HOME": str(home.root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_no_space(result: subprocess.CompletedProcess[str]) -> None:
    """One line, and the exit code for "no space"."""
    assert result.returncode == errors.NoSpaceError.exit_code, result.stderr
    assert result.stderr.startswith("blkckpt: "), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    base = tmp_path / "vda.raw"
    base.touch(0o600)
    os.truncate(base, SIZE)
    return base


def test_home_directory_full(home: paths.Home, raw: Path) -> None:
    """A VM that cannot be defined for want of space is not defined half."""
    with mounts.tmpfs(home.root, MIB):
        filler = mounts.fill(home.root)
        assert_no_space(blkckpt(home, "vm", "create", "v", "--disk", str(raw)))
        filler.unlink()
        assert blkckpt(home, "vm", "list", "--json").returncode == 0
        result = blkckpt(home, "vm", "create", "v", "--disk", str(raw))
        assert result.returncode == 0, result.stderr


def test_run_directory_full(home: paths.Home, raw: Path) -> None:
    """No room for sockets: said so, nothing started; with room it works."""
    result = blkckpt(home, "vm", "create", "v", "--disk", str(raw))
    assert result.returncode == 0, result.stderr
    with mounts.tmpfs(home.run, MIB, inodes=2):
        mounts.fill(home.run)
        assert_no_space(blkckpt(home, "serve", "v", "--detach"))
    try:
        result = blkckpt(home, "serve", "v", "--detach")
        assert result.returncode == 0, result.stderr
    finally:
        blkckpt(home, "stop", "v")

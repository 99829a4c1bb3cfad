"""The run directory: one holder, sockets of ours, a record that is believed only while it is true."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.agent import rundir


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[paths.VmPaths]:
    home = paths.home(tmp_path / "home")
    yield home.vm("test")
    shutil.rmtree(home.run, ignore_errors=True)


def ourselves() -> rundir.Running:
    return rundir.Running(rundir.Process.of(os.getpid()))


def test_one_holder(vm: paths.VmPaths) -> None:
    assert rundir.find(vm) is None
    held = rundir.RunDirectory(vm)
    held.record(ourselves())
    assert rundir.find(vm) == ourselves()
    with pytest.raises(errors.StateError, match="running already"):
        rundir.RunDirectory(vm)
    held.close()
    assert rundir.find(vm) is None
    rundir.RunDirectory(vm).close()


def test_asking_takes_no_lock(vm: paths.VmPaths) -> None:
    rundir.RunDirectory(vm).close()
    for _ in range(3):
        assert rundir.find(vm) is None
        rundir.RunDirectory(vm).close()


def test_a_killed_holder_is_no_holder(vm: paths.VmPaths) -> None:
    program = (
        "import os, signal, sys\n"
        "from blkckpt import paths\n"
        "from blkckpt.agent import rundir\n"
        f"vm = paths.home({str(vm.root.parent.parent)!r}).vm('test')\n"
        "held = rundir.RunDirectory(vm)\n"
        "held.listen(vm.nbd_socket)\n"
        "held.record(rundir.Running(rundir.Process.of(os.getpid())))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    left = rundir.read(vm)
    assert left is not None
    assert not left.supervisor.alive
    assert vm.nbd_socket.exists()
    assert rundir.find(vm) is None
    held = rundir.RunDirectory(vm)
    with held.listen(vm.nbd_socket), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(vm.nbd_socket))  # in place of the stale one
    held.close()


def test_sockets_are_private_and_go_with_the_holder(vm: paths.VmPaths) -> None:
    held = rundir.RunDirectory(vm)
    with held.listen(vm.nbd_socket), held.listen(vm.control_socket):
        for path in (vm.nbd_socket, vm.control_socket):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(vm.run.stat().st_mode) == 0o700
        held.close()
        assert sorted(path.name for path in vm.run.iterdir()) == ["supervisor.lock"]


def test_a_directory_that_others_may_write_is_refused(vm: paths.VmPaths) -> None:
    vm.run.mkdir(parents=True)
    vm.run.chmod(0o777)
    with pytest.raises(errors.AccessError, match="not yours alone"):
        rundir.RunDirectory(vm)


def test_a_path_too_long_for_a_socket(vm: paths.VmPaths) -> None:
    long = paths.VmPaths("test", vm.root, vm.run / ("x" * 100), vm.live)
    with pytest.raises(errors.InputError, match="107"):
        rundir.RunDirectory(long)
    assert not vm.run.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "boot": "x", "supervisor": 5}'])
def test_a_record_that_is_none(vm: paths.VmPaths, text: str) -> None:
    paths.private_directory(vm.run)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    rundir.record_path(vm).write_text(text.replace('"x"', json.dumps(boot)))
    rundir.record_path(vm).chmod(0o600)
    with pytest.raises(errors.CorruptError, match="not a run record"):
        rundir.read(vm)


def test_a_record_of_another_boot_says_nothing(vm: paths.VmPaths) -> None:
    held = rundir.RunDirectory(vm)
    held.record(ourselves())
    path = rundir.record_path(vm)
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))
    assert rundir.read(vm) is None
    held.close()


def test_a_pid_used_again_is_not_the_process() -> None:
    own = rundir.Process.of(os.getpid())
    assert own.alive
    assert not rundir.Process(own.pid, own.start - 1).alive
    assert rundir.start_time(1 << 22) is None


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = rundir.Process.of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.alive
    child.wait()

"""The checks of a machine: a machine that lacks something is made from fake programs and directories."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click import testing

from blkckpt import doctor, paths
from blkckpt.agent import nbdserver, rundir
from blkckpt.cli import main


@pytest.fixture
def home(tmp_path: Path) -> paths.Home:
    return paths.Home(tmp_path / "home", tmp_path / "run", Path("/dev/shm/blkckpt-test"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr(nbdserver, "CLEAN_PATH", str(directory))
    monkeypatch.setenv("PATH", str(directory))
    return directory


def fake(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_every_check_gives_a_finding(home: paths.Home) -> None:
    findings = list(doctor.examine(home))
    assert len({finding.name for finding in findings}) == len(findings) == 17
    for finding in findings:
        assert finding.found
        assert finding.advice or finding.status is doctor.Status.OK, "what is not well says what to do"
        assert "\n" not in finding.found + finding.advice


def test_empty_machine(home: paths.Home, programs: Path) -> None:
    status = {finding.name: finding for finding in doctor.examine(home)}
    for name in ("nbdkit", "nbdkit python plugin", "qemu"):
        assert status[name].status is doctor.Status.FAIL
        assert "apt install" in status[name].advice
    assert status["fuse"].status is doctor.Status.WARN


def test_another_interpreter_is_told_apart(programs: Path) -> None:
    fake(programs, "nbdkit", """echo '{"version": [3, 9], "missing": []}'""")
    finding = doctor.nbdkit_interpreter()
    assert finding.status is doctor.Status.FAIL
    assert "3.9" in finding.found and "/usr/bin/python3" in finding.advice


def test_a_module_that_cannot_be_imported_is_named(programs: Path) -> None:
    answer = json.dumps({"version": sys.version_info[:2], "missing": ["numpy (ImportError)"]})
    fake(programs, "nbdkit", f"echo '{answer}'")
    finding = doctor.nbdkit_interpreter()
    assert finding.status is doctor.Status.FAIL
    assert "numpy" in finding.found and "pipx" in finding.advice


@pytest.mark.parametrize("answer", ["exit 1", "echo nonsense", "echo '{}'", "echo '[1]'", """echo '{"version": 3}'"""])
def test_a_plugin_that_does_not_load(programs: Path, answer: str) -> None:
    fake(programs, "nbdkit", answer)
    assert "nbdkit-plugin-python" in doctor.nbdkit_interpreter().advice


def test_the_real_plugin_reports_what_is_missing() -> None:
    """Through the real nbdkit: an honest list, not the wish."""
    probe = doctor.probe_plugin("/nonexistent", ("json", "no_such_module"))
    assert probe is not None
    assert probe.missing == ("no_such_module (ModuleNotFoundError)",)


def test_old_qemu(programs: Path) -> None:
    fake(programs, "qemu-system-x86_64", "echo 'QEMU emulator version 5.2.0'")
    assert doctor.qemu().status is doctor.Status.FAIL


def test_kvm(tmp_path: Path) -> None:
    assert doctor.kvm(tmp_path / "none").status is doctor.Status.WARN
    (tmp_path / "file").touch()
    assert "tcg" in doctor.kvm(tmp_path / "file").advice


def test_home_writable_by_others(home: paths.Home) -> None:
    assert "will be made" in doctor.home_directory(home).found
    home.root.mkdir()
    home.root.chmod(0o777)
    assert doctor.home_directory(home).status is doctor.Status.FAIL


def test_live_directory_off_tmpfs(home: paths.Home, tmp_path: Path) -> None:
    assert doctor.live_directory(home).status is doctor.Status.OK
    kind = doctor.filesystem(tmp_path)
    finding = doctor.live_directory(paths.Home(home.root, home.run, tmp_path / "live"))
    assert (finding.status is doctor.Status.OK) == (kind == "tmpfs")


def test_low_space(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_SPACE", 1 << 62)
    assert doctor.free_space(home).status is doctor.Status.WARN


def test_leftovers_of_a_killed_supervisor(home: paths.Home) -> None:
    vm = home.vm("web")
    assert doctor.leftovers(home).status is doctor.Status.OK
    running = rundir.RunDirectory(vm)
    with running.listen(vm.control_socket):
        running.record(rundir.Running(rundir.Process(1, 1), machine=rundir.Process.of(os.getpid())))
        assert doctor.leftovers(home).status is doctor.Status.OK, "a supervisor holds the lock"
        running.close(keep_record=True)
        vm.control_socket.touch()
    finding = doctor.leftovers(home)
    assert finding.status is doctor.Status.WARN
    assert f"web: pid {os.getpid()}" in finding.found
    rundir.record_path(vm).unlink()
    finding = doctor.leftovers(home)
    assert finding.status is doctor.Status.WARN
    assert str(vm.control_socket) in finding.found


def test_a_check_that_breaks_is_a_finding(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "kvm", broken)
    (finding,) = [finding for finding in doctor.examine(home) if finding.name == "kvm"]
    assert finding.status is doctor.Status.WARN and "Input/output error" in finding.found


def test_command(tmp_path: Path, programs: Path) -> None:
    result = testing.CliRunner().invoke(main.command, ["--home", str(tmp_path / "h"), "doctor", "--json"])
    assert result.exit_code == 10
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    assert {"name", "status", "found", "advice"} == set(answer["findings"][0])
    assert result.stderr.startswith("blkckpt: this machine lacks: nbdkit")
    assert not (tmp_path / "h").exists(), "looking makes nothing"


def test_guest_files_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.guest_files().status is doctor.Status.OK
    monkeypatch.setattr(doctor, "_is_there", lambda name: name != "dissect.xfs")
    finding = doctor.guest_files()
    assert finding.status is doctor.Status.OK
    assert "blkckpt[files]" in finding.found and "dissect.xfs" in finding.found

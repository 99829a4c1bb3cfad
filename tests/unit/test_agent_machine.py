"""The hypervisor's part of a checkpoint against a fake QEMU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.agent import machine
from blkckpt.vm import qmp
from tests.support import fake_qmp


class Qemu(fake_qmp.FakeQmp):
    """Enough of a QEMU: a run state, capabilities, a bandwidth, a migration."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.status = "running"
        self.migration: dict[str, Any] = {}
        self.capabilities = {"events": False, "background-snapshot": False, "xbzrle": True}
        self.bandwidth = 123
        self.refuses_background = False
        self.answers |= {
            "query-status": lambda _: {"status": self.status},
            "query-migrate": lambda _: self.migration,
            "query-migrate-capabilities": lambda _: [
                {"capability": name, "state": state} for name, state in self.capabilities.items()
            ],
            "migrate-set-capabilities": self.set_capabilities,
            "query-migrate-parameters": lambda _: {"max-bandwidth": self.bandwidth},
            "migrate-set-parameters": self.set_parameters,
            "stop": lambda _: self.go("paused", "STOP"),
            "cont": lambda _: self.go("running", "RESUME"),
            "getfd": {}, "closefd": {}, "migrate": {}, "migrate_cancel": self.cancel,
        }  # fmt: skip

    def set_capabilities(self, arguments: dict[str, Any]) -> dict[str, Any]:
        asked = {entry["capability"]: entry["state"] for entry in arguments["capabilities"]}
        if asked.get("background-snapshot") and self.refuses_background:
            raise fake_qmp.Refusal("Background-snapshot is not supported by host kernel")
        self.capabilities |= asked
        return {}

    def set_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.bandwidth = arguments["max-bandwidth"]
        return {}

    def go(self, status: str, event: str) -> dict[str, Any]:
        if self.status != status:
            self.status = status
            self.event(event, 1)
        return {}

    def cancel(self, _: dict[str, Any]) -> dict[str, Any]:
        self.migration = {"status": "cancelled"}
        return {}


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path / "q")
    yield qemu
    qemu.close()


@pytest.fixture
def guest(qemu: Qemu, tmp_path: Path) -> Iterator[machine.Machine]:
    with qmp.QmpSession(tmp_path / "q", timeout=5) as session:
        yield machine.Machine(session)


@pytest.mark.parametrize("status", ["paused", "suspended", "shutdown", "guest-panicked", "prelaunch", "io-error"])
def test_a_guest_that_does_not_run(qemu: Qemu, guest: machine.Machine, status: str) -> None:
    qemu.status = status
    with pytest.raises(errors.StateError, match=f"QEMU says {status}.*; |QEMU says {status}.*--disk-only"):
        guest.check()


def test_a_guest_that_is_migrating_or_cannot_be(qemu: Qemu, guest: machine.Machine) -> None:
    guest.check()
    qemu.migration = {"status": "active"}
    with pytest.raises(errors.StateError, match="already"):
        guest.check()
    qemu.migration = {"blocked-reasons": ["VFIO device doesn't support migration"]}
    with pytest.raises(errors.HypervisorError, match="VFIO device"):
        guest.check()


def test_a_refused_capability_changes_nothing(qemu: Qemu, guest: machine.Machine) -> None:
    before = dict(qemu.capabilities)
    qemu.refuses_background = True
    assert "host kernel" in str(guest.try_background())
    assert qemu.capabilities == before
    guest.restore_settings()
    assert qemu.capabilities == before


def test_the_capability_is_tried_once(qemu: Qemu, guest: machine.Machine) -> None:
    """Each time costs QEMU a walk through the guest's memory."""
    before = dict(qemu.capabilities)
    assert guest.try_background() is None
    assert qemu.capabilities["background-snapshot"]
    guest.set_up(background=True)
    assert qemu.commands().count("migrate-set-capabilities") == 1
    guest.restore_settings()
    assert (qemu.capabilities, qemu.bandwidth) == (before, 123)
    assert guest.try_background() is None
    guest.restore_settings()
    assert qemu.capabilities == before


def test_settings_are_put_back(qemu: Qemu, guest: machine.Machine) -> None:
    before = dict(qemu.capabilities)
    guest.set_up(background=True)
    assert qemu.capabilities == before | {"events": True, "background-snapshot": True}
    assert qemu.bandwidth == machine.UNLIMITED
    guest.restore_settings()
    assert (qemu.capabilities, qemu.bandwidth) == (before, 123)
    guest.restore_settings()


def test_settings_of_the_user_stay(qemu: Qemu, guest: machine.Machine) -> None:
    qemu.capabilities["events"] = True
    guest.set_up(background=False)
    guest.restore_settings()
    assert qemu.capabilities["events"]


def test_settings_left_by_a_killed_agent_are_not_the_users(qemu: Qemu, guest: machine.Machine) -> None:
    qemu.capabilities["background-snapshot"], qemu.bandwidth = True, machine.UNLIMITED
    guest.set_up(background=True)
    guest.restore_settings()
    assert not qemu.capabilities["background-snapshot"]
    assert qemu.bandwidth == 128 << 20


def test_a1_only_a_guest_that_we_stopped_is_continued(qemu: Qemu, guest: machine.Machine) -> None:
    qemu.status = "paused"
    guest.continue_guest()
    assert qemu.status == "paused"
    qemu.status = "running"
    guest.stop()
    assert qemu.status == "paused"
    assert guest.may_be_stopped
    guest.continue_guest()
    assert qemu.status == "running"
    assert not guest.may_be_stopped


def test_a1_a_guest_in_another_state_is_reported(qemu: Qemu, guest: machine.Machine) -> None:
    guest.stop()
    qemu.status = "internal-error"
    with pytest.raises(errors.HypervisorError, match="does not run again: QEMU says internal-error"):
        guest.continue_guest()


def hand(guest: machine.Machine) -> None:
    read, write = os.pipe()
    guest.hand_stream(write)
    os.close(read)
    os.close(write)


def test_cancel_takes_the_descriptor_back(qemu: Qemu, guest: machine.Machine) -> None:
    guest.end_migration(None, background=False)
    assert "closefd" not in qemu.commands()
    hand(guest)
    guest.end_migration(None, background=False)
    guest.end_migration(None, background=False)
    assert qemu.commands().count("closefd") == 1
    assert "migrate_cancel" not in qemu.commands()


def test_cancel_ends_a_running_migration(qemu: Qemu, guest: machine.Machine) -> None:
    qemu.answers["closefd"] = fake_qmp.Refusal("File descriptor named 'blkckpt-stream' not found")
    hand(guest)
    guest.migrate().result()
    qemu.migration = {"status": "active"}
    guest.end_migration(None, background=False)
    assert qemu.commands().count("migrate_cancel") == 1
    guest.end_migration(None, background=False)


def test_a_failed_migration_says_why(qemu: Qemu, guest: machine.Machine) -> None:
    guest.migrate().result()
    qemu.migration = {"status": "failed", "error-desc": "Broken\npipe"}
    qemu.event("MIGRATION", status="failed")
    assert "Broken pipe" in str(guest.failed())
    with pytest.raises(errors.HypervisorError, match="Broken pipe"):
        guest.check_completed(background=True)


def test_qemu_that_resumes_by_itself(qemu: Qemu, guest: machine.Machine) -> None:
    guest.stop()
    qemu.migration = {"status": "active"}
    qemu.go("running", "RESUME")
    guest.await_running(5)
    assert "cont" not in qemu.commands()
    assert not guest.may_be_stopped


def test_qemu_that_leaves_a_stopped_guest_stopped(qemu: Qemu, guest: machine.Machine) -> None:
    """A newer QEMU: pages flow, so memory is protected, and nobody resumed the guest."""
    guest.stop()
    qemu.migration = {"status": "active", "ram": {"normal": 5, "duplicate": 0}}
    guest.await_running(5)
    assert qemu.status == "running"


def test_a2_nobody_resumes(qemu: Qemu, guest: machine.Machine) -> None:
    guest.stop()
    qemu.migration = {"status": "active", "ram": {"normal": 0, "duplicate": 0}}
    with pytest.raises(errors.DeadlineError):
        guest.await_running(0.2)
    qemu.migration = {"status": "failed", "error-desc": "no"}
    with pytest.raises(errors.HypervisorError, match="no"):
        guest.await_running(5)
    guest.continue_guest()
    assert qemu.status == "running"


def test_the_command_line_of_a_process() -> None:
    with subprocess.Popen(["/usr/bin/cat", "-u", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b".")
        process.stdin.flush()
        assert process.stdout.read(1) == b"."  # it has begun to run
        words = machine.command_line(process.pid)
    assert words[0] == "/usr/bin/cat"
    assert words[1] == "-u"
    with pytest.raises(errors.NotFoundError):
        machine.command_line(1 << 30)

"""The guard's process: it brings a guest back when the agent has gone, and touches nothing otherwise (A1)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt.agent import child, guard, rescue
from tests.support import fake_qmp
from tests.unit.test_agent_machine import Qemu
from tests.unit.test_vm_guestagent import FakeAgent

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path / "q")
    qemu.status = "paused"
    yield qemu
    qemu.close()


def wait(process: child.Child) -> int:
    return process.wait(20)


def test_released_touches_nothing(qemu: Qemu, tmp_path: Path) -> None:
    watch = guard.Guard(guard.QMP, str(tmp_path / "q"))
    watch.take_charge()
    watch.release()
    watch.release()
    watch.abandon()
    watch.reap()
    assert watch._process.status == 0
    assert qemu.seen == []


def test_one_that_was_not_given_charge_touches_nothing(qemu: Qemu, tmp_path: Path) -> None:
    """A guest that its user has paused stays so, when a checkpoint of it is refused or its agent dies early."""
    watch = guard.Guard(guard.QMP, str(tmp_path / "q"))
    watch.abandon()
    assert wait(watch._process) == 0
    assert qemu.seen == []


def test_abandoned_continues_the_guest(qemu: Qemu, tmp_path: Path) -> None:
    watch = guard.Guard(guard.QMP, str(tmp_path / "q"))
    watch.take_charge()
    watch.abandon()
    assert wait(watch._process) == 0
    assert qemu.status == "running"


def test_a_killed_agent_is_noticed(qemu: Qemu, tmp_path: Path) -> None:
    """kill -9 of the process that holds the guard's standard input."""
    program = "import sys, time\nfrom blkckpt.agent import guard\n"
    program += f"g = guard.Guard('qmp', {str(tmp_path / 'q')!r})\ng.take_charge()\n"
    program += "print(g._process.pid, flush=True)\ntime.sleep(60)"
    agent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    assert qemu.status == "paused"
    agent.send_signal(signal.SIGKILL)
    agent.wait(10)
    deadline = time.monotonic() + 20
    while qemu.status == "paused" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert qemu.status == "running"
    os.close(pidfd)


def test_signals_do_not_end_it(qemu: Qemu, tmp_path: Path) -> None:
    watch = guard.Guard(guard.QMP, str(tmp_path / "q"))
    watch.take_charge()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(watch._process.pid, number)
    time.sleep(0.1)
    with pytest.raises(TimeoutError):
        watch._process.wait(0)
    watch.abandon()
    assert wait(watch._process) == 0
    assert qemu.status == "running"


def test_a_running_migration_is_waited_for(qemu: Qemu, tmp_path: Path) -> None:
    """It may be about to stop the guest, or to resume it."""
    qemu.migration = {"status": "active"}
    watch = guard.Guard(guard.QMP, str(tmp_path / "q"))
    watch.take_charge()
    watch.abandon()
    deadline = time.monotonic() + 20
    while qemu.commands().count("query-migrate") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert qemu.status == "paused"
    qemu.migration = {"status": "failed"}
    assert wait(watch._process) == 0
    assert qemu.status == "running"


@pytest.mark.parametrize("status", ["running", "shutdown", "internal-error"])
def test_another_state_is_not_ours(qemu: Qemu, tmp_path: Path, status: str) -> None:
    qemu.status = status
    assert rescue.rescue(guard.QMP, str(tmp_path / "q"), patience=10)
    assert qemu.status == status
    assert "cont" not in qemu.commands()


def test_a2_it_gives_up(tmp_path: Path) -> None:
    start = time.monotonic()
    assert not rescue.rescue(guard.QMP, str(tmp_path / "nothing"), patience=0.5)
    assert time.monotonic() - start < 5


def test_a_refused_cont_is_tried_again(qemu: Qemu, tmp_path: Path) -> None:
    tries = []

    def reluctant(arguments: dict[str, object]) -> dict[str, object]:
        tries.append(1)
        if len(tries) < 3:
            raise fake_qmp.Refusal("not yet")
        return qemu.go("running", "RESUME")

    qemu.answers["cont"] = reluctant
    assert rescue.rescue(guard.QMP, str(tmp_path / "q"), patience=10)
    assert qemu.status == "running"


def test_frozen_file_systems_are_thawed(tmp_path: Path) -> None:
    agent = FakeAgent(tmp_path / "ga")
    agent.frozen = True
    watch = guard.Guard(guard.GUEST_AGENT, str(tmp_path / "ga"))
    watch.take_charge()
    watch.abandon()
    assert wait(watch._process) == 0
    assert not agent.frozen
    agent.close()

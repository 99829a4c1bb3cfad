"""The agent with a real disk server: schedules, kills of everything, retries with their reasons, a clean end.

Checkpoints of disks only, copied slowly where one is to be caught at work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors, paths
from blkckpt.control import client
from blkckpt.daemon import record, schedule, service
from tests.nbd import test_cli, test_supervisor
from tests.unit import test_daemon_metrics

MIB = 1 << 20
SIZE = 2 * MIB
SLOW = ("--rate", "1500K")
"""A copy takes more than a second: long enough to be met."""
wait_until = test_supervisor.wait_until


class Stand(test_cli.Cli):
    """A home with VM "web" being served, and an agent that the test starts and ends."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.agent: subprocess.Popen[str] | None = None
        self.log = root / "agent.log"

    @property
    def vm(self) -> paths.VmPaths:
        return paths.home(self.home).vm("web")

    def start_agent(self, *words: str) -> None:
        with self.log.open("a") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "blkckpt.cli.main", "agent", "run", "--log-format", "json", *words],
                env=self.environment, stdin=subprocess.DEVNULL, stderr=log, text=True,
            )  # fmt: skip
        wait_until(self.answers, "the agent answers")

    def end_agent(self, number: signal.Signals) -> int:
        assert self.agent is not None
        self.agent.send_signal(number)
        return self.agent.wait(60)

    def answers(self) -> bool:
        assert self.agent is not None and self.agent.poll() is None, self.log.read_text()
        try:
            return bool(service.ask(paths.home(self.home), "status")["pid"] == self.agent.pid)
        except errors.BlkckptError:
            return False

    def shown(self) -> Sequence[dict[str, Any]]:
        """The schedules as the agent tells them."""
        found: Sequence[dict[str, Any]] = service.ask(paths.home(self.home), "status")["schedules"]
        return found

    def one(self) -> dict[str, Any]:
        (found,) = self.shown()
        return found

    def phase(self) -> str:
        with client.Client.connect(self.vm.control_socket) as peer:
            return str(peer.status()["state"])

    def names(self) -> list[str]:
        return [one["name"] for one in self.json("list", "web")["checkpoints"]]

    def recorded(self) -> record.Record:
        return record.load(self.vm)

    def logged(self, message: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == message]

    def wait_copying(self) -> int:
        """Until a checkpoint is at work after its switch; its process."""
        wait_until(lambda: self.recorded().running is not None, "an attempt is recorded")
        wait_until(lambda: self.phase() == "switched", "it copies")
        running = self.recorded().running
        assert running is not None
        return running.pid

    def close(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.end_agent(signal.SIGTERM)
        super().close()


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    made = Stand(tmp_path)
    try:
        (tmp_path / "web.raw").write_bytes(os.urandom(SIZE))
        made.run("vm", "create", "web", "--disk", str(tmp_path / "web.raw"))
        yield made
    finally:
        made.close()


def taken(stand: Stand, since: record.Record) -> Callable[[], bool]:
    """Whether there was a success after *since*."""
    return lambda: stand.recorded().success not in (None, since.success)


def test_on_schedule_with_rules_and_metrics(stand: Stand) -> None:
    """A stopped VM is waited for; then every second; keep rules leave what people took; a second agent is refused."""
    stand.run("schedule", "web", "--every", "1s", "--disk-only", "--keep-last", "1")
    stand.start_agent("--survey", "2s")
    assert "already" in stand.run("agent", "run", code=5)
    wait_until(lambda: "does not run" in stand.one()["doing"], "it says what it waits for")
    assert stand.one()["failures"] == 0
    stand.run("agent", "now", "web", code=5)

    stand.serve("web")
    wait_until(lambda: stand.recorded().success is not None, "it is picked up when it runs")
    stand.run("checkpoint", "web", "--disk-only", "--name", "mine", "--wait", "30")
    wait_until(lambda: len(stand.logged("a checkpoint was taken")) >= 3, "one after the other")
    wait_until(lambda: bool(stand.logged("old checkpoints were removed")), "keep rules are applied")
    begun = [one["time"] for one in stand.logged("a checkpoint begins")]
    assert begun == sorted(set(begun))
    assert "mine" in stand.names()

    path = service.metrics_path(paths.home(stand.home))
    assert path.stat().st_mode & 0o777 == 0o600
    connection = test_daemon_metrics.Connection(path)

    def scrape() -> dict[tuple[str, str], float]:
        return test_daemon_metrics.values(test_daemon_metrics.families(test_daemon_metrics.get(connection)))

    wait_until(lambda: any(name == "blkckpt_store_dedup_ratio" for name, _ in scrape()), "the store is measured")
    found = scrape()
    assert found["blkckpt_checkpoints_total", "web"] >= 3
    assert found["blkckpt_skips_total", "web"] == 1
    assert found["blkckpt_disk_server_up", "web"] == 1
    assert found["blkckpt_checkpoint_seconds_count", "web"] == found["blkckpt_checkpoints_total", "web"]

    assert stand.run("schedule", "web", "--off")
    wait_until(lambda: not stand.shown(), "the agent was told")
    assert stand.json("agent", "stop") == {"stopped": True}
    assert stand.agent is not None and stand.agent.wait(60) == 0
    assert not path.exists() and stand.phase() == "rest"
    left = [name for name in stand.names() if name != "mine"]
    assert 1 <= len(left) <= 2, "the newest, and one that was taken when no rules were there any more"


def test_kills(stand: Stand) -> None:
    """Of the agent, of the disk server and of the checkpoint, each in the middle of a checkpoint."""
    stand.serve("web")
    stand.run("schedule", "web", "--every", "1h", "--disk-only", *SLOW)
    stand.start_agent()
    child = stand.wait_copying()
    assert stand.end_agent(signal.SIGKILL) == -signal.SIGKILL
    assert Path(f"/proc/{child}").exists(), "the checkpoint goes on"
    stand.start_agent()
    wait_until(lambda: stand.recorded().success is not None, "the next agent takes it over")
    first = stand.recorded()
    assert first.success is not None and first.failures == 0 and first.running is None
    assert stand.names() == [first.success.name], "and begins no other"
    assert stand.logged("an attempt of an agent before this one is taken over")[0]["pid"] == child

    for victim in ("server", "checkpoint"):
        before = stand.recorded()
        rewrite(stand)
        stand.run("agent", "now", "web")
        child = stand.wait_copying()
        pid = stand.status("web")["server"] if victim == "server" else child
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: stand.recorded().failures == 1, "it fails")
        problem = stand.recorded().problem
        assert problem is not None and problem.text
        if victim == "checkpoint":
            stand.run("agent", "now", "web")  # nobody has to wait for the next try
            assert problem.kind == "killed" and "SIGKILL" in problem.text
        assert "web: failed" in stand.run("agent", "status")
        wait_until(taken(stand, before), "it is tried again and succeeds")
        assert stand.recorded().failures == 0
    assert len(stand.names()) == 3
    assert stand.json("verify", "web")["ok"] is True
    assert stand.phase() == "rest"
    assert [one["retry_seconds"] for one in stand.logged("a checkpoint failed")] == [5.0, 5.0]


def rewrite(stand: Stand) -> None:
    """Something to copy."""
    handle = stand.connect("web")
    handle.pwrite(os.urandom(SIZE), 0)
    handle.shutdown()


def test_the_end_takes_back_what_does_not_finish_in_time(stand: Stand) -> None:
    stand.serve("web")
    stand.run("schedule", "web", "--every", "1h", "--disk-only", "--rate", "100K")
    stand.start_agent("--grace", "200ms")
    child = stand.wait_copying()
    assert stand.end_agent(signal.SIGTERM) == 0
    assert not Path(f"/proc/{child}").exists()
    assert stand.names() == []
    wait_until(lambda: stand.phase() == "rest", "its disks go back to rest")
    known = stand.recorded()
    assert (known.failures, known.running, known.success) == (0, None, None)

    stand.run("schedule", "web", "--every", "1h", "--disk-only", "--timeout", "1s", "--rate", "100K")
    stand.start_agent()
    wait_until(lambda: stand.recorded().failures == 1, "made good at once, and ended for taking too long")
    problem = stand.recorded().problem
    assert problem is not None and problem.kind == "timeout"
    assert stand.names() == []


def test_a_busy_disk_is_looked_at_first(stand: Stand) -> None:
    """The window: while the disk works it waits, and when it rests it begins at once."""
    stand.serve("web")
    handle = stand.connect("web")
    stand.run("schedule", "web", "--every", "1h", "--window", "30s", "--disk-only")
    stand.start_agent()
    waited = 0
    while waited < 3:
        handle.pwrite(b"x" * 4096, 0)
        waited += "quiet" in stand.one()["doing"]
        assert stand.recorded() == record.Record()
    handle.shutdown()
    wait_until(lambda: stand.recorded().success is not None, "the disk rests")
    assert stand.logged("a checkpoint begins")[0]["reason"] == "the disks rest"
    kept = schedule.load(stand.vm)
    assert kept is not None and kept.window_ns == 30 * schedule.SECOND

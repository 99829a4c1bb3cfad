"""Children of the agent: results, reasons, adoption by a later agent; turns; the service manager's protocol."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from blkckpt import errors, log, paths
from blkckpt.agent import rundir
from blkckpt.daemon import jobs, notify, planner, record, schedule, task
from blkckpt.vm import definition

SECONDS = 60.0


@pytest.fixture
def home(tmp_path: Path) -> paths.Home:
    return paths.home(tmp_path / "home")


@pytest.fixture
def files(tmp_path: Path) -> jobs.Files:
    return jobs.Files.of(tmp_path, "web")


def test_a_result_comes_through_a_file_that_is_ours_alone(home: paths.Home, files: jobs.Files) -> None:
    with jobs.start(home, ["vm", "list", "--json"], files) as job:
        assert job.wait(SECONDS)
        assert job.result() == {"vms": []}
    assert files.out.stat().st_mode & 0o777 == 0o600
    assert jobs.leftover(files) == {"vms": []}, "what it said stays for an agent that was not there"
    files.remove()
    assert jobs.leftover(files) == jobs.Failure("failed", "it ended without a result while no agent was there")


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["vm", "show", "nothing"], "not_found", "there is no VM nothing"),
        (["vm", "show", "a b"], "input", "not a usable name"),
        (["nonsense"], "usage", "nonsense"),
        (["completion", "bash"], jobs.GARBLED, "cannot be read"),
    ],
)
def test_a_failure_has_a_kind_and_one_line(
    words: list[str], kind: str, said: str, home: paths.Home, files: jobs.Files
) -> None:
    with jobs.start(home, words, files) as job:
        assert job.wait(SECONDS)
        found = job.result()
    assert isinstance(found, jobs.Failure)
    assert found.kind == kind and kind in jobs.ALL_KINDS
    assert said in found.text and "\n" not in found.text


def test_children_that_are_ended_and_killed(home: paths.Home, files: jobs.Files) -> None:
    """`status --watch` never ends by itself."""
    with jobs.start(home, ["status", "--watch"], files) as job:
        assert not job.wait(0)
        why = jobs.Failure(jobs.TIMEOUT, "too long")
        assert job.end(why, SECONDS) and job.result() == why
    with jobs.start(home, ["status", "--watch"], files) as job:
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.wait(SECONDS)
        found = job.result()
        assert isinstance(found, jobs.Failure) and found.kind == jobs.KILLED and "SIGKILL" in found.text


def test_a_child_is_adopted_by_its_pid_and_start(home: paths.Home, files: jobs.Files) -> None:
    with jobs.start(home, ["vm", "list", "--json"], files) as job:
        adopted = jobs.adopt(job.process, files)
        assert adopted is not None
        with adopted:
            assert adopted.wait(SECONDS)
            assert adopted.result() == {"vms": []}
    assert jobs.adopt(job.process, files) is None
    later = rundir.Process(os.getpid(), rundir.Process.of(os.getpid()).start + 1)
    assert jobs.adopt(later, files) is None, "another process with the pid"


def test_children_are_not_told_what_is_for_us(
    home: paths.Home, files: jobs.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    with jobs.start(home, ["vm", "list", "--json"], files) as job:
        environment = Path(f"/proc/{job.process.pid}/environ").read_bytes()
        assert job.wait(SECONDS)
    assert b"NOTIFY_SOCKET" not in environment


# Turns, and a task whose record cannot be written.


class Counted:
    """What happened, in words."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def taken(self, vm: str, document: object) -> None:
        self.events.append(f"{vm} taken")

    def failed(self, vm: str, reason: str) -> None:
        self.events.append(f"{vm} {reason}")

    def skipped(self, vm: str) -> None:
        self.events.append(f"{vm} skipped")

    def pruned(self, vm: str, count: int) -> None:
        self.events.append(f"{vm} pruned {count}")


def made(home: paths.Home, tmp_path: Path, name: str, turns: task.Turns, events: Counted) -> task.Task:
    base = tmp_path / f"{name}.raw"
    base.write_bytes(bytes(4096))
    vm = home.vm(name)
    definition.create(vm, [definition.DiskDefinition("vda", str(base), 4096)])
    host = task.Host(home, tmp_path, turns, events, lambda: None)
    return task.Task(host, vm, schedule.Schedule(schedule.SECOND, time.time_ns(), disk_only=True))


def test_turns_go_round_in_order_of_asking(home: paths.Home, tmp_path: Path) -> None:
    turns = task.Turns(2)
    a, b, c, d = (made(home, tmp_path, name, turns, Counted()) for name in "abcd")
    assert turns.take(a) and turns.take(b)
    assert not turns.take(c) and not turns.take(d)
    turns.give_back()
    assert not turns.take(d), "c asked first"
    assert turns.take(c) and not turns.take(d)
    turns.leave(d)
    turns.give_back()
    assert turns.take(a)
    for one in (a, b, c, d):
        one.close()


def test_a_stopped_vm_is_waited_for_and_the_task_ends_when_told(home: paths.Home, tmp_path: Path) -> None:
    events = Counted()
    one = made(home, tmp_path, "web", task.Turns(1), events)
    one.start()
    end = time.monotonic() + SECONDS
    while not events.events:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert one.doing == "waits: the VM does not run"
    one.stop(0)
    one.thread.join(SECONDS)
    assert one.ended and events.events == ["web skipped"], "said once, not at every look"
    assert one.known == record.Record(), "no failure"
    one.close()


def test_a_record_that_cannot_be_written_does_not_end_the_schedule(
    home: paths.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise errors.NoSpaceError("no space")

    one = made(home, tmp_path, "web", task.Turns(1), Counted())
    monkeypatch.setattr(record, "save", full)
    one._conclude(one.wanted, jobs.Failure("busy", "no"))
    assert one.known.failures == 1
    assert one.known.retry_ns is not None and planner.next_ns(one.wanted, one.known) == one.known.retry_ns
    one.close()


# The service manager.


@pytest.mark.parametrize("abstract", [False, True])
def test_notifications(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notify.send("READY=1"), "nobody is there"
    name = f"@blkckpt-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if abstract else name)
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify.ready("3 schedules")
        assert manager.recv(4096).decode().splitlines() == ["READY=1", f"MAINPID={os.getpid()}", "STATUS=3 schedules"]


def test_the_watchdog_is_fed_twice_as_often_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notify.watchdog_seconds() is None
    monkeypatch.setenv("WATCHDOG_USEC", "120000000")
    assert notify.watchdog_seconds() == 60.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_seconds() is None


def test_lines_for_the_journal_begin_with_their_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w+") as stream:
        assert not log.is_journal(stream)
        info = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        level = logging.getLogger().level
        try:
            log.setup(as_json=True, stream=stream)
            log.get("x").warning("careful", extra={"fields": {"vm": "web"}})
        finally:
            logging.getLogger().setLevel(level)
        stream.seek(0)
        line = stream.read()
    assert line.startswith('<4>{"time"') and '"vm": "web"' in line

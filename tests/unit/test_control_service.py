"""The verbs against a disk group that only notes what is asked: the driver, the lease, the barrier's descriptor."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from blkckpt import errors
from blkckpt.control import client, messages, server, service
from blkckpt.disk import api, barrier, group, job


class FakeDisk:
    size = 1 << 20


class FakeGroup:
    """The stages of checkpoints without disks."""

    def __init__(self) -> None:
        self.disks = {"vda": FakeDisk()}
        self.rounds: dict[str, str] = {}  # checkpoint under way → stage
        self.calls: list[str] = []
        self.leases: list[float] = []
        self.barrier: barrier.Barrier | None = None
        self.jobs: dict[str, job.Job] = {}
        self.copied: dict[str, Any] = {}
        self.work: Callable[[job.Job], Mapping[str, Any]] = lambda _: {}
        self.outcome = api.ArmState(True, False, None, 12345)

    def prepare(self, checkpoint: str, lease: float | None = None, *, retain: bool = False) -> None:
        if any(stage != "switched" for stage in self.rounds.values()):
            raise errors.StateError("a checkpoint is under way")
        assert lease == service.LEASE_SECONDS
        self.calls.append("prepare")
        self.rounds[checkpoint] = "prepared"

    def renew(self, lease: float, checkpoint: str) -> None:
        self.leases.append(lease)

    def arm(self, watch: barrier.Barrier, deadline: float, checkpoint: str) -> None:
        assert 0 < deadline - time.monotonic() <= 600
        self.calls.append("arm")
        self.barrier, self.rounds[checkpoint] = watch, "armed"

    def switch(self, checkpoint: str) -> api.ArmState:
        self.calls.append("switch")
        self.rounds[checkpoint] = "switched"
        return self.outcome

    def poll_barrier(self, checkpoint: str) -> api.ArmState:
        self.calls.append("poll")
        return self.outcome

    def disarm(self, checkpoint: str) -> None:
        self.calls.append("disarm")

    def start_copy(
        self,
        store: str,
        parents: Mapping[str, str | None],
        *,
        rate: int | None = None,
        label: str = "",
        command: Sequence[str] | None = None,
        checkpoint: str,
    ) -> job.Job:
        assert self.rounds[checkpoint]
        self.copied = {"store": store, "parents": parents, "rate": rate, "label": label, "command": command}
        return self.begin("copy")

    def commit(self, checkpoint: str) -> job.Job:
        del self.rounds[checkpoint]
        return self.begin("commit")

    def abort(self, checkpoint: str | None = None) -> job.Job:
        for name in [name for name in self.rounds if checkpoint in (None, name)]:
            del self.rounds[name]
        return self.begin("abort")

    def begin(self, kind: str) -> job.Job:
        self.calls.append(kind)
        started = job.Job(kind).start(self.work)
        self.jobs[started.id] = started
        return started

    def job(self, job_id: str) -> job.Job:
        if job_id not in self.jobs:
            raise errors.NotFoundError(f"no job {job_id}")
        return self.jobs[job_id]

    def checkpoints(self) -> frozenset[str]:
        return frozenset(self.rounds)

    def status(self) -> api.GroupStatus:
        under_way = tuple(api.RoundStatus(name, stage, None, False, None) for name, stage in self.rounds.items())
        newest = under_way[-1] if under_way else None
        state = api.State(newest.stage) if newest else api.State.REST
        return api.GroupStatus(state, newest.checkpoint if newest else None, None, None, under_way, None, None, ())


@pytest.fixture
def fake() -> FakeGroup:
    return FakeGroup()


@pytest.fixture
def stopped() -> threading.Event:
    return threading.Event()


@pytest.fixture
def address(tmp_path: Path, fake: FakeGroup, stopped: threading.Event) -> Iterator[Path]:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        identity = service.Identity("vm", "test")
        handler = service.Service(identity, cast("group.DiskGroup", fake), ["copy-child"], stopped.set)
        running = server.Server(listener, handler)
        running.start()
        yield path
        running.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_open(descriptor: int, twin: os.stat_result) -> bool:
    try:
        info = os.fstat(descriptor)
    except OSError:
        return False
    return (info.st_dev, info.st_ino) == (twin.st_dev, twin.st_ino)


def count_open(twin: os.stat_result) -> int:
    return sum(is_open(int(path.name), twin) for path in Path("/proc/self/fd").iterdir())


def test_a_checkpoint_from_prepare_to_commit(address: Path, fake: FakeGroup) -> None:
    fake.work = lambda running: {"disks": {"vda": {"image": "abc"}}}
    with client.Client.connect(address) as peer:
        assert peer.welcome.disks == {"vda": 1 << 20}
        peer.prepare("monday")
        assert peer.status()["driver"] == {"pid": os.getpid(), "client": "blkckpt"}
        assert peer.switch() == messages.Switched(True, False, None, 12345)
        state = peer.finish(peer.copy(Path("/store"), {"vda": None}, rate=1000), 10)
        assert state.result == {"disks": {"vda": {"image": "abc"}}}
        peer.finish(peer.commit(), 10)
    assert fake.calls[:4] == ["prepare", "switch", "copy", "commit"]
    assert fake.copied == {
        "store": "/store", "parents": {"vda": None}, "rate": 1000, "label": "vm@monday", "command": ("copy-child",),
    }  # fmt: skip


def test_every_message_of_the_driver_renews_the_lease(address: Path, fake: FakeGroup) -> None:
    """D7."""
    with client.Client.connect(address) as driver, client.Client.connect(address) as other:
        other.status()
        assert fake.leases == []
        driver.prepare("a")
        driver.status()
        driver.switch()
        assert fake.leases == [service.LEASE_SECONDS] * 2
        other.status()
        assert len(fake.leases) == 2


def test_a_driver_that_vanishes_is_taken_back(address: Path, fake: FakeGroup) -> None:
    """D7."""
    driver = client.Client.connect(address)
    driver.prepare("a")
    with client.Client.connect(address) as other:
        other.status()
    assert fake.rounds == {"a": "prepared"}  # another connection's end is nobody's business
    driver.close()
    wait_until(lambda: "abort" in fake.calls)
    wait_until(lambda: not fake.rounds)


def test_a_commit_that_has_begun_needs_no_driver(address: Path, fake: FakeGroup) -> None:
    """D7."""
    release = threading.Event()
    fake.work = lambda running: {"done": release.wait(10)}
    driver = client.Client.connect(address)
    driver.prepare("a")
    job_id = driver.commit()
    driver.close()
    with client.Client.connect(address) as other:
        assert other.wait(job_id, 0).state == messages.RUNNING
        release.set()
        assert other.finish(job_id, 10).result == {"done": True}
    assert "abort" not in fake.calls


def test_a_driver_at_rest_may_leave(address: Path, fake: FakeGroup) -> None:
    with client.Client.connect(address) as driver:
        driver.prepare("a")
        driver.finish(driver.abort(), 10)
    with client.Client.connect(address) as other:
        other.status()
    assert fake.calls == ["prepare", "abort"]


def test_only_the_driver_drives_but_anybody_may_abort(address: Path, fake: FakeGroup) -> None:
    with client.Client.connect(address, name="agent") as driver, client.Client.connect(address) as other:
        with pytest.raises(errors.StateError, match="prepare first"):
            other.switch()
        driver.prepare("a")
        for attempt in (other.switch, other.disarm, other.commit, lambda: other.copy(Path("/s"), {})):
            with pytest.raises(errors.StateError, match="driven by agent"):
                attempt()
        with pytest.raises(errors.StateError, match="under way"):
            other.prepare("b")
        other.abort()
        assert fake.calls == ["prepare", "abort"]


def test_each_connection_drives_its_own_checkpoint(address: Path, fake: FakeGroup) -> None:
    """D7: a driver that vanishes takes its own checkpoint with it, and only that."""
    with client.Client.connect(address, name="first") as first, client.Client.connect(address, name="other") as other:
        first.prepare("a")
        first.switch()
        with pytest.raises(errors.StateError, match="drives checkpoint a"):
            first.prepare("b")
        second = client.Client.connect(address, name="second")
        second.prepare("b")
        status = other.status()
        assert [(one["checkpoint"], one["driver"]["client"]) for one in status["rounds"]] == [
            ("a", "first"), ("b", "second"),
        ]  # fmt: skip
        assert status["driver"]["client"] == "second"
        second.close()
        wait_until(lambda: list(fake.rounds) == ["a"])
        first.copy(Path("/store"), {})
        assert fake.copied["label"] == "vm@a"
        first.abort()
        assert not fake.rounds
        first.prepare("c")


def test_arm_wraps_the_socket_and_switching_lets_it_go(address: Path, fake: FakeGroup) -> None:
    ours, theirs = socket.socketpair()
    twin = os.fstat(ours.fileno())
    with ours, theirs, client.Client.connect(address) as driver:
        driver.prepare("a")
        driver.arm(ours.fileno(), 5)
        assert count_open(twin) == 2
        assert fake.barrier is not None
        assert fake.barrier.poll() is barrier.BarrierState.WAITING
        fake.outcome = api.ArmState(False, True, None, None)
        assert driver.switch(messages.SWITCH_BARRIER).waiting
        assert count_open(twin) == 2
        theirs.sendall(b'{"event": "STOP"}\r\n')
        assert fake.barrier.poll() is barrier.BarrierState.VIOLATED
        fake.outcome = api.ArmState(False, False, fake.barrier.reason, None)
        assert "STOP" in str(driver.switch(messages.SWITCH_BARRIER).violation)
        assert count_open(twin) == 1


@pytest.mark.parametrize("how", ["disarm", "abort", "vanish", "arm again"])
def test_the_socket_is_let_go_whatever_ends_the_arming(address: Path, fake: FakeGroup, how: str) -> None:
    ours, theirs = socket.socketpair()
    twin = os.fstat(ours.fileno())
    driver = client.Client.connect(address)
    with ours, theirs, driver:
        driver.prepare("a")
        driver.arm(ours.fileno(), 5)
        ends: dict[str, Callable[[], object]] = {
            "disarm": driver.disarm,
            "abort": driver.abort,
            "vanish": driver.close,
            "arm again": lambda: driver.arm(theirs.fileno(), 5),
        }
        ends[how]()
        wait_until(lambda: count_open(twin) == 1)


def test_arm_takes_sockets_only_and_leaks_nothing(address: Path, fake: FakeGroup, tmp_path: Path) -> None:
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with open(tmp_path / "file", "wb") as file, datagram, other, client.Client.connect(address) as driver:
        driver.prepare("a")
        for wrong in (file, datagram):
            with pytest.raises(errors.InputError, match="descriptor sent along"):
                driver.arm(wrong.fileno(), 5)
            assert count_open(os.fstat(wrong.fileno())) == 1
    assert "arm" not in fake.calls


def test_arming_for_somebody_else_leaks_nothing(address: Path, fake: FakeGroup) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, client.Client.connect(address) as driver, client.Client.connect(address) as other:
        driver.prepare("a")
        with pytest.raises(errors.StateError):
            other.arm(ours.fileno(), 5)
        assert count_open(os.fstat(ours.fileno())) == 1


def test_a_failed_job_keeps_its_class_and_errno(address: Path, fake: FakeGroup) -> None:
    def fail(_: job.Job) -> Mapping[str, Any]:
        raise errors.NoSpaceError("copying vda: the store is full; free some space")

    fake.work = fail
    with client.Client.connect(address) as driver:
        driver.prepare("a")
        job_id = driver.copy(Path("/store"), {"vda": None})
        with pytest.raises(errors.NoSpaceError, match="free some space") as caught:
            driver.finish(job_id, 10)
        assert caught.value.errno == errno.ENOSPC
        assert driver.wait(job_id, 0).state == messages.FAILED


def test_progress_is_told_while_a_job_runs(address: Path, fake: FakeGroup) -> None:
    release = threading.Event()

    def work(running: job.Job) -> Mapping[str, Any]:
        running.progress(10, 100)
        release.wait(10)
        return {}

    fake.work = work
    with client.Client.connect(address) as driver:
        driver.prepare("a")
        job_id = driver.copy(Path("/store"), {})
        wait_until(lambda: (driver.wait(job_id, 0).done, driver.wait(job_id, 0).total) == (10, 100))
        with pytest.raises(errors.DeadlineError, match="did not end"):
            driver.finish(job_id, 0.05)
        release.set()
        driver.finish(job_id, 10)


def test_unknown_jobs_and_disks(address: Path) -> None:
    with client.Client.connect(address) as peer:
        with pytest.raises(errors.NotFoundError):
            peer.wait("nothing", 0)
        peer.prepare("a")
        with pytest.raises(errors.NotFoundError, match="no disk vdz"):
            peer.copy(Path("/store"), {"vdz": None})


def test_status_is_json(address: Path) -> None:
    with client.Client.connect(address) as peer:
        status = peer.status()
        assert json.loads(json.dumps(status)) == status
        assert (status["state"], status["disks"], status["driver"]) == ("rest", [], None)


def test_shutdown_asks_the_process_to_stop_and_takes_nothing_back(
    address: Path, fake: FakeGroup, stopped: threading.Event
) -> None:
    with client.Client.connect(address) as driver, client.Client.connect(address) as other:
        driver.prepare("a")
        other.shutdown()
        assert stopped.is_set()
    with client.Client.connect(address) as other:
        other.status()
    assert fake.calls == ["prepare"]

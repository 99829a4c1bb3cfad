"""The command line with a real guest: what is refused, what an interrupted verb leaves, what a person reads."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blkckpt import paths
from blkckpt.agent import turn
from blkckpt.control import client, server
from blkckpt.daemon import record, service
from blkckpt.vm import qmp
from tests.support import guest
from tests.unit import test_daemon_metrics


def phase(box: guest.Sandbox) -> str:
    return str(box.json("status", "v")["vms"][0]["phase"])


def names(box: guest.Sandbox) -> list[str]:
    return [one["name"] for one in box.json("list", "v")["checkpoints"]]


def test_a_checkpoint_tells_its_figures(box: guest.Sandbox, writer: guest.Console) -> None:
    body = box.json("checkpoint", "v", "--name", "told", "--note", "from a test")
    assert 0 < body["stopped_ms"] < 5000 and body["seconds"] > 0 and body["added_bytes"] > 0
    assert body["consistency"] == "machine" and body["notes"][0] == "from a test"
    assert body["machine"]["accelerator"] == "tcg" and body["machine"]["command"][0] == "qemu-system-x86_64"
    again = box.json("show", "v@told")
    assert {key: body[key] for key in again} == again
    assert {"prepare", "prefault", "stopped", "switch", "memory", "copy", "commit"} <= set(again["timings"])
    assert "qemu-system-x86_64" in box.run("show", "v@told") and "from a test" in box.run("list", "v")
    text = box.run("checkpoint", "v", "--name", "read")
    assert text.startswith("v@read: the guest stopped for ") and "added to the store" in text
    writer.check()


def test_checkpoint_of_a_stopped_guest(box: guest.Sandbox, writer: guest.Console) -> None:
    """Refused, and left as it was: stopped."""
    before = names(box)
    monitor(box, "stop")
    try:
        said = box.run("checkpoint", "v", code=5)
        assert said.count("\n") == 1 and "paused" in said and "cont" in said
        assert monitor(box, "query-status")["status"] == "paused"
    finally:
        monitor(box, "cont")
    assert names(box) == before and phase(box) == "rest"
    writer.beat()


def monitor(box: guest.Sandbox, command: str) -> Any:
    """One QMP command; QEMU talks to one client at a time, so the connection is given up again."""
    with qmp.QmpSession(paths.home(box.home).vm("v").qmp_socket) as session:
        return session.execute(command)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_checkpoint_leaves_nothing(
    box: guest.Sandbox, writer: guest.Console, sent: signal.Signals
) -> None:
    """Rule C3: taken back, the guest runs on, 130 or 143."""
    before = names(box)
    process = box.start("checkpoint", "v", "--name", "never", "--rate", "64K")
    wait(lambda: phase(box) == "switched")
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, said
    assert said.count("\n") == 1
    wait(lambda: phase(box) == "rest")
    assert names(box) == before
    assert not box.find("memory.receive") and not box.find("blkckpt.store.ingest")
    assert not (paths.home(box.home).vm("v").memory / "never").exists()
    assert writer.sweep() == 0, writer.complaints()


def test_a_second_checkpoint_is_refused_while_the_first_has_its_turn(box: guest.Sandbox, writer: guest.Console) -> None:
    """A4."""
    with turn.take(paths.home(box.home).vm("v")):
        said = box.run("checkpoint", "v", code=5)
    assert "already" in said and said.count("\n") == 1


def test_interrupting_one_of_two_stacked_checkpoints_leaves_the_other(
    box: guest.Sandbox, writer: guest.Console
) -> None:
    """A3, D7: each is taken back by itself."""
    running = {}
    for name in ("slow", "next"):
        running[name] = box.start("checkpoint", "v", "--name", name, "--rate", "64K", "--wait", "60")
        wait(lambda name=name: name in under_way(box))  # type: ignore[misc]
    assert under_way(box) == ["slow", "next"]
    for name, left in (("next", ["slow"]), ("slow", [])):
        running[name].send_signal(signal.SIGINT)
        running[name].communicate(timeout=60)
        assert running[name].returncode == 130
        wait(lambda left=left: under_way(box) == left)  # type: ignore[misc]
    wait(lambda: phase(box) == "rest")
    assert not {"slow", "next"} & set(names(box))
    assert writer.sweep() == 0


def under_way(box: guest.Sandbox) -> list[str]:
    return [one["name"] for one in box.json("status", "v")["vms"][0]["checkpoints"]]


def test_run_in_the_foreground_is_the_guests_terminal(sandbox: guest.Sandbox) -> None:
    """The console is ours, QEMU's end is ours, and its exit code too."""
    sandbox.create("f", {"vda": 8 << 20})
    words = guest.machine(sandbox.serial.path, "idle", memory=128)
    words[words.index("-serial") + 1] = "stdio"
    process = subprocess.Popen(
        sandbox.command("run", "f", "--", *words),
        env=sandbox.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("guest ready"):
                break
        process.stdin.write("quit\n")
        process.stdin.flush()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert sandbox.json("status", "f")["vms"][0]["state"] == "stopped"


def test_the_wrong_monitor(box: guest.Sandbox, writer: guest.Console) -> None:
    """Another server's socket given as QMP: named, refused, and the disks at rest."""
    vm = paths.home(box.home).vm("v")
    assert server.HELLO_SECONDS < qmp.CONNECT_TIMEOUT / 1.5
    said = box.run("checkpoint", "v", "--qmp", vm.control_socket, code=6)
    assert f"{vm.control_socket} is not a QMP socket" in said and said.count("\n") == 1
    with client.Client.connect(vm.control_socket) as peer:
        assert peer.status()["state"] == "rest"


def wait(test: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_status_while_it_runs(box: guest.Sandbox, writer: guest.Console) -> None:
    one = box.json("status", "v")["vms"][0]
    assert one["state"] == "running" and Path(f"/proc/{one['machine']}").exists()
    assert Path(one["console"]).is_file() and Path(one["log"]).is_file()
    assert one["disks"][0]["writes"] > 0
    assert json.loads(box.run("vm", "show", "v", "--json"))["running"] is True


def test_the_agent_has_checkpoints_taken(box: guest.Sandbox, writer: guest.Console) -> None:
    """Of a running guest, by its schedule; and the guest does not notice more than of one taken by hand."""
    home = paths.home(box.home)
    box.run("schedule", "v", "--every", "1h", "--keep-last", "1")
    agent = box.start("agent", "run")
    try:
        wait(lambda: record.load(home.vm("v")).success is not None, 120)
        success = record.load(home.vm("v")).success
        assert success is not None and success.stopped_ms is not None and 0 < success.stopped_ms < 5000
        connection = test_daemon_metrics.Connection(service.metrics_path(home))
        found = test_daemon_metrics.values(test_daemon_metrics.families(test_daemon_metrics.get(connection)))
        assert found["blkckpt_guest_stopped_seconds_count", "v"] == 1
        assert found["blkckpt_guest_stopped_seconds_sum", "v"] == pytest.approx(success.stopped_ms / 1000)
        assert found["blkckpt_prefault_seconds_count", "v"] == 1
        assert found["blkckpt_disk_chain_depth", "vda,v"] == 1
        writer.check()
    finally:
        box.run("schedule", "v", "--off")
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=120)
    assert agent.returncode == 0, said
    assert box.json("show", f"v@{success.name}")["tags"] == ["scheduled"]

"""kill -9 at every stage of a checkpoint: of the agent, the disk server, the copier, QEMU.

The agent runs here in a process of its own in which one verb of the control socket is bent: just before or just after
it is sent, somebody is killed.  So every stage is met, without luck.  Afterwards the guest must have seen no wrong
byte and no error, nothing of the checkpoint may be left but (if it got so far) a whole one, and the next works.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blkckpt import paths
from blkckpt.control import client
from blkckpt.store import store as stores
from blkckpt.vm import writeprotect
from tests.support import guest

AGENT = """
import contextlib, os, signal, subprocess, sys
from blkckpt import errors, paths
from blkckpt.agent import runner
from blkckpt.control import client
from blkckpt.store import store
from blkckpt.vm import definition

home, name, verb, when, victim = sys.argv[1:]
vm = paths.home(home).vm("v")
call = client.Client.call

def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in out.split()]

def kill(self):
    family = [*children(os.getpid()), os.getpid()]  # the guard and the memory receiver before the agent
    server = self.welcome.pid
    victims = {"agent": [os.getpid()], "family": family, "server": [server], "copier": children(server)}
    for pid in victims[victim] if victim in victims else [int(victim)]:
        with contextlib.suppress(ProcessLookupError):  # the ps that listed it
            os.kill(pid, signal.SIGKILL)

def bent(self, asked, *words, **more):
    if asked == verb and when == "before":
        kill(self)
    result = call(self, asked, *words, **more)
    if asked == verb and when == "after":
        kill(self)
    return result

client.Client.call = bent
place = store.Store.open_or_init(paths.home(home).store)
try:
    runner.take(vm, definition.load(vm), place, runner.CheckpointOptions(name=name), lambda *_: None)
except errors.BlkckptError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""

VERBS = ("prepare", "arm", "switch", "copy", "wait", "commit")
KILLS = [
    *((verb, "agent", when) for verb in VERBS for when in ("before", "after")),
    # Before one verb is after the one before it, but for what the agent does between; and the supervisor waits ever
    # longer before it starts a server again that keeps dying, which makes these the slow ones.
    *((verb, "server", "after") for verb in VERBS),
    ("commit", "server", "before"),
]
REST_SECONDS = 30.0


def take_and_kill(box: guest.Sandbox, name: str, verb: str, when: str, victim: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", AGENT, str(box.home), name, verb, when, victim]
    return subprocess.run(words, capture_output=True, text=True, timeout=90, env=box.environment, cwd=guest.ROOT)


def wait_for_rest(box: guest.Sandbox) -> dict[str, Any]:
    """Until the disks of "v" are back on their bases, by themselves."""
    vm = paths.home(box.home).vm("v")
    deadline = time.monotonic() + REST_SECONDS
    while True:
        with contextlib.suppress(Exception), client.Client.connect(vm.control_socket, name="test") as peer:
            status = peer.status()
            if status["state"] == "rest" and not any(disk["overlays"] for disk in status["disks"]):
                return status
        assert time.monotonic() < deadline, "the disks do not come back to rest"
        time.sleep(0.05)


def names(box: guest.Sandbox) -> set[str]:
    if not (box.home / "store/store.json").exists():
        return set()
    with stores.Store.open(box.home / "store") as store:
        return {name for _, name in store.names("v")}


def check_no_residue(box: guest.Sandbox) -> None:
    vm = paths.home(box.home).vm("v")
    overlays = [path.name for path in vm.layers.rglob("*") if path.is_file() and "overlay" in path.name]
    assert not overlays, f"layers left behind: {overlays}"
    assert not box.find("blkckpt.store.ingest"), "a copier is left"
    assert not box.find("memory.receive"), "a memory receiver is left"


def check_well(box: guest.Sandbox, console: guest.Console) -> None:
    """The guest goes on and every byte is right."""
    before = console.beat()
    assert console.sweep() == 0, console.complaints()
    assert console.beat().writes > before.writes
    console.check()


def check_whole_or_absent(box: guest.Sandbox, name: str) -> None:
    if name in names(box):
        box.run("verify", f"v@{name}")


@pytest.mark.parametrize(("verb", "victim", "when"), KILLS)
def test_guest_sees_nothing_of_a_kill(
    box: guest.Sandbox, writer: guest.Console, verb: str, victim: str, when: str
) -> None:
    """D7, A3."""
    name = f"{victim}-{verb}-{when}"
    result = take_and_kill(box, name, verb, when, victim)
    assert result.returncode != 0 or name in names(box), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    wait_for_rest(box)
    check_well(box, writer)
    check_no_residue(box)
    check_whole_or_absent(box, name)


def test_killed_copier_fails_the_checkpoint_only(box: guest.Sandbox, writer: guest.Console) -> None:
    result = take_and_kill(box, "copier", "copy", "after", "copier")
    assert result.returncode not in (0, -signal.SIGKILL), result.stdout + result.stderr
    assert "copier" not in names(box)
    wait_for_rest(box)
    check_well(box, writer)
    check_no_residue(box)


def test_after_all_that_a_checkpoint_works(box: guest.Sandbox, writer: guest.Console) -> None:
    """Depends on what the tests above left."""
    token = writer.beat().token
    box.run("checkpoint", "v", "--name", "last")
    copy = box.restore("v@last", "copy")
    assert copy.beat().token == token
    assert copy.sweep() == 0, copy.complaints()
    box.stop("copy")
    box.remove("copy")
    # What a killed agent cannot remove itself, the next checkpoint and the next collection do.
    kept = {path.name for path in (box.home / "vms/v/memory").iterdir()}
    assert kept <= names(box), "memory images of a checkpoint that is not"
    with stores.Store.open(box.home / "store") as store:
        store.collect()
        named = {image for _, name in store.names("v") for image in store.manifest("v", name).images()}
        assert set(store.image_ids()) == named, "images that no checkpoint names"


def _qemu_major() -> int:
    text = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return int(text.split("version ")[1].split(".")[0])


def test_a_guest_that_lost_agent_and_guard_is_freed_by_the_next_checkpoint(sandbox: guest.Sandbox) -> None:
    """A1: nobody is left to see the snapshot to its end, so QEMU before 10 leaves the memory write-protected."""
    sandbox.create("v", {"vda": 48 << 20})
    console = sandbox.boot("v", "idle", memory=512, fill=256, dirty=2000)
    console.beat()
    qemu = sandbox.json("status", "v")["vms"][0]["machine"]
    assert take_and_kill(sandbox, "dead", "copy", "before", "family").returncode == -signal.SIGKILL
    wait_for_rest(sandbox)
    assert writeprotect.is_protected(qemu) or _qemu_major() >= 10
    sandbox.run("checkpoint", "v", "--name", "next")
    assert not writeprotect.is_protected(qemu)
    console.check()
    before = console.beat()
    assert console.beat().seq > before.seq
    sandbox.stop("v")


@pytest.mark.parametrize("verb", ["arm", "copy", "commit"])
def test_killed_qemu_leaves_the_disks_at_rest(sandbox: guest.Sandbox, verb: str) -> None:
    """The supervisor sees its end and closes the disks; what the guest had flushed is in the base."""
    files = sandbox.create("v", {"vda": 48 << 20})
    console = sandbox.boot("v", "writer", memory=128, span=32, rate=1000)
    console.beat()
    qemu = sandbox.json("status", "v")["vms"][0]["machine"]
    result = take_and_kill(sandbox, "dead", verb, "after", str(qemu))
    assert result.returncode != 0 or "dead" in names(sandbox), result.stdout + result.stderr
    console.wait_closed()
    wait_until_stopped(sandbox)
    check_whole_or_absent(sandbox, "dead")
    assert not sandbox.processes()
    sandbox.run("serve", "v", "--detach")
    wait_for_rest(sandbox)
    check_no_residue(sandbox)
    sandbox.run("stop", "v")
    assert files["vda"].stat().st_size == 48 << 20
    assert sandbox.boot("v", "writer", memory=128, span=32).sweep() == 0


def wait_until_stopped(box: guest.Sandbox) -> None:
    deadline = time.monotonic() + REST_SECONDS
    while box.json("status", "v")["vms"][0]["state"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_killed_supervisor_and_server_together(box: guest.Sandbox, writer: guest.Console) -> None:
    """QEMU is alone with its requests until somebody serves the disks again."""
    running = box.json("status", "v")["vms"][0]
    for role in ("supervisor", "server"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running[role], signal.SIGKILL)
    box.run("serve", "v", "--detach")
    wait_for_rest(box)
    check_well(box, writer)
    assert Path(f"/proc/{running['machine']}").exists()

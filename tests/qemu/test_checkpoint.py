"""A checkpoint is of one instant: the guest itself says so after every restore.

The guest remembers in RAM what every sector of its disk must hold.  If the disks of a checkpoint were switched a
moment before or after the instant of its memory, the restored guest finds a sector that is older or newer than it
remembers, or half of one.
"""

from __future__ import annotations

import random
import time

import pytest

from blkckpt import paths
from blkckpt.agent import runner
from blkckpt.control import client
from blkckpt.store import contents
from blkckpt.store import store as stores
from blkckpt.vm import definition
from tests.support import guest

CHECKPOINTS = 10


def resume_and_compare(box: guest.Sandbox, checkpoint: str, name: str) -> tuple[guest.Console, int]:
    """Restore, let it run, read everything: the number of mismatches the guest sees."""
    console = box.restore(checkpoint, name)
    console.beat()
    return console, console.sweep()


def counted(box: guest.Sandbox, checkpoint: str) -> bool:
    """Whether the manifest says what is used of disk and memory and what the skeleton holds, and says what is there."""
    with stores.Store.open(paths.home(box.home).store) as place:
        found = place.manifest("v", checkpoint)
        assert found.memory is not None
        inside = found.memory.contents
        if inside is None or inside != contents.look(place.image(found.memory.skeleton)):
            return False
        for part in found.parts():
            extents = place.image(part.image).extents(0, part.size)
            if part.used != sum(length for _, length, zero in extents if not zero):
                return False
    return True


def test_ten_checkpoints_under_load_restore_without_a_wrong_byte(box: guest.Sandbox, writer: guest.Console) -> None:
    chance = random.Random(20)
    token = writer.beat().token
    for number in range(CHECKPOINTS):
        time.sleep(chance.random() * 0.7)  # the instants are to be anywhere in what the guest does
        box.run("checkpoint", "v", "--name", f"c{number}")
    writer.check()
    for number in range(CHECKPOINTS):
        console, mismatches = resume_and_compare(box, f"v@c{number}", f"r{number}")
        first = console.beat()
        assert mismatches == 0, f"c{number}: {console.complaints()}"
        assert first.token == token, "the guest was booted, not resumed"
        assert console.beat().writes > first.writes
        console.check()
        box.stop(f"r{number}")
        box.remove(f"r{number}")
    assert writer.sweep() == 0
    writer.check()


def test_switching_when_armed_is_caught(
    box: guest.Sandbox, writer: guest.Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above: the disks switched at the arm message, not at the barrier."""
    arm = client.Client.arm

    def arm_and_switch(self: client.Client, *words: object, **more: object) -> object:
        result = arm(self, *words, **more)  # type: ignore[arg-type]
        self.switch("now")
        return result

    writer.send("rate 0")
    monkeypatch.setattr(client.Client, "arm", arm_and_switch)
    vm = paths.home(box.home).vm("v")
    caught = 0
    for number in range(5):
        name = f"early{number}"
        with stores.Store.open_or_init(box.home / "store") as store:
            runner.take(vm, definition.load(vm), store, runner.CheckpointOptions(name=name), lambda *_: None)
        console, mismatches = resume_and_compare(box, f"v@{name}", name)
        caught += mismatches
        if mismatches:
            assert any("kind=stale" in line for line in console.complaints())
        box.stop(name)
        if caught:
            break
    assert caught, "five checkpoints with the wrong instant and no mismatch: the guest's check is worth nothing"
    writer.send("rate 1500")
    assert writer.sweep() == 0


def until(peer: client.Client, wanted: str, seconds: float = 60) -> int:
    """Wait until checkpoint *wanted* is under way; how many are."""
    end = time.monotonic() + seconds
    while wanted not in (names := [one["checkpoint"] for one in peer.status()["rounds"]]):
        assert time.monotonic() < end, names
        time.sleep(0.02)
    return len(names)


def test_stacked_checkpoints_are_each_of_their_own_instant(box: guest.Sandbox, writer: guest.Console) -> None:
    """The next one begins while the disks of those before are still being copied (at 4 MB a second); all restore."""
    before = writer.beat()
    running, deepest = [], 0
    with client.Client.connect(paths.home(box.home).vm("v").control_socket) as peer:
        for number in range(4):
            running.append(box.start("checkpoint", "v", "--name", f"s{number}", "--rate", "4M", "--wait", "60"))
            deepest = max(deepest, until(peer, f"s{number}"))
    assert deepest >= 3, "they were to overlap"
    shown = box.json("status", "v")["vms"][0]
    assert [one["stage"] for one in shown["checkpoints"]][:1] == ["switched"] and shown["checkpoint"] == "s3"
    for process in running:
        output, complaint = process.communicate(timeout=180)
        assert process.returncode == 0, output + complaint
    assert box.json("status", "v")["vms"][0]["disks"][0]["overlay_bytes"] == 0
    writer.check()
    assert all(counted(box, f"s{number}") for number in range(4))
    for number in (0, 2, 3):
        console, mismatches = resume_and_compare(box, f"v@s{number}", f"p{number}")
        assert mismatches == 0, f"s{number}: {console.complaints()}"
        assert console.beat().token == before.token
        box.stop(f"p{number}")
        box.remove(f"p{number}")
    assert writer.sweep() == 0

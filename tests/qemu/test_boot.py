"""Does a checkpoint live?  Resumed apart, watched, pictured, and nothing of that stays."""

from __future__ import annotations

import dataclasses
import signal
import uuid
from pathlib import Path

import pytest

from blkckpt.memory import skeleton
from blkckpt.store import evidence, store
from tests.support import guest, mounted


@pytest.fixture(scope="module")
def console(box: guest.Sandbox) -> guest.Console:
    """``s@c``: a guest with a screen, pictured at its checkpoint, that goes on."""
    box.create("s", {"vda": 16 << 20})
    words = guest.machine(box.serial.path, "idle", memory=160, fill=1)
    box.run("run", "s", "--detach", "--", *words, "-vga", "std", "-netdev", "user,id=n", "-device", "e1000,netdev=n")
    console = box.serial.accept()
    console.wait_ready()
    taken = box.json("checkpoint", "s", "--name", "c", "--screenshot")
    assert taken["screenshot"]["source"] == "checkpoint"
    assert taken["stopped_ms"] < 2000
    return console


def everything(box: guest.Sandbox) -> tuple[set[int], list[str], list[str]]:
    """Processes, VMs and pins."""
    pins = [path.name for path in (box.home / "store/pins").glob("*")]
    return set(box.processes()), sorted(path.name for path in (box.home / "vms").iterdir()), sorted(pins)


def test_it_lives_and_nothing_of_that_stays(box: guest.Sandbox, console: guest.Console, tmp_path: Path) -> None:
    before = everything(box)
    found = box.json("verify", "--boot", "s@c")
    assert (found["boot"]["alive"], found["boot"]["sign"]) == (True, "console")
    assert found["screenshot"]["source"] == "boot"
    assert everything(box) == before
    assert box.json("show", "s@c")["boot"]["alive"]
    assert box.json("list", "s")["checkpoints"][0]["boot"]["sign"] == "console"
    console.beat()
    with mounted.mounted(box, tmp_path / "m"):
        picture = (tmp_path / "m/s/c/screenshot.png").read_bytes()
    assert picture.startswith(evidence.PNG)
    assert len(picture) == found["screenshot"]["size"]


def damaged(box: guest.Sandbox, name: str) -> None:
    """Checkpoint ``s@NAME``: as ``s@c``, its first device section of a version that no QEMU has."""
    with store.Store.open(box.home / "store") as place:
        one = place.manifest("s", "c")
        assert one.memory
        whole = skeleton.decode(place.image(one.memory.skeleton).read(0, one.memory.skeleton_size))
        at = 1 + 4 + 1 + whole.tail[5] + 4
        broken = dataclasses.replace(whole, tail=whole.tail[:at] + b"\0\0\xff\xff" + whole.tail[at + 4 :])
        data = skeleton.encode(broken)
        writer = place.image_writer(len(data), kind="memory")
        writer.write(0, data)
        memory = dataclasses.replace(one.memory, skeleton=writer.finish().image, skeleton_size=len(data))
        place.put_manifest(dataclasses.replace(one, name=name, id=uuid.uuid4().hex, memory=memory))


def test_a_damaged_one_does_not(box: guest.Sandbox, console: guest.Console) -> None:
    damaged(box, "d")
    before = everything(box)
    assert "s@d does not live: " in box.run("verify", "--boot", "s@d", code=6)
    assert everything(box) == before
    kept = box.json("show", "s@d")
    assert kept["boot"]["alive"] is False
    assert kept["boot"]["message"]
    assert kept["screenshot"] is None
    assert any((box.home / "store/evidence/s").glob("d.*"))
    box.run("rm", "s@d", "--yes", "--no-collect")
    assert not any((box.home / "store/evidence/s").glob("d.*"))


def test_usage(box: guest.Sandbox, console: guest.Console) -> None:
    assert "one checkpoint" in box.run("verify", "--boot", code=3)
    box.run("checkpoint", "s", "--name", "disks", "--disk-only")
    assert "disks only" in box.run("verify", "--boot", "s@disks", code=3)
    assert "--disk-only" in box.run("checkpoint", "s", "--disk-only", "--screenshot", code=3)


def test_interrupted_it_leaves_nothing(box: guest.Sandbox, console: guest.Console) -> None:
    before = everything(box)
    child = box.start("verify", "--boot", "s@c")
    mounted.eventually(lambda: list((box.home / "vms").glob("verify-*/vm.json")), "the VM to be made")
    child.send_signal(signal.SIGINT)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == 130, complaint
    assert everything(box) == before

"""Several machines from one checkpoint: each goes on by itself, with a network address and a generation of its own."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blkckpt import paths
from blkckpt.vm import dialogue
from tests.support import guest

CARD = "52:54:00:00:00:07"
ADDRESS = "/sys/class/net/eth0/address"
DRIVER = "/sys/bus/virtio/drivers/virtio_net"
DEVICE = "virtio0"
"""The card comes before the disk on the command line, and so on the bus."""


@pytest.fixture(scope="module")
def token(box: guest.Sandbox) -> str:
    """``v@c``: the writing guest with a virtio card and a generation id; the original goes on."""
    box.create("v", {"vda": 96 << 20})
    network = ["-netdev", "user,id=n0", "-device", f"virtio-net-pci,netdev=n0,mac={CARD}"]
    command = guest.machine(box.serial.path, "writer", memory=192, rate=400)
    box.run("run", "v", "--detach", "--", *command, *network, "-device", "vmgenid,guid=auto")
    console = box.serial.accept()
    token = console.wait_ready()
    console.beat()
    box.run("checkpoint", "v", "--name", "c")
    assert console.file(ADDRESS) == CARD
    return token


@pytest.fixture(scope="module")
def forks(box: guest.Sandbox, token: str) -> Iterator[tuple[dict[str, Any], list[guest.Console]]]:
    """What ``fork`` said, and the consoles in the order in which they connected."""
    said = box.json("fork", "v@c", "-n", "2", "--as", "f")
    yield said, [box.serial.accept() for _ in said["forks"]]
    for one in said["forks"]:
        box.stop(one["vm"])
        box.remove(one["vm"])


def ask(box: guest.Sandbox, name: str, command: str) -> Any:
    """QMP command of the QEMU of VM *name*."""
    with dialogue.Dialogue(paths.home(box.home).vm(name).qmp_socket) as session:
        return session.execute(command)


def test_each_goes_on_by_itself(box: guest.Sandbox, token: str, forks: tuple[Any, list[guest.Console]]) -> None:
    for console in forks[1]:
        first = console.beat()
        assert first.token == token, "the guest was booted, not resumed"
        assert console.sweep() == 0, console.complaints()
        assert console.beat().writes > first.writes
        console.check()
    disks = {box.json("vm", "show", one["vm"])["disks"][0]["path"] for one in forks[0]["forks"]}
    assert len(disks) == 2
    listed = {one["name"]: one["from"] for one in box.json("vm", "list")["vms"]}
    assert listed == {"v": None, "f-1": "v@c", "f-2": "v@c"}
    assert {"f-1", "f-2"} <= set(box.run("list", "--tree").split())


def test_memory_images_are_one_file(box: guest.Sandbox, forks: tuple[Any, list[guest.Console]]) -> None:
    inodes = set()
    for one in forks[0]["forks"]:
        lines = Path(f"/proc/{one['machine']}/maps").read_text().splitlines()
        inodes |= {line.split()[4] for line in lines if "/incoming/" in line}
    (image,) = (box.home / "vms/v/memory/c").glob("*.raw")
    assert inodes == {str(image.stat().st_ino)}


def test_generations_differ(box: guest.Sandbox, forks: tuple[Any, list[guest.Console]]) -> None:
    names = ["v", *(one["vm"] for one in forks[0]["forks"])]
    assert len({ask(box, name, "query-vm-generation-id")["guid"] for name in names}) == 3


def test_addresses(box: guest.Sandbox, forks: tuple[Any, list[guest.Console]]) -> None:
    """QEMU has the new one at once and lets everything pass; the guest has it when its driver is bound anew."""
    said = {one["vm"]: one["cards"][0]["new"] for one in forks[0]["forks"]}
    assert len({CARD, *said.values()}) == 3
    for name, address in said.items():
        (found,) = ask(box, name, "query-rx-filter")
        assert (found["main-mac"], found["unicast"]) == (address, "all")
    seen = set()
    for console in forks[1]:
        assert console.file(ADDRESS) == CARD
        console.file(f"{DRIVER}/unbind", DEVICE)
        console.file(f"{DRIVER}/bind", DEVICE)
        seen.add(console.file(ADDRESS))
    assert seen == set(said.values())
    for name, address in said.items():
        (found,) = ask(box, name, "query-rx-filter")
        assert (found["main-mac"], found["unicast"]) == (address, "normal")


def test_one_without_a_screen_lives(box: guest.Sandbox, token: str) -> None:
    found = box.json("verify", "--boot", "v@c")
    assert found["boot"]["alive"]
    assert found["screenshot"] is None
    box.serial.drop_pending()


def vms(box: guest.Sandbox) -> list[str]:
    return sorted(path.name for path in (box.home / "vms").iterdir())


def test_all_or_none(box: guest.Sandbox, token: str) -> None:
    """A name that is taken, QEMU that refuses, and Ctrl-C: no machine, no process is left."""
    before, processes = vms(box), set(box.processes())
    (box.home / "vms/taken-2").mkdir(mode=0o700)
    (box.home / "vms/taken-2/vm.json").write_text("{}")
    assert "taken-2 exists already" in box.run("fork", "v@c", "-n", "2", "--as", "taken", code=5)
    shutil.rmtree(box.home / "vms/taken-2")
    box.run("fork", "v@c", "-n", "2", "--as", "bad", "--", "-device", "no-such-device", code=7)
    assert vms(box) == before
    child = box.start("fork", "v@c", "-n", "3", "--as", "cut")
    deadline = time.monotonic() + 60
    while not (box.home / "vms/cut-3/vm.json").exists():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == 130, complaint
    assert vms(box) == before
    assert set(box.processes()) <= processes
    box.serial.drop_pending()


def test_what_only_one_machine_can_have_is_refused(box: guest.Sandbox, token: str) -> None:
    words = ["--", "-netdev", "tap,id=t,ifname=tap7", "-device", "e1000,netdev=t"]
    assert "--network isolated" in box.run("fork", "v@c", "-n", "2", "--as", "t", *words, code=3)

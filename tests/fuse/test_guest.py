"""A real guest's checkpoint, looked at with what others wrote, and its memory served to QEMU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import paths
from blkckpt.view import elf, mounts, physical
from tests.support import guest, mounted

MEMORY = 192
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not guest.ready(), reason="no guest image; run tools/guest-image"),
]


def filesystem(path: Path) -> None:
    """An ext4 with some files, made without root."""
    source = path.with_name("source")
    (source / "etc").mkdir(parents=True)
    (source / "etc/motd").write_text("hello from the guest\n" * 500)
    (source / "big").write_bytes(bytes(range(256)) * 4096)
    (source / "link").symlink_to("etc/motd")
    path.write_bytes(b"")
    os.truncate(path, 24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", source, path], check=True)


@pytest.fixture(scope="module")
def console(box: guest.Sandbox, tmp_path_factory: pytest.TempPathFactory) -> guest.Console:
    """VM "v": vda is written by the guest all the time, vdb holds a file system that nobody writes to."""
    disks = box.create("v", {"vda": 64 << 20, "vdb": 24 << 20})
    filesystem(tmp_path_factory.mktemp("files") / "ext4")
    made = next(Path(tmp_path_factory.getbasetemp()).glob("files*/ext4"))
    disks["vdb"].write_bytes(made.read_bytes())
    console = box.boot("v", "writer", memory=MEMORY, rate=800, fill=16)
    box.run("checkpoint", "v", "--name", "one")
    return console


@pytest.fixture(scope="module")
def one(box: guest.Sandbox, console: guest.Console, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint's directory in a mount for all tests of the module."""
    with mounted.mounted(box, tmp_path_factory.mktemp("guest") / "view") as directory:
        yield directory / "v/one"


def test_the_disk_is_a_file_system(one: Path, tmp_path: Path) -> None:
    disk = one / "disks/vdb.img"
    mounted.run("e2fsck", "-fn", disk)
    (tmp_path / "disk").mkdir()
    if os.geteuid() == 0:
        mounted.run("mount", "-o", "loop,ro,noload", disk, tmp_path / "disk")
        try:
            assert (tmp_path / "disk/etc/motd").read_text() == "hello from the guest\n" * 500
        finally:
            mounted.run("umount", tmp_path / "disk")


def test_the_guests_files(one: Path, tmp_path: Path) -> None:
    pytest.importorskip("dissect.extfs")
    files = one / "disks/vdb.files"
    assert (files / "etc/motd").read_text() == "hello from the guest\n" * 500
    assert (files / "big").read_bytes() == bytes(range(256)) * 4096
    assert (files / "link").readlink() == Path("etc/motd")
    assert (files / "big").stat().st_size == 1 << 20
    mounted.run("tar", "-cf", tmp_path / "tar", "-C", files, "etc", "big", "link")
    with pytest.raises(FileNotFoundError):
        (files / "etc/none").stat()


def test_memory_is_that_of_the_machine(one: Path) -> None:
    ram = (one / "memory/ram.img").read_bytes()
    assert len(ram) == MEMORY << 20
    assert b"Linux version " in ram
    assert (one / "memory/blocks/pc.ram.img").read_bytes() == ram
    assert (one / "memory/guest-physical.raw").read_bytes() == ram  # all of it is below the hole
    assert (one / "memory/core.elf").read_bytes()[elf.HEAD :] == ram
    assert (one / "memory/blocks/pc.bios.img").stat().st_size == 256 << 10
    # fw_cfg hands the guest the tables that the block holds
    assert (one / "memory/blocks/_rom_etc_acpi_tables.img").read_bytes()[:4] in (b"FACS", b"DSDT")


def test_device_state_is_decoded(one: Path) -> None:
    decoded = json.loads((one / "device-state.json").read_text())
    raw = (one / "device-state.bin").read_bytes()
    assert [each["name"] for each in decoded["devices"] if "undecoded" in each] == []
    names = [each["name"] for each in decoded["devices"]]
    assert names[:3] == ["timer", "cpu_common", "cpu"]
    assert names.count("0000:00:01.0/virtio-blk") == names.count("0000:00:02.0/virtio-blk") == 1
    cpu = next(each for each in decoded["devices"] if each["name"] == "cpu")["fields"]
    assert cpu["env.eip"].to_bytes(8) in raw
    assert cpu["env.cr[0]"] & 0x80000001 == 0x80000001  # protected mode, paging
    assert cpu["env.eip"] >> 63 == 1 or cpu["env.eip"] < 1 << 47


def test_debuggers_open_the_core(one: Path) -> None:
    core = one / "memory/core.elf"
    text = mounted.run("readelf", "-a", core)
    assert "CORE (Core file)" in text and "NT_PRSTATUS" in text and "QEMU" in text
    loads = re.findall(r"LOAD\s+0x(\w+) 0x\w+ 0x(\w+)\s+0x(\w+)", text)
    assert [tuple(int(number, 16) for number in load) for load in loads] == [(elf.HEAD, 0, MEMORY << 20)]
    decoded = json.loads((one / "device-state.json").read_text())
    cpu = next(each for each in decoded["devices"] if each["name"] == "cpu")["fields"]
    shown = mounted.run("gdb", "-batch", "-nx", "-ex", "info registers", "-c", core)
    registers = dict(re.findall(r"^(\w+)\s+(0x\w+)", shown, re.M))
    assert int(registers["rip"], 16) == cpu["env.eip"]
    for name, value in elf.registers(cpu).items():
        assert int(registers[name], 16) == value, name


@pytest.mark.parametrize(("kind", "name"), [("elf", "core.elf"), ("physical", "guest-physical.raw")])
def test_an_export_is_what_the_mount_shows(box: guest.Sandbox, one: Path, tmp_path: Path, kind: str, name: str) -> None:
    target = tmp_path / f"memory.{kind}"
    said = box.json("export", f"v@{one.name}", "--memory", "--format", kind, "-o", target)
    assert said["size"] == target.stat().st_size
    assert target.stat().st_blocks * 512 < target.stat().st_size
    mounted.run("cmp", target, one / "memory" / name)


VOLATILITY = """
import sys
from volatility3.framework import contexts
from volatility3.framework.layers import elf, physical
context = contexts.Context()
context.config["base.location"] = "file://" + sys.argv[1]
context.add_layer(physical.FileLayer(context, "base", "base"))
top = "base"
if sys.argv[2] == "elf":
    assert elf.Elf64Stacker.stack(context, "base") is not None
    context.config["core.base_layer"] = "base"
    top = elf.Elf64Layer(context, "core", "core")
    context.add_layer(top)
    top = "core"
layer = context.layers[top]
found = b"Linux version "
from volatility3.framework.layers import scanners
hits = list(layer.scan(context, scanners.BytesScanner(found)))
print(layer.maximum_address, len(hits), layer.read(hits[0], 40).decode("ascii", "replace"))
"""


@pytest.mark.parametrize(("name", "kind"), [("core.elf", "elf"), ("guest-physical.raw", "raw")])
def test_volatility_finds_the_banner(one: Path, name: str, kind: str) -> None:
    """The physical layer is right: as long as memory, and the kernel's banner at the same address in both."""
    pytest.importorskip("volatility3")
    path = one / "memory" / name
    text = mounted.run(sys.executable, "-c", VOLATILITY, path, kind)
    top, hits, banner = text.split(" ", 2)
    assert int(top) == (MEMORY << 20) - 1
    assert int(hits) > 0 and banner.startswith("Linux version ")


@pytest.mark.parametrize(
    ("machine", "size"),
    [
        ("q35", 2815), ("q35", 2816), ("q35", 5000), ("q35,max-ram-below-4g=1G", 3000),
        ("pc", 3583), ("pc", 3584), ("pc", 3072), ("pc-i440fx-1.7", 4096), ("pc,max-ram-below-4g=2G", 3000),
    ],
)  # fmt: skip
def test_memory_lies_where_qemu_puts_it(machine: str, size: int) -> None:
    command = ["qemu-system-x86_64", "-machine", machine, "-m", str(size), "-accel", "tcg", "-S", "-nodefaults",
               "-display", "none", "-monitor", "stdio"]  # fmt: skip
    text = subprocess.run(command, input="info mtree\nquit\n", capture_output=True, text=True, timeout=60).stdout
    if not text:
        pytest.skip(f"this QEMU has no {machine}")
    places = dict(re.findall(r"-([0-9a-f]{16}) \(.*alias ram-(below|above)-4g", text))
    low = next(int(end, 16) + 1 for end, which in places.items() if which == "below")
    limit = {"1G": 1 << 30, "2G": 2 << 30}.get(machine.rpartition("=")[2])
    assert physical.below_4g(machine.partition(",")[0], size << 20, limit) == low


@pytest.fixture
def lazy(box: guest.Sandbox, console: guest.Console, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a VM restored with its memory from the store."""
    name = re.sub(r"\W+", "-", request.node.name)[:40]
    yield name
    box.run("stop", name)
    mounts.clear(paths.home(box.home))
    box.remove(name)


def record(box: guest.Sandbox, user: str) -> dict[str, object]:
    return next(one for one in box.json("mount")["mounts"] if one["user"] == user)


def test_memory_straight_from_the_store(box: guest.Sandbox, lazy: str) -> None:
    """The guest goes on, finds all its memory, and the mount ends with it."""
    copy = box.restore("v@one", lazy, "--memory", "fuse")
    assert copy.sweep() == 0
    copy.check()
    place = paths.home(box.home).vm(lazy)
    assert not list((place.root / "incoming").glob("*.raw"))
    mount = record(box, lazy)
    assert "prefetch" in box.json("status", lazy)["vms"][0]["warning"]
    assert mount["directory"] == str(place.run / "memory")
    touched = box.home / "touched"
    mounted.eventually(lambda: touched.is_dir() and list(touched.glob("*.json")), "a note of what was touched first")
    box.run("stop", lazy)
    mounted.eventually(lambda: str(place.run / "memory") not in Path("/proc/self/mountinfo").read_text(), "its end")
    mounted.eventually(lambda: all(one["user"] != lazy for one in box.json("mount")["mounts"]), "the record's end")


def test_prefetch_ends_the_dependence(box: guest.Sandbox, lazy: str) -> None:
    """After it the mount's process may be killed and its page cache dropped: the guest still has all its memory."""
    copy = box.restore("v@one", lazy, "--memory", "fuse", "--prefetch")
    mount = record(box, lazy)
    assert mount["prefetched"] is True
    assert box.json("status", lazy)["vms"][0]["warning"] is None
    os.kill(int(str(mount["pid"])), signal.SIGKILL)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    assert copy.sweep() == 0
    copy.check()


def test_the_death_of_the_mount_is_said(box: guest.Sandbox, lazy: str) -> None:
    box.restore("v@one", lazy, "--memory", "fuse")
    os.kill(int(str(record(box, lazy)["pid"])), signal.SIGKILL)
    state = box.json("status", lazy)["vms"][0]
    assert state["state"] == "stopped" or "killed" in state["warning"]


def test_options_that_do_not_go_together(box: guest.Sandbox, console: guest.Console) -> None:
    assert "--prefetch goes with" in box.run("restore", "v@one", "--prefetch", "--detach", code=3)
    assert "lazy restore" in box.run("restore", "v@one", "--memory", "fuse", "--mode", "eager", code=3)
    assert "not read from a mount" in box.run("prefetch", "v", code=5)


def test_the_restored_disk_is_the_same(box: guest.Sandbox, one: Path, lazy: str) -> None:
    box.restore("v@one", lazy)
    socket = paths.home(box.home).vm(lazy).nbd_socket
    served = f"nbd+unix:///vdb?socket={socket}"
    mounted.run("qemu-img", "compare", "-f", "raw", "-F", "raw", served, one / "disks/vdb.img")

"""Command lines as people and tools write them: parsed, rendered back unchanged, rewritten for a copy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.agent import qemuargs
from blkckpt.vm import commandline, qemuopts

NBD = Path("/run/blkckpt/ab/new/nbd.sock")
QMP = Path("/run/blkckpt/ab/new/qmp.sock")
OLD = "/run/blkckpt/ab/old"
RAM = {"pc.ram": Path("/home/ckpt/pc.ram.raw")}


def words(text: str) -> list[str]:
    return text.split()


SIMPLE = words(
    "qemu-system-x86_64 -machine q35,accel=kvm -cpu host -m 2G -nodefaults -display none -no-reboot "
    "-kernel /boot/vmlinuz -serial stdio "
    f"-blockdev driver=nbd,node-name=vda,server.type=unix,server.path={OLD}/nbd.sock,export=vda,reconnect-delay=300 "
    f"-device virtio-blk-pci,drive=vda -qmp unix:{OLD}/qmp.sock,server=on,wait=off"
)

DESKTOP = [
    *words("/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -M pc -enable-kvm"),
    *words("-m size=4096,slots=4,maxmem=16G -smp 4 -daemonize -pidfile /run/web.pid -vnc :0 -S -D /tmp/log"),
    *words("-monitor telnet::4444,server,nowait -netdev user,id=n0,hostfwd=tcp::2222-:22,hostfwd=tcp::8080-:80"),
    *words("-device e1000,netdev=n0,mac=52:54:00:1:2:3"),
    *words(f"-drive file=nbd+unix:///vda?socket={OLD}/nbd.sock,if=virtio,format=raw,cache=none"),
    *["-append", "console=ttyS0 root=/dev/vda rw,,odd"],
    *words("-serial mon:unix:/tmp/console.sock,server=on,wait=off"),
    *words("-chardev socket,id=ga,path=/tmp/ga.sock,server=on,wait=off,logfile=/tmp/ga.log -device virtio-serial"),
    *words("-device virtserialport,chardev=ga,name=org.qemu.guest_agent.0 -gdb tcp::1234 -s"),
    *words(f"-qmp unix:/tmp/other.sock,server,nowait -qmp unix:{OLD}/qmp.sock,server=on,wait=off -incoming defer"),
    *words("-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
]

LIBVIRT = [
    *words("/usr/bin/qemu-system-x86_64 -name guest=db,debug-threads=on"),
    *words("-machine pc-q35-7.2,usb=off,memory-backend=pc.ram -object"),
    json.dumps({"qom-type": "memory-backend-ram", "id": "pc.ram", "size": 2147483648}),
    "-blockdev",
    json.dumps({"driver": "nbd", "server": {"type": "unix", "path": f"{OLD}/nbd.sock"}, "export": "vda",
                "node-name": "n1", "read-only": False}),
    "-device", json.dumps({"driver": "virtio-blk-pci", "drive": "n1", "id": "virtio-disk0"}),
    "-device", json.dumps({"driver": "vmgenid", "guid": "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", "id": "v0"}),
    *words("-chardev socket,id=charmonitor,fd=33,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control"),
    *words("-netdev tap,fd=35,id=hostnet0,vhost=on,vhostfd=37 -sandbox on,obsolete=deny"),
]  # fmt: skip

ALL = {"simple": SIMPLE, "desktop": DESKTOP, "libvirt": LIBVIRT}


def copy(argv: list[str], **options: object) -> list[str]:
    given: dict[str, object] = {"nbd_socket": NBD, "qmp_socket": QMP, "memory": {}, "incoming": "defer", "paused": True}
    return list(commandline.rewrite(argv, **(given | options)))  # type: ignore[arg-type]


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == f"-{option}"]


# --- parsing ---


@pytest.mark.parametrize("argv", ALL.values(), ids=ALL.keys())
def test_rendered_back_unchanged(argv: list[str]) -> None:
    assert list(qemuopts.render(*qemuopts.parse(argv))) == argv


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(st.lists(st.tuples(WORD, st.none() | WORD), min_size=1, max_size=6))
def test_list_values_round_trip(pairs: list[tuple[str, str | None]]) -> None:
    """Whatever is in a key or value, commas included, is read back from its text."""
    # A key cannot begin with a comma: after the item before it that would be a doubled one.
    items = tuple(qemuopts.Item("k" + key.replace("=", "-"), value) for key, value in pairs)
    assert qemuopts.Items.parse(qemuopts.Items(items).text()).items == items


def test_flags_and_long_options() -> None:
    _, options = qemuopts.parse(["qemu", "--enable-kvm", "disk.img", "--machine", "q35", "-S"])
    assert [(option.name, option.value) for option in options] == [
        ("enable-kvm", None), ("", "disk.img"), ("machine", "q35"), ("S", None),
    ]  # fmt: skip


@pytest.mark.parametrize("argv", [[], ["qemu", "-m"]])
def test_not_a_command_line(argv: list[str]) -> None:
    with pytest.raises(errors.InputError):
        qemuopts.parse(argv)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("-m 512", 512 << 20), ("-m 2G", 2 << 30), ("-m size=1024,slots=2,maxmem=8G", 1 << 30), ("", 128 << 20),
        ("-m 256 -m 1G", 1 << 30), ("-m 4194304k", 4 << 30), ("-m 1.5G", 3 << 29),
    ],
)  # fmt: skip
def test_memory_size(words: str, size: int) -> None:
    assert commandline.ram_size(["qemu", *words.split()]) == size


def test_flags_are_those_of_the_installed_qemu() -> None:
    """Every option that QEMU's own help shows without an argument is known as a flag, and no other is."""
    text = subprocess.run(["qemu-system-x86_64", "--help"], capture_output=True, text=True, timeout=30).stdout
    for line in text.splitlines():
        words = line.split()
        if not line.startswith("-") or line.startswith("-h "):
            continue
        names = [word.lstrip("-") for word in words[0].split("/")]
        shown_alone = len(words) == 1 or line[len(words[0]) :].startswith("  ")
        for name in names:
            if name in qemuopts.FLAGS:
                assert not line[len(words[0]) + 1 :].startswith(("dev", "file", "id")), line
            elif shown_alone and name not in ("dtb", "seed", "audio"):
                pytest.fail(f"QEMU shows -{name} without an argument: {line}")


# --- rewriting ---


def test_what_run_writes_is_rewritten_to_what_run_would_write() -> None:
    """The two ends agree: the copy's disks and QMP socket are those that `run` gives the new VM."""
    plain = ["qemu-system-x86_64", "-machine", "q35", "-m", "256"]
    old = qemuargs.with_disks(plain, ["vda", "vdb"], Path(OLD, "nbd.sock"), Path(OLD, "qmp.sock"))
    new = qemuargs.with_disks(plain, ["vda", "vdb"], NBD, QMP)
    assert copy(old, incoming=None, paused=False) == new


def test_simple() -> None:
    new = copy(SIMPLE, memory=RAM, machine_type="pc-q35-7.2")
    assert values(new, "machine") == ["pc-q35-7.2,accel=kvm,memory-backend=pc.ram"]
    assert values(new, "object") == [
        "memory-backend-file,id=pc.ram,size=2147483648,mem-path=/home/ckpt/pc.ram.raw,share=off,"
        "x-use-canonical-path-for-ramblock-id=off"
    ]
    assert f"server.path={NBD}" in values(new, "blockdev")[0]
    assert values(new, "qmp") == [f"unix:{QMP},server=on,wait=off"]
    assert values(new, "incoming") == ["defer"]
    assert new[-1] == "-S"
    assert OLD not in " ".join(new)
    kept = ["-cpu", "host", "-m", "2G", "-nodefaults", "-serial", "stdio", "-device", "virtio-blk-pci,drive=vda"]
    assert [word for word in new if word in kept] == [word for word in SIMPLE if word in kept]


def test_desktop() -> None:
    new = copy(DESKTOP, machine_type="pc-i440fx-7.2", name="copy")
    text = " ".join(new)
    assert OLD not in text
    assert "/tmp/" not in text
    for gone in ("-daemonize", "-pidfile", "-D", "-gdb", "-s"):
        assert gone not in new
    assert values(new, "M") == ["pc-i440fx-7.2"]
    assert values(new, "name") == ["copy"]
    assert values(new, "drive") == [f"file=nbd+unix:///vda?socket={NBD},if=virtio,format=raw,cache=none"]
    assert values(new, "netdev") == ["user,id=n0"]
    assert values(new, "monitor") == ["null"]
    assert values(new, "serial") == [f"mon:unix:{QMP.parent}/console.sock,server=on,wait=off"]
    assert values(new, "chardev") == [
        f"socket,id=ga,path={QMP.parent}/ga.sock,server=on,wait=off,logfile={QMP.parent}/ga.log"
    ]
    assert values(new, "vnc") == [":0,to=99"]
    assert values(new, "qmp") == [f"unix:{QMP},server=on,wait=off"]
    assert values(new, "append") == ["console=ttyS0 root=/dev/vda rw,,odd"]
    assert "vmgenid,guid=auto" in values(new, "device")
    assert new.count("-S") == 1
    assert values(new, "incoming") == ["defer"]


def test_libvirt() -> None:
    new = copy(LIBVIRT, memory={"/objects/pc.ram": Path("/raw")}, machine_type="pc-q35-7.2")
    backend = json.loads(values(new, "object")[0])
    assert backend == {
        "qom-type": "memory-backend-file", "id": "pc.ram", "size": 2147483648, "mem-path": "/raw", "share": False,
    }  # fmt: skip
    assert json.loads(values(new, "blockdev")[0])["server"]["path"] == str(NBD)
    assert json.loads(values(new, "device")[1])["guid"] == "auto"
    assert values(new, "device")[0] == LIBVIRT[LIBVIRT.index("-device") + 1]


def test_every_device_stays() -> None:
    for argv in ALL.values():
        new = copy(argv, memory={}, machine_type="pc-q35-7.2")
        drivers = [qemuopts.member(value, "driver", "driver") for value in values(argv, "device")]
        assert [qemuopts.member(value, "driver", "driver") for value in values(new, "device")] == drivers


@pytest.mark.parametrize("argv", [SIMPLE, DESKTOP], ids=["simple", "desktop"])
def test_a_copy_of_a_copy(argv: list[str]) -> None:
    """A lazily restored guest is checkpointed and restored again: nothing piles up, no old image is named."""
    first = copy(argv, memory=RAM, machine_type="pc-q35-7.2", name="one")
    again = copy(first, memory={"pc.ram": Path("/other.raw")}, machine_type="pc-q35-7.2", name="two")
    assert again == copy(argv, memory={"pc.ram": Path("/other.raw")}, machine_type="pc-q35-7.2", name="two")
    eager = copy(first, machine_type="pc-q35-7.2", name="two")
    assert sorted(eager) == sorted(copy(argv, machine_type="pc-q35-7.2", name="two"))
    assert commandline.mappable(first, ["pc.ram"]) == ("pc.ram",)


def test_two_sockets_of_one_name() -> None:
    argv = ["q", "-serial", "unix:/a/x,server=on", "-serial", "unix:/b/x,server=on", "-serial", "unix:/c/y"]
    run = QMP.parent
    assert values(copy(argv), "serial") == [f"unix:{run}/x,server=on", f"unix:{run}/2-x,server=on", "unix:/c/y"]


def test_names_with_commas() -> None:
    odd = Path("/run/a,b/qmp.sock")
    new = copy(["q", "-blockdev", "driver=nbd,node-name=a,server.path=/x,,y/nbd.sock"], qmp_socket=odd,
               nbd_socket=Path("/run/a,b/nbd.sock"))  # fmt: skip
    assert values(new, "qmp") == ["unix:/run/a,,b/qmp.sock,server=on,wait=off"]
    assert values(new, "blockdev") == ["driver=nbd,node-name=a,server.path=/run/a,,b/nbd.sock"]


@pytest.mark.parametrize(
    ("words", "block", "can"),
    [
        ("-m 1G", "pc.ram", True),
        ("-m 1G", "vga.vram", False),
        ("-M virt -m 1G", "mach-virt.ram", True),
        ("-object memory-backend-ram,id=m0,size=1G -M q35,memory-backend=m0", "/objects/m0", True),
        ("-object memory-backend-ram,id=m0,size=1G -M q35,memory-backend=m0", "pc.ram", False),
        ("-object memory-backend-memfd,id=m0,size=1G -M q35,memory-backend=m0", "/objects/m0", False),
        ("-object memory-backend-memfd,id=m0,size=1G,share=off -M q35,memory-backend=m0", "/objects/m0", True),
        ("-object memory-backend-file,id=m0,size=1G,mem-path=/dev/shm/x,share=on", "/objects/m0", False),
        ("-object memory-backend-ram,id=r0,size=1G -numa node,memdev=r0", "/objects/r0", True),
        ("-m 1G -numa node,mem=512", "pc.ram", False),
    ],
)
def test_what_can_be_mapped(words: str, block: str, can: bool) -> None:
    assert commandline.mappable(["qemu", *words.split()], [block]) == ((block,) if can else ())


def test_files_of_the_working_directory() -> None:
    argv = ["qemu", "-kernel", "bzImage", "-initrd", "../i.img", "-cdrom", "/abs.iso", "disk.img", "-bios", "none.bin"]
    assert commandline.absolute(argv, "/srv/vm") == (
        "qemu", "-kernel", "/srv/vm/bzImage", "-initrd", "/srv/i.img", "-cdrom", "/abs.iso", "/srv/vm/disk.img",
        "-bios", "none.bin",
    )  # fmt: skip


# --- what cannot be put right ---


def test_nothing_to_say_about_our_own() -> None:
    assert commandline.review(SIMPLE) == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-drive file=data.qcow2,if=virtio", "not part of the checkpoint"),
        ("-hda x.img", "not part of the checkpoint"),
        ("x.img", "not part of the checkpoint"),
        ("-blockdev driver=file,node-name=f,filename=x", "not part of the checkpoint"),
        ("-netdev tap,id=n,ifname=tap0", "interface"),
        ("-netdev tap,id=n,fd=7", "descriptor"),
        ("-netdev user,id=n,hostfwd=tcp::1-:2", "hostfwd"),
        ("-spice port=5900", "port"),
        ("-device vfio-pci,host=01:00.0", "one guest only"),
    ],
)
def test_remarks(words: str, said: str) -> None:
    (note,) = commandline.review(["qemu", *words.split()])
    assert said in note


@pytest.mark.parametrize(
    "words",
    ["-cdrom x.iso", "-drive file=x.iso,media=cdrom", "-drive file=x,readonly=on", "-netdev user,id=n",
     "-blockdev driver=file,node-name=f,filename=x,read-only=on", "-drive if=none,id=empty"],
)  # fmt: skip
def test_no_remark(words: str) -> None:
    assert commandline.review(["qemu", *words.split()]) == ()

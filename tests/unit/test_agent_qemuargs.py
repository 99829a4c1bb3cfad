"""QEMU's command line with our disks added."""

from __future__ import annotations

from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.agent import qemuargs

NBD, QMP = Path("/run/x/nbd.sock"), Path("/run/x/qmp.sock")


def test_disks_and_qmp_are_added() -> None:
    assert qemuargs.with_disks(["qemu", "-m", "1G"], ["vda", "data"], NBD, QMP) == [
        "qemu", "-m", "1G",
        "-blockdev", "driver=nbd,node-name=vda,server.type=unix,server.path=/run/x/nbd.sock,export=vda,"
        "reconnect-delay=300,discard=unmap",
        "-device", "virtio-blk-pci,drive=vda",
        "-blockdev", "driver=nbd,node-name=data,server.type=unix,server.path=/run/x/nbd.sock,export=data,"
        "reconnect-delay=300,discard=unmap",
        "-device", "virtio-blk-pci,drive=data",
        "-qmp", "unix:/run/x/qmp.sock,server=on,wait=off",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "device",
    [
        "virtio-blk-pci,drive=vda",
        "scsi-hd,drive=vda,bootindex=1",
        "drive=vda,driver=virtio-blk-pci",
        '{"driver": "virtio-blk-pci", "drive": "vda"}',
        "virtio-blk-pci,serial=a,,b,drive=vda",
    ],
)
@pytest.mark.parametrize("option", ["-device", "--device"])
def test_the_users_own_device_is_kept(option: str, device: str) -> None:
    added = qemuargs.with_disks(["qemu", option, device], ["vda"], NBD, QMP)[3:]
    assert [word for word in added if word.startswith("-")] == ["-blockdev", "-qmp"]


@pytest.mark.parametrize(
    "device",
    [
        "virtio-blk-pci,drive=vdb",
        "virtio-blk-pci,drive=vda2",
        "virtio-blk-pci,serial=a,,drive=vda",
        "virtio-net-pci,netdev=vda",
        '{"driver": "virtio-blk-pci", "drive": ',
        '["drive", "vda"]',
    ],
)
def test_another_device_is_not_ours(device: str) -> None:
    assert "virtio-blk-pci,drive=vda" in qemuargs.with_disks(["qemu", "-device", device], ["vda"], NBD, QMP)[3:]


def test_a_node_of_our_name_is_refused() -> None:
    with pytest.raises(errors.InputError, match="node-name vda already"):
        qemuargs.with_disks(["qemu", "-blockdev", "driver=null-co,node-name=vda"], ["vda"], NBD, QMP)


def test_commas_are_doubled() -> None:
    added = qemuargs.with_disks(["qemu"], ["vda"], Path("/run/a,b/nbd.sock"), Path("/run/a,b/qmp.sock"))
    assert "server.path=/run/a,,b/nbd.sock,export" in added[2]
    assert added[-1] == "unix:/run/a,,b/qmp.sock,server=on,wait=off"


def test_no_command() -> None:
    with pytest.raises(errors.InputError, match="qemu-system"):
        qemuargs.with_disks([], ["vda"], NBD, QMP)

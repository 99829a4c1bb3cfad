"""Pins of restored VMs end when their disks need the store no longer."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from blkckpt import paths
from blkckpt.agent import forget
from blkckpt.control import host
from blkckpt.disk import group
from blkckpt.restore import disks
from blkckpt.store import manifest, store

SIZE = 1 << 20


def checkpoint(kept: store.Store, data: bytes) -> manifest.Manifest:
    with kept.hold():
        with kept.image_writer(len(data)) as writer:
            writer.write(0, data)
            image = writer.finish().image
        made = manifest.Manifest(
            vm="web", name="a", id=uuid.uuid4().hex, created_ns=1, disks=(manifest.DiskImage("vda", image, len(data)),)
        )
        kept.put_manifest(made)
    return made


def test_a_pin_ends_with_the_fill(tmp_path: Path) -> None:
    """Rule R5: the images of a restored disk stay as long as it reads from them, and no longer."""
    home = paths.Home(tmp_path, tmp_path / "run", tmp_path / "live")
    data = bytes(range(256)) * (SIZE // 256)
    with store.Store.init(home.store) as kept:
        taken = checkpoint(kept, data)
        vm = home.vm("copy")
        with disks.reserved(vm, kept, "web@a"):
            disks.create(vm, kept, taken)
        kept.remove("web", "a")
        forget.let_go(home)
        assert list(kept.pins().values()) == [[taken.disks[0].image]]
        kept.collect()

        opened = group.DiskGroup.open(vm, open_image=host.open_image)
        opened.start()
        limit = time.monotonic() + 20
        while opened.status().disks[0].source is not None:
            assert time.monotonic() < limit, opened.status()
            time.sleep(0.01)
        found = bytearray(SIZE)
        opened.disks["vda"].pread(found, 0)
        opened.close()
        assert found == data
        forget.let_go(home)
        assert kept.pins() == {}
        assert kept.collect().images == 1

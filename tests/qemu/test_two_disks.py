"""All disks of a VM switch at one instant.

The guest completes record n on one disk before it sends record n to the other (``mode=ordered``), in both directions
at once.  Whatever the instant, the disk written second never holds a record that the first one lacks.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from blkckpt.store import store as stores
from tests.support import guest
from tests.support.records import Ring, read_ring

SPAN = 32 << 20


def check_order(first: Ring, second: Ring) -> None:
    """Every record on the disk written *second* is on the one written *first*, or overwritten there by a newer one."""
    assert second.newest > 0, "nothing was written before the checkpoint"
    assert second.newest <= first.newest <= second.newest + 1
    assert (first.slots >= second.slots).all()


@pytest.fixture(scope="module")
def ordered(box: guest.Sandbox) -> guest.Console:
    box.create("w", {"vda": SPAN, "vdb": SPAN})
    return box.boot("w", "ordered", memory=128, rate=0, span=SPAN >> 20)


@pytest.mark.parametrize(
    "kind", [[], ["--disk-only"], ["--pause", "explicit"]], ids=["barrier", "disk-only", "explicit"]
)
def test_no_record_is_missing_from_the_disk_written_first(
    box: guest.Sandbox, ordered: guest.Console, kind: list[str]
) -> None:
    chance = random.Random(len(kind))
    for number in range(4):
        time.sleep(chance.random() * 0.5)
        name = f"o{len(kind)}{kind[0][2:3] if kind else ''}{number}"
        box.run("checkpoint", "w", "--name", name, *kind)
        check_images(box.home / "store", name)
    ordered.beat()
    ordered.check()


def check_images(store: Path, name: str) -> None:
    with stores.Store.open(store) as opened:
        disks = {disk.name: opened.image(disk.image) for disk in opened.manifest("w", name).disks}
        check_order(read_ring(disks["vda"], 0, SPAN), read_ring(disks["vdb"], 0, SPAN))
        check_order(read_ring(disks["vdb"], 1, SPAN), read_ring(disks["vda"], 1, SPAN))


def test_the_check_sees_one_disk_of_another_instant(box: guest.Sandbox, ordered: guest.Console) -> None:
    """Negative control: the disks of two different checkpoints are not of one instant."""
    for name in ("n1", "n2"):
        box.run("checkpoint", "w", "--name", name, "--disk-only")
        ordered.beat()
    with stores.Store.open(box.home / "store") as store:
        before = {disk.name: store.image(disk.image) for disk in store.manifest("w", "n1").disks}
        after = {disk.name: store.image(disk.image) for disk in store.manifest("w", "n2").disks}
        with pytest.raises(AssertionError):
            check_order(read_ring(before["vda"], 0, SPAN), read_ring(after["vdb"], 0, SPAN))

"""A consistency group of two real guests: stopped at one time, and each restores without a wrong byte."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blkckpt.store import store as stores
from tests.support import guest
from tests.support.records import read_ring

SPAN = 16 << 20


@dataclass(frozen=True, slots=True)
class Mail:
    """The numbers of the newest message that one has received from the other, and of its newest acknowledged one."""

    received: int
    acknowledged: int


def mail_in_memory(console: guest.Console) -> Mail:
    """What the guest says from now on."""
    found = console.wait(
        re.compile(r"peer received=(\d+) acknowledged=(\d+)").match, 20, start=len(console.lines), what="its mail"
    )
    return Mail(int(found[1]), int(found[2]))


def mail_on_disk(store: Path, vm: str, name: str) -> Mail:
    with stores.Store.open(store) as opened:
        image = opened.image(opened.manifest(vm, name).disks[0].image)
        return Mail(*(read_ring(image, stream, SPAN).newest for stream in (0, 1)))


def check_mail(one: Mail, other: Mail) -> None:
    """Neither knows of an acknowledgement of what the other has not got."""
    assert min(one.received, other.received) > 1, "nothing was sent before the checkpoint"
    assert one.acknowledged <= other.received
    assert other.acknowledged <= one.received


@pytest.fixture(scope="module")
def correspondents(box: guest.Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[guest.Console]]:
    """Two guests, "p0" and "p1", that send each other messages as fast as they can."""
    link = guest.Link(box.serial.path.parent)
    try:
        consoles = []
        for number, path in enumerate(link.paths):
            box.create(f"p{number}", {"vda": SPAN})
            consoles.append(box.boot(f"p{number}", "peer", memory=128, link=path, span=SPAN >> 20))
        link.connect()
        for console in consoles:
            console.send("go")
        yield consoles
        for name in ("p0", "p1"):
            box.stop(name)
    finally:
        link.close()


def test_what_one_guest_has_acknowledged_is_not_missing_in_another(
    box: guest.Sandbox, correspondents: list[guest.Console]
) -> None:
    for number in range(3):
        time.sleep(0.3 * number)
        box.run("checkpoint", "p0", "p1", "--name", f"g{number}")
        check_mail(*(mail_on_disk(box.home / "store", vm, f"g{number}") for vm in ("p0", "p1")))
    in_memory = []
    for vm in ("p0", "p1"):
        copy = box.restore(f"{vm}@g2", f"{vm}-copy")
        in_memory.append(mail_in_memory(copy))
        # One is between disk and memory, or has come and is read only after the restore.
        on_disk = mail_on_disk(box.home / "store", vm, "g2")
        assert abs(on_disk.received - in_memory[-1].received) <= 1
        copy.check()
        box.stop(f"{vm}-copy")
    check_mail(*in_memory)


def test_the_check_sees_checkpoints_of_two_times(box: guest.Sandbox, correspondents: list[guest.Console]) -> None:
    """Negative control: taken one after the other, the later one knows of more than the earlier one has got."""
    box.run("checkpoint", "p0", "--name", "early")
    before = correspondents[1].beats()[-1].seq
    correspondents[1].wait(lambda line: (b := guest.Beat.parse(line)) and b.seq > before + 3, 20, what="some beats")
    box.run("checkpoint", "p1", "--name", "late")
    store = box.home / "store"
    with pytest.raises(AssertionError):
        check_mail(mail_on_disk(store, "p0", "early"), mail_on_disk(store, "p1", "late"))


def test_two_guests_are_stopped_at_the_same_time(box: guest.Sandbox, writer: guest.Console) -> None:
    box.create("w", {"vda": 32 << 20})
    second = box.boot("w", "writer", memory=128, rate=500)
    taken = box.json("checkpoint", "v", "w", "--name", "both")
    assert [one["vm"] for one in taken["checkpoints"]] == ["v", "w"]
    # Whoever stopped first stood still until the last one had stopped, and some time more.
    assert max(one["stopped_ms"] for one in taken["checkpoints"]) > taken["spread_ms"] >= 0
    shown = box.json("show", "w@both")["group"]
    assert shown["members"] == ["v@both", "w@both"] and shown["spread_ms"] == taken["spread_ms"]
    assert "v@both, w@both; stopped within" in box.run("show", "v@both")
    for console in (writer, second):
        console.beat()
        console.check()
    for name in ("v", "w"):
        copy = box.restore(f"{name}@both", f"{name}-copy")
        copy.beat()
        assert copy.sweep() == 0
        box.stop(f"{name}-copy")
    box.stop("w")


def test_a_group_is_of_all_or_of_none(box: guest.Sandbox, writer: guest.Console) -> None:
    """A3: a member that cannot be taken leaves no checkpoint of the other."""
    box.create("served", {"vda": 1 << 20})
    said = box.run("checkpoint", "v", "served", "--name", "never", code=5)
    assert "served" in said and said.count("\n") == 1
    box.run("checkpoint", "v", "v", "--name", "once")
    said = box.run("checkpoint", "v", "served", "--disk-only", code=3)
    assert "--disk-only" in said
    names = [one["name"] for one in box.json("list", "v")["checkpoints"]]
    assert "never" not in names and "once" in names
    writer.check()

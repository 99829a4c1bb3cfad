"""Retained checkpoints: marks, claims, who lets go and when, what is refused (content: test_disk_model)."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.disk import api, claim, retaining
from blkckpt.disk import format as formats
from blkckpt.store import reference, retained
from tests.support import disks

SIZE = 2 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[disks.Rig]:
    made = disks.Rig(tmp_path, {"vda": SIZE, "vdb": 4096 * 3 + 5})
    yield made
    made.clean_up()


def put(rig: disks.Rig, data: bytes, offset: int = 0) -> None:
    rig.group.disks["vda"].pwrite(data, offset)


def retain(rig: disks.Rig, name: str, *, publish: bool = True) -> None:
    """A retained checkpoint, to the end, or until it waits for its manifest."""
    rig.group.prepare(name, retain=True)
    assert rig.group.switch().switched
    disks.finish(rig.group.start_retain(rig.marks(name)))
    if publish:
        disks.finish(rig.group.commit())


def depth(rig: disks.Rig) -> int:
    return len(rig.group.status().disks[0].overlays)


def kept(rig: disks.Rig) -> list[str | None]:
    return [overlay.retained for overlay in rig.group.status().disks[0].overlays]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_vm_goes_on_above_and_the_base_is_left_alone(rig: disks.Rig) -> None:
    put(rig, b"a" * 8192)
    retain(rig, "c1")
    put(rig, b"b" * 4096)
    put(rig, b"part", 5000)
    rig.group.disks["vda"].flush()
    assert rig.base().read_bytes()[:8192] == b"a" * 8192
    assert rig.group.status().state is api.State.REST and kept(rig) == ["c1"]
    retain(rig, "c2")
    assert kept(rig) == ["c2", "c1"]
    reader = rig.retained("c2")
    assert reader is not None and reader.read(4096, 1000) == b"a" * 904 + b"part" + b"a" * 92
    with pytest.raises(reference.RetainedError, match="blkckpt flatten vm@c2"):
        _ = reader.table
    with pytest.raises(reference.RetainedError):
        reader.entry(0)
    reader.close()


def test_a_mark_before_its_manifest_is_let_go_when_the_driver_dies(rig: disks.Rig) -> None:
    """A3: and it is kept when the manifest was there in time."""
    there: set[str] = set()
    rig.wanted = lambda mark: mark.checkpoint in there
    for name in ("lost", "saved"):
        retain(rig, name, publish=False)
        put(rig, name.encode())
        if name == "saved":
            there.add(name)
        disks.finish(rig.group.abort())
    assert kept(rig) == ["saved"]
    for stop in (rig.kill, rig.stop):
        retain(rig, "dead", publish=False)
        stop()
        until(lambda: kept(rig) == ["saved"])
    assert rig.read()[:5] == b"saved"


def test_what_cannot_be_known_is_kept(rig: disks.Rig) -> None:
    """The store is not mounted: nothing is let go."""

    def wanted(mark: formats.Retained) -> bool:
        raise errors.NotFoundError("there is no checkpoint store")

    retain(rig, "c1")
    rig.wanted = wanted
    rig.kill()
    disks.finish(rig.group.review())
    assert kept(rig) == ["c1"]


def test_what_is_read_is_let_go_when_it_is_not_read_any_more(rig: disks.Rig) -> None:
    """D1, D8: the base is not written while somebody reads it as a checkpoint's disk."""
    put(rig, b"a" * 4096)
    retain(rig, "c1")
    put(rig, b"b" * 4096)
    reader = rig.retained("c1")
    assert reader is not None
    rig.wanted = lambda mark: False
    disks.finish(rig.group.review())
    assert kept(rig) == ["c1"] and rig.base().read_bytes()[:4096] == b"a" * 4096 == reader.read(0, 4096)
    rig.kill()
    disks.finish(rig.group.review())
    assert kept(rig) == ["c1"] and reader.read(0, 4096) == b"a" * 4096
    reader.close()
    until(lambda: depth(rig) == 0)
    assert rig.base().read_bytes()[:4096] == b"b" * 4096


def test_nobody_can_claim_what_is_being_let_go(rig: disks.Rig) -> None:
    retain(rig, "c1")
    (overlay,) = rig.group.status().disks[0].overlays
    with claim.exclusive(rig.vm.layers / f"vda.{overlay.id}.data") as free:
        assert free
        found = reference.Reference(rig.kept_image("c1", "vda"), str(rig.root), "vm", disks.VM_ID, "vda", SIZE, "c1")
        with pytest.raises(errors.StateError, match="do not keep vm@c1"):
            retained.hold(found)
    os.close(retained.hold(found))
    for other in (dataclasses.replace(found, vm_id="0" * 32), dataclasses.replace(found, size=SIZE - 1)):
        assert retained.open_image(other) is None, "S4: what is there has to say the same"


@pytest.mark.parametrize("spoil", ["map", "data"])
def test_damaged_layers_are_an_error_and_not_other_bytes(
    rig: disks.Rig, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retained, "ATTEMPTS", 2)
    retain(rig, "c1")
    put(rig, b"x" * 4096)
    retain(rig, "c2")
    below = rig.group.status().disks[0].overlays[1].id
    path = rig.vm.layers / f"vda.{below}.{spoil}"
    if spoil == "map":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 8192)
    else:
        os.truncate(path, 100)
    with pytest.raises(errors.CorruptError, match=below):
        rig.retained("c2")


def test_what_is_refused(rig: disks.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining, "MAX_RETAINED", 2)
    rig.group.prepare("copied")
    rig.group.switch()
    with pytest.raises(errors.StateError, match="not prepared for that"):
        rig.group.start_retain(rig.marks("copied"))
    disks.finish(rig.group.abort())
    rig.group.prepare("c1", retain=True)
    rig.group.switch()
    with pytest.raises(errors.StateError, match="not prepared for that"):
        rig.group.start_copy("/nowhere", {})
    with pytest.raises(errors.InputError, match="other disks"):
        rig.group.start_retain({"vda": rig.marks("c1")["vda"]})
    disks.finish(rig.group.abort())
    retain(rig, "c2")
    retain(rig, "c3")
    with pytest.raises(errors.StateError, match="2 are retained already; flatten"):
        rig.group.prepare("c4", retain=True)
    rig.group.prepare("c5")
    disks.finish(rig.group.abort())
    for verb in (rig.group.flatten, rig.group.retained.rewind):
        with pytest.raises(errors.StateError, match="do not retain a checkpoint c9"):
            verb("c9")


def test_a_disk_that_is_being_filled_cannot_be_retained(tmp_path: Path) -> None:
    rig = disks.Rig(tmp_path, {"vda": SIZE}, b"image" * 1000)
    try:
        rig.kill(start=False)
        with pytest.raises(errors.StateError, match="still being filled"):
            rig.group.prepare("c1", retain=True)
    finally:
        rig.clean_up()


def test_d9_nothing_is_retained_over_a_failed_sync(rig: disks.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.group.abandon()
    files = disks.install(monkeypatch)
    rig.open()
    put(rig, b"x" * 4096)
    rig.group.prepare("c1", retain=True)
    rig.group.switch()
    files.fail["sync", "vda.raw"] = errno.EIO
    job = rig.group.start_retain(rig.marks("c1"))
    assert job.wait(20)
    with pytest.raises(errors.PoisonedError):
        job.outcome()
    assert kept(rig) == [None]


def test_it_rewinds_only_when_nobody_reads(rig: disks.Rig) -> None:
    put(rig, b"a" * 4096)
    retain(rig, "c1")
    put(rig, b"b" * 4096)
    reader = rig.retained("c1")
    assert reader is not None
    assert not rig.group.retained.rewind("c1") and rig.read()[:4096] == b"b" * 4096
    reader.close()
    assert rig.group.retained.rewind("c1") and rig.read()[:4096] == b"a" * 4096
    rig.stop()
    assert kept(rig) == ["c1"] and rig.read()[:4096] == b"a" * 4096
    assert len([name for name in rig.layer_files() if name.endswith(".data")]) == 2


def test_a_state_of_before_has_no_retained_overlay(tmp_path: Path) -> None:
    """An older version wrote ``false`` where there was no mark, and knew none."""
    disk = formats.DiskState("vda", "/x", 4096, formats.ChangedState("0" * 32), (formats.OverlayState("1" * 32),))
    body = json.loads(formats.encode_state(formats.GroupState("id", (disk,))))
    del body["checksum"]
    body["disks"][0]["overlays"][0]["retained"] = False
    body["checksum"] = formats._checksum(body)
    assert formats.decode_state(json.dumps(body).encode(), tmp_path).disks == (disk,)
    body["disks"][0]["overlays"][0]["retained"] = {"store": "relative", "checkpoint": "c", "id": "", "image": ""}
    del body["checksum"]
    body["checksum"] = formats._checksum(body)
    with pytest.raises(errors.CorruptError, match="fields"):
        formats.decode_state(json.dumps(body).encode(), tmp_path)

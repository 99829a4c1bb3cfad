"""References: what stands in a store for a retained disk, and what collections, pins and upkeep make of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.disk import format as formats
from blkckpt.store import check, images, keeping, layout, manifest, marks, reference, store, usage
from tests.support import disks

SIZE = 3 * layout.CHUNK
IMAGE = "12" * 16


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[disks.Rig]:
    made = disks.Rig(tmp_path, {"vda": SIZE})
    yield made
    made.clean_up()


def refer(image: str = IMAGE, home: Path | str = "/nowhere") -> reference.Reference:
    return reference.Reference(image, str(home), "vm", disks.VM_ID, "vda", SIZE, "c1")


def described(image: str = IMAGE, *, retained: bool = True) -> manifest.Manifest:
    return manifest.Manifest("vm", "c1", "0" * 32, 5, (manifest.DiskImage("vda", image, SIZE),), retained=retained)


def publish(target: store.Store, found: reference.Reference) -> manifest.Manifest:
    with target.hold():
        target.put_reference(found)
        target.put_manifest(one := described(found.image))
    return one


def flatten(target: store.Store, data: bytes, image: str = IMAGE) -> None:
    with target.image_writer(len(data), image=image) as out:
        out.write(0, data)
        out.finish()


@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_s4_a_flipped_byte_is_seen(position: int, flip: int) -> None:
    data = bytearray(reference.encode(refer()))
    data[position % len(data)] ^= flip
    with pytest.raises(errors.CorruptError):
        reference.decode(bytes(data), IMAGE)


@pytest.mark.parametrize(
    "bad",
    [
        {"vm": "../x"}, {"home": "relative"}, {"home": 7}, {"size": -1}, {"size": True}, {"vm_id": "zz"},
        {"disk": ""}, {"checkpoint": None}, {"image": "34" * 16}, {"kind": "other"},
    ],
    ids=str,
)  # fmt: skip
def test_s4_nothing_in_it_is_trusted(bad: dict[str, object]) -> None:
    fields = manifest.unseal(reference.encode(refer()), "it")
    with pytest.raises(errors.CorruptError):
        reference.decode(manifest.seal({**fields, **bad}), IMAGE)


def test_a_manifest_says_that_it_is_retained(target: store.Store) -> None:
    data = manifest.encode(described())
    assert manifest.decode(data, "it").retained and b'"requires":["retained"]' in data
    with pytest.raises(errors.CorruptError, match="newer blkckpt"):
        manifest.unseal(data, "it")  # as a reader before this feature: it must not take the disks for images
    with pytest.raises(errors.NotFoundError):
        target.put_manifest(described())
    with target.hold():
        target.put_reference(refer())
        with pytest.raises(reference.RetainedError):
            target.put_manifest(described(retained=False))
        with pytest.raises(errors.InputError, match="the manifest says 1"):
            target.put_manifest(
                dataclasses.replace(described(), disks=(manifest.DiskImage("vda", IMAGE, 1),))
            )  # fmt: skip
        with pytest.raises(FileExistsError):
            target.put_reference(refer())
        target.put_manifest(described())


def test_a_table_takes_its_place(target: store.Store, rig: disks.Rig) -> None:
    """S1: before it the bytes come from the layers, after it from the store, under the same id."""
    data = os.urandom(SIZE)
    rig.group.disks["vda"].pwrite(data, 0)
    keep(rig)
    image = rig.kept_image("c1", "vda")
    one = publish(target, refer(image, rig.root))
    rig.group.disks["vda"].pwrite(bytes(SIZE), 0)
    with contextlib.closing(target.image(image)) as reader:
        assert reader.read(0, SIZE) == data
    with pytest.raises(errors.StateError, match="flatten it first: blkckpt flatten vm@c1"):
        images.load_table(target.packs, image)
    with pytest.raises(reference.RetainedError):  # not before every image has a table
        target.amend_manifest(dataclasses.replace(one, retained=False))
    flatten(target, data, image)
    assert target.image(image).read(0, SIZE) == data and target.manifest("vm", "c1").retained
    assert target.manifest("vm", "c1").disks[0].used is None
    target.amend_manifest(dataclasses.replace(one, retained=False))
    flat = target.manifest("vm", "c1")
    assert not flat.retained and flat.disks[0].used == target.image(image).used() > 0
    with pytest.raises(errors.StateError, match="not a retained one"):
        flatten(target, data, image)


def test_layers_that_are_gone_are_an_error_with_a_name(target: store.Store, tmp_path: Path) -> None:
    publish(target, refer(home=tmp_path))
    with pytest.raises(errors.CorruptError, match=r"vm@c1 is retained, but VM vm in .* does not have its layers"):
        target.image(IMAGE)
    report = check.verify(target)
    assert report.problem_count == 1 and "does not have its layers" in report.problems[0].what
    measured = usage.measure(target)
    assert not measured.damaged and measured.total.logical == SIZE


def test_s5_a_collection_keeps_references_that_are_needed(target: store.Store) -> None:
    publish(target, refer())
    with target.hold():
        target.put_reference(refer("34" * 16))
    assert target.collect(repack=0.1).images == 1
    assert target.reference(IMAGE) == refer()
    target.pin("copy", [IMAGE])
    target.remove("vm", "c1")
    assert target.collect().images == 0
    mark = formats.Retained(str(target.path), "c1", "0" * 32, IMAGE)
    assert keeping.wanted("vm", mark), "R5: a restored disk still reads it"
    target.unpin("copy")
    assert not keeping.wanted("vm", mark)
    assert target.collect().images == 1
    with pytest.raises(errors.NotFoundError):
        target.reference(IMAGE)


def test_s5_what_is_flattened_between_marking_and_sweeping_is_kept(target: store.Store) -> None:
    """It needed no pack when it was marked first."""
    publish(target, refer())
    early = marks.Marks()
    marks.mark(target.packs, early)
    assert early.references == {IMAGE} and not early.usage
    flatten(target, os.urandom(SIZE))
    again = marks.again(target.packs, early)
    assert set(again.usage) == {pack for pack, _ in target.packs.ids()} and not again.references


def test_who_is_wanted(target: store.Store, tmp_path: Path) -> None:
    mark = formats.Retained(str(target.path), "c1", "0" * 32, IMAGE)
    assert not keeping.wanted("vm", mark)
    one = publish(target, refer())
    assert keeping.wanted("vm", mark)
    assert not keeping.wanted("vm", dataclasses.replace(mark, id="1" * 32)), "another checkpoint of that name"
    assert not keeping.wanted("other", mark)
    flatten(target, bytes(SIZE))
    target.amend_manifest(dataclasses.replace(one, retained=False))
    assert not keeping.wanted("vm", mark)
    with pytest.raises(errors.NotFoundError):
        keeping.wanted("vm", dataclasses.replace(mark, store=str(tmp_path / "not-mounted")))


def keep(rig: disks.Rig) -> None:
    rig.group.prepare("c1", retain=True)
    rig.group.switch()
    disks.finish(rig.group.start_retain(rig.marks("c1")))
    disks.finish(rig.group.commit())

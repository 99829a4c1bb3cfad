"""Manifests and store.json: what is written is read, and whatever is malformed is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.store import layout, manifest, store

IMAGE = "0123456789abcdef" * 2
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
IDS = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
COUNTS = st.integers(1 << 30, 1 << 45)
USED = st.none() | st.integers(0, 1 << 30)
TEXT = st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF), max_size=40)
PRINTABLE = st.from_regex(r"[ -~]{1,60}", fullmatch=True)
PARTITIONS = st.lists(
    st.tuples(st.integers(1, 128), st.integers(0, 1 << 29), st.integers(0, 1 << 29)),
    max_size=4,
    unique_by=lambda part: part[0],
).map(tuple)
ON_DISK = st.builds(manifest.DiskContents, st.integers(1, 9), PARTITIONS, st.booleans())
DISKS = st.lists(
    st.builds(manifest.DiskImage, NAMES, IDS, COUNTS, USED, st.none() | ON_DISK), max_size=4, unique_by=lambda d: d.name
)
BLOCKS = st.lists(
    st.builds(manifest.RamBlock, PRINTABLE, COUNTS, st.sampled_from([4096, 2 << 20]), IDS, USED),
    max_size=4,
    unique_by=lambda b: b.name,
)
CONTENTS = st.builds(
    manifest.Contents,
    st.lists(st.builds(manifest.StreamBlock, PRINTABLE, COUNTS, USED), max_size=4).map(tuple),
    COUNTS,
    USED,
)
MANIFESTS = st.builds(
    manifest.Manifest,
    vm=NAMES,
    name=NAMES,
    id=IDS,
    created_ns=st.integers(0, 1 << 62),
    disks=DISKS.map(tuple),
    parent=st.none() | NAMES,
    memory=st.none() | st.builds(manifest.MemoryImage, BLOCKS.map(tuple), IDS, COUNTS, st.none() | CONTENTS),
    machine=st.none()
    | st.builds(manifest.MachineInfo, st.lists(TEXT, max_size=5).map(tuple), TEXT, TEXT, TEXT, COUNTS),
    consistency=st.sampled_from(manifest.CONSISTENCY),
    timings=st.dictionaries(TEXT, st.floats(0, 1e6), max_size=5),
    notes=st.lists(TEXT, max_size=3).map(tuple),
)


def sample(**more: Any) -> manifest.Manifest:
    fields: dict[str, Any] = {"vm": "web", "name": "one", "id": IMAGE, "created_ns": 5, "disks": ()}
    return manifest.Manifest(**{**fields, **more})


@given(MANIFESTS)
def test_round_trip(made: manifest.Manifest) -> None:
    data = manifest.encode(made)
    found = manifest.decode(data, "it")
    assert found == made and [one.used for one in found.parts()] == [one.used for one in made.parts()]
    assert [disk.contents for disk in found.disks] == [disk.contents for disk in made.disks]
    assert (found.memory and found.memory.contents) == (made.memory and made.memory.contents)
    assert manifest.encode(manifest.decode(data, "it")) == data


def test_arguments_that_are_not_utf8_survive() -> None:
    argv = (os.fsdecode(b"-drive=\xff\xfe"), "ü")
    made = sample(machine=manifest.MachineInfo(argv, "pc", "tcg", "7.2", 1))
    assert manifest.decode(manifest.encode(made), "it") == made


@given(MANIFESTS, st.integers(0, 1 << 30), st.integers(1, 255))
def test_a_flipped_byte_is_seen(made: manifest.Manifest, position: int, flip: int) -> None:
    data = bytearray(manifest.encode(made))
    data[position % len(data)] ^= flip
    with pytest.raises(errors.CorruptError):
        manifest.decode(bytes(data), "it")


@given(MANIFESTS, st.integers(1, 1 << 30))
def test_a_torn_manifest_is_seen(made: manifest.Manifest, length: int) -> None:
    data = manifest.encode(made)
    with pytest.raises(errors.CorruptError):
        manifest.decode(data[: length % len(data)], "it")


def fields_of(**change: Any) -> bytes:
    memory = {"blocks": [{"name": "pc.ram", "size": 1, "page_size": 4096, "image": IMAGE}], "skeleton": IMAGE}
    fields = json.loads(
        manifest.encode(
            sample(
                disks=(manifest.DiskImage("vda", IMAGE, 1),),
                memory=manifest.MemoryImage((manifest.RamBlock("pc.ram", 1, 4096, IMAGE),), IMAGE, 1),
                machine=manifest.MachineInfo(("qemu",), "pc", "tcg", "7.2", 1),
            )
        )
    )
    assert memory["skeleton"] == fields["memory"]["skeleton"]
    del fields["checksum"]
    for path, value in change.items():
        place, keys = fields, path.split("__")
        for key in keys[:-1]:
            place = place[int(key) if key.isdigit() else key]
        if value is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
    return manifest.seal(fields)


BAD: list[tuple[str, Any]] = [
    ("version", 0), ("version", "1"), ("version", True), ("version", ...), ("vm", "../x"), ("vm", 5), ("vm", ...),
    ("name", "a/b"), ("name", ""), ("name", "a" * 65), ("id", "xyz"), ("id", IMAGE.upper()), ("created_ns", -1),
    ("created_ns", 1.5), ("disks", None), ("disks", {}), ("disks", [1]), ("disks", [{}]), ("disks__0__size", -1),
    ("disks__0__size", 1 << 60), ("disks__0__image", "../../etc"), ("disks__0__name", "a\0b"), ("parent", 7),
    ("disks__0__used", -1), ("disks__0__used", 2), ("disks__0__used", "1"), ("disks__0__used", True),
    ("memory__blocks__0__used", 2), ("memory__blocks__0__used", 0.5), ("memory__contents", []),
    ("memory__contents", {}), ("memory__contents", {"blocks": [], "state_size": 1, "state_used": 2}),
    ("memory__contents", {"blocks": [{"name": "a\nb", "size": 1}], "state_size": 1}),
    ("memory__contents", {"blocks": [{"name": "a", "size": 1, "used": 2}], "state_size": 1}),
    ("disks__0__contents", []), ("disks__0__contents", {"rules": 1, "partitions": [], "files": 1}),
    ("disks__0__contents", {"rules": 0, "partitions": [], "files": True}),
    ("disks__0__contents", {"rules": 1, "partitions": [[1, 0, 2]], "files": True}),
    ("disks__0__contents", {"rules": 1, "partitions": [[0, 0, 1]], "files": True}),
    ("disks__0__contents", {"rules": 1, "partitions": [[1, 0, True]], "files": True}),
    ("disks__0__contents", {"rules": 1, "partitions": [[1, -1, 1]], "files": True}),
    ("disks__0__contents", {"rules": 1, "partitions": [[1, 0, 1], [1, 0, 1]], "files": True}),
    ("parent", "/x"), ("memory", []), ("memory__blocks", "x"), ("memory__blocks__0__page_size", 3),
    ("memory__blocks__0__page_size", 0), ("memory__blocks__0__name", "a\nb"), ("memory__blocks__0__image", None),
    ("memory__skeleton", ""), ("memory__skeleton_size", -1), ("machine", 1), ("machine__argv", [1]),
    ("machine__argv", ["\0"]), ("machine__ram_size", "1"), ("machine__accel", None), ("consistency", "perfect"),
    ("consistency", ...), ("timings", []), ("timings", {"a": "b"}), ("timings", {"a" * 65: 1}), ("notes", "text"),
    ("notes", [1]), ("notes", ["x"] * 5000), ("requires", ["telepathy"]), ("requires", ...),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD, ids=lambda value: f"{value!r:.40}")
def test_malformed_fields_are_refused(path: str, value: Any) -> None:
    """Rule S4: with a checksum that is right, every field is still checked."""
    with pytest.raises(errors.CorruptError):
        manifest.decode(fields_of(**{path: value}), "it")


def test_what_is_used_may_be_missing() -> None:
    """As in a manifest from before it was recorded, whose bytes stay the same; None is no value of its own."""
    assert b'"used"' not in fields_of()
    for change in ({}, {"disks__0__used": None, "memory__blocks__0__used": None}):
        assert [one.used for one in manifest.decode(fields_of(**change), "it").parts()] == [None, None]
    found = manifest.decode(fields_of(disks__0__used=0, memory__blocks__0__used=1), "it")
    assert [one.used for one in found.parts()] == [0, 1]
    assert b'"contents"' not in fields_of()
    for change in ({}, {"memory__contents": None, "disks__0__contents": None}):
        plain = manifest.decode(fields_of(**change), "it")
        assert plain.memory is not None and plain.memory.contents is None and plain.disks[0].contents is None


def test_names_of_disks_and_blocks_are_unique() -> None:
    disk = {"name": "vda", "image": IMAGE, "size": 1}
    with pytest.raises(errors.CorruptError, match="disks"):
        manifest.decode(fields_of(disks=[disk, disk]), "it")


def test_unknown_fields_are_ignored_and_newer_ones_refused() -> None:
    assert manifest.decode(fields_of(colour="blue"), "it").vm == "web"
    for newer in ({"version": 2}, {"requires": ["telepathy"]}):
        with pytest.raises(errors.CorruptError, match="newer blkckpt"):
            manifest.decode(fields_of(**newer), "it")


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version":1e400}', b'{"version":' + b"9" * 5000 + b"}",
     b" " * (manifest.MAX_SIZE + 1), b'{"version":1,"requires":[],"x":NaN,"checksum":"sha256:0"}'],
    ids=lambda data: f"{data[:12]!r}",
)  # fmt: skip
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(errors.CorruptError):
        manifest.decode(data, "it")


def test_a_duplicate_key_is_not_canonical() -> None:
    data = manifest.encode(sample())
    with pytest.raises(errors.CorruptError):
        manifest.decode(data.replace(b'"vm":"web"', b'"vm":"web","vm":"web"'), "it")


@pytest.mark.parametrize("change", [{"vm": "a/b"}, {"consistency": "x"}, {"timings": {"a": float("nan")}}, {"id": "x"}])
def test_what_cannot_be_read_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(errors.InputError):
        manifest.encode(sample(**change))


# --- through a store


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def test_the_manifest_publishes(target: store.Store, tmp_path: Path) -> None:
    """Rule S1: before put_manifest there is no checkpoint, after it there is."""
    with target.image_writer(10) as out:
        out.write(0, b"0123456789")
        image = out.finish().image
    assert target.manifests() == []
    made = sample(disks=(manifest.DiskImage("vda", image, 10),), timings={"copy": 0.5})
    target.put_manifest(made)
    assert target.manifests() == [made] == target.manifests("web")
    assert target.manifests("other") == []
    assert target.manifest("web", "one") == made
    with pytest.raises(errors.StateError, match="already"):
        target.put_manifest(made)
    mode = (tmp_path / "store" / "manifests" / "web" / "one.json").stat().st_mode
    assert mode & 0o777 == 0o600
    target.remove("web", "one")
    for call in (target.remove, target.manifest):
        with pytest.raises(errors.NotFoundError):
            call("web", "one")


def test_what_is_used_is_noted(target: store.Store) -> None:
    """By the images' tables, whatever the caller says; amending keeps it."""
    data = bytes(layout.CHUNK) + b"x" * layout.CHUNK + b"tail"
    with target.image_writer(len(data)) as out:
        out.write(0, data)
        image = out.finish().image
    block = manifest.RamBlock("pc.ram", len(data), 4096, image)
    made = sample(
        disks=(manifest.DiskImage("vda", image, len(data), used=1),),
        memory=manifest.MemoryImage((block,), image, len(data)),
    )
    target.put_manifest(made)
    for _ in range(2):
        found = target.manifest("web", "one")
        assert found == made and [one.used for one in found.parts()] == [layout.CHUNK + 4] * 2
        target.amend_manifest(made := dataclasses.replace(made, notes=("amended",)))


def test_a_manifest_needs_its_images(target: store.Store) -> None:
    """Rule S2: what a manifest names is there, whole, and of the right size."""
    with target.image_writer(layout.CHUNK) as out:
        out.write(0, os.urandom(layout.CHUNK))
        image = out.finish().image
    missing = sample(disks=(manifest.DiskImage("vda", IMAGE, 10),))
    with pytest.raises(errors.NotFoundError):
        target.put_manifest(missing)
    with pytest.raises(errors.InputError, match="says"):
        target.put_manifest(sample(disks=(manifest.DiskImage("vda", image, 10),)))
    for pack, _ in list(target.packs.ids()):
        target.packs.delete(pack)
    with pytest.raises(errors.CorruptError, match="not in the store"):
        target.put_manifest(sample(disks=(manifest.DiskImage("vda", image, layout.CHUNK),)))
    assert target.names() == []


def test_manifests_are_listed_oldest_first_and_a_damaged_one_can_be_removed(
    target: store.Store, tmp_path: Path
) -> None:
    for number, name in enumerate(("b", "a", "c")):
        target.put_manifest(sample(name=name, created_ns=number))
    target.put_manifest(sample(vm="db", created_ns=1))
    assert [(m.vm, m.name) for m in target.manifests()] == [("web", "b"), ("db", "one"), ("web", "a"), ("web", "c")]
    (tmp_path / "store" / "manifests" / "web" / "a.json").write_bytes(b"{")
    with pytest.raises(errors.CorruptError, match="web@a"):
        target.manifests()
    assert ("web", "a") in target.names()
    target.remove("web", "a")
    assert len(target.manifests()) == 3


def test_a_manifest_under_another_name_is_refused(target: store.Store, tmp_path: Path) -> None:
    target.put_manifest(sample())
    place = tmp_path / "store" / "manifests" / "web"
    (place / "two.json").write_bytes((place / "one.json").read_bytes())
    with pytest.raises(errors.CorruptError, match="web@one"):
        target.manifest("web", "two")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a" * 65, "a\n"])
def test_names_do_not_leave_the_store(target: store.Store, name: str) -> None:
    for call in (target.manifest, target.remove):
        with pytest.raises(errors.InputError):
            call("web", name)
        with pytest.raises(errors.InputError):
            call(name, "web")
    with pytest.raises(errors.InputError):
        target.pin(name, [])


def test_init_and_open_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError):
        store.Store.open(tmp_path / "nothing")
    (tmp_path / "full").mkdir(0o700)
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(errors.InputError, match="not empty"):
        store.Store.init(tmp_path / "full")
    store.Store.init(tmp_path / "s").close()
    with pytest.raises(errors.StateError):
        store.Store.init(tmp_path / "s")
    store.Store.open_or_init(tmp_path / "s").close()
    store.Store.open_or_init(tmp_path / "t").close()
    with pytest.raises(errors.CorruptError, match="hash"):
        store.Store.init(tmp_path / "u", hash_name="crc32")
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(errors.AccessError):
        store.Store.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "newer blkckpt"), ({"features": ["x"]}, "newer blkckpt"), ({"format": "tar"}, "not a blkckpt"),
        ({"id": "../.."}, "damaged"), ({"hash": "md5"}, "does not know"), ({"chunk": 4096}, "of a size"),
        ({"version": "one"}, "damaged"), ({"hash": None}, "does not know"), ({"created_ns": []}, "damaged"),
    ],
    ids=str,
)  # fmt: skip
def test_foreign_and_newer_stores(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store.Store.init(tmp_path / "s").close()
    path = tmp_path / "s" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(errors.CorruptError, match=message) as caught:
        store.Store.open(tmp_path / "s")
    assert caught.value.exit_code == 6
    path.write_bytes(b"\0" * 100)
    with pytest.raises(errors.CorruptError):
        store.Store.open(tmp_path / "s")
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(errors.BlkckptError, match="symbolic link"):
        store.Store.open(tmp_path / "s")


def test_values_are_immutable() -> None:
    made = sample()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.vm = "x"  # type: ignore[misc]

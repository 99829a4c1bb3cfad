"""Definitions: what is refused, and that what is written is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from fcntl import F_OFD_SETLK, F_WRLCK, fcntl
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt import errors, paths
from blkckpt.vm import definition

SIZE = 1 << 20


@pytest.fixture
def vm(tmp_path: Path) -> paths.VmPaths:
    return paths.home(tmp_path / "home").vm("web")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.raw")


def make_base(path: Path, size: int = SIZE) -> Path:
    path.write_bytes(b"")
    os.truncate(path, size)
    path.chmod(0o600)
    os.utime(path, (1, 1))
    return path


def test_created_is_loaded(vm: paths.VmPaths, base: Path) -> None:
    created = definition.create(vm, [definition.disk("vda", base)], store="/some/store")
    assert definition.load(vm) == created
    assert created.disks == (definition.DiskDefinition("vda", str(base), SIZE),)
    assert vm.definition.stat().st_mode & 0o777 == 0o600
    definition.check(created)


def test_restored_disk_keeps_its_source(vm: paths.VmPaths) -> None:
    source = definition.ImageSource("/store", "ab" * 16)
    disk = definition.disk("vda", vm.layers / "fill.raw", SIZE, source)
    definition.create(vm, [disk])
    loaded = definition.load(vm)
    assert loaded.disk("vda").source == source
    filled = dataclasses.replace(loaded, disks=(dataclasses.replace(disk, source=None),))
    definition.save(vm, filled)
    assert definition.load(vm) == filled


def test_second_creation_is_refused(vm: paths.VmPaths, base: Path) -> None:
    first = definition.create(vm, [definition.disk("vda", base)])
    with pytest.raises(errors.StateError, match="exists already"):
        definition.create(vm, [definition.disk("vda", base)])
    assert definition.load(vm) == first


def test_missing_vm(vm: paths.VmPaths) -> None:
    with pytest.raises(errors.NotFoundError, match="blkckpt vm list"):
        definition.load(vm)


def test_unknown_disk_names_the_known(vm: paths.VmPaths, base: Path) -> None:
    created = definition.create(vm, [definition.disk("vda", base)])
    with pytest.raises(errors.NotFoundError, match="it has vda"):
        created.disk("vdb")


# --- base files ---


def test_missing_base(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="missing"):
        definition.disk("vda", tmp_path / "none")


def test_kinds_that_are_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(errors.InputError, match="regular file or a block device"):
            definition.disk("vda", path)


def test_writable_by_others(base: Path) -> None:
    base.chmod(0o666)
    with pytest.raises(errors.AccessError, match="chmod go-w"):
        definition.disk("vda", base)


def test_of_somebody_else(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    os.chown(base, 12345, 12345)
    with pytest.raises(errors.AccessError, match="uid 12345"):
        definition.disk("vda", base)


@pytest.mark.parametrize(("stated", "word"), [(SIZE + 1, "shorter"), (SIZE - 1, "longer"), (0, "cannot be served")])
def test_stated_size(base: Path, stated: int, word: str) -> None:
    with pytest.raises(errors.InputError, match=word):
        definition.disk("vda", base, stated)


def test_empty_base(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="0 bytes"):
        definition.disk("vda", make_base(tmp_path / "empty", 0))


def test_changed_size_after_creation(vm: paths.VmPaths, base: Path) -> None:
    created = definition.create(vm, [definition.disk("vda", base)])
    os.truncate(base, SIZE + 512)
    with pytest.raises(errors.InputError, match="grown"):
        definition.check(created)
    os.truncate(base, SIZE - 512)
    with pytest.raises(errors.InputError, match="shorter"):
        definition.check(created)


@pytest.fixture
def writer(base: Path) -> Iterator[None]:
    """Something that goes on appending to the base."""
    stop = threading.Event()

    def append() -> None:
        with base.open("ab", buffering=0) as file:
            while not stop.wait(0.01):
                file.write(bytes(512))

    thread = threading.Thread(target=append)
    thread.start()
    time.sleep(0.05)
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("writer")
def test_growing_base(base: Path) -> None:
    with pytest.raises(errors.InputError, match="growing"):
        definition.disk("vda", base)


def test_base_of_a_running_qemu(base: Path) -> None:
    with base.open("r+b") as other:
        fcntl(other, F_OFD_SETLK, struct.pack("hhqqi4x", F_WRLCK, 0, 100, 1, 0))
        with pytest.raises(errors.StateError, match="in use"):
            definition.disk("vda", base)
    definition.disk("vda", base)


def test_formats_that_are_not_raw(base: Path) -> None:
    with base.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    with pytest.raises(errors.InputError, match=r"qcow2 .* convert -O raw"):
        definition.disk("vda", base)


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x", "x" * 65, "a\n", "ä"])
def test_names(base: Path, name: str) -> None:
    with pytest.raises(errors.InputError, match="not a usable name"):
        definition.disk(name, base)


def test_file_used_twice_under_two_names(vm: paths.VmPaths, base: Path, tmp_path: Path) -> None:
    os.link(base, tmp_path / "alias.raw")
    disks = [definition.disk("vda", base), definition.disk("vdb", tmp_path / "alias.raw")]
    with pytest.raises(errors.InputError, match="already disk vda"):
        definition.create(vm, disks)
    assert not vm.definition.exists()


def test_file_of_another_vm(tmp_path: Path, base: Path) -> None:
    home = paths.home(tmp_path / "home")
    definition.create(home.vm("one"), [definition.disk("vda", base)])
    with pytest.raises(errors.InputError, match="already VM one's disk vda"):
        definition.create(home.vm("two"), [definition.disk("vda", base)])


def test_disk_name_used_twice(vm: paths.VmPaths, base: Path, tmp_path: Path) -> None:
    disks = [definition.disk("vda", base), definition.disk("vda", make_base(tmp_path / "b"))]
    with pytest.raises(errors.InputError, match="used twice"):
        definition.create(vm, disks)


def test_no_disk_and_too_many(vm: paths.VmPaths) -> None:
    many = [definition.DiskDefinition(f"d{i}", f"/x/{i}", 512) for i in range(65)]
    for disks in ([], many):
        with pytest.raises(errors.InputError, match="1 to 64"):
            definition.create(vm, disks)


# --- the file (rule S4: nothing read is trusted) ---


def sample() -> definition.VmDefinition:
    source = definition.ImageSource("/s", "i")
    disks = (definition.DiskDefinition("vda", "/a", 512), definition.DiskDefinition("vdb", "/b", 1, source))
    return definition.VmDefinition("web", "ab", 1, disks, "/store")


def test_round_trip() -> None:
    assert definition.decode(definition.encode(sample()), "x") == sample()


def test_newer_version_and_foreign_file() -> None:
    document = json.loads(definition.encode(sample()))
    with pytest.raises(errors.CorruptError, match="version 2"):
        definition.decode(json.dumps(document | {"version": 2}).encode(), "x")
    with pytest.raises(errors.CorruptError, match="not a VM definition"):
        definition.decode(json.dumps(document | {"magic": "?"}).encode(), "x")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_a_typed_error(data: st.DataObject) -> None:
    """One changed byte gives the same definition (white space) or a CorruptError, never anything else."""
    raw = bytearray(definition.encode(sample()))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(errors.CorruptError):
        assert definition.decode(bytes(raw), "x") == sample()


@pytest.mark.parametrize(
    "change",
    [
        {"disks": 5}, {"disks": [None]}, {"disks": []}, {"name": "../x"}, {"id": ""}, {"id": 7}, {"created_ns": True},
        {"extra": 1}, {"store": ""}, {"disks": [{"name": "a", "path": "rel", "size": 1, "source": None}]},
        {"disks": [{"name": "a", "path": "/x", "size": -1, "source": None}]},
        {"disks": [{"name": "a", "path": "/x", "size": 1.5, "source": None}]},
        {"disks": [{"name": "a", "path": "/x", "size": 1, "source": {"store": 1, "image": "x"}}]},
    ],
)  # fmt: skip
def test_wrong_contents_with_a_right_checksum(change: dict[str, object]) -> None:
    document = json.loads(definition.encode(sample()))
    document["vm"] |= change
    document["sha256"] = definition._digest(document["vm"])
    with pytest.raises(errors.CorruptError):
        definition.decode(json.dumps(document).encode(), "x")


def test_moved_directory(tmp_path: Path, base: Path) -> None:
    home = paths.home(tmp_path / "home")
    definition.create(home.vm("one"), [definition.disk("vda", base)])
    home.vm("one").root.rename(home.vm("two").root)
    with pytest.raises(errors.CorruptError, match="moved"):
        definition.load(home.vm("two"))

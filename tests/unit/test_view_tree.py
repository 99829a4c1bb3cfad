"""The tree below ``memory``: the same by the manifest as by the skeleton itself, which listing does not need."""

from __future__ import annotations

import dataclasses
import gc
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors, paths
from blkckpt.memory import records, skeleton
from blkckpt.store import check, contents, layout, manifest, store
from blkckpt.view import chunks, content, library, nodes, tree

RAM = 64 << 10
SMALL = {"pc.bios": b"\x55\xaa" * (96 << 9), "/rom@etc/acpi": bytes(64 << 10) + b"acpi" * 1024}
TAIL = b"state" * 20_000
OWN = ("manifest.json", "timings.json")
"""Files that have the time of the manifest's own file."""


@pytest.fixture
def home(tmp_path: Path) -> paths.Home:
    return paths.home(tmp_path)


@pytest.fixture
def target(home: paths.Home) -> Iterator[store.Store]:
    with store.Store.open_or_init(home.store) as opened:
        yield opened


def image(target: store.Store, data: bytes, kind: str) -> str:
    with target.image_writer(len(data), kind=kind) as out:
        out.write(0, data)
        return out.finish().image


def put(target: store.Store, name: str, state: bytes | None = None) -> manifest.MemoryImage:
    """A checkpoint with a skeleton, or with *state* for one; its memory as it was published."""
    names = ["/rom@etc/acpi", "pc.ram", "pc.bios"]
    blocks = tuple(records.Block(block, len(SMALL.get(block, bytes(RAM))), 4096) for block in names)
    data = state or skeleton.encode(skeleton.Skeleton(3, 4096, blocks, b"head", b"live", TAIL, SMALL))
    ram = manifest.RamBlock("pc.ram", RAM, 4096, image(target, b"m" * RAM, "memory"))
    memory = manifest.MemoryImage((ram,), image(target, data, "stream"), len(data))
    machine = manifest.MachineInfo(("qemu",), "pc-q35-7.2", "tcg", "7.2", RAM)
    target.put_manifest(manifest.Manifest("web", name, f"{len(name):032x}", 5, (), memory=memory, machine=machine))
    found = target.manifest("web", name).memory
    assert found is not None
    return found


def replace(target: store.Store, name: str, told: manifest.Contents | None) -> None:
    """The manifest with other contents, as if it had been published so."""
    one = target.manifest("web", name)
    assert one.memory is not None
    one = dataclasses.replace(one, memory=dataclasses.replace(one.memory, contents=told))
    target.packs.backend.put(f"manifests/web/{name}.json", manifest.encode(one))


@pytest.fixture
def root(home: paths.Home, target: store.Store) -> Iterator[tree.Tree]:
    books = library.Library(lambda: [home.store], chunks.Chunks(workers=0))
    yield tree.Tree(books)
    books.close()


def listed(root: tree.Tree, name: str) -> dict[str, nodes.Attributes]:
    found: dict[str, nodes.Attributes] = {}
    for folder in ("", "/memory", "/memory/blocks"):
        node = root.find(f"web/{name}{folder}")
        assert nodes.is_directory(node)
        names, look = nodes.listing(node)
        found |= {f"{folder}/{one}": look(one).attributes() for one in names if one not in OWN}
    return found


def read(root: tree.Tree, path: str) -> bytes:
    node = root.find(path)
    assert isinstance(node, nodes.File)
    opened = node.open()
    return content.read(opened, 0, opened.size)


def test_a_manifest_says_what_its_skeleton_holds(target: store.Store) -> None:
    told = put(target, "one").contents
    assert told is not None
    used = {"/rom@etc/acpi": 4096, "pc.ram": None, "pc.bios": 96 << 10}
    assert [(block.name, block.used) for block in told.blocks] == list(used.items())
    assert (told.state_size, told.state_used) == (len(TAIL), len(TAIL))
    assert check.verify(target).ok


def test_it_is_listed_the_same_without(root: tree.Tree, target: store.Store) -> None:
    """An older blkckpt's manifest says nothing of it: then the skeleton does."""
    put(target, "one")
    new = listed(root, "one")
    replace(target, "one", None)
    assert listed(root, "one") == new
    assert new["/device-state.bin"].size == len(TAIL)
    assert new["/memory/blocks/pc.bios.img"].used == 96 << 10
    for name, data in (
        ("pc.bios", SMALL["pc.bios"]),
        ("_rom_etc_acpi", SMALL["/rom@etc/acpi"]),
        ("pc.ram", b"m" * RAM),
    ):
        assert read(root, f"web/one/memory/blocks/{name}.img") == data
    assert read(root, "web/one/device-state.bin") == TAIL


def test_listing_reads_no_skeleton(root: tree.Tree, target: store.Store) -> None:
    put(target, "kept")
    memory = put(target, "one")
    new = listed(root, "kept")
    target.packs.backend.delete(layout.image_key(memory.skeleton))
    assert listed(root, "one") == new
    with pytest.raises(errors.NotFoundError):
        read(root, "web/one/device-state.bin")


def test_what_a_manifest_says_wrongly_is_no_byte(root: tree.Tree, target: store.Store) -> None:
    """V1: where the parts lie is never told from the manifest; verify says that it is wrong."""
    told = put(target, "one").contents
    assert told is not None
    first = dataclasses.replace(told.blocks[0], size=told.blocks[0].size + 4096)
    replace(target, "one", manifest.Contents((first, *told.blocks[1:]), 7, 7))
    for path in ("memory/blocks/_rom_etc_acpi.img", "device-state.bin"):
        with pytest.raises(errors.CorruptError, match="its manifest says"):
            read(root, f"web/one/{path}")
    report = check.verify(target)
    assert report.problem_count == 1
    assert "its manifest says" in report.problems[0].what


def test_what_is_no_skeleton_is_published_all_the_same(target: store.Store) -> None:
    assert put(target, "one", b"device state").contents is None
    assert contents.look(target.image(image(target, bytes(1 << 17), "stream"))) is None
    assert check.verify(target).ok


def test_timings_are_a_line_each_and_leave_nothing_to_collect(root: tree.Tree, target: store.Store) -> None:
    put(target, "none")
    told = dataclasses.replace(target.manifest("web", "none"), name="some", id="5" * 32, timings={"b": 0.5, "a": 2.25})
    target.put_manifest(told)
    gc.collect()
    assert read(root, "web/none/timings.json") == b"{}\n"
    assert read(root, "web/some/timings.json") == b'{\n "a": 2.25,\n "b": 0.5\n}\n'
    assert not gc.collect()


# --- what is on a disk


def disk_of(target: store.Store, name: str = "disk", *, table: bool = True) -> manifest.DiskImage:
    """A checkpoint of a disk with one partition of 1 MiB at 1 MiB, which holds ext2, or without a table."""
    data = bytearray(2 << 20)
    if table:
        data[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 2048, 2048)
        data[510:512] = b"\x55\xaa"
    data[(1 << 20) + 1080 : (1 << 20) + 1082] = b"\x53\xef"
    disk = manifest.DiskImage("vda", image(target, bytes(data), "disk"), len(data))
    target.put_manifest(manifest.Manifest("web", name, f"{len(name):032x}", 5, (disk,)))
    return target.manifest("web", name).disks[0]


def say(target: store.Store, told: manifest.DiskContents | None) -> None:
    """The manifest of ``web@disk`` with other contents, as if it had been published so."""
    one = target.manifest("web", "disk")
    one = dataclasses.replace(one, disks=(dataclasses.replace(one.disks[0], contents=told),))
    target.packs.backend.put("manifests/web/disk.json", manifest.encode(one))


def on_disk(root: tree.Tree) -> list[str]:
    node = root.find("web/disk/disks")
    assert nodes.is_directory(node)
    return sorted(nodes.listing(node)[0])


def test_a_manifest_says_what_is_on_its_disks(target: store.Store) -> None:
    assert disk_of(target).contents == manifest.DiskContents(contents.RULES, ((1, 1 << 20, 1 << 20),), True)
    assert disk_of(target, "plain", table=False).contents == manifest.DiskContents(contents.RULES, (), False)
    assert check.verify(target).ok


@pytest.mark.parametrize("rules", [None, contents.RULES + 1], ids=["older", "other rules"])
def test_a_disk_is_listed_the_same_without(root: tree.Tree, target: store.Store, rules: int | None) -> None:
    disk_of(target)
    new = on_disk(root)
    assert new[:2] == ["vda.files", "vda.img"] and new[2] == "vda.partitions"
    say(target, None if rules is None else manifest.DiskContents(rules, (), False))
    assert on_disk(root) == new
    assert read(root, "web/disk/disks/vda.partitions/1.img")[1080:1082] == b"\x53\xef"
    assert check.verify(target).ok


def test_listing_reads_no_disk(root: tree.Tree, target: store.Store) -> None:
    target.packs.backend.delete(layout.image_key(disk_of(target).image))
    assert on_disk(root) == ["vda.files", "vda.img", "vda.partitions"]
    with pytest.raises(errors.NotFoundError):
        read(root, "web/disk/disks/vda.img")


def test_a_partition_that_a_manifest_makes_up_is_no_byte(root: tree.Tree, target: store.Store) -> None:
    """V1: the table on the disk is asked before anything is read; verify says that the manifest is wrong."""
    disk_of(target)
    say(target, manifest.DiskContents(contents.RULES, ((1, 0, 1 << 20),), True))
    with pytest.raises(errors.CorruptError, match="its manifest says"):
        read(root, "web/disk/disks/vda.partitions/1.img")
    report = check.verify(target)
    assert report.problem_count == 1 and "its manifest says" in report.problems[0].what

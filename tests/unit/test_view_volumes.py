"""Guest files: every file system as its own tool makes it, and as a hostile guest might."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blkckpt import errors
from blkckpt.view import parser, volumes
from blkckpt.view import source as sources
from tests.support import guestdisks

MIB = guestdisks.MIB
POSIX = ("ext2", "ext4", "xfs", "btrfs")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The plain tree, and one with links."""
    root = tmp_path_factory.mktemp("trees")
    return guestdisks.tree(root / "plain"), guestdisks.links(guestdisks.tree(root / "posix"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, trees: tuple[Path, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("images")
    found = {}
    for kind, make in guestdisks.MAKERS.items():
        make(trees[kind in POSIX], root / f"{kind}.img")
        found[kind] = root / f"{kind}.img"
    return found


@pytest.fixture(scope="module")
def mounted(images: dict[str, Path]) -> Iterator[dict[str, volumes.Volume]]:
    found = {kind: volumes.filesystems(guestdisks.FileSource(path))[0] for kind, path in images.items()}
    yield found
    for volume in found.values():
        volume.close()


def contents(volume: volumes.Volume, path: str) -> bytes:
    source = volume.open(path)
    return source.read(0, source.size)


@pytest.mark.parametrize("kind", list(guestdisks.MAKERS))
def test_contents_are_those_that_were_put_in(
    mounted: dict[str, volumes.Volume], trees: tuple[Path, Path], kind: str
) -> None:
    folders = ("", "") if kind == "ntfs" else ("/etc", "/data")
    volume = mounted[kind]
    assert volume.kind == kind
    assert volume.name == ""
    for path in (f"{folders[0]}/passwd", f"{folders[1]}/blob", f"{folders[1]}/empty"):
        original = next(trees[0].rglob(path.rsplit("/", 1)[1])).read_bytes()
        assert contents(volume, path) == original
        assert volume.stat(path).size == len(original)
        assert volume.stat(path).is_file


@pytest.mark.parametrize("kind", ["ext2", "ext4", "btrfs", "vfat"])
def test_listing(mounted: dict[str, volumes.Volume], kind: str) -> None:
    assert [one.name for one in mounted[kind].list("/data/deep")] == ["naïve name.txt"]
    assert {one.name for one in mounted[kind].list("/")} - {"lost+found"} == {"etc", "data"}
    assert mounted[kind].list("/")[-1].is_directory


@pytest.mark.parametrize("kind", ["ext2", "ext4", "btrfs"])
def test_metadata_is_that_of_the_file(mounted: dict[str, volumes.Volume], trees: tuple[Path, Path], kind: str) -> None:
    path = trees[1] / "etc" / "passwd"
    original, found = path.stat(), mounted[kind].stat("/etc/passwd")
    assert (found.mode, found.uid, found.gid) == (original.st_mode, original.st_uid, original.st_gid)
    assert found.mtime_ns // 10**9 == original.st_mtime_ns // 10**9


@pytest.mark.parametrize("kind", POSIX)
def test_links_are_followed_inside_of_the_volume(mounted: dict[str, volumes.Volume], kind: str) -> None:
    volume = mounted[kind]
    assert volume.stat("/etc/alias").is_link
    assert volume.readlink("/etc/far") == "/data/deep"
    assert volume.resolve("/etc/alias") == "/etc/passwd"
    assert volume.resolve("etc/up") == "/etc/passwd"
    assert volume.resolve("/etc/far") == "/data/deep"
    with pytest.raises(errors.NotFoundError, match="too many symbolic links"):
        volume.resolve("/etc/loop")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_sparse_files(mounted: dict[str, volumes.Volume], trees: tuple[Path, Path], kind: str) -> None:
    assert contents(mounted[kind], "/data/sparse") == (trees[1] / "data" / "sparse").read_bytes()


def test_case_is_folded_where_the_guest_does(mounted: dict[str, volumes.Volume]) -> None:
    assert contents(mounted["vfat"], "/ETC/Passwd") == contents(mounted["vfat"], "/etc/passwd")
    assert contents(mounted["ntfs"], "/PASSWD") == contents(mounted["ntfs"], "/passwd")
    with pytest.raises(errors.NotFoundError):
        mounted["ext4"].stat("/ETC")


def test_errors_say_what_is_wrong(mounted: dict[str, volumes.Volume]) -> None:
    volume = mounted["ext4"]
    with pytest.raises(errors.NotFoundError, match="there is no /nothing on the disk's ext4"):
        volume.stat("/nothing")
    with pytest.raises(errors.NotFoundError) as wrong:
        volume.list("/etc/passwd")
    assert wrong.value.errno == errno.ENOTDIR
    with pytest.raises(errors.InputError) as folder:
        volume.open("/etc")
    assert folder.value.errno == errno.EISDIR
    with pytest.raises(errors.InputError):
        volume.stat("/etc/../etc")


def test_reads_in_threads(mounted: dict[str, volumes.Volume], trees: tuple[Path, Path]) -> None:
    original = (trees[1] / "data" / "blob").read_bytes()
    wrong: list[str] = []

    def read(kind: str, seed: int) -> None:
        source, chance = mounted[kind].open("/data/blob"), random.Random(seed)
        for _ in range(50):
            offset, length = chance.randrange(len(original)), chance.randrange(70000)
            if source.read(offset, length) != original[offset : offset + length]:
                wrong.append(kind)

    threads = [threading.Thread(target=read, args=(kind, seed)) for seed, kind in enumerate(POSIX * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_inside_of_its_inode_is_unpacked(mounted: dict[str, volumes.Volume], trees: tuple[Path, Path]) -> None:
    assert isinstance(mounted["btrfs"].open("/etc/passwd"), volumes.Unpacked)
    assert isinstance(mounted["btrfs"].open("/data/blob"), sources.Runs)
    assert contents(mounted["btrfs"], "/etc/passwd") == (trees[1] / "etc" / "passwd").read_bytes()


# --- disks with tables


def test_volumes_of_a_gpt_disk(tmp_path: Path, images: dict[str, Path]) -> None:
    script = "label: gpt\nstart=2048, size=98304, type=uefi\nstart=102400, size=65536, type=linux\n"
    parts = [(MIB, images["vfat"]), (50 * MIB, images["ext4"])]
    disk = guestdisks.FileSource(guestdisks.disk(tmp_path / "disk.img", script, parts))
    with volumes.Volumes(disk) as found:
        assert [(one.name, one.kind, one.label) for one in found.all] == [
            ("1", "vfat", "GUEST"),
            ("2", "ext4", "guest"),
        ]
        assert contents(found.all[1], "/etc/passwd") == contents(found.all[0], "/etc/passwd")


def test_logical_volumes(tmp_path: Path, images: dict[str, Path]) -> None:
    image = tmp_path / "lvm.img"
    data = images["ext4"].read_bytes()
    with image.open("wb") as file:
        file.truncate(80 * MIB)
        for at, part in ((11, data[: 16 * MIB]), (41, data[16 * MIB :])):
            file.seek(at * MIB)
            file.write(part)
    guestdisks.lvm(image, [("root", [(10, 16), (40, 16)]), ("empty", [(0, 4)])])
    with volumes.Volumes(guestdisks.FileSource(image)) as found:
        assert [(one.name, one.kind) for one in found.all] == [("vg-root", "ext4"), ("vg-empty", "unknown")]
        assert contents(found.all[0], "/data/blob").endswith(b"end")
        with pytest.raises(errors.StateError, match="nothing known"):
            found.all[1].list("/")


def test_a_layout_that_is_not_read_says_so(tmp_path: Path) -> None:
    image = tmp_path / "lvm.img"
    with image.open("wb") as file:
        file.truncate(80 * MIB)
    guestdisks.lvm(image, [("mirrored", [(0, 4)])], kind="mirror", extra=("mirror_count = 2",))
    (volume,) = volumes.filesystems(guestdisks.FileSource(image))
    with pytest.raises(errors.StateError, match="mirror"):
        volume.list("/")


def test_encrypted_volumes_say_so() -> None:
    (volume,) = volumes.filesystems(guestdisks.BytesSource(b"LUKS\xba\xbe".ljust(MIB, b"\0")))
    with pytest.raises(errors.StateError, match="encrypted"):
        volume.list("/")


def test_without_the_extra_the_error_says_what_to_install(
    images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "dissect"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise ModuleNotFoundError('gone', name='dissect.extfs')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    (volume,) = volumes.filesystems(guestdisks.FileSource(images["ext4"]))
    with pytest.raises(errors.MissingError, match=r"blkckpt\[files\]"):
        volume.list("/")


# --- hostile ones


def walk(volume: volumes.Volume, path: str = "", depth: int = 0) -> None:
    """Look at everything, as deep as it goes; any error but ours is a failure of the test."""
    try:
        listed = volume.list(path or "/")
    except errors.BlkckptError:
        return
    for one in listed[:50]:
        here = f"{path}/{one.name}"
        assert "/" not in one.name and one.name not in (".", "..")
        try:
            if stat.S_ISLNK(one.mode):
                volume.readlink(here)
            elif one.is_file:
                volume.open(here).read(0, MIB)
        except errors.BlkckptError:
            continue
        if one.is_directory and depth < 4:
            walk(volume, here, depth + 1)


@pytest.mark.parametrize("kind", list(guestdisks.MAKERS))
def test_damage_is_an_error_and_never_a_traceback(
    images: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not zero (mostly metadata) are changed: nothing but our errors comes out."""
    monkeypatch.setattr(volumes, "SECONDS", 0.5)
    clean = guestdisks.FileSource(images[kind])
    places = np.flatnonzero(np.frombuffer(clean.read(0, clean.size), np.uint64))[:8000].tolist()
    chance = random.Random(4)
    for _ in range(4):
        patches = {
            at * 8 + chance.randrange(8): chance.choice((0, 1, 255, chance.randrange(256)))
            for at in chance.sample(places, 60)
        }
        for volume in volumes.filesystems(guestdisks.PatchedSource(clean, patches)):
            walk(volume)
            volume.close()


def test_a_cluster_chain_that_leads_back_ends(images: dict[str, Path]) -> None:
    data = bytearray(images["vfat"].read_bytes())
    reserved, size = int.from_bytes(data[14:16], "little"), int.from_bytes(data[36:40], "little")
    for table in range(2):
        start = (reserved + table * size) * 512
        for cluster in range(3, size * 128):
            at = start + 4 * cluster
            if 2 <= int.from_bytes(data[at : at + 4], "little") < 0x0FFFFFF8:
                data[at : at + 4] = cluster.to_bytes(4, "little")
    (volume,) = volumes.filesystems(guestdisks.BytesSource(data))
    with pytest.raises(errors.CorruptError, match="leads nowhere"):
        volume.open("/data/blob")
    volume.close()


def test_a_tree_whose_node_is_its_own_child_ends(images: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Btrfs: the root tree's root points at itself; the library alone would go down for ever."""
    data = bytearray(images["btrfs"].read_bytes())
    root = int.from_bytes(data[0x10050:0x10058], "little")
    header = bytes(data[0x10020:0x10030])
    at = 0
    while True:
        at = data.find(header, at + 1)
        assert at > 0
        if int.from_bytes(data[at + 16 : at + 24], "little") == root:  # the header says where it is
            node = at - 32
            data[node + 100] = 1  # a level above the leaves
            data[node + 101 + 17 : node + 101 + 25] = root.to_bytes(8, "little")
            if data.find(header, at + 1) < 0 or at > len(data) // 2:
                break
        if at > len(data) - 4096:
            break
    monkeypatch.setattr(volumes, "SECONDS", 0.5)
    (volume,) = volumes.filesystems(guestdisks.BytesSource(data))
    with pytest.raises(errors.CorruptError):
        volume.list("/")
    volume.close()


def test_a_question_that_takes_too_long_is_given_up() -> None:
    class Endless(parser.Parser):
        def lvm(self, size: int) -> list[dict[str, object]]:
            while True:
                size += 1

    before = signal.signal(signal.SIGPROF, parser._too_long)
    try:
        pipe = parser.Pipe(io.BytesIO(), io.BytesIO())
        message, _ = parser.answer(Endless(pipe, 0.05), {"do": "lvm", "size": 1})
    finally:
        signal.signal(signal.SIGPROF, before)
    assert message["failed"] == "damaged"
    assert "processor time" in message["why"]


def test_a_parser_that_dies_is_an_error_and_the_next_question_starts_another(images: dict[str, Path]) -> None:
    (volume,) = volumes.filesystems(guestdisks.FileSource(images["ext4"]))
    volume.list("/")
    assert volume._parser is not None
    volume._parser._process.kill()
    volume._parser._process.wait()
    assert volume.list("/etc")
    volume.close()

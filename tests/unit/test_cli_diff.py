"""``diff``: bytes, pages, extents, files and pictures, against what was changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click import testing

from blkckpt import paths
from blkckpt.cli import main
from blkckpt.store import images
from blkckpt.view import filediff, heatmap
from tests.support import checkpoints, guestdisks

MIB = guestdisks.MIB
CHUNK = checkpoints.CHUNK
STAMP = 1_700_000_000
RAM = 4 * MIB


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree, and the same with files added, removed and changed."""
    root = tmp_path_factory.mktemp("diff-trees")
    old = guestdisks.links(guestdisks.tree(root / "old"))
    (old / "gone" / "with").mkdir(parents=True)
    (old / "gone" / "with" / "it").write_text("x")
    (old / "was-a-file").write_text("x")
    (old / "silent").write_bytes(b"a" * 5000)
    for path in sorted(old.rglob("*"), reverse=True):
        os.utime(path, (STAMP, STAMP), follow_symlinks=False)
    new = root / "new"
    shutil.copytree(old, new, symlinks=True)
    shutil.rmtree(new / "gone")
    (new / "was-a-file").unlink()
    (new / "was-a-file").mkdir()
    (new / "was-a-file" / "inside").write_text("y")
    (new / "fresh").mkdir()
    (new / "fresh" / "file").write_text("z")
    (new / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n")
    (new / "etc" / "alias").unlink()
    (new / "etc" / "alias").symlink_to("shadow")
    (new / "data" / "empty").chmod(0o600)
    (new / "silent").write_bytes(b"a" * 4999 + b"b")  # same size, and the same time below
    with (new / "data" / "sparse").open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"MIDDLE")
    for name in ("silent", "data/empty", "was-a-file/inside", "was-a-file", "fresh/file", "fresh", "data/sparse"):
        os.utime(new / name, (STAMP, STAMP))
    return old, new


@pytest.fixture(scope="module")
def memory() -> tuple[bytes, bytes]:
    old = bytearray(random.Random(1).randbytes(RAM))
    old[MIB : 2 * MIB] = bytes(MIB)
    new = bytearray(old)
    for page in (0, 1, 17, 700, 1023):
        new[page * 4096 + 5] ^= 1
    new[MIB + 7] = 1
    return bytes(old), bytes(new)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, trees: tuple[Path, Path], memory: tuple[bytes, bytes]) -> paths.Home:
    root = tmp_path_factory.mktemp("diff")
    made = paths.home(root / "home")
    script = "label: gpt\nstart=2048, size=65536, type=linux\nstart=71680, size=65536, type=linux\n"
    previous = None
    for number, (name, tree) in enumerate((("before", trees[0]), ("after", trees[1]))):
        guestdisks.ext("ext4", tree, root / f"{name}.ext4")
        guestdisks.ext("ext2", trees[0], root / "same.ext2") if not number else None
        disk = guestdisks.disk(
            root / f"{name}.img", script, [(MIB, root / f"{name}.ext4"), (35 * MIB, root / "same.ext2")], 70 * MIB
        )
        # the ids of a file system and of a partition table are random; they are the same disk's here
        disks: dict[str, bytes | Path] = {"vda": disk}
        if number:
            disks["vdb"] = b"new disk".ljust(3 * CHUNK, b"\0")
        checkpoints.checkpoint(
            made,
            name,
            disks,
            memory={"pc.ram": memory[number], "vga.vram": b"v" * CHUNK},
            number=number + 1,
            parent=previous,
        )
        previous = name
    return made


@pytest.fixture(autouse=True)
def _home(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLKCKPT_HOME", str(home.root))


def run(*words: str, code: int = 0) -> testing.Result:
    result = testing.CliRunner().invoke(main.command, words)
    assert result.exit_code == code, result.output
    return result


def found(*words: str) -> dict[str, Any]:
    keys: dict[str, Any] = json.loads(run("diff", "web@before", "web@after", "--json", *words).stdout)
    return keys


def test_numbers_are_those_of_a_byte_comparison(home: paths.Home, memory: tuple[bytes, bytes]) -> None:
    keys = found("--exact", "--pages", "--extents")
    old, new = (np.fromfile(home.root.parent / f"{name}.img", np.uint8) for name in ("before", "after"))
    disk, added = keys["disks"]
    chunks = np.flatnonzero((old != new).reshape(-1, CHUNK).any(axis=1))
    assert disk["changed_bytes"] == len(chunks) * CHUNK
    assert disk["exact_bytes"] == int(np.count_nonzero(old != new))
    covered = [
        n for one in disk["extents"] for n in range(one["offset"] // CHUNK, (one["offset"] + one["length"]) // CHUNK)
    ]
    assert covered == chunks.tolist()
    assert (added["old_size"], added["new_size"], added["changed_bytes"]) == (None, 3 * CHUNK, CHUNK)
    assert added["filled_bytes"] == CHUNK
    ram, vga = keys["memory"]
    assert (ram["changed_pages"], ram["exact_bytes"]) == (6, 6)
    assert ram["filled_bytes"] == CHUNK, "a page of the zero chunks was written"
    assert ram["changed_bytes"] == 5 * CHUNK
    assert (vga["changed_bytes"], vga["changed_pages"]) == (0, 0)


def test_no_data_is_read_unless_asked(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.ImageReader, "_fetch", None)
    said = run("diff", "web@after").stdout
    assert "pc.ram" in said and "added" in said
    assert {row.split()[0] for row in said.splitlines()[1:]} == {"disk", "memory"}


FILES = {
    "/was-a-file": ("changed", {"kind"}),
    "/was-a-file/inside": ("added", set()),
    "/gone": ("removed", set()),
    "/gone/with": ("removed", set()),
    "/gone/with/it": ("removed", set()),
    "/fresh": ("added", set()),
    "/fresh/file": ("added", set()),
    "/etc/passwd": ("changed", {"content", "size", "time"}),
    "/etc/alias": ("changed", {"target", "time"}),
    "/data/empty": ("changed", {"permissions"}),
    "/silent": ("changed", {"content"}),
    "/data/sparse": ("changed", {"content"}),
}


def test_files() -> None:
    shown = {
        one["path"]: (one["what"], set(one["how"]) - {"attributes"})
        for one in found("--files")["files"]
        if one["how"] != ["attributes"]  # mke2fs sets every change time to its own
    }
    assert shown == FILES
    assert {(one["disk"], one["volume"]) for one in found("--files")["files"]} == {("vda", "1")}


def test_files_for_people() -> None:
    lines = run("diff", "web@before", "web@after", "--files").stdout.splitlines()
    assert "- vda:1:/gone/with/it" in lines
    assert "+ vda:1:/fresh/file" in lines
    assert any(line.startswith("~ vda:1:/etc/passwd  (content, size") for line in lines)


def test_a_volume_without_a_changed_chunk_is_not_looked_at(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = filediff._directory

    def spy(both: Any, path: str, depth: int) -> Any:
        looked.append(both.new.name)
        return real(both, path, depth)

    monkeypatch.setattr(filediff, "_directory", spy)
    found("--files")
    assert set(looked) == {"1"}


def test_extents_for_people() -> None:
    said = run("diff", "web@before", "web@after", "--extents").stdout
    assert "disk vdb: 1 range\n" in said
    assert "filled" in said


def test_a_picture_as_svg(tmp_path: Path) -> None:
    run("diff", "web@after", "--svg", str(tmp_path / "heat.svg"))
    root = ElementTree.parse(tmp_path / "heat.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    words = [one.text or "" for one in root.iter(f"{space}text")]
    assert words[0] == "web@before to web@after"
    assert any(one.startswith("disk vda: ") for one in words)
    hot = [one for one in root.iter(f"{space}rect") if one.get("class") in {"s1", "s2", "s3", "s4"}]
    assert len(hot) > 10


def test_a_picture_as_png(tmp_path: Path) -> None:
    heat = np.zeros(256)
    heat[[0, 130, 255]] = 0.01, 0.5, 1.0
    data = heatmap.png([heatmap.Map("disk vda", 256 * CHUNK, 3 * CHUNK, heat)], "title")
    pixels = decode(data)
    assert pixels.shape == (8, 512)
    assert pixels[::4, ::4].tolist() == (heatmap.shades(heat).reshape(2, 128) + 1).tolist()
    run("diff", "web@after", "--png", str(tmp_path / "heat.png"))
    assert decode((tmp_path / "heat.png").read_bytes()).max() > 1


def decode(data: bytes) -> Any:
    """The pixels (palette numbers) of a PNG as this project writes it; every checksum is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        chunks[kind] = body
        at += 12 + length
    width, height = (int.from_bytes(chunks[b"IHDR"][at : at + 4], "big") for at in (0, 4))
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_shades() -> None:
    assert heatmap.text(np.array([0, 1e-9, 0.1, 0.2, 0.5, 0.71, 1])) == "·░░▒▓██"
    assert heatmap.text(np.zeros(0)) == ""


def test_mistakes(tmp_path: Path) -> None:
    assert "first of its VM" in run("diff", "web@before", code=3).stderr
    assert "two checkpoints" in run("diff", "web@a", "web@b", "web@c", code=3).stderr
    run("diff", "web@before", "web@nothing", code=4)
    run("diff", "web@after", "--svg", str(tmp_path / "no" / "where.svg"), code=4)

"""``ls``, ``cat``, ``cp``: the guest's files by name, and a guest that would like to write elsewhere."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click import testing

from blkckpt import errors, paths
from blkckpt.cli import guestpath, main, output
from blkckpt.view import extract
from tests.support import checkpoints, guestdisks

MIB = guestdisks.MIB
SCRIPT = (
    "label: gpt\nstart=2048, size=98304, type=uefi\nstart=102400, size=65536, type=linux\n"
    "start=204800, size=20480, type=swap\n"
)
OLD_NAME = "say \x1b[31mred\nrm"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> paths.Home:
    """web@before: a FAT, an ext4 and a swap partition on vda; ext2 on all of vdb."""
    root = tmp_path_factory.mktemp("guest-files")
    plain = guestdisks.tree(root / "plain")
    tricky = guestdisks.links(guestdisks.tree(root / "tricky"))
    (tricky / "only-here").write_text("ext4\n")
    (tricky / OLD_NAME).write_text("x")
    (tricky / "bin").mkdir()
    (tricky / "bin" / "su").write_text("root")
    (tricky / "bin" / "su").chmod(0o6755)
    (tricky / "bin" / "inside").symlink_to("su")
    (tricky / "bin" / "outside").symlink_to("../../../etc/passwd")
    (tricky / "bin" / "absolute").symlink_to("/etc/shadow")
    os.mkfifo(tricky / "bin" / "pipe")
    guestdisks.fat(plain, root / "fat.img")
    guestdisks.ext("ext4", tricky, root / "ext4.img")
    guestdisks.ext("ext2", plain, root / "ext2.img", 8 * MIB)
    disk = guestdisks.disk(root / "disk.img", SCRIPT, [(MIB, root / "fat.img"), (50 * MIB, root / "ext4.img")])
    with disk.open("r+b") as file:
        file.seek(100 * MIB + 4086)
        file.write(b"SWAPSPACE2")
    made = paths.home(root / "home")
    checkpoints.checkpoint(made, "before", {"vda": disk, "vdb": root / "ext2.img"})
    return made


@pytest.fixture(autouse=True)
def _home(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLKCKPT_HOME", str(home.root))


def run(*words: str, code: int = 0) -> testing.Result:
    result = testing.CliRunner().invoke(main.command, words)
    assert result.exit_code == code, result.output
    if code:
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("blkckpt: ")
        assert "Traceback" not in result.output
    return result


# --- addresses


@pytest.mark.parametrize(
    ("text", "disk", "volume", "path"),
    [
        ("web@a:/etc", None, None, "/etc"),
        ("web@a:vda:/etc", "vda", None, "/etc"),
        ("web@a:vda:2:/etc", "vda", "2", "/etc"),
        ("web@a:vda:vg-root:/a:b/c", "vda", "vg-root", "/a:b/c"),
        ("web@a:vda::/", "vda", "", "/"),
        ("web@latest:/a:/b", None, None, "/a:/b"),
    ],
)
def test_address(text: str, disk: str | None, volume: str | None, path: str) -> None:
    found = guestpath.parse(text)
    assert (found.disk, found.volume, found.path) == (disk, volume, path)
    assert str(found) == text


@pytest.mark.parametrize(
    "text", ["web:/etc", "web@a", "web@a:", "web@a:etc", "web@a:vda:", "web@a:../x:/y", "web@a:vda/x"]
)
def test_bad_address(text: str) -> None:
    run("cat", text, code=3)


# --- ls


def test_volumes() -> None:
    found = json.loads(run("ls", "web@before", "--json").stdout)["volumes"]
    assert [(one["disk"], one["volume"], one["kind"], one["problem"]) for one in found] == [
        ("vda", "1", "vfat", None),
        ("vda", "2", "ext4", None),
        ("vda", "3", "swap", "it is swap space"),
        ("vdb", "", "ext2", None),
    ]
    assert "swap space" in run("ls", "web@latest").stdout


def test_the_volume_that_has_it_is_found() -> None:
    assert run("cat", "web@before:/only-here").stdout == "ext4\n"


def test_a_path_that_several_volumes_have_is_asked_back() -> None:
    said = run("cat", "web@before:/etc/passwd", code=3).stderr
    for choice in ("web@before:vda:1:/etc/passwd", "web@before:vda:2:/etc/passwd", "web@before:vdb::/etc/passwd"):
        assert choice in said
        assert run("cat", choice).stdout.startswith("root:")
    assert run("cat", "web@before:/etc/passwd", "--disk", "vdb").stdout.startswith("root:")
    assert run("cat", "web@before:vda:/etc/passwd", "--volume", "2").stdout.startswith("root:")
    run("cat", "web@before:vda:1:/etc/passwd", "--volume", "2", code=3)


def test_what_is_not_there() -> None:
    said = run("ls", "web@before:/nothing", code=4).stderr
    assert "vda:2 (ext4)" in said and "swap" in said
    assert "it has vda, vdb" in run("ls", "web@before:vdc:/x", code=4).stderr
    assert "vda:1, vda:2" in run("ls", "web@before:vda:9:/x", code=4).stderr
    run("ls", "web@before:vda:3:/", code=5)
    run("ls", "web@nothing:/x", code=4)


def test_listing() -> None:
    said = run("ls", "-l", "web@before:vda:2:/bin").stdout
    assert "-rwsr-sr-x" in said and "absolute -> /etc/shadow" in said and said.splitlines()[3].startswith("p")
    assert run("ls", "web@before:vda:2:/bin").stdout.split() == ["absolute", "inside", "outside", "pipe", "su"]
    assert "/data/deep/naïve name.txt" in run("ls", "-R", "web@before:vdb:/").stdout
    one = json.loads(run("ls", "web@before:vda:2:/etc/passwd", "--json").stdout)["files"][0]
    assert (one["path"], one["type"], one["size"], one["target"]) == ("/etc/passwd", "file", 26, None)


def test_names_do_not_control_the_terminal() -> None:
    said = run("ls", "web@before:vda:2:/").stdout
    assert "\x1b" not in said
    assert "say \\x1b[31mred\\nrm" in said
    assert OLD_NAME in [one["name"] for one in json.loads(run("ls", "web@before:vda:2:/", "--json").stdout)["files"]]
    assert output.printable("a\udcffb\u202ec") == "a\\xffb\\u202ec"


# --- cp


def test_copying_one_file(tmp_path: Path) -> None:
    run("cp", "web@before:/only-here", str(tmp_path))
    run("cp", "web@before:vdb:/data/blob", str(tmp_path / "renamed"))
    assert (tmp_path / "only-here").read_text() == "ext4\n"
    assert (tmp_path / "renamed").read_bytes().endswith(b"end")


def test_copying_a_tree(tmp_path: Path) -> None:
    result = run("cp", "-r", "web@before:vda:2:/", str(tmp_path / "out"), "--json", code=6)
    report = json.loads(result.stdout)
    out = tmp_path / "out"
    assert (out / "data" / "sparse").stat().st_blocks * 512 < MIB
    assert (out / "data" / "sparse").stat().st_size == 5 * MIB
    assert (out / "data" / "sparse").read_bytes()[3 * MIB :].startswith(b"middle")
    assert (out / OLD_NAME).read_text() == "x"
    assert stat.S_IMODE((out / "bin" / "su").stat().st_mode) == 0o755, "set-user-id bits stay with the guest"
    assert (out / "bin" / "inside").is_symlink()
    assert (out / "etc" / "alias").read_text().startswith("root:")
    left = {one["path"] for one in report["problems"]}
    assert left == {"/bin/absolute", "/bin/outside", "/bin/pipe", "/etc/far", "/etc/up"}
    for path in left:
        assert not (out / path[1:]).is_symlink() and not (out / path[1:]).exists()
    assert report["files"] == 8


def test_links_on_request(tmp_path: Path) -> None:
    run("cp", "-r", "web@before:vda:2:/bin", str(tmp_path / "all"), "--links", "all", code=6)
    assert (tmp_path / "all" / "absolute").readlink() == Path("/etc/shadow")
    run("cp", "-r", "web@before:vda:2:/etc", str(tmp_path / "none"), "--links", "none")
    assert [one.name for one in (tmp_path / "none").iterdir()] == ["passwd"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A link where a directory or a file of the copy should be is not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("untouched")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "etc").symlink_to(outside)
    (tmp_path / "two" / "etc").mkdir()
    (tmp_path / "two" / "etc" / "passwd").symlink_to(outside / "passwd")
    said = run("cp", "-r", "web@before:vdb:/etc", str(tmp_path / "one"), "--replace", code=5).stderr
    assert "no directory" in said
    run("cp", "-r", "web@before:vdb:/etc", str(tmp_path / "two"), "--replace")
    assert (outside / "passwd").read_text() == "untouched"
    assert not (tmp_path / "two" / "etc" / "passwd").is_symlink()
    assert (tmp_path / "two" / "etc" / "passwd").read_text().startswith("root:")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("mine")
    assert "--replace" in run("cp", "web@before:vdb:/etc/passwd", str(tmp_path), code=5).stderr
    assert (tmp_path / "passwd").read_text() == "mine"
    run("cp", "web@before:vdb:/etc/passwd", str(tmp_path), "--replace")
    assert (tmp_path / "passwd").read_text().startswith("root:")


def test_mistakes(tmp_path: Path) -> None:
    assert "add -r" in run("cp", "web@before:vdb:/etc", str(tmp_path), code=3).stderr
    run("cp", "web@before:vdb:/etc/passwd", "web@before:vdb:/data/blob", str(tmp_path / "no"), code=4)
    run("cp", "web@before:vdb:/etc/passwd", str(tmp_path / "no" / "where"), code=4)
    assert "not a file" in run("cat", "web@before:vdb:/etc", code=3).stderr


@pytest.mark.parametrize(
    ("target", "depth", "inside"),
    [
        ("a", 1, True), ("a/b", 1, True), ("../a", 2, True), ("../a", 1, False), ("a/../../b", 5, False),
        ("/a", 9, False), ("..", 1, False), ("", 3, False), ("./../../a", 3, True), ("../../a", 2, False),
    ],
)  # fmt: skip
def test_links_that_stay_inside(target: str, depth: int, inside: bool) -> None:
    """Depth 1: in the directory that is copied itself."""
    assert extract.stays_inside(target, depth) is inside


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InputError):
        extract.copy(None, "/x", tmp_path, name, extract.Options(), lambda *_: None, extract.Report())  # type: ignore[arg-type]

"""Names and disk arguments as typed: what is accepted, and that what is not is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.cli import names


def test_target() -> None:
    assert names.parse_target("web@c1") == names.Target("web", "c1")
    assert names.parse_target("web@latest").checkpoint == names.LATEST
    assert str(names.parse_vm_or_target("web")) == "web"
    assert str(names.parse_target("web@c1")) == "web@c1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@c",
        "web@",
        "we/b@c",
        "../x@c",
        "web@..",
        "web@a/b",
        "a@b@c",
        "-w@c",
        "w@" + "x" * 65,
        "w b@c",
        "w\n@c",
    ],
)
def test_bad_target(text: str) -> None:
    with pytest.raises(errors.InputError) as caught:
        names.parse_target(text)
    assert "\n" not in str(caught.value)


def test_vm_alone_says_how_to_name_a_checkpoint() -> None:
    with pytest.raises(errors.InputError, match="web@latest"):
        names.parse_target("web")


@pytest.mark.parametrize("name", ["by-time", "by-tag"])
def test_names_of_a_mount_are_no_checkpoints(name: str) -> None:
    with pytest.raises(errors.InputError, match="mount"):
        names.check_new_checkpoint(name)


def test_latest_is_not_a_name() -> None:
    assert names.check_new_checkpoint("c1") == "c1"
    for text in (names.LATEST, "a/b", ".."):
        with pytest.raises(errors.InputError):
            names.check_new_checkpoint(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b.raw", (None, "/a/b.raw", None)),
        ("/a/b.raw:20G", (None, "/a/b.raw", 20 << 30)),
        ("vda=/a/b.raw:4096", ("vda", "/a/b.raw", 4096)),
        ("data=/a/b", ("data", "/a/b", None)),
        ("/a/x=y.raw", (None, "/a/x=y.raw", None)),  # the = is in the path
        ("/a/b:c.raw", (None, "/a/b:c.raw", None)),  # the : is in the path
        ("/dev/disk/by-path/pci-0:1/x", (None, "/dev/disk/by-path/pci-0:1/x", None)),
        ("d=/a/x=y:1.5M", ("d", "/a/x=y", 3 << 19)),
    ],
)
def test_disk(text: str, expected: tuple[str | None, str, int | None]) -> None:
    (disk,) = names.parse_disks([text])
    assert disk == names.DiskArgument(expected[0] or "vda", Path(expected[1]), expected[2])


def test_default_names_leave_out_those_taken() -> None:
    disks = names.parse_disks(["/a", "vda=/b", "/c", "x=/d"])
    assert [disk.name for disk in disks] == ["vdb", "vda", "vdc", "x"]


def test_many_default_names() -> None:
    disks = names.parse_disks([f"/d{number}" for number in range(64)])
    assert [disks[25].name, disks[26].name, disks[63].name] == ["vdz", "vdaa", "vdbl"]


def test_relative_path_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.parse_disks(["a.raw"])[0].path == tmp_path / "a.raw"


@pytest.mark.parametrize("texts", [["=x:"], [""], ["vda="], [":5G"], ["..=/a"], ["a b=/x"], ["/a:12Q"]])
def test_bad_disk(texts: list[str]) -> None:
    with pytest.raises(errors.InputError):
        names.parse_disks(texts)


def test_twice() -> None:
    with pytest.raises(errors.InputError, match=r"disk name 'vda'"):
        names.parse_disks(["vda=/a", "vda=/b"])
    with pytest.raises(errors.InputError, match="disk path '/a'"):
        names.parse_disks(["x=/a", "y=/a"])

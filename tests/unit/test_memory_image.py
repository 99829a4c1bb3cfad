"""Raw images: complete or absent, believed only on the boot that wrote them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.memory import image
from tests.unit import test_memory_generate as generated

MIB = 1 << 20


def write(path: Path, data: bytes, at: int = MIB) -> None:
    with image.RawWriter(path.parent, 4 * MIB) as writer:
        writer.write(at, data)
        writer.publish(path, "ab" * 16)


@pytest.fixture(params=["unnamed", "named"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With O_TMPFILE and, as on filesystems without it, with a temporary name."""
    if request.param == "named":
        real = os.open

        def refuse(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, mode, **more)

        monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("either_way")
def test_published(tmp_path: Path) -> None:
    path = tmp_path / "pc.ram.raw"
    write(path, b"one")
    write(path, b"two")  # replaces
    assert path.stat().st_size == 4 * MIB
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes()[MIB : MIB + 4] == b"two\0"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pc.ram.raw", "pc.ram.raw.json"]
    assert image.usable(path, 4 * MIB, "ab" * 16)


@pytest.mark.usefixtures("either_way")
def test_absent_unless_published(tmp_path: Path) -> None:
    with image.RawWriter(tmp_path, MIB) as writer:
        writer.write(0, b"x")
    assert list(tmp_path.iterdir()) == []


def test_not_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pc.ram.raw"
    assert not image.usable(path, 4 * MIB, "ab" * 16)
    write(path, b"x")
    assert not image.usable(path, 4 * MIB, "cd" * 16)
    assert not image.usable(path, 2 * MIB, "ab" * 16)
    note = tmp_path / "pc.ram.raw.json"
    text = note.read_text()
    for damage in ("", "{", "[]", text.replace('"version": 1', '"version": 2')):
        note.write_text(damage)
        assert not image.usable(path, 4 * MIB, "ab" * 16)
    note.write_text(text)
    assert image.usable(path, 4 * MIB, "ab" * 16)
    os.truncate(path, MIB)
    assert not image.usable(path, 4 * MIB, "ab" * 16)
    os.truncate(path, 4 * MIB)
    monkeypatch.setattr(image, "boot_id", lambda: "another boot")
    assert not image.usable(path, 4 * MIB, "ab" * 16)


def test_reader_extents(tmp_path: Path) -> None:
    path = tmp_path / "pc.ram.raw"
    write(path, b"x" * 65536)
    with image.RawReader(path) as reader:
        assert reader.size == 4 * MIB
        extents = list(reader.extents(0, reader.size))
        assert sum(length for _, length, _ in extents) == reader.size
        assert all(not any(reader.read(at, length)) for at, length, zero in extents if zero)
        assert [(at, zero) for at, _, zero in extents] == [(0, True), (MIB, False), (MIB + 65536, True)]
        assert list(reader.extents(MIB + 4096, 4096)) == [(MIB + 4096, 4096, False)]
        with pytest.raises(errors.CorruptError):
            reader.read(4 * MIB - 1, 2)


def test_materialise(tmp_path: Path) -> None:
    data = generated.contents(5, 700, 0.4)
    path = tmp_path / "m.raw"
    told: list[tuple[int, int]] = []
    cuts = tuple(range(0, len(data), 65536))
    image.materialise(generated.Reader(data, cuts), path, "ab" * 16, lambda done, total: told.append((done, total)))
    assert path.read_bytes() == data
    assert told[-1] == (len(data), len(data))
    assert image.usable(path, len(data), "ab" * 16)


def test_file_names() -> None:
    assert image.file_name("pc.ram") == "pc.ram.raw"
    assert image.file_name("0000:00:01.0/vga.vram") == "0000_00_01.0_vga.vram.raw"
    assert image.file_name("/rom@etc/acpi/tables") == "_rom_etc_acpi_tables.raw"
    assert "/" not in image.file_name("../../etc/passwd")
    names = image.file_names(["a/b", "a:b", "a_b", "..", "x" * 255])
    assert len(set(names.values())) == 5
    assert not any(name.startswith(".") for name in names.values())


def test_no_space_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with image.RawWriter(tmp_path, MIB) as writer:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(errors.NoSpaceError, match="memory image"):
            writer.write(0, b"x")


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, pieces, at: real(fd, [b"".join(pieces)[:5]], at))
    with image.RawWriter(tmp_path, MIB) as writer:
        writer.writev(100, [b"hello", b", ", b"world"], 12)
        assert writer.read(98, 16) == b"\0\0hello, world\0\0"


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError):
        image.RawWriter(tmp_path / "nowhere", MIB)

"""Small disks with file systems and partition tables, made by the tools that everybody uses.  Needs no root."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

MIB = 1 << 20
TOOLS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


class FileSource:
    """A file as a source; counts what is read."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self.size = len(self._data)
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        data = self._data[offset : offset + length]
        self.bytes_read += len(data)
        return data


class PatchedSource:
    """Another source with some bytes changed."""

    def __init__(self, inner: FileSource, patches: dict[int, int]) -> None:
        self._inner, self._patches, self.size = inner, patches, inner.size

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(self._inner.read(offset, length))
        for at, value in self._patches.items():
            if offset <= at < offset + len(data):
                data[at - offset] = value
        return bytes(data)


class BytesSource:
    """Bytes as a source."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytes(data)
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def run(*command: str | Path, data: bytes | None = None) -> None:
    """Run a tool; what it says is shown if it fails."""
    done = subprocess.run(
        [str(part) for part in command], input=data, capture_output=True, env={**os.environ, "PATH": TOOLS}, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout!r} {done.stderr!r}"


def tree(root: Path) -> Path:
    """The files that every image below has (FAT and NTFS without the links)."""
    (root / "etc").mkdir(parents=True)
    (root / "data" / "deep").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "data" / "blob").write_bytes(bytes(range(256)) * 9000 + b"end")
    (root / "data" / "empty").write_bytes(b"")
    (root / "data" / "deep" / "naïve name.txt").write_text("ü")
    return root


def links(root: Path) -> Path:
    """*root* with symbolic links and a sparse file as well."""
    (root / "etc" / "alias").symlink_to("passwd")
    (root / "etc" / "far").symlink_to("/data/deep")
    (root / "etc" / "up").symlink_to("../../../../etc/passwd")
    (root / "etc" / "loop").symlink_to("loop")
    with (root / "data" / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"middle")
        file.truncate(5 * MIB)
    return root


def ext(kind: str, source: Path, image: Path, size: int = 32 * MIB) -> None:
    _blank(image, size)
    run("mke2fs", "-q", "-t", kind, "-L", "guest", "-E", "root_owner=0:0", "-d", source, image)


def xfs(source: Path, image: Path) -> None:
    _blank(image, 320 * MIB)
    prototype = image.with_suffix(".proto")
    prototype.write_text("\n".join(["/", "0 0", "d--755 0 0", *_prototype(source), "$", ""]))
    run("mkfs.xfs", "-q", "-L", "guest", "-p", prototype, image)


def btrfs(source: Path, image: Path) -> None:
    _blank(image, 128 * MIB)
    run("mkfs.btrfs", "-q", "-L", "guest", "--rootdir", source, image)


def fat(source: Path, image: Path, bits: int = 32, size: int = 48 * MIB) -> None:
    _blank(image, size)
    run("mkfs.vfat", "-F", str(bits), "-n", "GUEST", image)
    run("mcopy", "-s", "-i", image, *sorted(source.iterdir()), "::")


def ntfs(source: Path, image: Path) -> None:
    _blank(image, 16 * MIB)
    run("mkfs.ntfs", "-q", "-F", "-Q", "-L", "guest", image)
    for path in (source / "data" / "blob", source / "etc" / "passwd", source / "data" / "empty"):
        run("ntfscp", image, path, path.name)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "ext2": lambda source, image: ext("ext2", source, image),
    "ext4": lambda source, image: ext("ext4", source, image),
    "xfs": xfs,
    "btrfs": btrfs,
    "vfat": fat,
    "ntfs": ntfs,
}


def disk(image: Path, script: str, parts: Sequence[tuple[int, Path]] = (), size: int = 128 * MIB) -> Path:
    """A disk with the partition table of sfdisk's *script*; *parts* are put at their offsets."""
    _blank(image, size)
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", image, data=script.encode())
    with image.open("r+b") as file:
        for offset, part in parts:
            file.seek(offset)
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
    return image


def lvm(
    image: Path,
    volumes: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    *,
    kind: str = "striped",
    extra: Sequence[str] = (),
) -> None:
    """A physical volume with linear *volumes*: name and (first extent, extents), 1 MiB an extent, data at 1 MiB."""
    identity = b"0123456789abcdefghijklmnopqrstuv"
    size = image.stat().st_size
    text = _lvm_text(identity.decode(), size, volumes, kind, extra).encode() + b"\0"
    label = bytearray(512)
    label[:32] = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001"
    label[32:152] = identity + struct.pack("<Q10Q", size, MIB, 0, 0, 0, 4096, MIB - 4096, 0, 0, 0, 0)
    header = bytearray(512)
    magic = b" LVM2 x[5A%r0N*>"
    header[4:40] = magic + struct.pack("<IQQ", 1, 4096, MIB - 4096)[:20]
    header[40:88] = struct.pack("<QQIIQQII", 512, len(text), zlib.crc32(text), 0, 0, 0, 0, 0)
    with image.open("r+b") as file:
        for offset, data in ((512, label), (4096, header), (4096 + 512, text)):
            file.seek(offset)
            file.write(data)


def _lvm_text(
    identity: str,
    size: int,
    volumes: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    kind: str,
    extra: Sequence[str],
) -> str:
    lines = [
        "vg {", 'id = "vg"', "seqno = 1", 'status = ["RESIZEABLE", "READ", "WRITE"]', "flags = []",
        "extent_size = 2048", "max_lv = 0", "max_pv = 0", "physical_volumes {", "pv0 {", f'id = "{identity}"',
        'status = ["ALLOCATABLE"]', "pe_start = 2048", f"pe_count = {size // MIB - 1}", "}", "}", "logical_volumes {",
    ]  # fmt: skip
    for name, segments in volumes:
        lines += [f"{name} {{", f'id = "{name}"', 'status = ["READ", "WRITE", "VISIBLE"]', "flags = []"]
        lines += [f"segment_count = {len(segments)}"]
        start = 0
        for number, (first, count) in enumerate(segments):
            lines += [f"segment{number} {{", f"start_extent = {start}", f"extent_count = {count}", f'type = "{kind}"']
            lines += [*extra, "stripe_count = 1", f'stripes = ["pv0", {first}]', "}"]
            start += count
        lines.append("}")
    return "\n".join([*lines, "}", "}", 'contents = "Text Format Volume Group"', "version = 1", ""])


def _prototype(source: Path) -> list[str]:
    """The lines of a mkfs.xfs prototype for what is in *source* (names without spaces)."""
    lines = []
    for path in sorted(source.iterdir()):
        name = path.name.replace(" ", "_")
        if path.is_symlink():
            lines.append(f"{name} l--777 0 0 {path.readlink()}")
        elif path.is_dir():
            lines += [f"{name} d--755 0 0", *_prototype(path), "$"]
        else:
            lines.append(f"{name} ---644 7 8 {path.parent / path.name}" if " " not in path.name else "")
    return [line for line in lines if line]


def _blank(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)

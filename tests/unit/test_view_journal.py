"""A journal that was not written back, replayed in memory: the same files that e2fsck's replay leaves on the disk."""

from __future__ import annotations

import io
import shutil
import struct
from pathlib import Path

import pytest

from blkckpt.view import jbd2, volumes
from tests.support import guestdisks

MIB = guestdisks.MIB


def debugfs(image: Path, *commands: str) -> None:
    guestdisks.run("debugfs", "-w", "-f", "-", image, data="\n".join([*commands, ""]).encode())


def differing(old: bytes, new: bytes, size: int) -> list[int]:
    return [at // size for at in range(0, len(old), size) if old[at : at + size] != new[at : at + size]]


def contents(image: Path) -> dict[str, bytes]:
    (volume,) = volumes.filesystems(guestdisks.FileSource(image))
    try:
        found = {}
        for one in volume.list("/"):
            if one.is_file:
                source = volume.open(f"/{one.name}")
                found[one.name] = source.read(0, source.size)
        return found
    finally:
        volume.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("journal") / "plain"
    root.mkdir()
    (root / "stays").write_text("stays\n")
    (root / "goes").write_text("goes\n")
    return root


@pytest.mark.parametrize(("block", "options", "opening"), [
    (4096, "64bit,metadata_csum", "jo -c -v 3"),
    (1024, "64bit,metadata_csum", "jo -c -v 3"),
    (4096, "^64bit,metadata_csum", "jo -c -v 2"),
    (4096, "^64bit,^metadata_csum", "jo"),
    (2048, "64bit,^metadata_csum", "jo"),
])  # fmt: skip
def test_what_is_only_in_the_journal_is_seen(
    tmp_path: Path, plain: Path, block: int, options: str, opening: str
) -> None:
    """Every block that creating and removing files changes is put into the journal of the old file system only."""
    old, new = tmp_path / "old.img", tmp_path / "new.img"
    guestdisks.run(
        "mke2fs", "-q", "-t", "ext4", "-b", str(block), "-O", options, "-J", "size=4", "-d", plain, old, "24M"
    )
    shutil.copy(old, new)
    data = tmp_path / "data"
    magic = jbd2.MAGIC.to_bytes(4, "big")  # the file begins as a block of the journal does: it is escaped there
    data.write_bytes(magic + bytes(range(256)) * 40)
    debugfs(new, f"write {data} fresh", "rm goes")
    image = new.read_bytes()
    blocks = differing(old.read_bytes(), image, block)
    pieces = tmp_path / "pieces"
    pieces.write_bytes(b"".join(image[n * block : (n + 1) * block] for n in blocks))
    assert contents(old).keys() == {"stays", "goes"}
    debugfs(old, opening, f"jw -b {','.join(map(str, blocks))} {pieces}", "jc")
    replayed = tmp_path / "replayed.img"
    shutil.copy(old, replayed)
    debugfs(replayed, "jo", "jr", "jc")
    expected = {"stays": b"stays\n", "fresh": data.read_bytes()}
    assert contents(replayed) == expected
    assert contents(old) == expected


def log(*blocks: bytes, features: int = 0, start: int = 1, length: int = 16) -> bytes:
    """A journal of blocks of 1024 bytes."""
    head = struct.pack(">IIIIIIIIIII", jbd2.MAGIC, 4, 0, 1024, length, 1, 7, start, 0, 0, features)
    data = bytearray(length * 1024)
    data[: len(head)] = head
    for number, one in enumerate(blocks):
        at = 1 + (start - 1 + number) % (length - 1)
        data[at * 1024 : at * 1024 + len(one)] = one
    return bytes(data)


def header(kind: int, sequence: int) -> bytes:
    return struct.pack(">III", jbd2.MAGIC, kind, sequence)


def descriptor(sequence: int, *targets: int, flags: int = 2) -> bytes:
    last = len(targets) - 1
    return header(1, sequence) + b"".join(
        struct.pack(">IHH", target, 0, flags | (8 if number == last else 0)) for number, target in enumerate(targets)
    )


def found(data: bytes) -> dict[int, int]:
    return {target: one.place for target, one in jbd2.replay(io.BytesIO(data))[1].items()}


COMMIT7, COMMIT8 = header(2, 7), header(2, 8)


def test_a_transaction_counts_when_it_is_committed() -> None:
    assert found(log(descriptor(7, 100, 200), b"a", b"b", COMMIT7, descriptor(8, 300), b"c")) == {100: 2, 200: 3}
    assert found(log(descriptor(7, 100), b"a", COMMIT7, descriptor(8, 100), b"b", COMMIT8)) == {100: 5}
    assert found(log(descriptor(6, 100), b"a", header(2, 6))) == {}, "what an earlier round of the ring left"


def test_a_revoked_block_is_not_taken_from_before() -> None:
    revoke = header(5, 8) + struct.pack(">II", 20, 100)
    assert found(log(descriptor(7, 100, 200), b"a", b"b", COMMIT7, revoke, COMMIT8)) == {200: 3}
    again = (descriptor(9, 100), b"c", header(2, 9))
    assert found(log(descriptor(7, 100), b"a", COMMIT7, revoke, COMMIT8, *again)) == {100: 7}


def test_the_log_is_a_ring() -> None:
    assert found(log(descriptor(7, 100, 200), b"a", b"b", COMMIT7, start=14)) == {100: 15, 200: 1}


def test_a_log_that_leads_back_for_ever_ends() -> None:
    """All blocks are descriptors of thousands of targets."""
    full = descriptor(7, *range(126), flags=2).ljust(1024, b"\0")
    assert found(log(*[full] * 15)) == {}


@pytest.mark.parametrize("damage", [(12, 0), (12, 1000), (16, 1 << 31), (20, 0), (28, 99), (28, 0), (0, 5), (40, 4)])
def test_a_log_that_cannot_be(damage: tuple[int, int]) -> None:
    data = bytearray(log(descriptor(7, 100), b"a", COMMIT7))
    struct.pack_into(">I", data, *damage)
    assert found(bytes(data)) == {}

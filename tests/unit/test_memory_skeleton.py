"""The skeleton's file format: what is put in comes out; nothing in a damaged one is believed."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.memory import records, skeleton
from blkckpt.store import layout
from tests.support import ramstream as rs

PAGE = rs.PAGE


def example() -> skeleton.Skeleton:
    blocks = (records.Block("pc.ram", 1 << 30, PAGE), records.Block("pc.bios", 2 * PAGE, PAGE))
    data = rs.whole([(block.name, block.size) for block in blocks], [], rs.tail(description={"devices": [1]}))
    cut = data.index(b"\x02" + struct.pack(">I", rs.RAM))
    return skeleton.Skeleton(2, PAGE, blocks, data[:cut], b"live", rs.tail(description={"devices": [1]}),
                             {"pc.bios": b"b" * 2 * PAGE})  # fmt: skip


def test_alignment_is_the_stores_chunk() -> None:
    assert skeleton.ALIGNMENT == layout.CHUNK


def test_round_trip() -> None:
    before = example()
    data = skeleton.encode(before)
    after = skeleton.decode(data)
    assert after.blocks == before.blocks
    assert (after.section, after.page_size) == (2, PAGE)
    assert (after.head, after.live, after.tail) == (before.head, before.live, before.tail)
    assert {name: bytes(content) for name, content in after.small.items()} == before.small
    assert [block.name for block in after.main] == ["pc.ram"]
    assert skeleton.encode(after) == data


class Source:
    """A skeleton's bytes, and how many of them were asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.asked = data, len(data), 0

    def read(self, offset: int, length: int) -> bytes:
        self.asked += length
        return self.data[offset : offset + length]


def test_the_parts_are_found_without_reading_them() -> None:
    before = example()
    source = Source(skeleton.encode(before))
    index = skeleton.read_index(source)
    assert source.asked < 256
    assert index.blocks == before.blocks
    for place, wanted in [(index.head, before.head), (index.live, before.live), (index.tail, before.tail),
                          (index.small["pc.bios"], before.small["pc.bios"])]:  # fmt: skip
        assert source.data[place[0] : place[0] + place[1]] == bytes(wanted)


@pytest.mark.parametrize("offset", [*range(8, 16), *range(20, 32), *range(36, 96), *range(128, 150)])
def test_an_index_is_bounded(offset: int) -> None:
    """A byte that is not what it should be is an error or leads to places within the file."""
    data = bytearray(skeleton.encode(example()))
    data[offset] ^= 0xFF
    try:
        index = skeleton.read_index(Source(bytes(data)))
    except errors.CorruptError:
        return
    for place in (index.head, index.live, index.tail, *index.small.values()):
        assert place[0] >= 0 and place[0] + place[1] <= len(data)


def test_contents_do_not_move_when_the_device_state_grows() -> None:
    """Small blocks deduplicate across checkpoints: their offsets depend on the block list only."""
    before = example()
    longer = skeleton.Skeleton(2, PAGE, before.blocks, before.head, b"", before.tail + bytes(99), before.small)
    one, two = skeleton.encode(before), skeleton.encode(longer)
    assert one.index(b"bbbb") == two.index(b"bbbb") == skeleton.ALIGNMENT


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    kept=st.sets(st.integers(0, 7)),
    parts=st.tuples(st.binary(max_size=50), st.binary(max_size=50), st.binary(max_size=50)),
)
def test_any_round_trip(sizes: list[int], kept: set[int], parts: tuple[bytes, bytes, bytes]) -> None:
    blocks = tuple(records.Block(f"bløck{n}", size * PAGE, PAGE) for n, size in enumerate(sizes))
    small = {block.name: bytes([n]) * block.size for n, block in enumerate(blocks) if n in kept}
    after = skeleton.decode(skeleton.encode(skeleton.Skeleton(9, PAGE, blocks, *parts, small)))
    assert (after.blocks, after.head, after.live, after.tail) == (blocks, *parts)
    assert {name: bytes(content) for name, content in after.small.items()} == small


def test_every_flipped_byte_is_seen() -> None:
    data = skeleton.encode(example())
    for at in [*range(300), skeleton.ALIGNMENT + 5, len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(errors.CorruptError):
            skeleton.decode(bytes(damaged))


@pytest.mark.parametrize("length", [0, 7, 8, 127, 128, 200, -1])
def test_truncated(length: int) -> None:
    with pytest.raises(errors.CorruptError):
        skeleton.decode(skeleton.encode(example())[:length])


@pytest.mark.parametrize(
    ("offset", "packed"),
    [
        (8, struct.pack("<I", 2)),
        (12, struct.pack("<I", 1)),
        (20, struct.pack("<I", 1 << 31)),
        (36, struct.pack("<I", 5000)),
        (40, struct.pack("<I", 3)),
        (40, struct.pack("<I", 1)),
        (40, struct.pack("<I", 1 << 30)),
        (48, struct.pack("<Q", 1 << 60)),
        (72, struct.pack("<Q", (1 << 64) - 1)),
        (128, struct.pack("<Q", 1 << 60)),
        (128, struct.pack("<Q", 4097)),
        (160, struct.pack("<Q", 4096)),
        (136, struct.pack("<Q", 1 << 60)),
        (144, struct.pack("<H", 60000)),
    ],
)
def test_hostile_fields_with_a_good_checksum(offset: int, packed: bytes) -> None:
    """Rule S4: the checksum proves nothing about who wrote it."""
    data = bytearray(skeleton.encode(example()))
    data[offset : offset + len(packed)] = packed
    data[96:128] = bytes(32)
    data[96:128] = hashlib.sha256(data).digest()
    with pytest.raises(errors.CorruptError):
        skeleton.decode(bytes(data))


def test_wrong_contents_are_refused() -> None:
    before = example()
    with pytest.raises(errors.InputError):
        skeleton.encode(skeleton.Skeleton(2, PAGE, before.blocks, b"", b"", b"", {"pc.bios": b"short"}))


def test_describe() -> None:
    told = skeleton.describe(example())
    assert told.machine == "pc-q35-7.2"
    assert told.devices == {"devices": [1]}
    assert [block.name for block in told.blocks] == ["pc.ram", "pc.bios"]


def test_small_blocks_are_chosen_within_a_budget() -> None:
    def block(name: str, mebibytes: int) -> records.Block:
        return records.Block(name, mebibytes << 20, PAGE)

    assert skeleton.choose_small((block("pc.ram", 512), block("vga.vram", 16), block("pc.bios", 1))) == {
        "vga.vram",
        "pc.bios",
    }
    many = tuple(block(f"vga{n}", 16) for n in range(10))
    assert len(skeleton.choose_small(many)) == 4

"""Streams written from a skeleton parse back to the same memory, whatever extents the readers report."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.memory import generate, records, skeleton
from tests.support import ramstream as rs

PAGE = rs.PAGE


@dataclass
class Reader:
    """A block's contents with extents cut at *cuts* (bytes), some of which may be misaligned to pages."""

    data: bytes
    cuts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.data[offset : offset + length]

    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        edges = sorted({offset, offset + length, *(cut for cut in self.cuts if offset < cut < offset + length)})
        for start, stop in itertools.pairwise(edges):
            yield start, stop - start, self.data.count(0, start, stop) == stop - start


def skeleton_of(blocks: dict[str, bytes], small: set[str]) -> skeleton.Skeleton:
    listed = [(name, len(data)) for name, data in blocks.items()]
    head = b"QEVM\0\0\0\x03" + rs.configuration() + rs.ram_start(listed)
    infos = tuple(records.Block(name, size, PAGE) for name, size in listed)
    live = rs.begin(3, "dirty-bitmap", 1) + b"bits" + rs.foot(3)
    return skeleton.Skeleton(rs.RAM, PAGE, infos, head, live, rs.tail(), {name: blocks[name] for name in small})


def contents(seed: int, pages: int, density: float) -> bytes:
    rng = random.Random(seed)
    return b"".join(rng.randbytes(PAGE) if rng.random() < density else bytes(PAGE) for _ in range(pages))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    pages=st.integers(1, 600),
    density=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    cuts=st.lists(st.integers(1, 600 * 4096), max_size=12),
    lazy=st.sets(st.sampled_from(["pc.ram", "m1"])),
)
def test_what_is_written_parses_to_the_same_memory(
    seed: int, pages: int, density: float, cuts: list[int], lazy: set[str]
) -> None:
    blocks = {"pc.ram": contents(seed, pages, density), "pc.bios": contents(2, 3, 0.5), "m1": contents(3, 5, 1.0)}
    skel = skeleton_of(blocks, {"pc.bios"})
    readers = {name: Reader(blocks[name], tuple(cuts)) for name in ("pc.ram", "m1") if name not in lazy}
    sink, parts = rs.parse(b"".join(generate.lean(skel, readers, lazy)))
    want = [bytes(len(data)) if name in lazy else data for name, data in blocks.items()]
    assert [bytes(block) for block in sink.blocks] == want
    assert (parts.head, parts.live, parts.tail) == (skel.head, skel.live, skel.tail)
    told = sum(len(data) // PAGE for name, data in blocks.items() if name not in lazy)
    assert parts.pages + parts.zeros == told
    assert parts.pages == sum(data != bytes(PAGE) for block in want for data in _pages(block))


def _pages(data: bytes) -> Iterable[bytes]:
    return (data[at : at + PAGE] for at in range(0, len(data), PAGE))


def test_missing_and_wrong_readers_are_refused_at_once() -> None:
    skel = skeleton_of({"pc.ram": bytes(4 * PAGE)}, set())
    with pytest.raises(errors.InputError, match="no image"):
        generate.full(skel, {})
    with pytest.raises(errors.InputError, match="no image of 16384 bytes"):
        generate.full(skel, {"pc.ram": Reader(bytes(PAGE))})
    with pytest.raises(errors.InputError, match=r"no RAM block is called 'pc\.rom'"):
        generate.lean(skel, {}, ["pc.rom"])


class Gap(Reader):
    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        return [(offset, PAGE, True), (offset + 2 * PAGE, length - 2 * PAGE, True)]


class Short(Reader):
    def extents(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        return [(offset, length - PAGE, True)]


class Less(Reader):
    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length - 1] if offset else self.data[:length]


@pytest.mark.parametrize("kind", [Gap, Short, Less])
def test_a_reader_that_leaves_something_out_is_an_error(kind: type[Reader]) -> None:
    data = contents(1, 8, 1.0)
    with pytest.raises(errors.CorruptError):
        b"".join(generate.full(skeleton_of({"pc.ram": data}, set()), {"pc.ram": kind(data)}))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 64))
def test_few_records_are_the_same_records(zeros: list[bool], first: int) -> None:
    data = b"".join(bytes(PAGE) if zero else bytes([number + 1]) * PAGE for number, zero in enumerate(zeros))
    few = b"".join(generate.few_records(PAGE, first * PAGE, data))
    assert few == b"".join(generate.page_records(PAGE, first * PAGE, data))

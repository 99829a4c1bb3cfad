"""Range arithmetic and block maps, against naive models."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt.disk import blockmap, blocks


@given(st.integers(1, 60_000), st.data())
def test_cut_covers_the_range_and_only_edges_are_partial(size: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    cut = blocks.cut(offset, length, size)
    assert cut.first == offset // 4096
    assert cut.end == blocks.count(offset + length)
    assert cut.first <= cut.body <= cut.stop <= cut.end
    assert cut.body - cut.first <= 1 and cut.end - cut.stop <= 1
    for block in range(cut.first, cut.end):
        start, count = blocks.byte_range(block, block + 1, size)
        whole = offset <= start and start + count <= offset + length
        assert whole == (cut.body <= block < cut.stop), (cut, block)


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 16), st.integers(512, 1 << 14))
def test_pieces_are_the_range_cut_at_steps(offset: int, length: int, step: int) -> None:
    parts = list(blocks.pieces(offset, length, step))
    assert sum(count for _, count in parts) == length
    position = offset
    for start, count in parts:
        assert start == position and 0 < count <= step and start // step == (start + count - 1) // step
        position += count


@given(st.lists(st.tuples(st.integers(1, 9000), st.booleans()), min_size=1, max_size=12), st.integers(0, 3))
def test_round_segments_covers_all_and_never_calls_data_zero(lengths: list[tuple[int, bool]], first: int) -> None:
    offset = first * 4096
    segments, position = [], offset
    for length, zero in lengths:
        segments.append((position, length, zero))
        position += length
    rounded = list(blocks.round_segments(segments, offset, position))
    zero_bytes = {byte for start, count, zero in segments if zero for byte in range(start, start + count)}
    at = offset
    for start, count, zero in rounded:
        assert start == at and count > 0 and start % 4096 == 0
        at += count
        assert not zero or zero_bytes.issuperset(range(start, start + count))
    assert at == position


def naive_runs(bits: list[bool], first: int, end: int) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for block in range(first, end):
        if runs and runs[-1][2] == bits[block]:
            runs[-1] = (runs[-1][0], block + 1, bits[block])
        else:
            runs.append((block, block + 1, bits[block]))
    return runs


EDGES = (0, 1, 7, 8, 9, 63, 1023, 1024, 1025, 32767, 32768, 32769, 65535, 65536, 69999, 70_000)
BLOCK = st.one_of(st.sampled_from(EDGES), st.integers(0, 70_000))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(BLOCK, BLOCK, st.booleans()), max_size=8), BLOCK, BLOCK, st.booleans())
def test_map_is_a_list_of_bits(operations: list[tuple[int, int, bool]], a: int, b: int, sparse: bool) -> None:
    count = 70_000
    bits = [False] * count
    kept = blockmap.BlockMap(bytearray(blockmap.byte_count(count)), count, backed=bytearray(3) if sparse else None)
    for one, two, value in operations:
        first, end = sorted((one, two))
        if first == end:
            continue
        (kept.set_range if value else kept.clear_range)(first, end)
        bits[first:end] = [value] * (end - first)
    assert kept.count() == sum(bits)
    first, end = sorted((a, b))
    if first < end:
        expected = naive_runs(bits, first, end)
        assert list(kept.runs(first, end)) == expected
        assert list(kept.set_runs(first, end)) == [(low, high) for low, high, value in expected if value]
        assert kept.all_set(first, end) == all(bits[first:end])
        assert kept.none_set(first, end) == (not any(bits[first:end]))
        assert kept.next_set(first, end) == next((low for low, _, value in expected if value), None)
        assert kept.test(first) == bits[first]
    other = blockmap.BlockMap.empty(count)
    other.set_range(5, 40_000)
    other.merge(kept)
    assert list(other.runs(0, count)) == naive_runs(
        [value or 5 <= block < 40_000 for block, value in enumerate(bits)], 0, count
    )


@given(st.integers(0, (1 << 300) - 1))
def test_number_runs_is_the_number(number: int) -> None:
    total = 0
    last = -1
    for low, high in blockmap.number_runs(number):
        assert last < low < high
        last = high
        total |= ((1 << (high - low)) - 1) << low
    assert total == number


def test_map_bytes_survive_a_round_trip_in_odd_pages() -> None:
    source, target = blockmap.BlockMap.empty(100_000), blockmap.BlockMap.empty(100_000)
    for first in range(0, 100_000, 977):
        source.set_range(first, first + 3 if first + 3 <= 100_000 else 100_000)
    for start in range(0, blockmap.byte_count(100_000), 4032):
        target.write_bytes(start, source.read_bytes(start, 4032))
    assert list(source.set_runs(0, 100_000)) == list(target.set_runs(0, 100_000))


def test_d10_a_page_that_cannot_be_backed_changes_nothing() -> None:
    def back(page: int) -> None:
        if page == 1:
            raise OSError(errno.ENOSPC, "full")

    kept = blockmap.BlockMap(bytearray(8192), 65_536, backed=bytearray(2), back=back)
    with pytest.raises(OSError, match="full"):
        kept.set_range(32_000, 40_000)
    assert kept.count() == 0


def test_a_map_of_4_tib_is_scanned_without_touching_what_was_never_set() -> None:
    class Untouchable(bytearray):
        def __getitem__(self, item: object) -> object:  # type: ignore[override]
            start = item.start if isinstance(item, slice) else item
            assert isinstance(start, int) and start >> 12 == 20_000, "an unbacked page was touched"
            return super().__getitem__(item)  # type: ignore[call-overload]

    count = 1 << 30
    pages = blockmap.byte_count(count) >> 12
    bits = Untouchable(blockmap.byte_count(count))
    kept = blockmap.BlockMap(bits, count, backed=bytearray(pages))
    block = 20_000 << 15
    kept.set_range(block + 10, block + 20)
    assert list(kept.set_runs(0, count)) == [(block + 10, block + 20)]
    assert not kept.all_set(0, count) and kept.count() == 10

"""Comparing images: exact against a comparison of their bytes, and no chunk of data is read for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.store import compare, images, layout, store

CHUNK = layout.CHUNK
SMALL = 6 * CHUNK + 1000


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Store]:
    with store.Store.init(tmp_path_factory.mktemp("compare") / "store") as made:
        yield made


def keep(target: store.Store, data: bytes) -> images.ImageReader:
    with target.image_writer(len(data), workers=1) as writer:
        for offset in range(0, len(data), CHUNK):
            writer.write(offset, data[offset : offset + CHUNK])
        return target.image(writer.finish().image)


CHANGES = st.lists(
    st.tuples(st.integers(0, SMALL - 1), st.integers(1, 3 * CHUNK), st.sampled_from([0, 1, 2, None])), max_size=6
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, CHANGES, st.sampled_from([SMALL, 6 * CHUNK, 3 * CHUNK + 7, CHUNK, 0]), st.integers(0, 1 << 30))
def test_is_what_a_comparison_of_the_bytes_finds(
    target: store.Store,
    first: list[tuple[int, int, int | None]],
    second: list[tuple[int, int, int | None]],
    size: int,
    seed: int,
) -> None:
    """Two random images, of one size or of two; ranges of zeros, of equal and of random bytes."""
    old = bytearray(SMALL)
    chance = random.Random(seed)
    apply(old, first, chance)
    new = bytearray(old)
    apply(new, second, chance)
    new = new[:size]
    left, right = keep(target, bytes(old)), keep(target, bytes(new))
    for a, b, x, y in ((left, right, old, new), (right, left, new, old)):
        check(compare.compare(a, b), a, b, bytes(x), bytes(y))


def apply(data: bytearray, changes: list[tuple[int, int, int | None]], chance: random.Random) -> None:
    for offset, length, value in changes:
        length = min(length, len(data) - offset)
        data[offset : offset + length] = chance.randbytes(length) if value is None else bytes([value]) * length


def check(found: compare.Difference, a: images.ImageReader, b: images.ImageReader, old: bytes, new: bytes) -> None:
    size = max(len(old), len(new))
    x, y = (np.frombuffer(data.ljust(size, b"\0"), np.uint8) for data in (old, new))
    expected = set()
    for number in range(layout.chunk_count(size)):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        lengths = {max(min(len(data) - part.start, CHUNK), 0) for data in (old, new)}
        zero = not x[part].any() and not y[part].any()
        if (x[part] != y[part]).any() or (len(lengths) > 1 and not zero):
            expected.add(number)
    assert found.chunks.tolist() == sorted(expected)
    assert found.bytes == sum(layout.chunk_length(size, number) for number in expected)
    assert sum(found.bytes_of(state) for state in compare.State) == found.bytes
    assert sum(one.length for one in found.extents()) == found.bytes
    for one in found.extents():
        before, after = (data[one.offset : one.offset + one.length].any() for data in (x, y))
        assert (one.state is not compare.State.FILLED) or not before
        assert (one.state is not compare.State.ZEROED) or not after
    bits = np.zeros(size, np.bool_)
    for offset, mask in compare.refine(a, b, found, 1):
        bits[offset : offset + len(mask)] = mask
    assert (bits == (x != y)).all()
    pages = {
        offset // 4096 + index for offset, mask in compare.refine(a, b, found, 4096) for index in np.flatnonzero(mask)
    }
    assert pages == set((np.flatnonzero(x != y) // 4096).tolist())


def test_leaves_that_are_equal_are_not_read(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GiB with one changed chunk: two leaves are read, and no chunk."""
    size = 100 << 30
    with target.image_writer(size) as writer:
        for place in range(0, 3200, 100):
            writer.write(place * layout.LEAF * CHUNK, (place + 1).to_bytes(4, "little") * (CHUNK // 4))
        old = writer.finish().image
    with target.image_writer(size, parent=old) as writer:
        writer.write(99 << 30, b"x" * CHUNK)
        writer.zero(100 * layout.LEAF * CHUNK, CHUNK)
        new = writer.finish().image
    monkeypatch.setattr(images.ImageReader, "_fetch", None)  # reading a chunk of data would fail
    before, after = target.image(old), target.image(new)
    found = compare.compare(before, after)
    assert found.leaves == 2
    assert [(one.offset, one.length, one.state) for one in found.extents()] == [
        (100 * layout.LEAF * CHUNK, CHUNK, compare.State.ZEROED),
        (99 << 30, CHUNK, compare.State.FILLED),
    ]
    assert compare.compare(before, before).bytes == 0
    assert compare.compare(None, after).bytes == 32 * CHUNK
    assert compare.compare(after, None).bytes_of(compare.State.ZEROED) == 32 * CHUNK


def test_heat_and_touches() -> None:
    numbers = np.array([0, 1, 50, 99], np.int64)
    found = compare.Difference(100 * CHUNK, 100 * CHUNK, numbers, np.ones(4, np.uint8), 1)
    assert found.heat(10).tolist() == [0.2, 0, 0, 0, 0, 0.1, 0, 0, 0, 0.1]
    assert found.heat(1000).sum() == 4
    assert found.touches(2 * CHUNK - 1, 1)
    assert not found.touches(2 * CHUNK, 48 * CHUNK)
    assert found.touches(2 * CHUNK, 48 * CHUNK + 1)
    assert not found.touches(0, 0)


def test_a_unit_that_divides_no_chunk(target: store.Store) -> None:
    image = keep(target, b"x" * CHUNK)
    with pytest.raises(errors.InputError):
        next(compare.refine(None, image, compare.compare(None, image), 1000))

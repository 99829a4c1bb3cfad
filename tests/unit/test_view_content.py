"""Contents of views against a model: bytes, holes, what is in use; and the cache's bounds."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.store import images, layout, store
from blkckpt.view import chunks, content

CHUNK = layout.CHUNK


class Sparse:
    """A content made of (length, has data) runs."""

    images: frozenset[str] = frozenset()

    def __init__(self, runs: list[tuple[int, bool]], seed: int) -> None:
        source = random.Random(seed)
        self.bytes = b"".join(source.randbytes(length) if data else bytes(length) for length, data in runs)
        self.map = [data for length, data in runs for _ in range(length)]
        self.size = len(self.map)

    def pieces(self, offset: int, length: int) -> list[bytes]:
        assert offset >= 0 and offset + length <= self.size and length > 0
        return [self.bytes[offset : offset + length]]

    def used(self) -> int:
        return sum(self.map)

    def data_at(self, offset: int) -> int | None:
        return next((at for at in range(offset, self.size) if self.map[at]), None)

    def hole_at(self, offset: int) -> int:
        return next((at for at in range(offset, self.size) if not self.map[at]), self.size)

    def ahead(self, offset: int, length: int) -> None:
        assert offset >= 0 and offset + length <= self.size


def model(found: content.Content) -> tuple[bytes, list[bool]]:
    """Bytes and map of a content as its reader sees them."""
    data = b"".join(found.pieces(0, found.size)) if found.size else b""
    filled, at = [False] * found.size, 0
    while (start := found.data_at(at)) is not None:
        at = found.hole_at(start)
        assert at > start
        filled[start:at] = [True] * (at - start)
    return data, filled


@st.composite
def sparse(draw: st.DrawFn) -> Sparse:
    runs = draw(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=5))
    return Sparse(runs, draw(st.integers(0, 99)))


@given(st.lists(st.tuples(st.integers(0, 6), sparse()), max_size=4), st.integers(0, 7), st.data())
def test_pieces(parts: list[tuple[int, Sparse]], rest: int, data: st.DataObject) -> None:
    placed: list[tuple[int, Sparse]] = []
    wanted, filled = b"", []
    for gap, part in parts:
        placed.append((len(wanted) + gap, part))
        wanted += bytes(gap) + part.bytes
        filled += [False] * gap + part.map
    wanted, filled = wanted + bytes(rest), filled + [False] * rest
    whole = content.Pieces(len(wanted), placed)
    assert model(whole) == (wanted, filled)
    assert whole.used() == sum(filled) == content.used(whole)
    if wanted:
        start = data.draw(st.integers(0, len(wanted) - 1))
        length = data.draw(st.integers(1, len(wanted) - start))
        assert content.read(whole, start, length) == wanted[start : start + length]
        part_ = content.Slice(whole, start, length)
        assert model(part_) == (wanted[start : start + length], filled[start : start + length])
        whole.ahead(start, length)
        for at in range(len(wanted)):
            assert whole.hole_at(at) == next((n for n in range(at, len(wanted)) if not filled[n]), len(wanted))


def test_read_is_cut_at_the_end() -> None:
    assert content.read(content.Bytes(b"abc"), 1, 10) == b"bc"
    assert content.read(content.Bytes(b"abc"), 3, 10) == b""
    assert content.Bytes(b"abc").data_at(3) is None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as place:
        yield place


def written(place: store.Store, data: bytes) -> str:
    with place.hold(), place.image_writer(len(data), workers=1) as writer:
        writer.write(0, data)
        return writer.finish().image


def test_an_image_under_many_readers(place: store.Store) -> None:
    """The shared cache stays within its bound, whoever reads; a chunk decoded twice at once is the same chunk."""
    source = random.Random(4)
    parts = [source.randbytes(CHUNK) if source.random() < 0.7 else bytes(CHUNK) for _ in range(40)]
    wanted = b"".join(parts) + b"tail"
    cache = chunks.Chunks(limit=6 * CHUNK)
    one = content.Image(place.packs, images.load_table(place.packs, written(place, wanted)), cache)
    failures: list[BaseException] = []

    def reader(seed: int) -> None:
        own = random.Random(seed)
        try:
            for _ in range(150):
                offset = own.randrange(len(wanted))
                length = own.choice((1, 4096, 3 * CHUNK))
                if own.random() < 0.3:
                    one.ahead(offset, min(length, len(wanted) - offset))
                assert content.read(one, offset, length) == wanted[offset : offset + length]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert not failures
    assert cache.bytes <= 6 * CHUNK
    assert one.used() == sum(CHUNK for part in parts if part.count(0) != CHUNK) + 4


def test_what_is_read_in_whole_chunks_is_not_kept(place: store.Store) -> None:
    """The kernel has it; parts of a chunk will be asked for again."""
    wanted = random.Random(8).randbytes(20 * CHUNK + 5)
    cache = chunks.Chunks()
    one = content.Image(place.packs, images.load_table(place.packs, written(place, wanted)), cache)
    one.ahead(0, len(wanted))
    for offset in range(0, len(wanted), 2 * CHUNK):
        assert content.read(one, offset, 2 * CHUNK) == wanted[offset : offset + 2 * CHUNK]
    assert cache.bytes <= 5, "the last piece is a read inside of one chunk"
    kept = cache.bytes
    assert content.read(one, 100, 2 * CHUNK) == wanted[100 : 100 + 2 * CHUNK]
    assert cache.bytes == kept + 2 * CHUNK, "the two that were read in part"
    cache.close()


def test_a_failed_read_ahead_is_no_wrong_byte(place: store.Store) -> None:
    wanted = random.Random(5).randbytes(4 * CHUNK)
    image = written(place, wanted)
    entry = place.image(image).entry(2)
    pack = place.path / layout.pack_key(entry.pack)
    data = bytearray(pack.read_bytes())
    data[entry.offset + 9] ^= 4
    pack.write_bytes(data)
    cache = chunks.Chunks()
    one = content.Image(place.packs, images.load_table(place.packs, image), cache)
    one.ahead(0, 4 * CHUNK)
    for _ in range(2):
        with pytest.raises(errors.CorruptError, match=f"image {image} chunk 2 .pack {entry.pack:016x}"):
            one.pieces(2 * CHUNK, 10)
    assert content.read(one, CHUNK, CHUNK) == wanted[CHUNK : 2 * CHUNK]
    cache.close()


def test_a_table_that_was_written_anew_is_followed(place: store.Store) -> None:
    """Repacking gives an image other places under the same id and deletes the old packs."""
    wanted = random.Random(6).randbytes(3 * CHUNK)
    image = written(place, wanted)
    cache = chunks.Chunks(limit=CHUNK)
    one = content.Image(place.packs, images.load_table(place.packs, image), cache)
    assert content.read(one, 0, 10) == wanted[:10]
    old = place.image(image).entry(0).pack
    (place.path / layout.pack_key(old)).unlink()
    place.packs.backend.delete(layout.pack_key(old))
    with pytest.raises(errors.CorruptError):
        content.read(one, CHUNK, 10)
    place.index.drop([old])
    again = written(place, wanted)
    table = images.load_table(place.packs, again)
    moved = layout.Table(image, table.size, table.kind, table.label, None, table.created_ns, table.directory)
    place.packs.backend.put(layout.image_key(image), layout.encode_table(moved, place.packs.codec.digest))
    assert content.read(one, 0, 3 * CHUNK) == wanted
    cache.close()


def test_reading_in_order_is_read_ahead_of() -> None:
    asked: list[tuple[int, int]] = []

    class Watched(Sparse):
        def ahead(self, offset: int, length: int) -> None:
            asked.append((offset, length))

    watched = Watched([(1, True)], 0)
    watched.size = 64 << 20
    cursor = content.Cursor(watched)
    for offset in range(0, 16 << 20, 128 << 10):
        cursor.note(offset, 128 << 10)
    ends = [offset + length for offset, length in asked]
    assert [offset for offset, _ in asked[1:]] == ends[:-1], "no gap, nothing twice"
    assert ends[-1] >= (16 << 20) + content.AHEAD // 2
    asked.clear()
    own = random.Random(1)
    for _ in range(100):
        cursor.note(own.randrange(64 << 20), 4096)
    assert not asked

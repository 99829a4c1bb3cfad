"""Images: what is read is what was written, and what is there already is not stored again."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.store import codec, images, layout, leaves, packs, store, writer

CHUNK = layout.CHUNK


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def put(target: store.Store, data: bytes, **more: object) -> images.ImageInfo:
    with target.image_writer(len(data), **more) as out:  # type: ignore[arg-type]
        out.write(0, data)
        return out.finish()


def whole(target: store.Store, image: str) -> bytes:
    reader = target.image(image)
    return reader.read(0, reader.size)


def pack_bytes(target: store.Store) -> int:
    return sum(size for _, size in target.packs.ids())


CONTENT = st.sampled_from(["zero", "random", "text", "same", "skip"])
IMAGE = st.tuples(st.lists(CONTENT, max_size=40), st.integers(0, CHUNK - 1), st.randoms(use_true_random=False))


def chunk_of(kind: str, length: int, chance: random.Random) -> bytes:
    if kind == "random":
        return chance.randbytes(length)
    if kind == "text":
        return (b"%d the quick brown fox " % chance.randrange(100) * length)[:length]
    return {"zero": bytes(length), "same": b"\x5a" * length}[kind]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=IMAGE, second=IMAGE)
def test_round_trip_and_inheritance(
    target: store.Store, first: tuple[list[str], int, random.Random], second: tuple[list[str], int, random.Random]
) -> None:
    """Chunks in any order; what is never written is zero, or the parent's exactly; ``zero`` masks the parent."""
    kinds, tail, chance = first
    size = len(kinds) * CHUNK + tail
    model = bytearray(size)
    base = _write(target, model, kinds, chance, None)
    assert whole(target, base) == model
    over = [*second[0], *["skip"] * len(kinds)][: len(kinds)]
    child = _write(target, model, over, second[2], base)
    assert whole(target, child) == model
    reader = target.image(child)
    assert _by_extents(reader) == model
    assert reader.table.used == _counted(reader)
    for _ in range(5):
        low, high = sorted((chance.randint(0, size), chance.randint(0, size)))
        assert reader.read(low, high - low) == model[low:high]


def _write(target: store.Store, model: bytearray, kinds: list[str], chance: random.Random, parent: str | None) -> str:
    with target.image_writer(len(model), parent=parent) as out:
        numbers = list(range(len(kinds)))
        chance.shuffle(numbers)
        for number in numbers:
            if kinds[number] == "skip":
                continue
            data = chunk_of(kinds[number], CHUNK, chance)
            model[number * CHUNK : (number + 1) * CHUNK] = data
            if kinds[number] == "zero" and chance.random() < 0.5:
                out.zero(number * CHUNK, CHUNK)
            else:
                out.write(number * CHUNK, memoryview(bytearray(data)) if chance.random() < 0.5 else data)
        tail = len(model) % CHUNK
        if tail and kinds and kinds[0] != "skip":
            model[-tail:] = chunk_of(kinds[0], tail, chance)
            out.write(len(model) - tail, bytes(model[-tail:]))
        return out.finish().image


def _counted(reader: images.ImageReader) -> int:
    return sum(length for _, length, zero in reader.extents(0, reader.size) if not zero)


def _uncounted(target: store.Store, image: str) -> None:
    """Its table as an older blkckpt has written it: with zeros where it says what is used."""
    table = images.load_table(target.packs, image)
    data = layout.encode_table(dataclasses.replace(table, used=None), target.packs.codec.digest)
    assert data[88:128] == bytes(40)
    target.packs.backend.put(layout.image_key(image), data)


@pytest.mark.parametrize("old", [False, True], ids=["counted", "older"])
def test_what_is_used_of_a_child(target: store.Store, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """Leaves filled, emptied, half overwritten, left alone and put aside, on a parent that says it or does not."""
    monkeypatch.setattr(leaves, "MAX_HELD", 1)
    span = layout.LEAF * CHUNK
    size = 4 * span + CHUNK + 5
    with target.image_writer(size) as out:
        for leaf in (0, 1, 2, 4):
            out.write(leaf * span, b"a" * min(2 * CHUNK, size - leaf * span))
        parent = out.finish().image
    assert target.image(parent).table.used == 6 * CHUNK + CHUNK + 5
    if old:
        _uncounted(target, parent)
        assert target.image(parent).table.used is None and target.image(parent).used() == 7 * CHUNK + 5
    with target.image_writer(size, parent=parent) as out:
        out.zero(0, span)
        out.write(span + CHUNK, bytes(CHUNK) + b"b" * CHUNK)
        out.write(3 * span, b"c" * CHUNK)
        out.zero(4 * span + CHUNK, 5)
        reader = target.image(out.finish().image)
    assert reader.table.used == _counted(reader) == 6 * CHUNK


def test_what_is_used_needs_no_leaf_that_is_not_needed_otherwise(target: store.Store, tmp_path: Path) -> None:
    """A child over a damaged parent is written as ever; then nobody says what is used of it."""
    parent = put(target, b"a" * layout.LEAF * CHUNK)
    entry = target.image(parent.image).table.leaf(0)
    (path,) = (tmp_path / "store").glob("packs/*/*.pack")
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"damage")
    with target.image_writer(layout.LEAF * CHUNK, parent=parent.image) as out:
        out.zero(0, layout.LEAF * CHUNK)
        reader = target.image(out.finish().image)
    assert reader.table.used is None and reader.used() == 0


def _by_extents(reader: images.ImageReader) -> bytes:
    parts, position, last = [], 0, None
    for offset, length, zero in reader.extents(0, reader.size):
        assert offset == position
        assert length > 0
        assert zero is not last, "neighbours differ"
        parts.append(bytes(length) if zero else reader.read(offset, length))
        position, last = offset + length, zero
    return b"".join(parts)


@pytest.mark.parametrize("hash_name", ["blake3", "sha256"])
@pytest.mark.parametrize(
    "size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK * layout.LEAF, CHUNK * (layout.LEAF + 1) + 5]
)
def test_sizes_and_hashes(tmp_path: Path, hash_name: str, size: int) -> None:
    with store.Store.init(tmp_path / "s", hash_name=hash_name) as made:
        data = os.urandom(min(size, 3 * CHUNK)) + bytes(max(size - 3 * CHUNK, 0))
        info = put(made, data)
    with store.Store.open(tmp_path / "s") as opened:
        assert opened.info.hash_name == hash_name
        assert whole(opened, info.image) == data


def test_zero_chunks_cost_nothing(target: store.Store) -> None:
    info = put(target, bytes(200 * CHUNK))
    assert info.zero_chunks == 200
    assert pack_bytes(target) == 0
    assert info.new_bytes < 400
    with target.image_writer(1 << 40) as out:
        terabyte = out.finish()
    assert terabyte.new_bytes < 2 << 20
    assert list(target.image(terabyte.image).extents(0, 1 << 40)) == [(0, 1 << 40, True)]


def test_what_is_known_is_not_stored_again(target: store.Store, tmp_path: Path) -> None:
    """Deduplication within an image, between images, after reopening, and after the index is gone."""
    data = os.urandom(20 * CHUNK)
    first = put(target, data + data[: 10 * CHUNK])
    assert first.new_chunks == 20
    size = pack_bytes(target)
    assert put(target, data + data[: 10 * CHUNK]).new_chunks == 0
    assert pack_bytes(target) == size, "not even the leaf"
    moved = put(target, bytes(CHUNK) + data, kind="memory")
    assert moved.new_chunks == 0
    target.close()
    for path in (tmp_path / "store" / "index").iterdir():
        path.unlink()
    with store.Store.open(tmp_path / "store") as again:
        assert put(again, data[: 5 * CHUNK]).new_chunks == 0
        assert again.rebuild_index() == len(list(again.packs.ids()))
        assert put(again, data[5 * CHUNK : 9 * CHUNK]).new_chunks == 0


def test_a_malformed_index_is_set_aside(target: store.Store, tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    put(target, data)
    target.close()
    for path in (tmp_path / "store" / "index").iterdir():
        path.write_bytes(os.urandom(8192))
    with store.Store.open(tmp_path / "store") as again:
        info = put(again, data)
        assert whole(again, info.image) == data
        again.rebuild_index()
        assert put(again, data).new_chunks == 0


def test_lying_index_rows_are_not_believed(target: store.Store) -> None:
    """Rule S4: rows that point elsewhere, or into packs that are not there, find nothing."""
    data = os.urandom(2 * CHUNK)
    put(target, data)
    database = target.index._connect()
    with database:
        database.execute("UPDATE chunks SET place = place + 1")
    info = put(target, data)
    assert info.new_chunks == 2
    assert whole(target, info.image) == data
    with database:
        database.execute("UPDATE chunks SET place = -5, pack = 7, crc = -1")
    assert put(target, data).new_chunks == 2
    target.index.rebuild(lambda pack: target.packs.index(pack))
    for pack, _ in list(target.packs.ids()):
        target.packs.delete(pack)
    target.abandon()
    target.index._sizes.clear()
    assert put(target, data).new_chunks == 2


def test_an_incremental_image_costs_what_changed(target: store.Store) -> None:
    data = bytearray(os.urandom(3 * layout.LEAF * CHUNK))
    base = put(target, bytes(data))
    with target.image_writer(len(data), parent=base.image) as out:
        data[CHUNK * 700 : CHUNK * 701] = os.urandom(CHUNK)
        out.write(CHUNK * 700, bytes(data[CHUNK * 700 : CHUNK * 701]))
        child = out.finish()
    assert child.new_chunks == 1
    assert child.new_bytes < CHUNK + layout.LEAF * 56 + 2000, "one chunk, one leaf, one directory"
    assert whole(target, child.image) == data
    old, new = target.image(base.image), target.image(child.image)
    assert list(images.changed(old, new)) == [(700, 1)]
    assert list(images.changed(old, old)) == []


def test_diff_reads_leaves_only(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    left = bytearray(os.urandom(40 * CHUNK))
    right = bytearray(left)
    for number in (0, 1, 7, 39):
        right[number * CHUNK] ^= 1
    right[12 * CHUNK : 14 * CHUNK] = bytes(2 * CHUNK)
    old, new = (target.image(put(target, bytes(data)).image) for data in (left, right))
    monkeypatch.setattr(packs.Packs, "payloads", lambda *_: pytest.fail("data was read"))
    assert list(images.changed(old, new)) == [(0, 2), (7, 1), (12, 2), (39, 1)]


def test_packs_are_rolled_over(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_PACK", 8 << 20)
    data = os.urandom(40 << 20)
    info = put(target, data)
    sizes = [size for _, size in target.packs.ids()]
    assert len(sizes) >= 5
    assert max(sizes) < 9 << 20
    assert whole(target, info.image) == data


def test_many_threads_write_and_read_one_image(target: store.Store) -> None:
    data = os.urandom(16 << 20)
    out = target.image_writer(len(data))
    step = 1 << 20

    def part(number: int) -> None:
        for offset in range(number * step, len(data), 4 * step):
            out.write(offset, memoryview(data)[offset : offset + step])

    _run(part)
    reader = target.image(out.finish().image, cache=1 << 20)
    wrong = []

    def check(number: int) -> None:
        chance = random.Random(number)
        for _ in range(100):
            offset = chance.randrange(len(data))
            length = min(chance.choice([1, 4096, 70000, 300000]), len(data) - offset)
            if reader.read(offset, length) != data[offset : offset + length]:
                wrong.append(offset)

    _run(check)
    assert not wrong


def _run(work: object) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_misuse_of_a_writer_is_refused(target: store.Store) -> None:
    out = target.image_writer(3 * CHUNK + 10)
    with pytest.raises(errors.InputError):
        out.write(1, bytes(CHUNK))
    with pytest.raises(errors.InputError):
        out.write(0, bytes(100))
    with pytest.raises(errors.InputError):
        out.write(3 * CHUNK, bytes(11))
    with pytest.raises(errors.InputError):
        out.write(-CHUNK, bytes(CHUNK))
    out.write(CHUNK, b"x" * CHUNK)
    with pytest.raises(errors.InputError, match="already"):
        out.zero(0, 2 * CHUNK)
    out.write(3 * CHUNK, b"y" * 10)
    image = out.finish().image
    for call in (lambda: out.write(0, bytes(CHUNK)), out.finish):
        with pytest.raises(errors.StateError):
            call()
    assert whole(target, image) == bytes(CHUNK) + b"x" * CHUNK + bytes(CHUNK) + b"y" * 10
    reader = target.image(image)
    for offset, length in ((-1, 1), (0, reader.size + 1), (reader.size, 1)):
        with pytest.raises(errors.InputError):
            reader.read(offset, length)
    with pytest.raises(errors.InputError):
        reader.chunk(4)
    with pytest.raises(errors.InputError):
        target.image_writer(-1)
    with pytest.raises(errors.InputError):
        target.image_writer(1, kind="tape")
    with pytest.raises(errors.InputError, match="parent"):
        target.image_writer(1, parent=image)
    with pytest.raises(errors.NotFoundError):
        target.image_writer(1, parent="0" * 32)
    with pytest.raises(errors.InputError):
        target.image("../../etc/passwd")
    target.abandon()
    target.collect()  # every refused writer has let go of the lock


def test_an_aborted_writer_leaves_nothing(target: store.Store, tmp_path: Path) -> None:
    with target.image_writer(16 << 20) as out:
        for offset in range(0, 16 << 20, 1 << 20):
            out.write(offset, os.urandom(1 << 20))
    assert list(target.image_ids()) == []
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    target.collect()


def test_an_error_of_a_thread_reaches_the_caller(
    target: store.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ENOSPC in the appender: write or finish says so by class, and nothing is published."""

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    out = target.image_writer(64 << 20)
    with pytest.raises(errors.NoSpaceError):
        for offset in range(0, 64 << 20, 1 << 20):
            out.write(offset, os.urandom(1 << 20))
        out.finish()
    out.abort()
    monkeypatch.undo()
    assert list(target.packs.ids()) == []
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    data = os.urandom(1 << 20)
    assert whole(target, put(target, data).image) == data


def test_memory_of_a_writer_is_bounded(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the appender held up, ``write`` stops taking data."""
    gate = threading.Event()
    real = packs.PackWriter.append

    def slow(self: packs.PackWriter, chunks: list[packs.NewChunk]) -> list[layout.Entry]:
        gate.wait(30)
        return real(self, chunks)

    monkeypatch.setattr(packs.PackWriter, "append", slow)
    size = (writer.JOBS + 10) * writer.BATCH * CHUNK
    out = target.image_writer(size)
    taken = []

    def feed() -> None:
        for offset in range(0, size, 1 << 20):
            out.write(offset, memoryview(os.urandom(1 << 20)))
            taken.append(offset)

    thread = threading.Thread(target=feed)
    thread.start()
    thread.join(2)
    assert thread.is_alive()
    assert len(taken) << 20 <= (writer.JOBS + 1) * writer.BATCH * CHUNK
    gate.set()
    thread.join(60)
    out.finish()


@given(st.binary(min_size=1, max_size=3000), st.integers(0, 3))
def test_the_zero_test(data: bytes, padding: int) -> None:
    assert codec.is_zero(bytes(padding) + data) == (not any(data))
    assert codec.is_zero(memoryview(bytes(len(data))))


def test_a_scattered_image_holds_few_leaves(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves beyond the limit wait in a file and come back, with a parent and without."""
    monkeypatch.setattr(leaves, "MAX_HELD", 3)
    size = 20 * layout.LEAF * CHUNK
    chance = random.Random(5)
    model: dict[int, bytes] = {}
    parent = None
    for _ in range(2):
        numbers = chance.sample(range(layout.chunk_count(size)), 120)
        with target.image_writer(size, parent=parent) as out:
            for number in numbers:
                model[number] = chance.randbytes(100) * 656
                model[number] = model[number][:CHUNK]
                out.write(number * CHUNK, model[number])
            parent = out.finish().image
        reader = target.image(parent)
        assert all(reader.chunk(number) == data for number, data in model.items())
        assert sum(n for _, n, zero in reader.extents(0, size) if not zero) == len(model) * CHUNK


def test_leaves_complete_once_every_chunk_is_set() -> None:
    size = (layout.LEAF + 2) * CHUNK
    table = leaves.LeafTable(size, None, None)
    entry = layout.pack_entry(layout.Entry(b"h" * 32, 1, 200, 5, CHUNK))
    assert [table.set(number, entry) for number in range(layout.LEAF)] == [None] * (layout.LEAF - 1) + [0]
    assert table.take(0) == entry * layout.LEAF
    table.finish(0, layout.ZERO)
    assert table.set(layout.LEAF, entry) is None
    assert table.begun() == [1]
    assert table.set_zero(layout.LEAF + 1, 1) == [1]


# --- reading ahead


class Fetches:
    """What a reader asks of the packs, and by which thread; failing on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead: list[int] = []
        self.direct: list[int] = []
        self.broken = False
        fetch = images.ImageReader._fetch

        def noted(reader: images.ImageReader, numbers: list[int]) -> dict[int, bytes]:
            by_thread = threading.current_thread().name.startswith("read-ahead")
            (self.ahead if by_thread else self.direct).extend(numbers)
            if by_thread and self.broken:
                raise errors.CorruptError("damaged")
            return fetch(reader, numbers)

        monkeypatch.setattr(images.ImageReader, "_fetch", noted)


@pytest.mark.parametrize("library", [True, False], ids=["liblz4", "module"])
def test_reading_into_a_buffer(target: store.Store, monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """Any range, by either decoder; whole chunks are neither kept nor read ahead of, and parts of one decoded once."""
    if not library:
        monkeypatch.setattr(codec, "_decompress_safe", None)
    elif codec._decompress_safe is None:
        pytest.skip("no liblz4 here")
    chance = random.Random(11)
    kinds = [chance.choice(["zero", "random", "text", "same"]) for _ in range(30)]
    data = b"".join(chunk_of(kind, CHUNK, chance) for kind in kinds) + b"the end"
    image = put(target, data).image
    reader = target.image(image)
    for _ in range(80):
        low, high = sorted(chance.randint(0, len(data)) for _ in range(2))
        buf = bytearray(b"?" * (high - low))
        reader.read_into(memoryview(buf), low)
        assert buf == data[low:high]
    with pytest.raises(errors.InputError):
        reader.read_into(memoryview(bytearray(8)), len(data) - 7)
    fetches, reader = Fetches(monkeypatch), target.image(image, ahead=True)
    step, buf = 3 * CHUNK, bytearray(3 * CHUNK)
    for offset in range(4096, 27 * CHUNK, step):
        reader.read_into(memoryview(buf), offset)
        assert buf == data[offset : offset + step]
    reader.close()
    assert not fetches.ahead
    with_data = [number for number in fetches.direct if kinds[number] != "zero"]
    assert with_data == [number for number in range(0, 28, 3) if kinds[number] != "zero"], "those at borders, each once"


def test_a_sequential_reader_finds_its_chunks_made(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(100 * CHUNK + 77)
    image = put(target, data).image
    fetches = Fetches(monkeypatch)
    reader = target.image(image, ahead=True)
    got = b"".join(reader.read(at, min(10000, reader.size - at)) for at in range(0, reader.size, 10000))
    reader.close()
    assert got == data
    assert sorted(fetches.direct + fetches.ahead) == list(range(101)), "a chunk was fetched twice or never"
    assert len(fetches.direct) <= 2


def test_a_long_read_makes_its_other_chunks_while_some_are_coming(
    target: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half is with the other thread, which gets on only when the reader has made the second one."""
    data = os.urandom(128 * CHUNK)
    image = put(target, data).image
    fetch, made, waited = images.ImageReader._fetch, threading.Event(), []

    def gated(self: images.ImageReader, numbers: list[int]) -> dict[int, bytes]:
        if threading.current_thread().name.startswith("read-ahead"):
            waited.append(made.wait(10))
        found = fetch(self, numbers)
        if numbers[-1] == 127:
            made.set()
        return found

    monkeypatch.setattr(images.ImageReader, "_fetch", gated)
    reader = target.image(image, ahead=True)
    reader.read(0, CHUNK)
    reader.read(CHUNK, CHUNK)
    assert reader.read(2 * CHUNK, 126 * CHUNK) == data[2 * CHUNK :]
    reader.close()
    assert waited and all(waited), "the reader waited first"


def test_nothing_is_read_ahead_for_a_reader_that_jumps(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    image = put(target, os.urandom(100 * CHUNK)).image
    fetches = Fetches(monkeypatch)
    reader = target.image(image, ahead=True)
    for number in (0, 50, 7, 90, 30, 60, 10, 80):
        reader.read(number * CHUNK, 100)
    reader.close()
    assert not fetches.ahead and len(fetches.direct) == 8


def test_what_cannot_be_read_ahead_fails_for_who_wants_it(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before: a guest that never comes there is not told."""
    data = os.urandom(20 * CHUNK)
    fetches = Fetches(monkeypatch)
    fetches.broken = True
    reader = target.image(put(target, data).image, ahead=True)
    assert b"".join(reader.read(at, CHUNK) for at in range(0, len(data), CHUNK)) == data
    reader.close()
    assert fetches.ahead, "nothing was tried"


def test_an_image_in_pieces_is_announced_to_the_disk(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece once, before it is read; nothing of an image in one piece, nor for a reader that jumps."""
    data = bytearray(os.urandom(700 * CHUNK))
    whole_one = put(target, bytes(data)).image
    with target.image_writer(len(data), parent=whole_one) as out:
        for number in range(0, 700, 3):
            data[number * CHUNK : (number + 1) * CHUNK] = os.urandom(CHUNK)
            out.write(number * CHUNK, bytes(data[number * CHUNK : (number + 1) * CHUNK]))
        pieces = out.finish().image
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(target._backend, "hint", lambda key, ranges: told.extend((key, offset) for offset, _ in ranges))
    for image, step in ((whole_one, 4), (pieces, 37)):
        reader = target.image(image, cache=0)
        for number in range(0, 696, step) if image == whole_one else (0, 300, 5, 690, 40):
            reader.read(number * CHUNK, 4 * CHUNK)
    assert told == []
    reader = target.image(pieces, cache=0)
    for number in range(0, 700, 4):
        assert reader.read(number * CHUNK, 4 * CHUNK) == data[number * CHUNK : (number + 4) * CHUNK]
        places = {(layout.pack_key(entry.pack), entry.offset) for entry in map(reader.entry, range(number + 4, 700))}
        assert number in (0, 696) or places & set(told), "the disk is ahead of the reader"
    assert len(told) == len(set(told)) > 400

"""Damaged, truncated and hostile stores: CorruptError naming the place, never a wrong byte (rules S3, S4)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import lz4.block
import numpy as np
import pytest

from blkckpt import errors
from blkckpt.store import check, codec, images, layout, manifest, packs, store

CHUNK = layout.CHUNK
SIZE = 6 * CHUNK + 1234


def content() -> bytes:
    chance = random.Random(1)
    text = (b"all work and no play " * 8000)[: 2 * CHUNK]
    return (text + chance.randbytes(2 * CHUNK) + bytes(CHUNK) + b"\1" * CHUNK + chance.randbytes(SIZE))[:SIZE]


DATA = content()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    """A store with one checkpoint of one image: one pack, one table, one manifest."""
    with store.Store.init(tmp_path / "store") as opened:
        with opened.image_writer(SIZE) as out:
            out.write(0, DATA)
            image = out.finish().image
        disk = manifest.DiskImage("vda", image, SIZE)
        opened.put_manifest(manifest.Manifest("web", "one", "0" * 32, time.time_ns(), (disk,)))
        yield opened


def image_of(target: store.Store) -> str:
    return target.manifest("web", "one").disks[0].image


def only(root: Path, pattern: str) -> Path:
    (path,) = root.glob(pattern)
    return path


def read(target: store.Store) -> bytes:
    """Everything, through fresh descriptors and caches; raises or returns the right bytes."""
    target._backend.close()
    reader = target.image(image_of(target))
    return reader.read(0, SIZE)


def read_by_chunk(target: store.Store) -> int:
    """The number of chunks that can be read; each is right."""
    target._backend.close()
    good = 0
    reader = target.image(image_of(target))
    for number in range(reader.chunks):
        try:
            assert reader.chunk(number) == DATA[number * CHUNK : (number + 1) * CHUNK]
            good += 1
        except errors.CorruptError:
            pass
    return good


@pytest.mark.parametrize("what", ["packs/*/*.pack", "images/*/*.image", "manifests/*/*.json"])
def test_a_flipped_byte_anywhere(target: store.Store, tmp_path: Path, what: str) -> None:
    """Rule S3, and verify sees every flip that is not in a reserved byte of no consequence (there is none)."""
    path = only(tmp_path / "store", what)
    clean = path.read_bytes()
    chance = random.Random(2)
    edges = [*range(130), *range(len(clean) - 130, len(clean))] if len(clean) > 260 else [*range(len(clean))]
    places = [*chance.sample(edges, min(len(edges), 120)), *(chance.randrange(len(clean)) for _ in range(120))]
    for place in places:
        damaged = bytearray(clean)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read(target) == DATA, f"wrong bytes after a flip at {place}"
        except errors.CorruptError as error:
            assert str(error)
        report = check.verify(target)
        assert not report.ok, f"verify missed a flip at {place}"
    path.write_bytes(clean)
    target._backend.close()
    assert check.verify(target).ok
    assert read(target) == DATA


@pytest.mark.parametrize("what", ["packs/*/*.pack", "images/*/*.image", "manifests/*/*.json"])
def test_truncated_anywhere(target: store.Store, tmp_path: Path, what: str) -> None:
    path = only(tmp_path / "store", what)
    clean = path.read_bytes()
    chance = random.Random(3)
    for length in [0, 1, len(clean) - 1, *(chance.randrange(len(clean)) for _ in range(40))]:
        path.write_bytes(clean[:length])
        with contextlib.suppress(errors.CorruptError):
            assert read(target) == DATA
        assert not check.verify(target).ok
    path.write_bytes(clean + b"more")
    assert not check.verify(target).ok


def test_one_bad_chunk_is_named_and_the_others_are_read(target: store.Store, tmp_path: Path) -> None:
    reader = target.image(image_of(target))
    entry = reader.entry(3)
    path = only(tmp_path / "store", "packs/*/*.pack")
    damaged = bytearray(path.read_bytes())
    damaged[entry.offset + 100] ^= 4
    path.write_bytes(damaged)
    assert read_by_chunk(target) == reader.chunks - 1
    with pytest.raises(errors.CorruptError, match=f"chunk 3 .*{entry.pack:016x}"):
        target.image(reader.image_id).chunk(3)
    with pytest.raises(errors.CorruptError, match=f"chunk 3 .*{entry.pack:016x}"):
        target.image(reader.image_id).read_into(memoryview(bytearray(4 * CHUNK)), CHUNK)
    for report in (check.verify(target), check.verify(target, "web", "one"), check.verify(target, "web")):
        assert report.problem_count == 1
        assert report.problems[0].where == f"web@one, image {reader.image_id}, chunk 3"
        assert f"{entry.pack:016x}" in report.problems[0].what


@pytest.mark.parametrize("where", ["table", "manifest"])
def test_a_wrong_count_of_what_is_used(target: store.Store, where: str) -> None:
    """Verify says it; every byte is right all the same.  One that cannot be is refused."""
    image = image_of(target)
    table, one = images.load_table(target.packs, image), target.manifest("web", "one")
    assert table.used == one.disks[0].used == SIZE - CHUNK
    if where == "table":
        data = layout.encode_table(dataclasses.replace(table, used=SIZE + 1), target.packs.codec.digest)
        target.packs.backend.put(layout.image_key(image), data)
        with pytest.raises(errors.CorruptError, match="impossible header"):
            read(target)
        data = layout.encode_table(dataclasses.replace(table, used=0), target.packs.codec.digest)
        target.packs.backend.put(layout.image_key(image), data)
    else:
        data = manifest.encode(one.counted({image: 0}))
        target.packs.backend.put("manifests/web/one.json", data)
    assert read(target) == DATA
    report = check.verify(target)
    assert report.problem_count == 1
    assert f"its {where} says that 0 bytes are used, not {SIZE - CHUNK}" in report.problems[0].what


def test_verify_counts_and_tells_progress(target: store.Store) -> None:
    seen: list[tuple[int, int]] = []
    report = check.verify(target, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.checkpoints, report.images, report.packs) == (1, 1, 1)
    assert report.chunks == 6 + 1, "one is zero and one is the leaf"
    assert seen
    assert seen == sorted(seen)
    with pytest.raises(errors.NotFoundError):
        check.verify(target, "web", "two")


def test_a_missing_pack_and_a_missing_image(target: store.Store, tmp_path: Path) -> None:
    image = image_of(target)
    pack = only(tmp_path / "store", "packs/*/*.pack")
    pack.rename(tmp_path / "away")
    target._backend.close()
    with pytest.raises(errors.CorruptError, match="missing"):
        read(target)
    report = check.verify(target)
    assert any(problem.where.startswith("web@one") for problem in report.problems)
    (tmp_path / "away").rename(pack)
    only(tmp_path / "store", "images/*/*.image").unlink()
    target._backend.close()
    with pytest.raises(errors.NotFoundError, match=image):
        read(target)
    assert not check.verify(target).ok


def test_a_damaged_index_costs_no_data(target: store.Store, tmp_path: Path) -> None:
    """The entry headers alone rebuild the index of a pack whose footer is gone."""
    path = only(tmp_path / "store", "packs/*/*.pack")
    (pack, size) = next(iter(target.packs.ids()))
    good = target.packs.index(pack)
    clean = bytearray(path.read_bytes())
    clean[-70] ^= 1
    path.write_bytes(clean)
    target._backend.close()
    with pytest.raises(errors.CorruptError, match="index of pack"):
        target.packs.index(pack)
    assert target.rebuild_index() == 1
    assert set(target.index.lookup([data.tobytes() for data in good["hash"]])) == {h.tobytes() for h in good["hash"]}
    assert read(target) == DATA
    report = check.verify(target)
    assert [problem.where for problem in report.problems] == [f"index of pack {pack:016x}"]
    path.write_bytes(clean[: size // 2])
    target._backend.close()
    with pytest.raises(errors.CorruptError):
        list(target.packs.scan(pack))


# --- hostile: checksums right, contents impossible


def entry_of(payload: bytes, raw: int, digest: bytes) -> tuple[bytes, int, bytes]:
    return payload, raw, digest


CODEC = codec.codec("sha256")


@pytest.mark.parametrize(
    ("payload", "raw"),
    [
        (lz4.block.compress(bytes(CHUNK * 100), store_size=False), CHUNK),  # a bomb: more than raw
        (lz4.block.compress(bytes(1000), store_size=False), CHUNK),  # a short output
        (lz4.block.compress(bytes(CHUNK), store_size=False) + b"x", CHUNK),  # trailing data
        (b"\xf0" + b"\xff" * 300, CHUNK),
        (b"", CHUNK), (b"x" * (CHUNK + 1), CHUNK + 1), (b"xx", 1), (b"x", 1 << 40), (b"x", -1), (b"x", 0),
    ],
    ids=lambda value: f"{value!r:.30}",
)  # fmt: skip
def test_bombs_and_impossible_lengths(payload: bytes, raw: int) -> None:
    """Rule S4: the output of lz4 is bounded by what the entry says, and that by the size of a chunk."""
    for digest in (CODEC.digest(bytes(CHUNK)), CODEC.digest(payload)):
        with pytest.raises(errors.CorruptError, match="the chunk"):
            CODEC.decode(payload, raw, digest, "the chunk")


@pytest.mark.parametrize("library", [True, False], ids=["liblz4", "module"])
def test_damage_decoded_in_place(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """Rules S3, S4: nothing beside the buffer is written, and no damage is taken for the chunk."""
    if not library:
        monkeypatch.setattr(codec, "_decompress_safe", None)
    elif codec._decompress_safe is None:
        pytest.skip("no liblz4 here")
    chance = random.Random(7)
    raw = (chance.randbytes(300) + b"words, words, " * 9000)[:CHUNK]
    good = lz4.block.compress(raw, store_size=False)
    bombs = [lz4.block.compress(bytes(1 << 20), store_size=False), lz4.block.compress(raw[:-1], store_size=False)]
    flipped = []
    for _ in range(300):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        flipped.append(bytes(data))
    digest = CODEC.digest(raw)
    around = bytearray(b"\xa5" * (CHUNK + 8192))
    with memoryview(around)[4096:-4096] as buf:
        for payload in [*bombs, *flipped, good[:-1], good + b"x", b"", b"\xf0" + b"\xff" * 300, bytes(CHUNK + 1)]:
            with pytest.raises(errors.CorruptError, match="the chunk"):
                CODEC.decode_into(memoryview(payload), buf, digest, "the chunk")
            assert around[:4096] == around[-4096:] == b"\xa5" * 4096
        for payload in (good, raw):
            CODEC.decode_into(memoryview(payload), buf, digest, "the chunk")
            assert buf == raw


def test_a_bomb_in_a_pack(target: store.Store) -> None:
    bomb = lz4.block.compress(bytes(10 << 20), store_size=False)[:60000]
    writer = packs.PackWriter(target.packs)
    (entry,) = writer.append([packs.NewChunk(b"h" * 32, bomb, CHUNK)])
    writer.seal()
    with pytest.raises(errors.CorruptError, match="it in pack"):
        target.packs.read(entry, "it")


TABLE_EDITS = [
    (8, "<I", 2), (12, "<I", 1), (16, "<Q", 1 << 63), (16, "<Q", SIZE + CHUNK * layout.LEAF), (24, "<I", 4096),
    (28, "<I", 1), (32, "<Q", 1 << 40), (32, "<Q", 0), (80, "<B", 9), (84, "<I", 1 << 31), (48, "<Q", 1),
    (128 + 32, "<Q", 0), (128 + 40, "<Q", 1), (128 + 40, "<Q", 1 << 62), (128 + 48, "<I", 0),
    (128 + 48, "<I", CHUNK + 1), (128 + 52, "<I", CHUNK), (128 + 52, "<I", 0),
]  # fmt: skip


@pytest.mark.parametrize("edit", TABLE_EDITS, ids=str)
def test_hostile_tables(target: store.Store, tmp_path: Path, edit: tuple[int, str, int]) -> None:
    """Rule S4: a table with a right checksum and impossible contents."""
    path = only(tmp_path / "store", "images/*/*.image")
    place, form, value = edit
    body = bytearray(path.read_bytes()[: -layout.HASH])
    struct.pack_into(form, body, place, value)
    path.write_bytes(bytes(body) + target.packs.codec.digest(bytes(body)))
    with pytest.raises(errors.CorruptError):
        read(target)
    assert not check.verify(target).ok
    if place < 16:
        with pytest.raises(errors.CorruptError, match="newer blkckpt"):
            target.image(image_of(target))


def test_a_hostile_leaf(target: store.Store) -> None:
    """A leaf with a right hash whose entries cannot be."""
    good = target.image(image_of(target)).entries(0)
    for field, value in (("raw", 1), ("raw", CHUNK + 1), ("stored", 0), ("offset", 5), ("offset", 1 << 50), ("raw", 0)):
        entries = good.copy()
        entries[field][0] = value
        with pytest.raises(errors.CorruptError, match="entry 0"):
            layout.check_leaf(entries.tobytes(), SIZE, 0, "it")
    with pytest.raises(errors.CorruptError, match="wrong length"):
        layout.check_leaf(good.tobytes()[:-56], SIZE, 0, "it")


def _first_refused(case: bytes) -> int | None:
    """As those who look at single entries find it: a view at one, a comparison at those that differ."""
    for number in range(len(case) // layout.ENTRY.size):
        single = np.frombuffer(case, layout.ENTRY_TYPE)[number : number + 1]
        refusals = 0
        try:
            layout.checked_entry(case, number, layout.chunk_length(SIZE, number), "it")
        except errors.CorruptError:
            refusals += 1
        try:
            layout.check_chosen(single, np.array([number]), SIZE, "it")
        except errors.CorruptError:
            refusals += 1
        assert refusals in (0, 2)
        if refusals:
            return number
    return None


def test_all_judges_of_entries_agree(target: store.Store) -> None:
    """Those that need no numpy, or see one entry, say what the others say, for every field of every place."""
    good = target.image(image_of(target)).leaf(0)
    count = len(good) // layout.ENTRY.size
    cases = [good, bytes(len(good)), b""]
    edits = (
        (0, "B", (1,)),
        (32, "<Q", (0, 7)),
        (40, "<Q", (0, 5, 120, 1 << 50)),
        (48, "<I", (0, 1, CHUNK, CHUNK + 1)),
        (52, "<I", (0, 1, CHUNK - 1, CHUNK)),
    )
    for number in (0, count // 2, count - 1):
        for place, form, values in edits:
            for value in values:
                for base in (good, bytes(len(good))):
                    body = bytearray(base)
                    struct.pack_into(form, body, number * layout.ENTRY.size + place, value)
                    cases.append(bytes(body))
    length, last = CHUNK, layout.chunk_length(SIZE, count - 1)
    answers = [layout.first_bad_of_few(case, length, last) for case in cases]
    assert answers == [layout.first_bad(case, length, last) for case in cases]
    assert answers == [_first_refused(case) for case in cases]
    assert {None, 0, count // 2, count - 1} <= set(answers)


def test_hostile_packs(target: store.Store, tmp_path: Path) -> None:
    path = only(tmp_path / "store", "packs/*/*.pack")
    clean = path.read_bytes()
    pack = next(iter(target.packs.ids()))[0]
    digest = target.packs.codec.digest
    end = int.from_bytes(clean[-48:-40], "little")
    records = np.frombuffer(clean[end : -layout.TRAILER_SIZE], layout.RECORD_TYPE)

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        target._backend.close()
        with pytest.raises(errors.CorruptError, match=message):
            target.packs.index(pack)

    for field, value in (("offset", 1 << 60), ("stored", 0), ("raw", CHUNK + 1), ("stored", CHUNK + 1)):
        changed = records.copy()
        changed[field][1] = value
        refused(clean[:end] + layout.encode_index(pack, changed, end, digest), "impossible lengths|do not follow")
    refused(clean[:end] + layout.encode_index(pack, records[:-1], end, digest), "do not follow")
    refused(clean[:end] + layout.encode_index(pack + 1, records, end, digest), "ends as pack")
    refused(clean[:-48] + (1 << 63).to_bytes(8, "little") + clean[-40:], "does not fit")
    for place, message in ((8, "newer"), (12, "newer"), (16, "says that it is"), (24, "another store")):
        header = bytearray(clean[:64])
        header[place] ^= 2
        header[60:] = zlib.crc32(header[:60]).to_bytes(4, "little")
        refused(bytes(header) + clean[64:], message)
    refused(b"", "impossible size")
    refused(bytes(200), "begin with a pack header")
    with path.open("wb") as file:
        file.truncate(layout.MAX_PACK_FILE + 1)
    target._backend.close()
    with pytest.raises(errors.CorruptError, match="impossible size"):
        target.packs.index(pack)


def test_a_huge_table_is_not_read(target: store.Store, tmp_path: Path) -> None:
    path = only(tmp_path / "store", "images/*/*.image")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(errors.CorruptError, match="longer than any"):
        read(target)


def test_files_that_are_not_ours(target: store.Store, tmp_path: Path) -> None:
    """Symlinks, devices and files others may write are not read."""
    path = only(tmp_path / "store", "packs/*/*.pack")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.BlkckptError):
        read(target)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.BlkckptError):
        read(target)
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    path.chmod(0o666)
    with pytest.raises(errors.BlkckptError):
        read(target)
    path.chmod(0o600)
    assert read(target) == DATA


def test_strange_files_in_a_store_are_left_alone(target: store.Store, tmp_path: Path) -> None:
    strange = [
        tmp_path / "store" / name
        for name in ("packs/README", "packs/00/x.pack", "images/zz.image", "manifests/a.json", "manifests/web/.hidden")
    ]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    assert target.names() == [("web", "one")]
    assert list(target.image_ids()) == [image_of(target)]
    target.collect()
    assert all(path.exists() for path in strange)
    assert check.verify(target).ok
    assert images.load_table(target.packs, image_of(target)).size == SIZE

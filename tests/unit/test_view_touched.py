"""What a machine touched first: kept once for each image, bounded, and never more than a hint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import paths
from blkckpt.store import layout, store
from blkckpt.view import chunks, content, touched

IMAGE = "0123456789abcdef" * 2


@pytest.fixture
def home(tmp_path: Path) -> paths.Home:
    return paths.home(tmp_path / "home")


def test_the_first_restore_notes_and_the_next_one_reads_ahead(home: paths.Home) -> None:
    asked: list[touched.Ranges] = []
    first = touched.First(home)
    notes = first.opened(IMAGE, asked.append)
    assert notes is not None
    assert not asked
    assert first.opened(IMAGE, asked.append) is notes  # QEMU opens the file more than once
    for offset, length in ((8, 4), (12, 4), (100, 1), (0, 8)):
        notes.note(offset, length)
    notes.close()
    notes.note(500, 1)  # too late
    notes.close()
    assert touched.First(home).opened(IMAGE, asked.append) is None
    assert asked == [[(8, 8), (100, 1), (0, 8)]]
    assert touched.place(home, IMAGE).stat().st_mode & 0o777 == 0o600


def test_what_is_noted_is_bounded(home: paths.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touched, "MAX_BYTES", 100)
    monkeypatch.setattr(touched, "KEPT", 3)
    found: list[touched.Ranges] = []
    notes = touched.Notes(found.append)
    for number in range(0, 100, 2):
        notes.note(number * 10, 10)
    notes.close()
    assert sum(length for _, length in found[0]) == 100
    for number in range(5):
        touched.save(home, f"{number:032x}", [(0, 1)])
        os.utime(touched.place(home, f"{number:032x}"), (number, number))
    assert [number for number in range(5) if touched.load(home, f"{number:032x}")] == [2, 3, 4]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 2, "ranges": [[0, 1]]}', '{"version": 1, "ranges": [[0, -1]]}',
             '{"version": 1, "ranges": [0]}', '{"version": 1, "ranges": [["a", 1]]}']
)  # fmt: skip
def test_a_foreign_file_is_no_hint(home: paths.Home, text: str) -> None:
    touched.save(home, IMAGE, [(0, 1)])
    touched.place(home, IMAGE).write_text(text)
    assert touched.load(home, IMAGE) == []
    assert touched.First(home).opened(IMAGE, lambda _: None) is not None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as made:
        yield made


def test_ranges_are_asked_for_in_order_and_no_more_than_fit(
    place: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges beyond the end and of zeros ask for nothing."""
    data = b"".join(os.urandom(layout.CHUNK) if number != 3 else bytes(layout.CHUNK) for number in range(12))
    with place.image_writer(len(data), workers=1) as writer:
        writer.write(0, data)
        reader = place.image(writer.finish().image)
    asked: list[bytes] = []
    cache = chunks.Chunks(limit=8 * layout.CHUNK)
    monkeypatch.setattr(cache, "ahead", lambda _, wanted: asked.extend(entry.hash for entry, _ in wanted))
    order = [7, 3, 1, 2, 9, 7, 0, 5, 4, 8, 11]
    ranges = [(len(data) + layout.CHUNK, 5), *((number * layout.CHUNK, 1) for number in order)]
    content.Image(place.packs, reader.table, cache).ahead_of(ranges)
    cache.close()
    assert asked == [reader.entry(number).hash for number in (7, 1, 2, 9, 0, 5, 4)]  # three quarters, and one more
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(place.packs.backend, "hint", lambda _, ranges: told.extend(ranges))
    reader.announce(ranges)
    wanted = [reader.entry(number) for number in order if number != 3]
    assert told == [(entry.offset, entry.stored) for entry in wanted]

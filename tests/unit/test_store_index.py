"""The deduplication index beside a pack that is just being made durable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.store import layout, packs, store

CHUNK = layout.CHUNK


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def put(target: store.Store, data: bytes) -> int:
    """Store *data* as an image; the number of its new chunks."""
    with target.image_writer(len(data)) as out:
        out.write(0, data)
        return out.finish().new_chunks


def digests(target: store.Store, data: bytes) -> list[bytes]:
    return [target.packs.codec.digest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]


def test_s2_nothing_refers_to_a_pack_that_is_not_durable(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are entered while the disk works on it, and found when it is there."""
    data = os.urandom(4 * CHUNK)
    entered = threading.Event()
    enter, commit = target.index.enter, packs.PackWriter.commit
    found = []

    def entering(pack: int, size: int, records: layout.Array) -> None:
        enter(pack, size, records)
        entered.set()

    def committing(pack: packs.PackWriter) -> None:
        assert entered.wait(20), "the index is told only afterwards"
        found.append(target.index.lookup(digests(target, data)))
        commit(pack)

    monkeypatch.setattr(target.index, "enter", entering)
    monkeypatch.setattr(packs.PackWriter, "commit", committing)
    put(target, data)
    assert found == [{}]
    assert set(target.index.lookup(digests(target, data))) == set(digests(target, data))


def test_s4_what_was_entered_of_a_pack_that_failed_is_not_found(
    target: store.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = os.urandom(4 * CHUNK)

    def fail(_: packs.PackWriter) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch, pytest.raises((OSError, errors.BlkckptError)):
        patch.setattr(packs.PackWriter, "commit", fail)
        put(target, data)
    assert target.index.lookup(digests(target, data)) == {}
    assert put(target, data) == 4
    assert set(target.index.lookup(digests(target, data))) == set(digests(target, data))
    target.close()
    with store.Store.open(tmp_path / "store") as again:  # a writer drops what is left of it
        assert put(again, data) == 0
        count = again.index._connect().execute("SELECT count(*) FROM packs").fetchone()[0]
        assert count == len(list(again.packs.ids()))

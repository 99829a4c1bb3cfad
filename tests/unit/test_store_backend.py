"""Large objects: durable under their key after ``commit``, and not there after an error."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.store import backend

KEY = "packs/ab/abcd.pack"
PIECE = b"\x5a" * (4 << 20)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[backend.LocalBackend]:
    monkeypatch.setattr(backend, "_SYNC_EVERY", 8 << 20)
    (tmp_path / "tmp").mkdir(mode=0o700)
    opened = backend.LocalBackend(tmp_path)
    yield opened
    opened.close()


def test_a_large_object_is_synced_while_it_arrives(
    place: backend.LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        real(descriptor)
        synced.set()

    monkeypatch.setattr(os, "fdatasync", sync)
    out = place.create(KEY)
    for _ in range(4):
        out.append([PIECE])
    assert synced.wait(20), "before there is a commit"
    out.append([b"the end"])
    out.commit()
    assert place.size(KEY) == 4 * len(PIECE) + 7
    assert place.get(KEY, 4 * len(PIECE) - 1, 8) == b"\x5athe end"


def test_s1_what_a_sync_on_the_way_failed_with_fails_the_commit(
    place: backend.LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write-back once for a descriptor: the last fsync would succeed."""
    failed = threading.Event()

    def fail(_: int) -> None:
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = place.create(KEY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        for _ in range(2):
            out.append([PIECE])
        assert failed.wait(20)
    with pytest.raises(errors.BlkckptError, match="Input/output error"):
        out.commit()
    out.abort()
    assert not (tmp_path / KEY).exists()
    assert list((tmp_path / "tmp").iterdir()) == []

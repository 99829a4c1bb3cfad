"""What a mount holds open is pinned, and no pin names an image that is gone (rule S5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.store import layout, lock, store
from blkckpt.view import held


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def mounted() -> Iterator[held.Held]:
    made = held.Held("test")
    yield made
    made.close()


def put(target: store.Store) -> str:
    with target.image_writer(layout.CHUNK) as out:
        out.write(0, os.urandom(layout.CHUNK))
        image = out.finish().image
    target.abandon()
    return image


def test_what_is_open_is_not_collected(target: store.Store, mounted: held.Held) -> None:
    image, other = put(target), put(target)
    mounted.take(target, [image])
    assert target.collect().images == 1
    assert target.image(image).size
    with pytest.raises(errors.NotFoundError):
        mounted.take(target, [other])
    mounted.take(target, [image])
    assert target.pins() == {held.owner("test"): [image]}


def test_an_image_that_went_while_it_was_open_without_a_pin_is_in_no_later_pin(
    target: store.Store, mounted: held.Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store was being collected for longer than an opening waits; the next collection must not stumble over it."""
    gone, kept = put(target), put(target)
    monkeypatch.setattr(held, "LOCK_SECONDS", 0.0)
    with lock.exclusive(target.path / "lock"):
        mounted.take(target, [gone])
    assert target.pins() == {}
    target.pin("other", [kept])
    assert target.collect().images == 1
    mounted.take(target, [kept])
    assert target.pins()[held.owner("test")] == [kept]
    target.collect()

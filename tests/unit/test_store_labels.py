"""Labels: tags, notes and pins beside a manifest (rules S1, S4, S5)."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import durable, errors
from blkckpt.store import labels, layout, manifest, store
from tests.unit.test_store_collect import put

CHUNK = layout.CHUNK
PINNED = labels.Labels(pinned=True)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def take(target: store.Store, name: str, marked: labels.Labels = labels.NONE, number: int = 1) -> manifest.Manifest:
    info = put(target, os.urandom(CHUNK))
    disk = manifest.DiskImage("vda", info.image, info.size)
    made = manifest.Manifest("web", name, f"{number:032x}", time.time_ns(), (disk,))
    target.put_manifest(made, marked)
    return made


def test_a_life_of_labels(target: store.Store) -> None:
    made = take(target, "one")
    assert target.labels(made) == labels.NONE
    assert target.relabel("web", "one", lambda now: now.tag(["b", "a", "b"])).tags == ("a", "b")
    target.relabel("web", "one", lambda now: now.untag(["b"]).note(["it boots", "twice"]))
    target.relabel("web", "one", lambda now: dataclasses.replace(now, pinned=True))
    with store.Store.open(target.path) as other:
        assert other.labels(made) == labels.Labels(("a",), ("it boots", "twice"), True)
    assert target.manifest("web", "one") == made, "the manifest is as it was"
    with pytest.raises(errors.NotFoundError):
        target.relabel("web", "two", lambda now: now)


def test_a_pinned_checkpoint_stays(target: store.Store) -> None:
    take(target, "one", PINNED)
    with pytest.raises(errors.StateError, match="unpin web@one"):
        target.remove("web", "one")
    assert target.names() == [("web", "one")]
    target.relabel("web", "one", lambda now: dataclasses.replace(now, pinned=False))
    target.remove("web", "one")
    assert list((target.path / "labels").rglob("*.json")) == []


def test_one_that_is_taken_back_goes_pinned_or_not(target: store.Store) -> None:
    """A3: a checkpoint that failed after its manifest was put leaves nothing."""
    take(target, "one", PINNED)
    target.remove("web", "one", pinned=True)
    assert target.names() == []


def test_labels_are_there_from_the_first_instant(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1: whoever sees the manifest sees the labels; without the manifest they count for nothing and are collected."""
    real = durable.create_file
    seen: list[bool] = []

    def create(path: Path, data: bytes, mode: int = 0o600) -> None:
        if path.name == "one.json":
            seen.append((target.path / "labels/web/one.json").exists())
            raise KeyboardInterrupt
        real(path, data, mode)

    monkeypatch.setattr(durable, "create_file", create)
    with pytest.raises(KeyboardInterrupt):
        take(target, "one", PINNED)
    monkeypatch.setattr(durable, "create_file", real)
    assert seen == [True]
    target.abandon()
    again = take(target, "one", number=2)
    assert target.labels(again) == labels.NONE, "they were another checkpoint's"
    target.remove("web", "one")
    target.close()
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(durable, "create_file", create)
        take(target, "one", PINNED)
    monkeypatch.setattr(durable, "create_file", real)
    target.abandon()
    target.collect()
    assert list((target.path / "labels").rglob("*.json")) == []


def test_a_name_that_is_taken_keeps_its_labels(target: store.Store) -> None:
    made = take(target, "one", labels.Labels(("first",)))
    with pytest.raises(errors.StateError, match="already"):
        take(target, "one", PINNED, number=2)
    assert target.labels(made).tags == ("first",)


def test_collection_leaves_labels_that_are_in_use(target: store.Store) -> None:
    made = take(target, "one", labels.Labels(("a",)))
    target.collect(repack=-1)
    assert target.labels(made).tags == ("a",)


def test_damaged_labels_pin(target: store.Store) -> None:
    """S4: what cannot be read may have been a pin; the checkpoint is whole all the same, and they can be set anew."""
    made = take(target, "one", labels.Labels(("a",)))
    path = target.path / "labels/web/one.json"
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    for attempt in (
        lambda: target.labels(made),
        lambda: target.remove("web", "one"),
        lambda: target.relabel("web", "one", lambda now: now.tag(["x"])),
    ):
        with pytest.raises(errors.CorruptError, match="unpin web@one"):
            attempt()
    assert target.manifest("web", "one") == made
    target.collect()
    assert path.exists()
    assert target.relabel("web", "one", lambda now: now.tag(["x"]), anew=True).tags == ("x",)
    target.remove("web", "one")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"requires": ["colours"]}, {"tags": "a"}, {"tags": ["../x"]}, {"tags": [1]}, {"pinned": 1},
        {"notes": ["x" * 5000]}, {"notes": [""]}, {"id": "short"}, {"tags": [f"t{n}" for n in range(65)]},
    ],
    ids=str,
)  # fmt: skip
def test_foreign_labels_are_refused(change: dict[str, object]) -> None:
    """S4."""
    fields = {"version": 1, "requires": [], "id": "1" * 32, "tags": ["a"], "notes": [], "pinned": False}
    assert labels.decode(manifest.seal(fields), "x") == (labels.Labels(("a",)), "1" * 32)
    with pytest.raises(errors.CorruptError):
        labels.decode(manifest.seal({**fields, **change}), "labels")


def test_a_pin_that_comes_after_a_damaged_manifest(target: store.Store) -> None:
    """Whose id cannot be read: the pin counts."""
    take(target, "one", PINNED)
    path = target.path / "manifests/web/one.json"
    path.write_bytes(b"torn")
    with pytest.raises(errors.StateError, match="pinned"):
        target.remove("web", "one")


def test_no_change_is_lost(target: store.Store) -> None:
    """Many change the labels of one checkpoint at once, each through a store of its own."""
    made = take(target, "one")

    def change(number: int) -> None:
        with store.Store.open(target.path) as mine:
            for step in range(5):
                tag = f"t{number}-{step}"
                mine.relabel("web", "one", lambda now, tag=tag: now.tag([tag]))  # type: ignore[misc]

    threads = [threading.Thread(target=change, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(target.labels(made).tags) == 30


@pytest.mark.parametrize(
    "how",
    [
        lambda now: now.tag(["a b"]), lambda now: now.tag([""]), lambda now: now.untag(["nosuch"]),
        lambda now: now.note([" "]), lambda now: now.note(["x" * 4097]), lambda now: now.note(["a\0b"]),
        lambda now: now.tag(f"t{n}" for n in range(65)), lambda now: now.note("x" for _ in range(257)),
    ],
)  # fmt: skip
def test_bad_changes(target: store.Store, how: object) -> None:
    take(target, "one")
    with pytest.raises(errors.InputError):
        target.relabel("web", "one", how)  # type: ignore[arg-type]

"""Accounting: compared with a plain model that walks every image chunk by chunk."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click import testing

from blkckpt.cli import main
from blkckpt.store import layout, manifest, store, usage

CHUNK = layout.CHUNK


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[store.Store]:
    monkeypatch.setenv("BLKCKPT_HOME", str(tmp_path))
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def put(place: store.Store, pieces: dict[int, bytes], size: int, parent: str | None = None) -> str:
    with place.image_writer(size, parent=parent) as out:
        for number, data in pieces.items():
            out.write(number * CHUNK, data)
        return out.finish().image


def publish(place: store.Store, vm: str, name: str, *image_ids: str, created: int = 0) -> None:
    disks = tuple(
        manifest.DiskImage(f"d{number}", image, place.image(image).size) for number, image in enumerate(image_ids)
    )
    place.put_manifest(manifest.Manifest(vm, name, random.randbytes(16).hex(), created, disks))


def model(place: store.Store, groups: Sequence[Sequence[str]], pinned: Sequence[str] = ()) -> list[usage.Usage]:
    """The same figures by dictionaries and sets."""
    walked = [walk(place, ids) for ids in groups]
    kept = walk(place, pinned)[2]
    result = []
    for number, (logical, referenced, places) in enumerate(walked):
        others = set(kept).union(*(other[2] for index, other in enumerate(walked) if index != number))
        distinct = sum(raw for raw, _ in places.values())
        stored = sum(size for _, size in places.values())
        unique = sum(size for key, (_, size) in places.items() if key not in others)
        result.append(usage.Usage(logical, referenced, distinct, stored, unique))
    return result


def walk(place: store.Store, image_ids: Sequence[str]) -> tuple[int, int, dict[tuple[int, int], tuple[int, int]]]:
    logical = referenced = 0
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for image in dict.fromkeys(image_ids):
        reader = place.image(image)
        logical += reader.size
        for number in range(reader.chunks):
            entry = reader.entry(number)
            if entry.raw:
                referenced += entry.raw
                places[entry.pack, entry.offset] = (entry.raw, entry.stored + layout.ENTRY_HEADER.size)
        for leaf in range(layout.leaf_count(reader.size)):
            entry = reader.table.leaf(leaf)
            if entry.raw:
                places[entry.pack, entry.offset] = (0, entry.stored + layout.ENTRY_HEADER.size)
    return logical, referenced, places


def history(place: store.Store) -> dict[tuple[str, str], list[str]]:
    """Two VMs, one of three checkpoints with shared, repeated and zero chunks; several leaves; an odd size."""
    chance = random.Random(5)
    size = (2 * layout.LEAF + 3) * CHUNK + 77
    same = chance.randbytes(CHUNK)
    text = (b"the quick brown fox " * CHUNK)[:CHUNK]
    first = put(place, {0: same, 1: same, 2: text, layout.LEAF + 1: chance.randbytes(CHUNK), 9: bytes(CHUNK)}, size)
    second = put(place, {2: chance.randbytes(CHUNK), 700: same}, size, first)
    tail = put(place, {0: chance.randbytes(77)}, 77)
    other = put(place, {5: same, 6: chance.randbytes(CHUNK)}, 10 * CHUNK)
    made = {("a", "one"): [first, tail], ("a", "two"): [second, tail], ("b", "one"): [other, first]}
    for number, ((vm, name), ids) in enumerate(made.items()):
        publish(place, vm, name, *ids, created=number)
    return made


def test_figures_are_those_of_a_plain_walk(place: store.Store) -> None:
    made = history(place)
    report = usage.measure(place)
    assert [(one.vm, one.name) for one in report.checkpoints] == list(made)
    assert [one.usage for one in report.checkpoints] == model(place, list(made.values()))
    of_vms = [[i for (vm, _), ids in made.items() if vm == wanted for i in ids] for wanted in ("a", "b")]
    assert list(report.vms.values()) == model(place, of_vms)
    assert [report.total] == model(place, [[image for ids in made.values() for image in ids]])
    assert report.damaged == () and report.stored_bytes == sum(size for _, size in place.packs.ids())
    assert report.dead_bytes == 0, "nothing was removed: every byte of every pack is accounted for"


def test_unique_is_what_a_removal_makes_garbage(place: store.Store) -> None:
    history(place)
    before = usage.measure(place)
    (one,) = [one for one in before.checkpoints if (one.vm, one.name) == ("a", "two")]
    place.remove("a", "two")
    after = usage.measure(place)
    assert before.total.compressed - after.total.compressed == one.usage.unique > 0
    records = after.dead_bytes - one.usage.unique
    assert records > 0 and records % layout.RECORD.size == 0, "and its records in the packs' indexes"


def test_what_is_pinned_is_nobodys_alone(place: store.Store) -> None:
    made = history(place)
    place.pin("reader", [made["a", "two"][0]])
    report = usage.measure(place)
    pinned = [made["a", "two"][0]]
    assert [one.usage for one in report.checkpoints] == model(place, list(made.values()), pinned)
    place.remove("a", "two")
    assert usage.measure(place).dead_bytes == 0, "its pinned image is live; the other image is shared"


def test_empty_store_and_command(place: store.Store) -> None:
    assert usage.measure(place).total == usage.Usage(0, 0, 0, 0, 0)
    made = history(place)
    result = testing.CliRunner().invoke(main.command, ["du", "a", "--json"])
    body = json.loads(result.stdout)
    assert [one["name"] for one in body["checkpoints"]] == ["one", "two"] and len(body["vms"]) == 1
    assert body["checkpoints"][0]["unique"] == model(place, list(made.values()))[0].unique
    assert "a (all)" in testing.CliRunner().invoke(main.command, ["du"]).stdout
    assert testing.CliRunner().invoke(main.command, ["du", "nosuch"]).exit_code == 4


def test_damage_is_told_and_the_rest_is_counted(place: store.Store) -> None:
    made = history(place)
    path = place.path / layout.image_key(made["b", "one"][0])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    report = usage.measure(place)
    assert len(report.damaged) == 1 and made["b", "one"][0] in report.damaged[0]
    assert report.checkpoints[0].usage.logical == model(place, [made["a", "one"]])[0].logical
    result = testing.CliRunner().invoke(main.command, ["du", "--json"])
    assert result.exit_code == 6 and json.loads(result.stdout)["damaged"]


def test_a_long_history_is_quick(place: store.Store) -> None:
    """40 checkpoints of 2 GiB of data each: equal leaves are read once.  The bound is on processor time."""
    size = 64 * layout.LEAF * CHUNK
    data = random.Random(1).randbytes(CHUNK)
    image = put(place, dict.fromkeys(range(layout.chunk_count(size)), data), size)
    for number in range(40):
        image = put(place, {number: random.Random(100 + number).randbytes(CHUNK)}, size, image)
        publish(place, "v", f"n{number}", image, created=number)
    began = time.process_time()
    report = usage.measure(place)
    assert time.process_time() - began < 5
    assert report.total.logical == 40 * size and report.total.distinct == 41 * CHUNK

"""Bundles: what arrives is what was sent, nothing is published otherwise, and repeating it does no harm."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.exchange import beside, bundle, inuse, packing, unpacking
from blkckpt.store import check, evidence, images, labels, layout, manifest, packs, store

CHUNK = layout.CHUNK
SIZE = (2 * layout.LEAF + 5) * CHUNK + 123


@pytest.fixture
def near(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "near") as opened:
        yield opened


@pytest.fixture
def far(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "far") as opened:
        yield opened


def put(
    place: store.Store, pieces: Mapping[int, bytes], size: int, parent: str | None = None, kind: str = "disk"
) -> str:
    with place.image_writer(size, parent=parent, kind=kind, label="l") as out:
        for number, data in pieces.items():
            out.write(number * CHUNK, data)
        return out.finish().image


def noise(seed: int, length: int = CHUNK) -> bytes:
    return random.Random(seed).randbytes(length)


def history(place: store.Store) -> list[manifest.Manifest]:
    """Three checkpoints of one VM; disk and memory share a chunk; the second changes one leaf, the third nothing."""
    text = (b"hello " * CHUNK)[:CHUNK]
    first = put(place, {0: noise(1), 1: text, layout.LEAF: noise(2), 2 * layout.LEAF + 5: noise(3, 123)}, SIZE)
    second = put(place, {layout.LEAF: noise(4)}, SIZE, first)
    third = put(place, {}, SIZE, second)
    made = []
    for number, disk in enumerate((first, second, third)):
        ram = put(place, {0: noise(1), 3: noise(10 + number)}, 6 * CHUNK, kind="memory")
        state = put(place, {0: noise(20 + number, 1000)}, 1000, kind="stream")
        memory = manifest.MemoryImage((manifest.RamBlock("pc.ram", 6 * CHUNK, 4096, ram),), state, 1000)
        one = manifest.Manifest(
            vm="web",
            name=f"n{number}",
            id=f"{number + 1:032x}",
            created_ns=number,
            parent=f"n{number - 1}" if number else None,
            disks=(manifest.DiskImage("vda", disk, SIZE),),
            memory=memory,
            consistency="machine",
            notes=("kept",),
        )
        place.put_manifest(one)
        made.append(one)
    return made


def pack(place: store.Store, chosen: list[manifest.Manifest], bases: list[manifest.Manifest] | None = None) -> bytes:
    out = bytearray()
    packing.pack(place, chosen, bases or [], out.extend, lambda done, total: None)
    return bytes(out)


def unpack(place: store.Store, data: bytes, rename: unpacking.Rename | None = None) -> unpacking.Unpacked:
    return unpacking.unpack(place, io.BytesIO(data).read, rename or {}, lambda position: None)


def same(near: store.Store, one: manifest.Manifest, far: store.Store, vm: str, name: str) -> None:
    there = far.manifest(vm, name)
    assert (there.id, there.notes, there.consistency) == (one.id, one.notes, one.consistency)
    ours, theirs = bundle.parts(one), bundle.parts(there)
    assert ours.keys() == theirs.keys()
    for part, (image, size, kind) in ours.items():
        reader, copy = near.image(image), far.image(theirs[part][0])
        assert copy.read(0, size) == reader.read(0, size)
        assert (copy.table.kind, copy.table.label, copy.table.used) == (kind, reader.table.label, reader.used())
    assert [part.used for part in there.parts()] == [near.image(part.image).used() for part in one.parts()]


def test_whole_history(near: store.Store, far: store.Store) -> None:
    made = history(near)
    data = pack(near, made)
    done = unpack(far, data)
    assert done.checkpoints == ("web@n0", "web@n1", "web@n2") and done.chunks == done.new_chunks
    for one in made:
        same(near, one, far, "web", one.name)
    assert check.verify(far, None, None, lambda done, total: None).ok
    assert far.manifest("web", "n2").parent == "n1"


def test_repeated_it_does_nothing(near: store.Store, far: store.Store) -> None:
    data = pack(near, history(near))
    unpack(far, data)
    before = dict(far.packs.ids()), sorted(far.image_ids())
    done = unpack(far, data)
    assert done.checkpoints == () and len(done.present) == 3
    assert (dict(far.packs.ids()), sorted(far.image_ids())) == before


def test_incremental_sends_only_what_differs(near: store.Store, far: store.Store) -> None:
    made = history(near)
    unpack(far, pack(near, made[:1]))
    data = pack(near, made[1:], packing.choose_bases(near.manifests(), made[1:], [made[0].id]))
    done = unpack(far, data)
    assert done.chunks == done.new_chunks == 1 + 2 + 2, "one of the disk, two of memory, two of state"
    for one in made[1:]:
        same(near, one, far, "web", one.name)


def test_what_is_needed_must_be_there(near: store.Store, far: store.Store) -> None:
    made = history(near)
    data = pack(near, made[1:], made[:1])
    with pytest.raises(errors.NotFoundError, match="web@n0"):
        unpack(far, data)
    assert far.names() == [] and list(far.packs.ids()) == []


def test_another_checkpoint_with_the_needed_id(near: store.Store, far: store.Store) -> None:
    """The id is as it should be, the data is not: the hashes of unchanged leaves tell."""
    made = history(near)
    disk = put(far, {0: noise(77)}, SIZE)
    far.put_manifest(manifest.Manifest("web", "n0", made[0].id, 0, (manifest.DiskImage("vda", disk, SIZE),)))
    with pytest.raises(errors.CorruptError, match=r"data differs|neither in the bundle"):
        unpack(far, pack(near, made[1:], made[:1]))
    assert far.names() == [("web", "n0")]


def test_a_taken_name_is_refused_and_can_be_changed(near: store.Store, far: store.Store) -> None:
    made = history(near)
    disk = put(far, {0: noise(5)}, CHUNK)
    far.put_manifest(manifest.Manifest("web", "n1", 32 * "e", 0, (manifest.DiskImage("vda", disk, CHUNK),)))
    data = pack(near, made)
    with pytest.raises(errors.StateError, match="--rename"):
        unpack(far, data)
    assert far.names() == [("web", "n1")]
    unpack(far, data, {("web", "n1"): ("web", "other")})
    assert far.manifest("web", "n2").parent == "other"
    same(near, made[1], far, "web", "other")
    with pytest.raises(errors.InputError, match="one name"):
        unpack(far, data, {("web", name): ("copy", "x") for name in ("n0", "n1", "n2")})
    unpack(far, data, {("web", None): ("copy", None)})
    assert [name for _, name in far.names("copy")] == ["n0", "n1", "n2"]


@pytest.mark.parametrize("seed", range(6))
def test_damage_publishes_nothing(near: store.Store, far: store.Store, seed: int) -> None:
    """Any flipped bit, wherever it is; records left out, doubled or exchanged."""
    chance = random.Random(seed)
    data = bytearray(pack(near, history(near)[:1]))
    records = list(offsets(data))
    for damage in (flip, cut, drop, double, exchange):
        broken = damage(bytearray(data), records, chance)
        with pytest.raises((errors.CorruptError, errors.InputError)):
            unpack(far, bytes(broken))
        assert far.names() == [], damage.__name__
    unpack(far, bytes(data))


def offsets(data: bytearray) -> Iterator[tuple[int, int]]:
    position = bundle.HEADER.size
    while position < len(data):
        record = bundle.decode_record(bytes(data[position : position + bundle.RECORD.size]), "")
        end = position + bundle.RECORD.size + record.stored
        yield position, end
        position = end


Damage = Callable[[bytearray, list[tuple[int, int]], random.Random], bytearray]


def flip(data: bytearray, records: list[tuple[int, int]], chance: random.Random) -> bytearray:
    """Not in the header's time and store id alone, which bear a checksum too."""
    position = chance.randrange(len(data))
    data[position] ^= 1 << chance.randrange(8)
    return data


def cut(data: bytearray, records: list[tuple[int, int]], chance: random.Random) -> bytearray:
    return data[: chance.choice([chance.randrange(len(data)), *(start for start, _ in records)])]


def drop(data: bytearray, records: list[tuple[int, int]], chance: random.Random) -> bytearray:
    start, end = chance.choice(records)
    return data[:start] + data[end:]


def double(data: bytearray, records: list[tuple[int, int]], chance: random.Random) -> bytearray:
    start, end = chance.choice(records[:-1])
    return data[:end] + data[start:]


def exchange(data: bytearray, records: list[tuple[int, int]], chance: random.Random) -> bytearray:
    number = chance.randrange(len(records) - 1)
    (start, middle), (_, end) = records[number], records[number + 1]
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def test_interrupted_and_repeated(near: store.Store, far: store.Store) -> None:
    """What a first run stored is found again by the second; no collection came between."""
    made = history(near)
    data = pack(near, made)
    stop = [end for _, end in offsets(bytearray(data))][-2]

    reader = io.BytesIO(data[:stop])
    with pytest.raises(errors.CorruptError, match="truncated"):
        unpacking.unpack(far, reader.read, {}, lambda position: None)
    assert far.names() == []
    done = unpack(far, data)
    assert done.chunks > 0 and done.new_chunks == 0
    assert far.collect().packs == 0, "every pack is of use"
    same(near, made[2], far, "web", "n2")


def test_it_waits_for_no_collection(near: store.Store, far: store.Store) -> None:
    """While a bundle is being read, nothing is collected; what is being packed is pinned."""
    made = history(near)
    data = pack(near, made)
    seen: list[int] = []

    def progress(position: int) -> None:
        if not seen:
            with store.Store.open(far.path) as other, pytest.raises(errors.StateError):
                other.collect(timeout=0)
            seen.append(position)

    unpacking.unpack(far, io.BytesIO(data).read, {}, progress)
    assert seen
    pinned: list[int] = []
    packing.pack(near, made, [], lambda data: pinned.append(len(near.pins())), lambda done, total: None)
    assert set(pinned) == {1} and near.pins() == {}


def test_other_hash_and_other_version(near: store.Store, tmp_path: Path) -> None:
    data = pack(near, history(near)[:1])
    with (
        store.Store.init(tmp_path / "sha", hash_name="sha256") as place,
        pytest.raises(errors.InputError, match="hash"),
    ):
        unpack(place, data)
    newer = bundle.HEADER.pack(bundle.MAGIC, bundle.VERSION + 1, 0, bytes(16), b"blake3", 0, 0)[:-4]
    with pytest.raises(errors.CorruptError, match="newer"):
        bundle.decode_header(newer + zlib.crc32(newer).to_bytes(4, "little"))


def test_pins_of_dead_processes_go(near: store.Store) -> None:
    made = history(near)
    near.pin("use.nbd.00000000.4194303.1.0", made[0].images())
    near.pin("someone", made[0].images())
    with inuse.using(near, made[0].images(), "test"):
        assert inuse.let_go(near) == 1
        assert len(near.pins()) == 2
    assert list(near.pins()) == ["someone"]


PICTURE = evidence.PNG + b"pixels" * 1000


def told(place: store.Store, made: list[manifest.Manifest]) -> None:
    """Something beside the first two of *made*."""
    place.relabel("web", "n0", lambda known: dataclasses.replace(known.tag(["golden"]).note(["a, b"]), pinned=True))
    boot = evidence.Boot(alive=True, sign="network", seconds=1.5, when_ns=7)
    place.add_evidence(made[0], boot=boot, png=PICTURE, source=evidence.AT_BOOT)
    place.relabel("web", "n1", lambda known: dataclasses.replace(known, pinned=True))
    place.add_evidence(made[1], boot=dataclasses.replace(boot, alive=False, message="no"), source=evidence.AT_BOOT)


def test_what_is_beside_travels_but_for_pins(near: store.Store, far: store.Store) -> None:
    made = history(near)
    told(near, made)
    unpack(far, pack(near, made), {("web", None): ("copy", None)})
    there = [far.manifest("copy", one.name) for one in made]
    assert far.labels(there[0]) == labels.Labels(("golden",), ("a, b",)) and far.labels(there[1]) == labels.NONE
    assert [far.evidence(one) for one in there] == [near.evidence(one) for one in made]
    assert far.picture(there[0]) == PICTURE and far.picture(there[1]) is None
    assert not list(far.path.glob("tmp?*"))


def test_what_is_beside_goes_with_an_increment_and_leaves_alone_what_is_there(
    near: store.Store, far: store.Store
) -> None:
    made = history(near)
    unpack(far, pack(near, made[:1]))
    told(near, made)
    unpack(far, pack(near, made, made[:1]))
    assert far.labels(far.manifest("web", "n0")) == labels.NONE
    found = far.evidence(far.manifest("web", "n1")).boot
    assert found is not None and found.message == "no"


def test_a_bundle_with_nothing_beside_is_the_older_version(near: store.Store, far: store.Store) -> None:
    made = history(near)
    plain = pack(near, made)
    told(near, made)
    versions = [bundle.decode_header(data[: bundle.HEADER.size]).version for data in (plain, pack(near, made))]
    assert versions == [bundle.PLAIN, bundle.VERSION]
    unpack(far, plain)


def test_damage_beside_publishes_nothing(near: store.Store, far: store.Store) -> None:
    made = history(near)[:2]
    told(near, made)
    data = bytearray(pack(near, made))
    few = [place for place in offsets(data) if data[place[0] + 4] in (bundle.LABELS, bundle.EVIDENCE, bundle.SCREEN)]
    for damage in (drop, double, exchange):
        with pytest.raises(errors.CorruptError):
            unpack(far, bytes(damage(bytearray(data), few, random.Random(0))))
        assert far.names() == [] and not list(far.path.glob("evidence/*/*"))
    unpack(far, bytes(data))


@pytest.mark.parametrize("wrong", ["owner", "twice", "picture", "no picture", "no png"])
def test_what_cannot_be_beside_is_refused(tmp_path: Path, wrong: str) -> None:
    """A well-formed bundle of somebody else's making (rule X3)."""
    screen = evidence.Screen(1, evidence.AT_BOOT, len(PICTURE), hashlib.sha256(PICTURE).hexdigest())
    other = evidence.Screen(1, evidence.AT_BOOT, 3, hashlib.sha256(b"abc").hexdigest())
    said, ours = labels.encode(labels.Labels(("a",)), "1" * 32), "1" * 32
    records = {
        "owner": [(bundle.LABELS, labels.encode(labels.Labels(("a",)), "2" * 32))],
        "twice": [(bundle.LABELS, said), (bundle.LABELS, said)],
        "picture": [(bundle.EVIDENCE, evidence.encode(evidence.Evidence(None, screen), ours)), (bundle.SCREEN, b"abc")],
        "no picture": [(bundle.EVIDENCE, evidence.encode(evidence.Evidence(None, screen), ours))],
        "no png": [(bundle.EVIDENCE, evidence.encode(evidence.Evidence(None, other), ours)), (bundle.SCREEN, b"abc")],
    }[wrong]
    waiting = [*records, (bundle.END, b"")]

    def wanted(kind: int) -> bytes | None:
        return waiting.pop(0)[1] if waiting[0][0] == kind else None

    with pytest.raises(errors.CorruptError, match="the bundle"):
        beside.Incoming(wanted, {ours}, tmp_path)


@pytest.mark.parametrize("where", ["read_leaf", "payloads", "images"])
def test_packs_that_move_while_it_is_made(
    near: store.Store, far: store.Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A collection with repacking between two leaves, two packs, two images: what arrives is whole."""
    made = history(near)
    of = {"read_leaf": images, "payloads": packs.Packs, "images": packing}[where]
    name = {"read_leaf": "read_leaf", "payloads": "payloads", "images": "_send_image"}[where]
    real, left = getattr(of, name), 2

    with store.Store.open(near.path) as other, monkeypatch.context() as patch:

        def meanwhile(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left >= 0:
                patch.undo()
                other.collect(repack=-1)
                patch.setattr(of, name, meanwhile)
            return real(*arguments)

        patch.setattr(of, name, meanwhile)
        data = pack(near, made)
    assert left < 0
    unpack(far, data)
    for one in made:
        same(near, one, far, "web", one.name)

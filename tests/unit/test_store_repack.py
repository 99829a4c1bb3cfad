"""Repacking: dead bytes go, every image stays as it is for readers, writers and crashes (rules S1, S2, S3, S5)."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkckpt import durable, errors
from blkckpt.store import check, images, layout, repack, store, usage
from tests.unit.test_store_collect import checkpoint, packs_of, publish, put, whole

CHUNK = layout.CHUNK
ALL = -1
"""A threshold that makes every pack a victim."""


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def size_of(target: store.Store) -> int:
    return sum(size for _, size in target.packs.ids())


def half_dead(target: store.Store, count: int = 2) -> dict[str, bytes]:
    """*count* checkpoints each of whose packs is two thirds dead: name → what it must read back as."""
    kept = {}
    for number in range(count):
        live, dead = random.Random(number).randbytes(5 * CHUNK + 100), random.Random(500 + number).randbytes(10 * CHUNK)
        image = put(target, dead + live)
        publish(target, f"gone{number}", image.image, image.size)
        kept[f"kept{number}"] = live
        checkpoint(target, f"kept{number}", live)
        target.remove("web", f"gone{number}")
    return kept


def check_all(target: store.Store, kept: dict[str, bytes]) -> None:
    for name, data in kept.items():
        assert whole(target, target.manifest("web", name).disks[0].image) == data, name
    report = check.verify(target)
    assert report.ok, report.problems


def test_dead_bytes_go_and_images_stay(target: store.Store) -> None:
    """S5: what the report promises is freed, under the same ids, and shared leaves stay shared."""
    kept = half_dead(target)
    twin = put(target, kept["kept0"])
    publish(target, "twin", twin.image, twin.size)
    kept["twin"] = kept["kept0"]
    before, old = size_of(target), packs_of(target)
    assert target.collect().dead_bytes > 19 * CHUNK
    dry = target.collect(dry_run=True, repack=0.25)
    assert packs_of(target) == old, "a dry run changes nothing"
    seen: list[tuple[str, int, int]] = []
    report = target.collect(repack=0.25, progress=lambda *step: seen.append(step))
    assert report.repacked_packs == dry.repacked_packs == 2
    assert report.repacked_images == 3
    assert report.freed_bytes == before - size_of(target) > 19 * CHUNK
    assert abs(dry.freed_bytes - report.freed_bytes) < 4096
    assert not packs_of(target) & old
    assert report.dead_bytes < 1024
    assert report.damaged == ()
    steps = [(done, total) for stage, done, total in seen if stage == "repack"]
    assert steps[-1][0] == steps[-1][1] > 0
    check_all(target, kept)
    first, other = (target.image(target.manifest("web", name).disks[0].image) for name in ("kept0", "twin"))
    assert (first.table.leaves == other.table.leaves).all()
    assert list(images.changed(first, other)) == []


def test_the_threshold_decides(target: store.Store) -> None:
    kept = half_dead(target, 1)
    target.collect()
    packs = packs_of(target)
    assert target.collect(repack=0.75).repacked_packs == 0
    assert packs_of(target) == packs
    assert target.collect(repack=0.5).repacked_packs == 1
    assert target.collect(repack=0).repacked_packs == 0, "what is repacked has nothing dead in it"
    check_all(target, kept)


def test_a_fully_live_pack_of_tiny_entries_is_no_victim(target: store.Store) -> None:
    """The headers and index records of what lives are not dead bytes."""
    checkpoint(target, "one", b"".join(bytes([n]) * CHUNK for n in range(1, 200)))
    assert target.collect(repack=0).repacked_packs == 0


def test_later_writers_find_moved_chunks(target: store.Store) -> None:
    """The index knows the new places, here and in another process' connection."""
    kept = half_dead(target)
    other = store.Store.open(target.path)
    put(other, b"x")
    other.abandon()
    target.collect(repack=0.25)
    for user in (target, other):
        info = put(user, kept["kept1"])
        assert info.new_chunks == 0
        assert whole(user, info.image) == kept["kept1"]
        user.abandon()
    other.close()


def test_children_of_a_repacked_image(target: store.Store) -> None:
    """A parent opened before repacking, and one opened after: what is inherited is there."""
    kept = half_dead(target, 1)
    parent = target.manifest("web", "kept0").disks[0].image
    size = len(kept["kept0"])
    other = store.Store.open(target.path)
    with target.image_writer(size, parent=parent) as out:
        with pytest.raises(errors.StateError):
            other.collect(repack=0.25, timeout=0)
        out.write(0, b"n" * CHUNK)
        early = out.finish()
    publish(target, "early", early.image, size)
    other.collect(repack=0.25)
    with target.image_writer(size, parent=parent) as out:
        out.write(CHUNK, b"m" * CHUNK)
        late = out.finish()
    publish(target, "late", late.image, size)
    data = kept["kept0"]
    check_all(target, {
        **kept, "early": b"n" * CHUNK + data[CHUNK:], "late": data[:CHUNK] + b"m" * CHUNK + data[2 * CHUNK :],
    })  # fmt: skip
    other.close()


def test_a_writer_that_comes_while_it_copies(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint published between the marks and the sweep, with chunks that were dead by the marks, stays whole."""
    kept = half_dead(target, 1)
    dead = random.Random(500).randbytes(10 * CHUNK)  # found in the index, though nothing needs it any more
    publisher = store.Store.open(target.path)
    real = repack.run

    def run(*arguments: object) -> None:
        checkpoint(publisher, "meanwhile", dead)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(repack, "run", run)
    target.collect(repack=0.25)
    check_all(target, {**kept, "meanwhile": dead})
    publisher.close()


def test_readers_follow(target: store.Store) -> None:
    """A reader that has an image open, with and without open files and cached leaves, goes on reading."""
    kept = half_dead(target, 1)
    data = kept["kept0"]
    image = target.manifest("web", "kept0").disks[0].image
    others = [store.Store.open(target.path) for _ in range(3)]
    warm, opened, leafed = (other.image(image, cache=0) for other in others)
    assert warm.read(0, CHUNK) == data[:CHUNK]
    leafed.entries(0)
    others[2]._backend.close()
    for threshold in (0.25, ALL):  # the second time from what the first one made
        assert target.collect(repack=threshold).repacked_packs
        for reader in (warm, opened, leafed):
            assert reader.read(0, len(data)) == data
    for other in others:
        held = [file for file in open_files() if file.startswith(str(target.path)) and "(deleted)" in file]
        assert not held, "deleted packs take no room"
        other.close()


def open_files() -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208  (a descriptor may go meanwhile)
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
    return [path for path in found if ".pack" in path]


def test_a_reader_of_what_is_really_gone(target: store.Store) -> None:
    """S3: an error, not an endless search: the pack is missing, or the whole image."""
    image = checkpoint(target, "one", os.urandom(3 * CHUNK))
    reader = target.image(image)
    (pack,) = packs_of(target)
    target.packs.delete(pack)
    with pytest.raises(errors.CorruptError, match="missing from the store"):
        reader.read(0, CHUNK)
    target._backend.delete(layout.image_key(image))
    with pytest.raises(errors.CorruptError, match="missing from the store"):
        reader.read(0, CHUNK)


def test_verify_begins_anew_when_packs_move(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection between two of its passes, or between leaves of one: no false alarm, and everything is checked."""
    kept = half_dead(target)
    other = store.Store.open(target.path)
    for name in ("_check_packs", "_read_image"):
        real, left = getattr(check, name), 2

        def meanwhile(*arguments: object, real: Callable[..., object] = real) -> object:
            nonlocal left
            left -= 1
            if left >= 0:
                other.collect(repack=ALL)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(check, name, meanwhile)
            report = check.verify(target)
        assert report.ok, report.problems
        assert report.images == 2
        assert report.chunks >= 12
    assert other.collect().live_images == len(kept)
    other.close()


def test_readers_while_it_repacks(target: store.Store) -> None:
    """Threads read all the time, another verifies, while checkpoints come and go and packs are rewritten."""
    kept = half_dead(target)
    stop, problems = threading.Event(), []

    def read() -> None:
        with store.Store.open(target.path) as mine:
            readers = {name: mine.image(mine.manifest("web", name).disks[0].image, cache=0) for name in kept}
            while not stop.is_set():
                for name, reader in readers.items():
                    if reader.read(0, reader.size) != kept[name]:
                        problems.append(name)

    def verify() -> None:
        with store.Store.open(target.path) as mine:
            while not stop.is_set():
                problems.extend(map(str, check.verify(mine, "web", "kept0").problems))

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, verify)]
    for thread in threads:
        thread.start()
    moved = 0
    for number in range(4):
        extra = random.Random(number + 100).randbytes(12 * CHUNK)
        image = put(target, extra + kept["kept0"][:CHUNK])
        publish(target, f"extra{number}", image.image, image.size)
        target.remove("web", f"extra{number}")
        half_dead_again(target, number, kept)
        moved += target.collect(repack=ALL).repacked_packs
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not problems, problems[:3]
    assert moved >= 4
    check_all(target, kept)


def half_dead_again(target: store.Store, number: int, kept: dict[str, bytes]) -> None:
    """Publish *kept* anew with ballast in its pack, and take the ballast away again."""
    live = random.Random(1000 + number).randbytes(3 * CHUNK)
    image = put(target, live + random.Random(2000 + number).randbytes(6 * CHUNK))
    publish(target, f"ballast{number}", image.image, image.size)
    checkpoint(target, f"more{number}", live)
    target.remove("web", f"ballast{number}")


def test_a_damaged_victim_is_left(target: store.Store) -> None:
    """S3: nothing that fails its hash is copied; the pack stays, is told, and the others are rewritten."""
    kept = half_dead(target)
    image = target.image(target.manifest("web", "kept0").disks[0].image)
    entry = image.entry(2)
    path = target.path / layout.pack_key(entry.pack)
    with path.open("r+b") as file:
        file.seek(entry.offset + 5)
        file.write(b"\xff\x00\xff\x00")
    report = target.collect(repack=0.25)
    assert report.repacked_packs == 1
    assert len(report.damaged) == 1
    assert f"{entry.pack:016x}" in report.damaged[0]
    assert path.exists()
    assert whole(target, target.manifest("web", "kept1").disks[0].image) == kept["kept1"]
    assert image.read(0, 2 * CHUNK) == kept["kept0"][: 2 * CHUNK]
    assert target.collect(repack=0.25).repacked_packs == 0


def test_rounds_are_bounded(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one pack a round: every victim is rewritten once, and space is freed after each."""
    monkeypatch.setattr(repack, "ROUND_BYTES", 1)
    kept = half_dead(target, 4)
    rounds: list[int] = []
    real = repack.run

    def run(*arguments: object) -> None:
        rounds.append(size_of(target))
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(repack, "run", run)
    assert target.collect(repack=0.25).repacked_packs == 4
    assert len(rounds) == 4
    assert sorted(rounds, reverse=True) == rounds
    assert rounds[0] > rounds[-1]
    check_all(target, kept)


def test_small_packs(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images over many packs, victims among packs that stay."""
    monkeypatch.setattr(layout, "MAX_PACK", 200_000)
    chance = random.Random(5)
    pool = [chance.randbytes(CHUNK) for _ in range(40)]
    kept: dict[str, bytes] = {}
    for number in range(12):
        data = b"".join(chance.choice(pool) if chance.random() < 0.7 else chance.randbytes(CHUNK) for _ in range(20))
        checkpoint(target, f"c{number}", data)
        kept[f"c{number}"] = data
        if number % 3 == 2:
            for name in chance.sample(sorted(kept), 2):
                target.remove("web", name)
                del kept[name]
            target.collect(repack=chance.choice((0, 0.2, 0.6)))
            check_all(target, kept)


class Killed(Exception):  # noqa: N818
    """Stands for kill -9 in the parent."""


STEPS = ("fsync", "replace", "unlink", "pwrite", "write", "link")
"""System calls after and before which a collection is killed."""


def killed_at(path: Path, step: int) -> bool:
    """Collect in a child that kills itself before its *step*-th system call that changes the disk; was it so?"""
    child = os.fork()
    if not child:
        left = step

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*arguments, **options)

            return call

        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            with store.Store.open(path) as mine:
                mine.collect(repack=0.25)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_every_step(target: store.Store, tmp_path: Path) -> None:
    """S1, S2, S5: kill -9 before every call that changes the disk; all is whole, and the next run finishes."""
    kept = half_dead(target)
    target.close()
    place = tmp_path / "copy"
    step = repacked = 0
    while True:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(target.path, place)
        killed = killed_at(place, step)
        with store.Store.open(place) as found:
            check_all(found, kept)
            report = found.collect(repack=0.25)
            repacked += report.repacked_packs
            assert report.dead_bytes < 1024
            check_all(found, kept)
            assert len(list(found.image_ids())) == 2
            assert put(found, kept["kept0"]).image
        if not killed:
            break
        step += 1
    assert step > 25, "the child was killed in the middle, not before or after"
    assert repacked > 10


def test_interrupted_by_the_user(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves no temporary file and a whole store."""
    kept = half_dead(target)
    real = durable.publish

    def publish_(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "publish", publish_)
    with pytest.raises(KeyboardInterrupt):
        target.collect(repack=0.25)
    monkeypatch.setattr(durable, "publish", real)
    assert list(target.path.glob("tmp/*")) == []
    check_all(target, kept)
    assert target.collect(repack=0.25).repacked_packs == 2


def test_one_collection_at_a_time(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one, that would take the new packs for garbage, is told to wait."""
    kept = half_dead(target)
    other = store.Store.open(target.path)
    refused: list[str] = []
    real = repack._replace_tables

    def replace(*arguments: object) -> int:
        with pytest.raises(errors.StateError) as caught:
            other.collect(timeout=0)
        refused.append(str(caught.value))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(repack, "_replace_tables", replace)
    target.collect(repack=0.25)
    assert "another collection" in refused[0]
    other.collect()
    check_all(target, kept)
    other.close()


def collecting(place: store.Store, real: Callable[..., object]) -> Callable[..., object]:
    """*real*, before whose first two calls every pack is rewritten."""
    left = 2

    def meanwhile(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            place.collect(repack=ALL)
        return real(*arguments)

    return meanwhile


def test_an_accounting_begins_anew_when_packs_move(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    half_dead(target)
    with store.Store.open(target.path) as other, monkeypatch.context() as patch:
        patch.setattr(usage._Table, "_leaf", collecting(other, usage._Table._leaf))
        report = usage.measure(target)
    assert report.damaged == () and report == usage.measure(target)


def test_an_accounting_of_what_is_really_gone(target: store.Store) -> None:
    checkpoint(target, "one", os.urandom(3 * CHUNK))
    for pack in packs_of(target):
        target.packs.delete(pack)
    assert "missing from the store" in usage.measure(target).damaged[0]

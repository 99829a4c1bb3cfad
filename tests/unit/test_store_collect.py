"""Collection and concurrency: nothing needed is ever deleted, whoever dies or writes meanwhile (rules S1, S2, S5)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkckpt import durable, errors
from blkckpt.store import check, images, layout, lock, manifest, store

CHUNK = layout.CHUNK
FORK = multiprocessing.get_context("spawn")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store.init(tmp_path / "store") as opened:
        yield opened


def put(target: store.Store, data: bytes, parent: str | None = None) -> images.ImageInfo:
    with target.image_writer(len(data), parent=parent) as out:
        out.write(0, data)
        return out.finish()


def publish(target: store.Store, name: str, image: str, size: int, vm: str = "web") -> None:
    disk = manifest.DiskImage("vda", image, size)
    target.put_manifest(manifest.Manifest(vm, name, "0" * 32, time.time_ns(), (disk,)))


def checkpoint(target: store.Store, name: str, data: bytes, vm: str = "web") -> str:
    image = put(target, data).image
    publish(target, name, image, len(data), vm)
    return image


def whole(target: store.Store, image: str) -> bytes:
    reader = target.image(image)
    return reader.read(0, reader.size)


def packs_of(target: store.Store) -> set[int]:
    return {pack for pack, _ in target.packs.ids()}


def test_only_what_nothing_needs_is_deleted(target: store.Store) -> None:
    """Rule S5: shared chunks stay as long as one checkpoint has them."""
    shared, own = os.urandom(10 * CHUNK), os.urandom(10 * CHUNK)
    first = checkpoint(target, "one", shared + own)
    second = checkpoint(target, "two", shared)
    third = checkpoint(target, "three", os.urandom(4 * CHUNK))
    dry = target.collect(dry_run=True)
    assert (dry.images, dry.packs, dry.freed_bytes) == (0, 0, 0)
    assert dry.dead_bytes == sum(size for _, size in target.packs.ids()) - dry.live_bytes
    target.remove("web", "one")
    target.remove("web", "three")
    before = packs_of(target)
    dry = target.collect(dry_run=True)
    assert packs_of(target) == before, "a dry run deletes nothing"
    report = target.collect()
    assert (report.images, report.packs) == (dry.images, dry.packs) == (2, 1)
    assert report.freed_bytes == dry.freed_bytes
    assert report.dead_bytes > 10 * CHUNK, "what the first one had alone lies dead in a pack that lives"
    assert whole(target, second) == shared
    for image in (first, third):
        with pytest.raises(errors.NotFoundError):
            target.image(image)
    target.remove("web", "two")
    target.collect()
    assert packs_of(target) == set()
    assert checkpoint(target, "four", shared) and whole(target, target.manifest("web", "four").disks[0].image) == shared


def test_collected_chunks_are_not_found_again(target: store.Store) -> None:
    """The index forgets the packs that are deleted, in this process and in another that has it open."""
    data = os.urandom(8 * CHUNK)
    other = store.Store.open(target.path)
    checkpoint(other, "zero", os.urandom(CHUNK))
    checkpoint(target, "one", data)
    assert put(other, data).new_chunks == 0
    other.abandon()
    target.remove("web", "one")
    target.collect()
    for user in (target, other):
        info = put(user, data)
        assert info.new_chunks in (8, 0)
        assert whole(user, info.image) == data
    other.close()


def test_pins_keep_images(target: store.Store) -> None:
    image = checkpoint(target, "one", os.urandom(CHUNK))
    target.pin("vm-restored", [image])
    assert target.pins() == {"vm-restored": [image]}
    target.remove("web", "one")
    assert target.collect().images == 0
    assert len(whole(target, image)) == CHUNK
    target.unpin("vm-restored")
    target.unpin("vm-restored")
    assert target.collect().images == 1
    with pytest.raises(errors.NotFoundError):
        target.pin("x", [image])


def test_an_unpublished_image_is_kept_by_its_process(target: store.Store) -> None:
    """Writers hold the store until the manifest, or until they give up."""
    data = os.urandom(CHUNK)
    image = put(target, data).image
    other = store.Store.open(target.path)
    with pytest.raises(errors.StateError, match="being written"):
        other.collect(timeout=0.1)
    with pytest.raises(errors.StateError, match="this process"):
        target.collect()
    publish(target, "one", image, CHUNK)
    assert other.collect().images == 0
    assert put(target, data).image
    target.abandon()
    assert other.collect().images == 1
    with target.hold(), pytest.raises(errors.StateError):
        other.collect(timeout=0)
    other.close()


def test_a_collection_keeps_writers_waiting(target: store.Store) -> None:
    held = lock.exclusive(target.path / "lock")
    with pytest.raises(errors.StateError, match="collection is running"):
        lock.shared(target.path / "lock", timeout=0.1)
    threading.Timer(0.3, held.release).start()
    began = time.monotonic()
    put(target, b"x")
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("victim", ["manifests/*/*.json", "images/*/{image}.image", "pins/*.json"])
def test_what_cannot_be_read_stops_the_collection(target: store.Store, victim: str) -> None:
    image = checkpoint(target, "one", os.urandom(CHUNK))
    checkpoint(target, "two", os.urandom(CHUNK))
    target.pin("vm", [image])
    put(target, os.urandom(CHUNK))
    target.abandon()
    (path, *_) = target.path.glob(victim.format(image=image))  # one that is needed: the third image is not
    path.write_bytes(path.read_bytes()[:-1])
    target._backend.close()
    before = packs_of(target)
    with pytest.raises(errors.CorruptError):
        target.collect()
    assert packs_of(target) == before
    assert len(list(target.image_ids())) == 3


def test_an_interrupted_collection_is_repeated(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule S5: stopped after any deletion, everything needed is whole, and the next run finishes."""
    keep = os.urandom(3 * CHUNK)
    kept = checkpoint(target, "keep", keep)
    real = durable.remove
    for stop_after in range(6):
        for name in ("a", "b"):
            checkpoint(target, name, os.urandom(2 * CHUNK) + keep)
            target.remove("web", name)
        left = stop_after

        def remove(path: Path) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            real(path)

        monkeypatch.setattr(durable, "remove", remove)
        with contextlib.suppress(KeyboardInterrupt):
            target.collect()
        monkeypatch.setattr(durable, "remove", real)
        for image in target.image_ids():
            assert whole(target, image)[-3 * CHUNK :] == keep, "an image that is there has all its packs"
        target.collect()
        assert list(target.image_ids()) == [kept]
        assert len(packs_of(target)) == 1
        assert check.verify(target).ok


WRITER = """
import os, sys
from blkckpt.store import store
target = store.Store.open(sys.argv[1])
out = target.image_writer(1 << 30, workers=1)
for offset in range(0, 1 << 30, 1 << 20):
    out.write(offset, os.urandom(1 << 20))
    if offset == 24 << 20:
        sys.stdout.write("writing\\n"); sys.stdout.flush()
        sys.stdin.readline()
"""


def test_a_killed_writer_leaves_only_residue(target: store.Store) -> None:
    """Rule S5: kill -9 half-way; collect removes what is left and nothing else.  While it lives, it is safe."""
    data = os.urandom(4 * CHUNK)
    image = checkpoint(target, "one", data)
    for number in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout
        assert child.stdin
        assert child.stdout.readline() == b"writing\n"
        with pytest.raises(errors.StateError):
            target.collect(timeout=0.1)
        assert target._backend.sweep(dry_run=True)[0] == number, "the temporary pack of the living one is locked"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
    assert len(list(target.path.glob("tmp/*"))) == 3
    report = target.collect()
    assert report.temporaries == 3
    assert report.freed_bytes > 8 << 20
    assert list(target.path.glob("tmp/*")) == []
    assert whole(target, image) == data
    assert check.verify(target).ok


def _write_many(path: str, seed: int, count: int) -> None:
    """A process: checkpoints of data that overlaps with the other processes'."""
    chance = random.Random(seed)
    with store.Store.open(path) as target:
        for number in range(count):
            data = b"".join(random.Random(chance.randrange(60)).randbytes(CHUNK) for _ in range(40))
            checkpoint(target, f"c{seed}-{number}", data, f"vm{seed}")
            image = target.manifest(f"vm{seed}", f"c{seed}-{number}").disks[0].image
            if whole(target, image) != data:
                raise SystemExit(3)
            if number and chance.random() < 0.6:
                target.remove(f"vm{seed}", f"c{seed}-{number - 1}")


def _collect_often(path: str, stop: object) -> None:
    with store.Store.open(path) as target:
        while not stop.is_set():  # type: ignore[attr-defined]
            try:
                target.collect(timeout=0.5)
            except errors.StateError:
                continue


def _run(jobs: list[tuple[Callable[..., None], tuple[object, ...]]]) -> list[int | None]:
    processes = [FORK.Process(target=work, args=arguments) for work, arguments in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_writers_and_a_collector_in_processes(target: store.Store) -> None:
    """Several processes write overlapping data and remove it again while another collects all the time."""
    stop = FORK.Event()
    collector = FORK.Process(target=_collect_often, args=(str(target.path), stop))
    collector.start()
    try:
        codes = _run([(_write_many, (str(target.path), seed, 12)) for seed in range(3)])
    finally:
        stop.set()
        collector.join(30)
    assert codes == [0, 0, 0]
    assert collector.exitcode == 0
    report = check.verify(target)
    assert report.ok, report.problems
    assert report.checkpoints == len(target.names()) > 0
    target.collect()
    for vm, name in target.names():
        assert len(whole(target, target.manifest(vm, name).disks[0].image)) == 40 * CHUNK


def test_two_processes_make_one_checkpoint_once(target: store.Store) -> None:
    """put_manifest is exclusive: of several, one wins and the others are told."""
    image = put(target, b"x" * 100).image
    results: list[str] = []

    def attempt() -> None:
        with store.Store.open(target.path) as opened:
            try:
                publish(opened, "one", image, 100)
                results.append("done")
            except errors.StateError:
                results.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["done", *["refused"] * 5]


def test_a_reader_takes_no_lock(target: store.Store) -> None:
    data = os.urandom(20 * CHUNK)
    image = checkpoint(target, "one", data)
    with lock.exclusive(target.path / "lock"):
        assert whole(target, image) == data
        assert check.verify(target).ok


def test_modes_of_files_and_directories(target: store.Store) -> None:
    old = os.umask(0)
    try:
        image = checkpoint(target, "one", os.urandom(CHUNK))
        target.pin("vm", [image])
    finally:
        os.umask(old)
    for path in target.path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_full_disk_leaves_the_store_whole(target: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC at every call that may meet it, one after the other: an error by class, and no residue."""
    data = os.urandom(2 * CHUNK)
    image = checkpoint(target, "one", data)
    for name in ("pwrite", "write", "fsync"):
        real = getattr(os, name)
        for skip in range(4):
            left = skip

            def full(*arguments: object, real: Callable[..., int] = real) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(28, os.strerror(28))
                return real(*arguments)

            monkeypatch.setattr(os, name, full)
            try:
                checkpoint(target, "two", os.urandom(3 * CHUNK))
            except errors.NoSpaceError:
                pass
            except FileExistsError:
                pytest.fail("an error without a class")
            finally:
                monkeypatch.setattr(os, name, real)
            target.abandon()
            if ("web", "two") in target.names():
                target.remove("web", "two")
            target.collect()
            assert check.verify(target).ok
            assert list(target.path.rglob("*.part")) == list(target.path.rglob(".tmp-*")) == []
    assert whole(target, image) == data


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB (also a file system of another kind: O_DIRECT may not be there)."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_file_system_that_is_really_full(small: Path) -> None:
    data = os.urandom(8 << 20)
    with store.Store.init(small / "store") as target:
        image = checkpoint(target, "one", data)
        for _ in range(2):
            with pytest.raises(errors.NoSpaceError):
                checkpoint(target, "two", os.urandom(12 << 20))
            target.abandon()
        assert list((small / "store" / "tmp").iterdir()) == []
        target.collect()
        assert whole(target, image) == data
        assert check.verify(target).ok
        assert checkpoint(target, "three", data[: 4 << 20]), "what is known needs no room"

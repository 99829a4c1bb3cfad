"""The mount of checkpoints that need no guest: bytes, holes, names, what is removed, damaged, killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import paths
from blkckpt.store import images, layout, manifest, store
from tests.support import checkpoints, guest, mounted

CHUNK = layout.CHUNK
SIZE = 9 * CHUNK * layout.LEAF // 8 + 12345  # more than a leaf, and an odd end


def pattern(seed: int, size: int = SIZE) -> bytes:
    """Runs of chunks that are random, text, or zeros; the last byte is not zero."""
    source = random.Random(seed)
    parts = []
    left = size
    while left > 0:
        length = min(source.choice((1, 2, 5, 40)) * CHUNK, left)
        kind = source.randrange(3)
        parts.append(
            source.randbytes(length)
            if kind == 0
            else (b"checkpoint\n" * length)[:length]
            if kind == 1
            else bytes(length)
        )
        left -= length
    return b"".join(parts)[:-1] + b"x"


@pytest.fixture(scope="module")
def home(box: guest.Sandbox) -> paths.Home:
    return paths.home(box.home)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small disk with two partitions."""
    disk = tmp_path_factory.mktemp("table") / "disk"
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["sfdisk", "-q", disk], input="label: gpt\nsize=2M\nsize=3M\n", text=True, check=True)
    with disk.open("r+b") as file:
        file.seek(1 << 20)
        file.write(random.Random(5).randbytes(2 << 20))
    return disk.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def first(home: paths.Home, table: bytes) -> None:
    checkpoints.checkpoint(home, "one", {"vda": pattern(1), "vdb": table}, timings={"stop": 0.004})
    checkpoints.checkpoint(home, "two", {"vda": pattern(2), "vdb": table}, number=2)


def test_bytes_and_holes(view: Path) -> None:
    wanted = pattern(1)
    disk = view / "web/one/disks/vda.img"
    assert disk.read_bytes() == wanted
    filled = [wanted[at : at + CHUNK].count(0) != len(wanted[at : at + CHUNK]) for at in range(0, SIZE, CHUNK)]
    runs = mounted.extents(disk)
    assert runs and all(low % CHUNK == 0 for low, _ in runs)
    told = [any(low <= at < high for low, high in runs) for at in range(0, SIZE, CHUNK)]
    assert told == filled
    used = sum(min(CHUNK, SIZE - at) for at, full in zip(range(0, SIZE, CHUNK), filled, strict=True) if full)
    assert disk.stat().st_blocks == -(-used // 512)
    assert disk.stat().st_size == SIZE


def test_what_is_used_is_counted_where_nothing_says_it(home: paths.Home, view: Path) -> None:
    """A manifest and a table from before they recorded it: the file's size in blocks is the same."""
    made = checkpoints.checkpoint(home, "one", {"vda": pattern(1)}, vm="older")
    with store.Store.open(home.store) as place:
        image = made.disks[0].image
        table = dataclasses.replace(images.load_table(place.packs, image), used=None)
        place.packs.backend.put(layout.image_key(image), layout.encode_table(table, place.packs.codec.digest))
        assert place.manifest("older", "one").disks[0].used is not None
        place.packs.backend.put("manifests/older/one.json", manifest.encode(made.counted({image: None})))
    old, new = (view / vm / "one/disks/vda.img" for vm in ("older", "web"))
    assert 0 < old.stat().st_blocks == new.stat().st_blocks < SIZE // 512


def test_others_read_it(view: Path, tmp_path: Path, table: bytes) -> None:
    raw, disk = tmp_path / "raw", view / "web/one/disks/vda.img"
    raw.write_bytes(pattern(1))
    mounted.run("cmp", raw, disk)
    mounted.run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, disk)
    mounted.run("cp", "--sparse=auto", disk, tmp_path / "copy")
    mounted.run("cmp", raw, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_blocks * 512 <= disk.stat().st_blocks * 512 + CHUNK
    for mode in ("read", "randread"):
        job = ["fio", "--name=j", f"--filename={disk}", f"--rw={mode}", "--bs=4k", "--readonly", "--size=4M"]
        report = mounted.run(*job, "--ioengine=psync", "--invalidate=1", "--output-format=json")
        assert json.loads(report[report.index("{") :])["jobs"][0]["error"] == 0


def test_partitions(view: Path, tmp_path: Path, table: bytes) -> None:
    (tmp_path / "vdb.img").write_bytes(table)
    disks = view / "web/one/disks"
    wanted = mounted.run("sfdisk", "-d", tmp_path / "vdb.img").replace(str(tmp_path), "")
    assert mounted.run("sfdisk", "-d", disks / "vdb.img").replace(str(disks), "") == wanted
    assert sorted(path.name for path in (disks / "vdb.partitions").iterdir()) == ["1.img", "2.img"]
    assert (disks / "vdb.partitions/1.img").read_bytes() == table[1 << 20 : 3 << 20]
    assert (disks / "vdb.partitions/2.img").read_bytes() == table[3 << 20 : 6 << 20]
    assert not (disks / "vda.partitions").exists()


def test_names(view: Path, home: paths.Home) -> None:
    vm = view / "web"
    assert (vm / "latest").readlink() == Path("two")
    assert [str(path.readlink()) for path in sorted((vm / "by-time").iterdir())] == ["../one", "../two"]
    assert sorted(path.name for path in (vm / "by-time").iterdir())[0] == "2023-11-14T22-14-20.000Z"
    assert (vm / "by-time/2023-11-14T22-14-20.000Z/manifest.json").read_bytes() == (
        vm / "one/manifest.json"
    ).read_bytes()
    assert (vm / "one/manifest.json").read_bytes() == (home.store / "manifests/web/one.json").read_bytes()
    assert (vm / "one/timings.json").read_text() == '{\n "stop": 0.004\n}\n'
    assert (vm / "one").stat().st_mtime_ns == 1_700_000_060 * 10**9
    for name in ("web/three", "web/..%2f", "nobody", "web/one/disks/vdc.img", "web/by-time/now"):
        assert not (view / name).exists()
    for name in ("web/one/disks/vda.img", "web/one/manifest.json"):
        with pytest.raises(OSError, match="Read-only"):
            (view / name).open("ab")
    assert (vm / "one").stat().st_mode & 0o777 == 0o500
    assert (vm / "one/disks/vda.img").stat().st_mode & 0o777 == 0o400


def test_tags(view: Path, home: paths.Home) -> None:
    """A tag leads to the newest checkpoint that has it, from the moment it is given to the moment it is taken."""
    tags = view / "web/by-tag"
    assert list(tags.iterdir()) == []
    with store.Store.open(home.store) as place:
        for name in ("one", "two"):
            place.relabel("web", name, lambda labels: labels.tag(["good"]))
        place.relabel("web", "one", lambda labels: labels.tag(["first"]))
        mounted.eventually((tags / "first").exists, "the tags", 10)
        assert {path.name: str(path.readlink()) for path in tags.iterdir()} == {"good": "../two", "first": "../one"}
        assert (tags / "first/manifest.json").exists()
        place.relabel("web", "two", lambda labels: labels.untag(["good"]))
        mounted.eventually(lambda: str((tags / "good").readlink()) == "../one", "the other", 10)
        place.relabel("web", "one", lambda labels: labels.untag(["good", "first"]))


def test_what_is_amended_is_seen(view: Path, home: paths.Home) -> None:
    before = (view / "web/two/manifest.json").read_bytes()
    with store.Store.open(home.store) as place:
        place.amend_manifest(dataclasses.replace(place.manifest("web", "two"), notes=("amended",)))
    after = mounted.eventually(
        lambda: (data := (view / "web/two/manifest.json").read_bytes()) != before and data, "the new manifest", 10
    )
    assert json.loads(after)["notes"] == ["amended"]


def test_open_stays_readable(view: Path, home: paths.Home) -> None:
    """V2, V3: a checkpoint appears, is opened, removed, its data collected; the open file reads on."""
    wanted = pattern(77)
    made = checkpoints.checkpoint(home, "gone", {"vda": wanted}, number=3)
    disk = view / "web/gone/disks/vda.img"
    mounted.eventually(disk.exists, "the new checkpoint", 10)
    with disk.open("rb", buffering=0) as file, store.Store.open(home.store) as place:
        assert os.pread(file.fileno(), 10, 0) == wanted[:10]
        assert [owner for owner, held in place.pins().items() if made.disks[0].image in held]
        place.remove("web", "gone")
        assert place.collect().images == 0
        mounted.eventually(lambda: not disk.exists(), "its name to go", 10)
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == wanted
    with store.Store.open(home.store) as place:
        mounted.eventually(lambda: not any(place.pins().values()), "the pin to go", 30)
        assert place.collect().images == 1


def test_a_name_used_again_shows_its_own_bytes(view: Path, home: paths.Home) -> None:
    """V1: two images under one path, one still open: each reader gets its own."""
    old, new = pattern(11, 5 * CHUNK), pattern(12, 5 * CHUNK)
    checkpoints.checkpoint(home, "again", {"vda": old}, number=4)
    disk = view / "web/again/disks/vda.img"
    mounted.eventually(disk.exists, "the checkpoint", 10)
    with disk.open("rb", buffering=0) as before:
        assert os.pread(before.fileno(), 5 * CHUNK, 0) == old
        with store.Store.open(home.store) as place:
            place.remove("web", "again")
        checkpoints.checkpoint(home, "again", {"vda": new}, number=5)
        mounted.eventually(lambda: disk.stat().st_mtime_ns == 1_700_000_300 * 10**9, "the new one", 10)
        assert disk.read_bytes() == new
        assert os.pread(before.fileno(), 5 * CHUNK, 0) == old
    assert disk.read_bytes() == new
    with store.Store.open(home.store) as place:
        place.remove("web", "again")


def test_parallel_readers(view: Path) -> None:
    wanted = {name: pattern(seed) for seed, name in ((1, "one"), (2, "two"))}

    def reader(number: int) -> int:
        source = random.Random(number)
        name = source.choice(("one", "two"))
        with (view / "web" / name / "disks/vda.img").open("rb", buffering=0) as file:
            for _ in range(60):
                offset, length = source.randrange(SIZE), source.choice((1, 4096, 70_000, 300_000))
                assert os.pread(file.fileno(), length, offset) == wanted[name][offset : offset + length]
        return number

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(reader, range(16))) == list(range(16))


def test_walks_while_checkpoints_come_and_go(view: Path, home: paths.Home, tmp_path: Path) -> None:
    """find, tar and rsync over it: what is there all the time is whole, what goes meanwhile is no surprise to them."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        number = 10
        try:
            while not stop.is_set():
                checkpoints.checkpoint(
                    home, f"c{number}", {"vda": pattern(number, 3 * CHUNK)}, vm="churn", number=number
                )
                with store.Store.open(home.store) as place:
                    if number >= 13:
                        place.remove("churn", f"c{number - 3}")
                    place.collect(timeout=30)
                number += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(3):
            listed = mounted.run("find", view / "web", "-type", "f").split()
            assert len(listed) == len(set(listed)) >= 8
            subprocess.run(["find", view, "-ls"], capture_output=True, check=False, timeout=60)
            mounted.run("tar", "-cSf", tmp_path / "web.tar", "-C", view, "web/one")
            mounted.run("rsync", "-a", "--delete", f"{view}/web/one/", tmp_path / "copy")
            code = subprocess.run(
                ["rsync", "-a", "--delete", f"{view}/churn/", tmp_path / "churn"], capture_output=True, timeout=60
            ).returncode
            assert code in (0, 23, 24)  # partial transfer: files vanished
    finally:
        stop.set()
        thread.join()
    assert not failures
    with tarfile.open(tmp_path / "web.tar") as archive:
        member = archive.extractfile("web/one/disks/vda.img")
        assert member is not None and member.read() == pattern(1)
    assert (tmp_path / "copy/disks/vda.img").read_bytes() == pattern(1)


@pytest.fixture
def damaged(home: paths.Home, tmp_path: Path) -> Iterator[tuple[Path, paths.Home, int]]:
    """A store with one disk of eight random chunks whose chunk 5 is about to be hurt: pack, home, place of chunk 5."""
    other = paths.home(tmp_path / "home")
    made = checkpoints.checkpoint(other, "hurt", {"vda": random.Random(3).randbytes(8 * CHUNK)})
    with store.Store.open(other.store) as place:
        entry = place.image(made.disks[0].image).entry(5)
        yield place.path / layout.pack_key(entry.pack), other, entry.offset


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_an_error_that_names_the_chunk(
    box: guest.Sandbox, damaged: tuple[Path, paths.Home, int], tmp_path: Path, how: str
) -> None:
    """V1: EIO and a line in the log, never a wrong byte; what is whole is still read."""
    pack, other, offset = damaged
    wanted = random.Random(3).randbytes(8 * CHUNK)
    directory = tmp_path / "view"
    directory.mkdir()
    with pack.open("r+b") as file:
        if how == "flipped":
            file.seek(offset + 1000)
            byte = file.read(1)[0]
            file.seek(offset + 1000)
            file.write(bytes([byte ^ 1]))
        elif how == "truncated":
            # the leaf lies behind the chunks: keep it readable by reading it first
            pass
    command = [sys.executable, "-m", "blkckpt.cli.main", "--home", str(other.root)]
    subprocess.run([*command, "mount", directory], check=True, capture_output=True, cwd=guest.ROOT)
    try:
        disk = directory / "web/hurt/disks/vda.img"
        with disk.open("rb", buffering=0) as file_:
            assert os.pread(file_.fileno(), 100, 0) == wanted[:100]
            if how == "truncated":
                os.truncate(pack, offset + 500)
            elif how == "missing":
                pack.unlink()
            if how != "missing":  # a pack that is open already stays readable
                os.posix_fadvise(file_.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with pytest.raises(OSError) as caught:
                    os.pread(file_.fileno(), 4096, 5 * CHUNK)
                assert caught.value.errno == errno.EIO
                assert os.pread(file_.fileno(), 4096, 4 * CHUNK) == wanted[4 * CHUNK : 4 * CHUNK + 4096]
        text = (other.root / "log/mount.log").read_text()
        assert how == "missing" or ("chunk 5" in text and pack.name.removesuffix(".pack") in text)
    finally:
        subprocess.run([*command, "umount", "--lazy", directory], check=True, capture_output=True, cwd=guest.ROOT)
        for place in (other.run, other.live):
            shutil.rmtree(place, ignore_errors=True)


def test_a_pack_that_is_gone(box: guest.Sandbox, damaged: tuple[Path, paths.Home, int], tmp_path: Path) -> None:
    """Everything is still listed; reading says EIO and names the pack."""
    pack, other, _ = damaged
    pack.unlink()
    directory = tmp_path / "view"
    directory.mkdir()
    command = [sys.executable, "-m", "blkckpt.cli.main", "--home", str(other.root)]
    subprocess.run([*command, "mount", directory], check=True, capture_output=True, cwd=guest.ROOT)
    try:
        assert "vda.img" in mounted.run("ls", "-l", directory / "web/hurt/disks")
        with pytest.raises(OSError) as caught:
            (directory / "web/hurt/disks/vda.img").read_bytes()
        assert caught.value.errno == errno.EIO
        assert pack.name.removesuffix(".pack") in (other.root / "log/mount.log").read_text()
    finally:
        subprocess.run([*command, "umount", directory], check=True, capture_output=True, cwd=guest.ROOT)
        for place in (other.run, other.live):
            shutil.rmtree(place, ignore_errors=True)


def is_mounted(directory: Path) -> bool:
    return f" {directory} " in Path("/proc/self/mountinfo").read_text()


def test_killed(box: guest.Sandbox, tmp_path: Path) -> None:
    """V6: fusermount3 takes the mount away by itself, if it looks after the kernel has noticed; else the next mount."""
    with mounted.mounted(box, tmp_path / "view") as directory:
        record = next(one for one in box.json("mount")["mounts"] if one["directory"] == str(directory))
        os.kill(record["pid"], signal.SIGKILL)
        mounted.eventually(lambda: is_dead(directory), "death")
        box.run("mount", directory)
        assert (directory / "web").is_dir()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor whose closing may fail."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.read(descriptor, 10)
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def is_dead(directory: Path) -> bool:
    """Whether nobody answers there; fusermount may take the mount away by itself (``auto_unmount``)."""
    try:
        directory.stat()
    except OSError as error:
        assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        return True
    return not is_mounted(directory)


@pytest.mark.parametrize("who", ["mount", "umount", "doctor"])
def test_killed_with_its_helper(box: guest.Sandbox, home: paths.Home, tmp_path: Path, who: str) -> None:
    """V6: what is left dead is cleared up by the next command, also with files open, and its pins with it."""
    with mounted.mounted(box, tmp_path / "view") as directory:
        record = next(one for one in box.json("mount")["mounts"] if one["directory"] == str(directory))
        with opened(directory / "web/one/disks/vda.img"):
            for child in Path(f"/proc/{record['pid']}/task/{record['pid']}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            os.kill(record["pid"], signal.SIGKILL)
            mounted.eventually(lambda: is_dead(directory), "death")
            if who == "doctor":
                findings = box.json("doctor")["findings"]
                assert any(str(directory) in one["found"] for one in findings)
            else:
                box.run(who, directory)
            assert is_mounted(directory) == (who == "mount")
        with store.Store.open(home.store) as place:
            assert f"view-{record['id']}" not in place.pins()


def test_busy(box: guest.Sandbox, tmp_path: Path) -> None:
    with (
        mounted.mounted(box, tmp_path / "view") as directory,
        (directory / "web/one/disks/vda.img").open("rb") as file,
    ):
        assert "--lazy" in box.run("umount", directory, code=5)
        box.run("umount", directory, "--lazy")
        assert not is_mounted(directory)
        assert file.read() == pattern(1)


def test_refusals(box: guest.Sandbox, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "not empty" in box.run("mount", tmp_path / "full", code=5)
    assert "make it first" in box.run("mount", tmp_path / "none", code=4)
    (tmp_path / "empty").mkdir()
    assert "allow_other" in box.run("mount", tmp_path / "empty", "-o", "rw", code=3)
    assert "nobody" in box.run("mount", tmp_path / "empty", "--vm", "nobody", code=4)
    assert "no checkpoints are mounted" in box.run("umount", tmp_path, code=4)


def test_one_vm_in_the_foreground(box: guest.Sandbox, tmp_path: Path) -> None:
    directory = tmp_path / "view"
    directory.mkdir()
    process = box.start("mount", directory, "--vm", "web", "--foreground", "--json")
    try:
        mounted.eventually(lambda: is_mounted(directory) and (directory / "web").exists(), "the mount")
        assert [path.name for path in directory.iterdir()] == ["web"]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert json.loads(output)["vm"] == "web"
        assert not is_mounted(directory)
    finally:
        process.kill()
        subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True, check=False)


NOBODY = """
mknod -m 666 {base}/fuse c 10 229
mount --bind {base}/fuse /dev/fuse
run() {{ setpriv --reuid 65534 --regid 65534 --clear-groups env -u XDG_RUNTIME_DIR BLKCKPT_HOME={base}/home "$@"; }}
run {python} -c "from blkckpt import paths; from tests.support import checkpoints as c
c.checkpoint(paths.home('{base}/home'), 'one', {{'vda': b'nobody' * 50000}})"
run {python} -m blkckpt.cli.main mount {base}/view
run sh -c 'stat -c %U:%a {base}/view/web/one/disks/vda.img; tail -c 6 {base}/view/web/one/disks/vda.img; echo'
cat {base}/view/web/one/disks/vda.img > /dev/null 2>&1 && echo open to others
run {python} -m blkckpt.cli.main umount {base}/view
rm -rf /tmp/blkckpt-65534
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without privileges then")
def test_without_privileges() -> None:
    """A user who may open /dev/fuse needs nothing else; not even root looks into the mount (V5)."""
    base = Path(f"/var/tmp/blkckpt-nobody-{os.getpid()}")
    for name in ("home", "view"):
        (base / name).mkdir(parents=True, mode=0o700)
        os.chown(base / name, 65534, 65534)
    base.chmod(0o755)
    try:
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", NOBODY.format(base=base, python=sys.executable)],
            capture_output=True, text=True, cwd=guest.ROOT, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "nobody:400\nnobody\n" in result.stdout, result.stdout + result.stderr
        assert "open to others" not in result.stdout
    finally:
        shutil.rmtree(base)

"""Checkpoints as files: reading through the mount beside lz4, a raw file and nbdfuse; listing; memory for QEMU.

Sequential.  The disk's data are files of this machine (``/usr``), compressed by us in the store and by ``lz4`` in one
file.  Cold: before each sample the page cache is dropped and the mount is new; ours is read through the mount, the
peer is ``lz4 -dc`` of its file into nothing.  Warm: the same file again, and the raw file, both from the page cache: no
process has a part in it.  ext4 caches a file that is read in order in large folios (64 KiB and more); the kernel gives
FUSE single pages, whoever serves them, and copies from those more slowly.  So there are two peers: the raw file as it
is cached, and the same bytes cached page by page (read so, without read-ahead), the most that FUSE could reach here.

Random.  4 KiB past the page cache (``O_DIRECT``), one at a time, from a disk that is in our chunk cache; the peer is
nbdfuse over ``nbdkit file`` with the same disk in the page cache.  Pinned to one processor each way alike: a hand-over
between processors costs more than either program does.

Listing.  ``ls -lR`` over a thousand checkpoints, each with a disk, memory and device state of its own, of a mount that
has seen none of them; the most memory that its process ever had.

Restore.  From the command to the guest's first line with its memory straight from compressed chunks, beside QEMU alone
reading its whole stream; the guest's data on the disk, the programs in memory (see the bench ``restore``).  The peer's
time is the guest's data by the disk's speed, ours is nearly all the start of programs and does not grow with the data;
so there are two guests of 2 GiB, and the one that is mostly full has the bar::

    fuse_restore_speedup         1.6 GiB of random data
    fuse_restore_speedup_640m    640 MiB of random data
    …_first                      of the same: the first restore of a checkpoint; later ones know what it touched
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import bench_restore, context, figures, guests, product, servers
from blkckpt import paths
from blkckpt.memory import skeleton
from blkckpt.store import layout, manifest, store
from tests.support import guest, ramstream

DESCRIPTION = "checkpoints as files: sequential, random, ls of 1,000, restore with memory from the mount"

OURS, LZ4, NBDFUSE = "blkckpt mount", "lz4 -dc", "nbdfuse, nbdkit file"
RAW, PAGED = "raw file", "raw file, cached page by page"
FUSE, FIRST, QEMU = "restore --memory fuse", "restore --memory fuse, the first", "qemu -incoming"
FULL = bench_restore.Size("full", 2048, 1638)
CHECKPOINTS = 1000
_READER = (
    "import os, sys, time\n"
    "descriptor = os.open(sys.argv[1], os.O_RDONLY); buffer = bytearray(1 << 20); began = time.monotonic()\n"
    "total = 0\n"
    "while count := os.readv(descriptor, [buffer]): total += count\n"
    "print(total / 1e6 / (time.monotonic() - began))\n"
)
_RANDOM_SIZE = 48 << 20


def run(context_: context.Context) -> list[figures.Figure]:
    if not Path("/proc/sys/vm/drop_caches").exists():
        raise context.BenchError("the page cache cannot be dropped here; run as root")
    found: list[figures.Figure] = []
    with product.sandbox(context_.directory) as box:
        raw = _usr(context_, context_.pick(256, 768) << 20)
        _store(box, raw)
        found += _sequential(context_, box, raw)
        found += _random(context_, box, raw)
    with product.sandbox(context_.directory) as box:
        found += _listing(context_, box)
    if guest.ready():
        found += _restore(context_)
    return found


@contextlib.contextmanager
def _mounted(box: guest.Sandbox, *words: str) -> Iterator[tuple[Path, int]]:
    """A new mount of *box*'s checkpoints, and the pid of its process."""
    directory = box.root / "view"
    directory.mkdir(exist_ok=True)
    pid = box.json("mount", directory, *words)["pid"]
    try:
        yield directory, pid
    finally:
        subprocess.run(["fusermount3", "-u", "-z", directory], check=False)


def _usr(context_: context.Context, size: int) -> Path:
    """*size* bytes of this machine's programs and libraries."""
    context_.say(f"{size >> 20} MiB of /usr as a disk")
    raw = context_.directory / "usr.raw"
    with raw.open("wb") as file:
        archive = subprocess.Popen(["tar", "-cf", "-", "/usr/lib", "/usr/bin", "/usr/share"], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        assert archive.stdout is not None
        left = size
        while left and (data := archive.stdout.read(min(4 << 20, left))):
            left -= file.write(data)
        archive.kill()
        archive.wait()
        file.truncate(size)
    subprocess.run(["lz4", "-q", "-f", raw, raw.with_suffix(".lz4")], check=True)
    return raw


def _image(
    place: store.Store, data: bytes | Path, kind: str, parent: str | None = None, size: int = 0, start: int = 0
) -> str:
    """An image of *data* at *start*, from *parent* on."""
    content = data.read_bytes() if isinstance(data, Path) else data
    with place.image_writer(size or len(content), kind=kind, parent=parent, workers=1) as writer:
        for offset in range(0, len(content), 4 << 20):
            writer.write(start + offset, content[offset : offset + (4 << 20)])
        return writer.finish().image


def _store(box: guest.Sandbox, raw: Path) -> None:
    with store.Store.open_or_init(paths.home(box.home).store) as place, place.hold():
        size = raw.stat().st_size
        small = raw.with_suffix(".small")
        with raw.open("rb") as file:
            small.write_bytes(file.read(_RANDOM_SIZE))
        disks = (
            manifest.DiskImage("vda", _image(place, raw, "disk"), size),
            manifest.DiskImage("vdb", _image(place, small, "disk"), _RANDOM_SIZE),
        )
        place.put_manifest(manifest.Manifest("usr", "c", "0" * 32, time.time_ns(), disks))


def _read(path: Path) -> float:
    """MB a second of reading *path* from one end to the other."""
    return float(subprocess.run(["python3", "-c", _READER, path], capture_output=True, text=True, check=True).stdout)


def _cached_by_pages(raw: Path) -> Path:
    """A copy of *raw* whose page cache consists of single pages, as that of FUSE's files does."""
    copy = raw.with_suffix(".paged")
    shutil.copyfile(raw, copy)
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, raw.stat().st_size, mmap.PAGESIZE):
            os.pread(descriptor, mmap.PAGESIZE, offset)
    finally:
        os.close(descriptor)
    return copy


def _sequential(context_: context.Context, box: guest.Sandbox, raw: Path) -> list[figures.Figure]:
    def ours() -> float:
        context.drop_caches()
        with _mounted(box) as (directory, _):
            return _read(directory / "usr/c/disks/vda.img")

    def lz4() -> float:
        context.drop_caches()
        began = time.monotonic()
        subprocess.run(["lz4", "-dc", raw.with_suffix(".lz4")], stdout=subprocess.DEVNULL, check=True)
        return raw.stat().st_size / 1e6 / (time.monotonic() - began)

    cold = context_.round_robin(context_.pick(3, 7), {OURS: ours, LZ4: lz4}, "MB/s")
    with _mounted(box) as (directory, _):
        paths_ = {OURS: directory / "usr/c/disks/vda.img", RAW: raw, PAGED: _cached_by_pages(raw)}
        for name in (OURS, RAW):
            context.warm(paths_[name])
        samplers = {name: lambda path=path: _read(path) for name, path in paths_.items()}  # type: ignore[misc]
        warm = context_.round_robin(context_.pick(5, 15), samplers, "MB/s")
        paths_[PAGED].unlink()
    return [
        figures.ratio("seqread_cold_vs_lz4", OURS, LZ4, cold, figures.at_least(0.5)),
        figures.ratio("seqread_warm_vs_raw", OURS, RAW, warm, figures.at_least(0.9)),
        figures.ratio("seqread_warm_vs_pages", OURS, PAGED, warm, figures.at_least(0.9)),
    ]


def _fio(path: Path, seconds: float) -> float:
    """4 KiB random reads a second past the page cache."""
    command = ["taskset", "-c", "0", "fio", "--output-format=json", "--name=j", f"--filename={path}", "--rw=randread",
               "--bs=4k", "--ioengine=psync", "--direct=1", "--readonly", "--time_based=1", f"--runtime={seconds}",
               "--ramp_time=0.5", "--norandommap"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode != 0:
        raise context.BenchError(f"fio failed: {result.stderr.strip()[-400:]}")
    return float(json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]["read"]["iops"])


def _pin(pid: int) -> None:
    """All threads of a process on the processor that fio has."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread.name), {0})


def _random(context_: context.Context, box: guest.Sandbox, raw: Path) -> list[figures.Figure]:
    seconds = context_.pick(3, 8)
    small = raw.with_suffix(".small")
    context.warm(small)
    mount = context_.directory / "nbdfuse"
    mount.mkdir(exist_ok=True)
    with _mounted(box) as (directory, pid), servers.nbdkit_file(small, context_.directory) as uri:
        disk = directory / "usr/c/disks/vdb.img"
        context.warm(disk)
        command = ["nbdfuse", "-r", str(mount / "disk"), uri]
        with context.process(command, log=context_.directory / "nbdfuse.log") as child:
            context.wait_for(lambda: (mount / "disk").exists(), "nbdfuse's file", 10, child)
            for each in (pid, child.pid):
                _pin(each)
            samplers = {OURS: lambda: _fio(disk, seconds), NBDFUSE: lambda: _fio(mount / "disk", seconds)}
            peers = context_.round_robin(context_.pick(2, 5), samplers, "IOPS")
            subprocess.run(["fusermount3", "-u", "-z", mount], check=False)
    return [figures.ratio("randread4k_vs_nbdfuse", OURS, NBDFUSE, peers, figures.at_least(0.8))]


# --- listing


def _skeleton(seed: int) -> bytes:
    """A memory skeleton with 120 KB of device state, like that of a small machine."""
    blocks = [("pc.ram", 64 << 20), ("pc.bios", 256 << 10)]
    state = random.Random(seed).randbytes(120_000)
    field = {"name": "state", "type": "buffer", "size": len(state)}
    described = {"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "version": 1, "fields": [field]}]}
    stream = ramstream.whole(blocks, [(1, 0, bytes(4096))], ramstream.tail(state, described))
    sink, parts = ramstream.parse(stream)
    assert sink.ram is not None
    return skeleton.encode(
        skeleton.Skeleton(
            parts.layout.section, 4096, parts.layout.blocks, parts.head, parts.live, parts.tail,
            {"pc.bios": bytes(256 << 10)},
        )
    )  # fmt: skip


def _thousand(box: guest.Sandbox) -> None:
    """A thousand checkpoints of one VM, each a few chunks different from the one before."""
    ram = 64 << 20
    machine = manifest.MachineInfo(("qemu-system-x86_64",), "pc-q35-7.2", "tcg", "7.2", ram)
    source = random.Random(1)
    with store.Store.open_or_init(paths.home(box.home).store) as place, place.hold():
        disk = _image(place, source.randbytes(8 << 20), "disk", size=256 << 20)
        memory = _image(place, source.randbytes(8 << 20), "memory", size=ram)
        for number in range(CHECKPOINTS):
            disk, memory = (
                _image(place, source.randbytes(2 * layout.CHUNK), kind, parent, size, start=1 << 20)
                for kind, parent, size in (("disk", disk, 256 << 20), ("memory", memory, ram))
            )
            skeleton_ = _skeleton(number)
            kept = manifest.MemoryImage(
                (manifest.RamBlock("pc.ram", ram, 4096, memory),), _image(place, skeleton_, "stream"), len(skeleton_)
            )
            place.put_manifest(
                manifest.Manifest(
                    "many", f"c{number:04}", f"{number:032x}", (1_700_000_000 + 60 * number) * 10**9,
                    (manifest.DiskImage("vda", disk, 256 << 20),), memory=kept, machine=machine,
                )
            )  # fmt: skip


def _listing(context_: context.Context, box: guest.Sandbox) -> list[figures.Figure]:
    context_.say(f"a store of {CHECKPOINTS} checkpoints")
    _thousand(box)
    seconds, megabytes = [], []
    for turn in range(context_.pick(3, 5)):
        with _mounted(box) as (directory, pid):
            began = time.monotonic()
            subprocess.run(["ls", "-lR", directory], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.monotonic() - began)
            status = Path(f"/proc/{pid}/status").read_text()
            megabytes.append(int(status.partition("VmHWM:")[2].split()[0]) / 1000)
        context_.say(f"  round {turn + 1} ls -lR: {seconds[-1]:.2f} s, {megabytes[-1]:.0f} MB")
    taken, most = figures.Samples(seconds, "s"), figures.Samples(megabytes, "MB")
    return [
        figures.Figure("ls1000_s", "s", taken.median, {"ls -lR": taken}, figures.at_most(2)),
        figures.Figure("ls1000_mb", "MB", most.median, {"the mount's process": most}, figures.at_most(150)),
    ]


# --- restore


def _restore(context_: context.Context) -> list[figures.Figure]:
    """As the bench ``restore`` does it, with other words."""
    words = ("--memory", "fuse")
    found: list[figures.Figure] = []
    with guests.serial(context_.directory) as serial, bench_restore.small(context_, serial, *words) as warm:
        for size, suffix, bar in ((FULL, "", figures.at_least(5)), (bench_restore.USUAL, "_640m", None)):
            with product.sandbox(context_.directory) as box:
                peers = _restored(context_, box, size, serial, warm, words)
            name = f"fuse_restore_speedup{suffix}"
            found += [
                figures.ratio(name, QEMU, FUSE, peers, bar), figures.ratio(f"{name}_first", QEMU, FIRST, peers, None)
            ]  # fmt: skip
    return found


def _restored(
    context_: context.Context,
    box: guest.Sandbox,
    size: bench_restore.Size,
    serial: guest.Serial,
    warm: Callable[[], None],
    words: tuple[str, ...],
) -> dict[str, figures.Samples]:
    context_.say(f"a checkpoint of a 2 GiB guest with {size.fill} MiB of random data, and its stream from QEMU alone")
    ours = bench_restore.Ours(box, size, *words)
    plain = bench_restore.Plain(context_, size, serial)
    touched = box.home / "touched"

    def again() -> float:
        if not touched.exists():
            ours.sample()
        return bench_restore.cold(ours, warm)

    def first() -> float:
        shutil.rmtree(touched, ignore_errors=True)
        return bench_restore.cold(ours, warm)

    samplers = {FUSE: again, FIRST: first, QEMU: lambda: bench_restore.cold(plain, warm)}
    peers = context_.round_robin(context_.pick(3, 7), samplers, "s")
    plain.stream.unlink()
    return peers

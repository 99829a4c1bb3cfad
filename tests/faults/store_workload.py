"""A random life of a store, run under the recorder: ``python -m tests.faults.store_workload STORE SEED STEPS``.

Checkpoints of two VMs with disks and memory, most of whose chunks are shared with earlier ones; writers that give
up; labels; removals; collections, most of which repack.  Packs are kept small, so that an image spans several.  What
each checkpoint must read back as follows from its number (:func:`images_of`), so that the log need not carry it.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from pathlib import Path

from blkckpt.store import layout, manifest, store
from tests.faults import recorder

mark = recorder.Marker()

CHUNKS = 13
POOL = 24
PACK = 200_000
"""Three incompressible chunks a pack."""


@functools.cache
def chunk(number: int) -> bytes:
    """Chunk *number* of the pool: zeros, compressible, or random."""
    if number == 0:
        return bytes(layout.CHUNK)
    rng = random.Random(number)
    return rng.randbytes(256) * (layout.CHUNK // 256) if number % 3 == 0 else rng.randbytes(layout.CHUNK)


@functools.cache
def image_of(number: int) -> bytes:
    """The content of image *number*: chunks of the pool, some of its own, and a short tail."""
    rng = random.Random(number)
    picks = [rng.randrange(POOL) if rng.random() < 0.8 else 1000 + number * 100 + n for n in range(CHUNKS)]
    return b"".join(map(chunk, picks)) + rng.randbytes(rng.choice((0, 512, 4096)))


def images_of(checkpoint: int) -> tuple[bytes, bytes, bytes]:
    """Disk, RAM and skeleton of checkpoint number *checkpoint*."""
    disk, ram, skeleton = (image_of(checkpoint * 3 + part) for part in range(3))
    return disk, ram, skeleton[:70_000]


def write_image(where: store.Store, content: bytes, kind: str, rng: random.Random, parent: str | None = None) -> str:
    with where.image_writer(len(content), kind=kind, parent=parent) as writer:
        offsets = list(range(0, len(content), layout.CHUNK))
        rng.shuffle(offsets)
        for offset in offsets:
            writer.write(offset, content[offset : offset + layout.CHUNK])
        return writer.finish().image


def take(where: store.Store, vm: str, number: int, rng: random.Random, parents: dict[int, str]) -> manifest.Manifest:
    """Write the images of checkpoint *number* and publish it."""
    disk, ram, skeleton = images_of(number)
    disk_id = write_image(where, disk, "disk", rng, parents.get(len(disk)))
    ram_id = write_image(where, ram, "memory", rng)
    skeleton_id = write_image(where, skeleton, "stream", rng)
    parents[len(disk)] = disk_id
    result = manifest.Manifest(
        vm=vm,
        name=f"c{number}",
        id=f"{number:032x}",
        created_ns=time.time_ns(),
        disks=(manifest.DiskImage("vda", disk_id, len(disk)),),
        memory=manifest.MemoryImage((manifest.RamBlock("pc.ram", len(ram), 4096, ram_id),), skeleton_id, len(skeleton)),
    )
    mark(put=number, vm=vm)
    where.put_manifest(result)
    mark(put_done=number, vm=vm, ack=True)
    return result


def main(path: str, seed: str, steps: str) -> None:
    layout.MAX_PACK = PACK
    rng = random.Random(int(seed))
    where = store.Store.init(Path(path))
    mark(init=True, ack=True)
    published: list[tuple[str, int]] = []
    parents: dict[int, str] = {}
    for number in range(int(seed) * 1000, int(seed) * 1000 + int(steps)):
        if published and rng.random() < 0.3:
            vm, gone = published.pop(rng.randrange(len(published)))
            mark(remove=gone, vm=vm)
            where.remove(vm, f"c{gone}")
            mark(remove_done=gone, vm=vm, ack=True)
        if rng.random() < 0.4:
            parents.clear()  # an image that nothing names goes with the collection
            mark(collect=True)
            where.collect(repack=rng.choice((None, 0.2, -1)))
            mark(collect_done=True, ack=True)
        if rng.random() < 0.2:
            with where.image_writer(CHUNKS * layout.CHUNK) as writer:
                writer.write(0, random.Random(number).randbytes(5 * layout.CHUNK))
        vm = rng.choice(("alpha", "beta"))
        take(where, vm, number, rng, parents)
        published.append((vm, number))
        tags = [f"t{number}", f"u{number}"]
        mark(tag=number, vm=vm)
        where.relabel(vm, f"c{number}", lambda now, tags=tags: now.tag(tags))  # type: ignore[misc]
        mark(tag_done=number, vm=vm, ack=True)
    where.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

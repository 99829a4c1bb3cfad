"""A long history: what a hundred checkpoints cost, and whether the hundredth is as quick to restore as the first.

At the level of the store, with made-up images: a disk and a memory of 256 MiB each (``--quick``: 128), of random
bytes, so that nothing is gained by compression.  Between two checkpoints 8 MiB of the disk and 16 MiB of the memory
change, in runs of 1 MiB that begin at any block of 4 KiB (as written files and their cached pages do); each image is
written with the one before as parent, every chunk compared.  Growth is what all files of the store take, tables and
manifests included.

Chunks are 64 KiB, so changes that are strewn about in 4 KiB blocks cost up to sixteen times themselves: shown without
a bar.

Then a checkpoint every five seconds of a real guest that writes (:mod:`often`).

Restoring is reading both images of a checkpoint with every hash checked, ahead as the disk of a guest does it, by a
store opened for it, with the page cache of the machine dropped before.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import context, figures, often, peers
from blkckpt.store import layout, manifest, store

DESCRIPTION = "a hundred checkpoints: growth by what changed, and the time to restore the first and the last"

MIB = 1 << 20
BLOCK = 4096
CHANGED = {"disk": 8 * MIB, "memory": 16 * MIB}
COUNT = 100
FIRST, LAST = "checkpoint 1", f"checkpoint {COUNT}"


class History:
    """A VM's images as they change, and its store."""

    def __init__(self, place: store.Store, size: int, seed: int) -> None:
        self._size = size
        self._place, self._random = place, random.Random(seed)
        self._now = {
            kind: bytearray(np.random.default_rng((seed, part)).bytes(size)) for part, kind in enumerate(CHANGED)
        }
        self._parents: dict[str, str] = {}

    def change(self, run: int) -> int:
        """Change each image in runs of *run* bytes; returns the bytes that are different now."""
        changed = 0
        for kind, amount in CHANGED.items():
            touched: set[int] = set()
            while len(touched) * BLOCK < amount:
                start = self._random.randrange((self._size - run) // BLOCK + 1)
                blocks = set(range(start, start + run // BLOCK))
                if touched.isdisjoint(blocks):
                    touched |= blocks
                    self._now[kind][start * BLOCK : start * BLOCK + run] = self._random.randbytes(run)
            changed += len(touched) * BLOCK
        return changed

    def take(self, number: int) -> None:
        """Checkpoint *number*."""
        done = {}
        for kind, data in self._now.items():
            with self._place.image_writer(self._size, parent=self._parents.get(kind), kind=kind) as out:
                for offset in range(0, self._size, 4 * MIB):
                    out.write(offset, memoryview(data)[offset : offset + 4 * MIB])
                self._parents[kind] = out.finish().image
            done[kind] = self._parents[kind]
        disks = tuple(manifest.DiskImage(kind, image, self._size) for kind, image in done.items())
        self._place.put_manifest(manifest.Manifest("web", f"c{number}", f"{number:032x}", time.time_ns(), disks))


def _growth(context_: context.Context, root: Path, run: int, count: int) -> float:
    """Take *count* checkpoints; the growth of the store after the first one by the bytes changed."""
    with store.Store.init(root) as place:
        history = History(place, context_.pick(128, 256) * MIB, run)
        history.take(1)
        place.index.close()
        before, changed = _files(root), 0
        for number in range(2, count + 1):
            changed += history.change(run)
            history.take(number)
            if number % 25 == 0:
                context_.say(f"  {number} checkpoints")
        place.index.close()
        return (_files(root) - before) / changed


def _files(root: Path) -> int:
    """What the store takes, without the index: that is a cache, which may be deleted."""
    return peers.disk_usage(root) - peers.disk_usage(root / "index")


def _restore(root: Path, name: str) -> float:
    context.drop_caches()
    began = time.monotonic()
    with store.Store.open(root) as place:
        for disk in place.manifest("web", name).disks:
            with contextlib.closing(place.image(disk.image, ahead=True)) as reader:
                for offset in range(0, reader.size, 4 * MIB):
                    reader.read(offset, 4 * MIB)
    return time.monotonic() - began


def run(context_: context.Context) -> list[figures.Figure]:
    root = context_.directory / "store"
    context_.say(f"{COUNT} checkpoints, {sum(CHANGED.values()) // MIB} MiB changed between each")
    growth = _growth(context_, root, MIB, COUNT)
    samplers: dict[str, Callable[[], float]] = {
        FIRST: lambda: _restore(root, "c1"), LAST: lambda: _restore(root, f"c{COUNT}"),
    }  # fmt: skip
    times = context_.round_robin(context_.pick(5, 11), samplers, "s")
    context.remove_tree(root)
    context_.say("the changes strewn about, one block of 4 KiB at a time")
    strewn = _growth(context_, context_.directory / "strewn", BLOCK, 3)
    once = {"growth ÷ changed": figures.Samples([growth], "x")}
    return [
        figures.Figure("growth_per_checkpoint", "x", growth, once, figures.at_most(1.5)),
        figures.Figure(
            "growth_strewn", "x", strewn,
            {f"of at most {layout.CHUNK // BLOCK + 1}": figures.Samples([strewn], "x")},
        ),
        figures.ratio("restore_100th_vs_1st", LAST, FIRST, times, figures.at_most(1.2)),
        *often.run(context_),
    ]  # fmt: skip

"""Is comparing cheap?  ``blkckpt diff`` of two 100 GiB images of which 1 % differs: no data is read.

The disk is one that was used: a quarter of it holds data, in some 1,600 runs of 1 to 32 MiB.  Of all its chunks 1 %
(1 GiB) differ: two thirds are single chunks scattered at random over what is used, as a file system's metadata and
random writes leave them, so that nearly every leaf that holds data differs; one third are runs of 1 to 16 MiB, half of
them where nothing was (new files).

Only the images' tables are made, with a hash of its own for every chunk; the 25 GiB of data that they name are nowhere,
so that a diff that read any would fail.

The whole command is timed, from the start of the interpreter to the printed table.
"""

from __future__ import annotations

import random
import secrets
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import context, figures
from blkckpt import paths
from blkckpt.store import codec, layout, manifest, packs, store

DESCRIPTION = "blkckpt diff of two 100 GiB sparse images with 1 % change, by their tables"

SIZE = 100 << 30
CHUNKS = SIZE // layout.CHUNK
CHANGED = CHUNKS // 100
VM = "bench"


def _used(chance: random.Random) -> np.ndarray:
    """Which chunks hold data: a quarter."""
    used = np.zeros(CHUNKS, np.bool_)
    while used.sum() < CHUNKS // 4:
        first = chance.randrange(CHUNKS)
        used[first : first + chance.randint(16, 512)] = True
    return used


def _changed(chance: random.Random, used: np.ndarray) -> np.ndarray:
    """Which chunks are written before the second checkpoint: 1 % of all."""
    changed = np.zeros(CHUNKS, np.bool_)
    changed[chance.sample(np.flatnonzero(used).tolist(), CHANGED * 2 // 3)] = True
    holes, full = np.flatnonzero(~used), np.flatnonzero(used)
    while changed.sum() < CHANGED:
        first = int(chance.choice(holes if chance.random() < 0.5 else full))
        changed[first : first + min(chance.randint(16, 256), CHANGED - int(changed.sum()))] = True
    return changed


def _table(place: store.Store, hashes: np.ndarray, used: np.ndarray) -> str:
    """An image of whose chunks the *used* ones have these hashes; its leaves are real, its data are nowhere."""
    entries = np.zeros(CHUNKS, layout.ENTRY_TYPE)
    entries["hash"][used] = hashes[used]
    entries["raw"][used] = layout.CHUNK
    entries["stored"][used] = 20_000 + hashes[used, 0] % 40_000
    entries["pack"][used] = np.arange(CHUNKS, dtype=np.uint64)[used] // 20_000 + 1
    entries["offset"][used] = 1000 + np.arange(CHUNKS, dtype=np.uint64)[used] % 20_000 * 20_056
    directory = np.zeros(layout.leaf_count(SIZE), layout.ENTRY_TYPE)
    writer = packs.PackWriter(place.packs)
    for number in range(len(directory)):
        data = entries[number * layout.LEAF : (number + 1) * layout.LEAF].tobytes()
        if any(data):
            digest = place.packs.codec.digest(data)
            (made,) = writer.append([packs.NewChunk(digest, codec.compress(data), len(data), layout.LEAF_KIND)])
            directory[number : number + 1] = np.frombuffer(layout.pack_entry(made), layout.ENTRY_TYPE)
    writer.seal()
    identity = secrets.token_hex(16)
    table = layout.Table(identity, SIZE, "disk", "", None, 0, directory.tobytes())
    place.packs.backend.put(layout.image_key(identity), layout.encode_table(table, place.packs.codec.digest))
    return identity


def _prepare(home: paths.Home) -> int:
    """Both checkpoints; returns the number of chunks that differ."""
    chance = random.Random(100)
    used = _used(chance)
    changed = _changed(chance, used)
    hashes = np.random.default_rng(100).integers(1, 1 << 63, (CHUNKS, 4), np.uint64)
    with store.Store.open_or_init(home.store) as place, place.hold():
        for number, name in enumerate(("old", "new"), 1):
            disk = manifest.DiskImage("vda", _table(place, hashes, used), SIZE)
            place.put_manifest(manifest.Manifest(VM, name, f"{number:032x}", number * 10**18, (disk,)))
            hashes[changed] += np.uint64(1)
            used |= changed
    return int(changed.sum())


def _diff(home: Path, expected: int) -> float:
    command = [
        sys.executable,
        "-m",
        "blkckpt.cli.main",
        "--home",
        str(home),
        "diff",
        f"{VM}@old",
        f"{VM}@new",
        "--json",
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    took = time.perf_counter() - began
    if done.returncode or f'"changed_bytes": {expected * layout.CHUNK},'.encode() not in done.stdout:
        raise context.BenchError(
            f"diff found something else: {done.stderr.decode()[:300]} {done.stdout.decode()[:300]}"
        )
    return took


def run(context_: context.Context) -> list[figures.Figure]:
    home = paths.home(context_.directory / "home")
    context_.say("making the tables of two images of 100 GiB (25 GiB in use, 1 GiB changed)")
    expected = _prepare(home)
    _diff(home.root, expected)
    found = context_.round_robin(context_.pick(5, 15), {"blkckpt diff": lambda: _diff(home.root, expected)}, "s")
    return [figures.Figure("diff100g_s", "s", found["blkckpt diff"].median, found, figures.at_most(1))]

"""A store that is filled by bundles, under the recorder: ``python -m tests.faults.bundle_workload STORE SEED STEPS``.

Another store, outside of what is recorded, takes the checkpoints of :mod:`tests.faults.store_workload`; they arrive
here in bundles of one or two, whole or against what is here, sometimes cut short first or twice.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path

from blkckpt import errors
from blkckpt.exchange import packing, unpacking
from blkckpt.store import layout, manifest, store
from tests.faults import recorder, store_workload

mark = recorder.Marker()


def take(near: store.Store, number: int, rng: random.Random, parents: dict[int, str]) -> manifest.Manifest:
    """A checkpoint of the other store, whose marks are nobody's business here."""
    store_workload.mark = lambda **fields: None  # type: ignore[assignment]
    return store_workload.take(near, "alpha", number, rng, parents)


def pack(near: store.Store, chosen: list[manifest.Manifest], have: list[str]) -> bytes:
    out = bytearray()
    bases = packing.choose_bases(near.manifests(), chosen, have)
    packing.pack(near, chosen, bases, out.extend, lambda done, total: None)
    return bytes(out)


def unpack(where: store.Store, data: bytes) -> None:
    unpacking.unpack(where, io.BytesIO(data).read, {}, lambda position: None)


def deliver(where: store.Store, data: bytes, numbers: list[int], rng: random.Random) -> None:
    """Unbundle, after a run that ended early now and then."""
    for number in numbers:
        mark(put=number, vm="alpha")
    if rng.random() < 0.4:
        with contextlib.suppress(errors.CorruptError):
            unpack(where, data[: rng.randrange(len(data))])
    unpack(where, data)
    for number in numbers:
        mark(put_done=number, vm="alpha", ack=True)
    if rng.random() < 0.3:
        unpack(where, data)


def main(path: str, seed: str, steps: str) -> None:
    layout.MAX_PACK = unpacking.MAX_HELD_PACK = store_workload.PACK
    unpacking.BATCH = 3
    rng = random.Random(int(seed))
    where = store.Store.init(Path(path))
    mark(init=True, ack=True)
    parents: dict[int, str] = {}
    here: list[int] = []
    with tempfile.TemporaryDirectory() as outside, store.Store.init(Path(outside) / "near") as near:
        number = int(seed) * 1000
        for _ in range(int(steps)):
            numbers = list(range(number, number + rng.choice((1, 1, 2))))
            number += len(numbers)
            chosen = [take(near, each, rng, parents) for each in numbers]
            deliver(where, pack(near, chosen, [one.id for one in where.manifests()]), numbers, rng)
            here += numbers
            if rng.random() < 0.4:
                gone = here.pop(rng.randrange(len(here)))
                mark(remove=gone, vm="alpha")
                where.remove("alpha", f"c{gone}")
                mark(remove_done=gone, vm="alpha", ack=True)
            if rng.random() < 0.3:
                where.collect()
    where.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

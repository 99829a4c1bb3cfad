"""4 KiB random reads and writes at queue depth 32 on an overlay, page cache warm.

Three states of an overlay are measured, because a server can be quick in one and slow in another:

``randread``       one block in 64 is in the overlay, so reads cross both layers, as some time after a checkpoint
``randwrite``      the overlay is new: (nearly) every write finds its block, and in qcow2 its 64 KiB cluster, not
                   yet there.  A fixed number of writes over a large disk, so that every server does the same work;
                   on a small one qcow2's clusters are all copied within a second and the rest is overwriting
``randoverwrite``  every block written is in the overlay already.  Kind to qcow2; context, nothing is demanded
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from benchmarks import context, figures, fio, product, servers

DESCRIPTION = "4 KiB random I/O at queue depth 32 on an overlay, over NBD, page cache warm"

OURS, QCOW2 = "blkckpt python", "qemu-nbd qcow2"

PEERS: dict[str, servers.Server] = {
    OURS: product.overlay_server,
    QCOW2: servers.qemu_qcow2,
    "qemu-nbd raw": servers.qemu_raw,
    "nbdkit file": servers.nbdkit_file,
    "nbdkit file + cow": servers.nbdkit_cow,
}
"""Ours and the bar's peer work on an overlay and take turns.  The others are context, measured after them in turns of
their own, fewer: they have no overlay, or one that is not durable."""

SIZE = 4 << 30
WRITES = 16384
HOT = 256 << 20
"""What ``randoverwrite`` works on."""


def _read(uri: str, context_: context.Context, seed: int) -> float:
    fio.counted(uri, "randwrite", SIZE, context_.directory, operations=WRITES, seed=7)
    seconds = context_.pick(2, 8)
    return fio.timed(uri, "randread", SIZE, context_.directory, seconds=seconds, seed=seed)


def _write(uri: str, context_: context.Context, seed: int) -> float:
    return fio.counted(uri, "randwrite", SIZE, context_.directory, operations=WRITES, seed=seed)


def _overwrite(uri: str, context_: context.Context, seed: int) -> float:
    fio.allocate(uri, HOT, context_.directory)
    seconds = context_.pick(2, 8)
    return fio.timed(uri, "randwrite", HOT, context_.directory, seconds=seconds, seed=seed)


WORK: dict[str, tuple[Callable[[str, context.Context, int], float], figures.Bar | None]] = {
    "randread": (_read, figures.at_least(1.0)),
    "randwrite": (_write, figures.at_least(1.5)),
    "randoverwrite": (_overwrite, None),
}


def _measure(context_: context.Context, base: Path, work: Callable[..., float]) -> dict[str, figures.Samples]:
    def sampler(name: str) -> Callable[[], float]:
        seeds = itertools.count(1)

        def sample() -> float:
            """A fresh server with an empty overlay, so that every sample starts from the same state."""
            context.warm(base)
            context.settle()
            with PEERS[name](base, context_.directory) as uri:
                return work(uri, context_, next(seeds))

        return sample

    measured = context_.round_robin(context_.pick(3, 7), {name: sampler(name) for name in (OURS, QCOW2)}, "IOPS")
    others = [name for name in PEERS if name not in measured]
    return {**measured, **context_.round_robin(context_.pick(1, 3), {name: sampler(name) for name in others}, "IOPS")}


def run(context_: context.Context) -> list[figures.Figure]:
    base = context_.directory / "base.raw"
    context_.say("making a 4 GiB base of random data")
    context.random_file(base, SIZE)
    found = []
    for name, (work, bar) in WORK.items():
        context_.say(f"{name}: {', '.join(PEERS)}")
        peers = _measure(context_, base, work)
        found.append(figures.ratio(f"{name}4k_python_vs_qcow2", OURS, QCOW2, peers, bar))
    return found

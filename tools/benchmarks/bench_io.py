"""Guest I/O over NBD beside nbdkit and QEMU: every state of a disk, page cache warm.

States, each sample from a server of its own:

``fresh``    a new and empty overlay on a base of 4 GiB; a fixed number of 4 KiB writes, none twice at one place: what
             a guest feels just after a checkpoint, and the same work for everybody (on a small disk qcow2's 64 KiB
             clusters are all copied within a second, and the rest is overwriting)
``mixed``    the same overlay after 16384 such writes: one block in 64 is in it, reads cross both layers
``warm``     an overlay that holds all that is read and written (nbdkit's file plugin has none, its null plugin not even
             a file: the ceiling)
``base``     no overlay
``deep``     the same data spread over three overlays
``filling``  a restored disk that still reads from its compressed image
``copy``, ``commit``  see :mod:`benchmarks.jobs`

The quick mode measures each state with the loads that have a bar; the full one also puts every load (:data:`WARM`,
:data:`MORE`) on every state, and writes from inside a guest (:mod:`benchmarks.inguest`).  Switch time and the memory of
maps by disk size: ``tools/bench scale``.

*Ours* is measured with the C fast path, where it is built, and without ("blkckpt python").  Figures that name no
variant are of the best there is.  Where a file was written or read ahead in large pieces, its page cache is in large
folios, and each small write costs 20 us more, for every server: so the warm data is written in blocks of 4 KiB, into
an empty page cache, for everybody.
"""

from __future__ import annotations

import functools
import itertools
import random
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import context, figures, fio, inguest, jobs, product, servers

DESCRIPTION = "guest I/O over NBD in every state of a disk, beside nbdkit and QEMU, page cache warm"

FAST, PYTHON = "blkckpt", "blkckpt python"
QCOW2, RAW, FILE, COW = "qemu-nbd qcow2", "qemu-nbd raw", "nbdkit file", "nbdkit file + cow"
NULL = "nbdkit null"

SIZE = 4 << 30
WRITES = 16384
QUICK_SECONDS, FULL_SECONDS = 1.0, 2.0
"""Of one cell."""

HOT = 128 << 20
"""What the warm state works on: all of it is in the overlay."""

READ, WRITE = fio.Cell("randread4k", "randread"), fio.Cell("randwrite4k", "randwrite")
SEQUENTIAL_READ = fio.Cell("read256k", "read", "256k", 8)
WARM = (
    READ,
    WRITE,
    fio.Cell("randread256k", "randread", "256k", 8),
    fio.Cell("randwrite256k", "randwrite", "256k", 8),
    fio.Cell("qd1_read4k", "randread", depth=1),
    fio.Cell("qd1_write4k", "randwrite", depth=1),
)
MORE = (
    SEQUENTIAL_READ,
    fio.Cell("write256k", "write", "256k", 8),
    fio.Cell("fsync16_write4k", "randwrite", options=("--fsync=16",)),
    fio.Cell("mixed70_4k", "randrw", options=("--rwmixread=70",)),
)

NOTES = f"""\
io: bars above the "ceiling".  It is {NULL}, which does nothing with a request, behind our own socket code.
A 4 KiB operation at depth 32 costs fio 9 to 11 us of processor, three quarters of it in the kernel (socket, wake-up,
copy), so that nothing behind this socket goes beyond some 100,000 a second: there fio alone fills one of the
processors.  A peer that takes p us for an operation is beaten by p/10 at most.  What the server costs a guest's
processors is in the figures named "…_cpu_us"; they do not depend on the client."""
"""From fio's own account (``usr_cpu``, ``sys_cpu``) and the server's ``/proc/PID/stat``; fio 3.33, nbdkit 1.32."""

Samples = Mapping[str, figures.Samples]
Serve = Callable[[Path, Path], AbstractContextManager[str]]


def _ours() -> dict[str, product.Server]:
    """Our variants; the best one first."""
    variants = {FAST: product.Server(fast=True)} if product.fast_path() else {}
    return {**variants, PYTHON: product.Server(fast=False)}


class Bench:
    """One run: the base, the variants, and what has been found."""

    def __init__(self, context_: context.Context) -> None:
        self.context = context_
        self.directory = context_.directory
        self.base = context_.directory / "base.raw"
        self.ours = _ours()
        self.best = next(iter(self.ours))
        self.found: list[figures.Figure] = []

    def ratio(
        self, name: str, over: str, under: str, peers: Samples, bar: figures.Bar | None, ceiling: str | None = None
    ) -> None:
        self.found.append(figures.ratio(name, over, under, peers, bar, ceiling))

    @property
    def seconds(self) -> float:
        return QUICK_SECONDS if self.context.quick else FULL_SECONDS

    def fresh(self, serve: Serve) -> AbstractContextManager[str]:
        context.warm(self.base)
        context.settle()
        return serve(self.base, self.directory)

    # ---- fresh and mixed ----

    def overlays(self) -> None:
        """First touches, then reads across both layers, of one overlay."""
        serves: dict[str, Serve] = {name: server.overlay for name, server in self.ours.items()}
        serves |= {QCOW2: servers.qemu_qcow2, COW: servers.nbdkit_cow}
        seeds = itertools.count(1)

        def sample(serve: Serve) -> dict[str, float]:
            with self.fresh(serve) as uri:
                seed = next(seeds)
                used = servers.processor_seconds(self.directory)
                first = fio.counted(uri, WRITE, SIZE, self.directory, operations=WRITES, seed=seed)
                used = servers.processor_seconds(self.directory) - used
                mixed, read_used = self._timed(uri, READ, SIZE, self.seconds, seed)
                return {"first": first, "first, us": used * 1e6 / WRITES, "mixed": mixed, "mixed, us": read_used}

        self.context.say(f"a new overlay: first writes, then reads across it: {', '.join(serves)}")
        samplers = {name: functools.partial(sample, serve) for name, serve in serves.items()}
        cells = self.context.cells(self.context.pick(3, 5), samplers, "IOPS")
        first, mixed = cells["first"], cells["mixed"]
        self.ratio("randread4k_python_vs_qcow2", PYTHON, QCOW2, mixed, figures.at_least(1.0))
        self.ratio("randwrite4k_python_vs_qcow2", PYTHON, QCOW2, first, figures.at_least(1.5))
        self.ratio("firstwrite4k_vs_qcow2", self.best, QCOW2, first, figures.at_least(2.5))
        self.ratio("firstwrite4k_vs_cow", self.best, COW, first, figures.at_least(2.5))
        self._processor("mixed_randread4k", PYTHON, cells["mixed, us"])
        self._processor("firstwrite4k", PYTHON, cells["first, us"])

    def _timed(self, uri: str, cell: fio.Cell, size: int, seconds: float, seed: int) -> tuple[float, float]:
        """Operations a second, and the server's processor time for each in us."""
        used = servers.processor_seconds(self.directory)
        rate = fio.timed(uri, cell, size, self.directory, seconds=seconds, seed=seed)
        used = servers.processor_seconds(self.directory) - used
        return rate, used * 1e6 / (rate * (seconds + float(fio.RAMP)))

    def _processor(self, cell: str, ours: str, peers: Samples) -> None:
        """Processor time an operation costs the server: what is left to the guest, and steady on a busy machine."""
        named = {name: figures.Samples(samples.values, "us") for name, samples in peers.items()}
        self.found.append(figures.Figure(f"{cell}_cpu_us", "us", named[ours].median, named))

    # ---- warm ----

    def warm(self) -> None:
        """Overwriting and reading what is in the overlay; a server that does nothing is the ceiling."""
        whole = [(0, HOT)]
        serves: dict[str, Serve] = {
            name: functools.partial(self._stacked, server, [whole]) for name, server in self.ours.items()
        }
        serves |= {QCOW2: servers.qemu_qcow2, COW: servers.nbdkit_cow, FILE: servers.nbdkit_file}
        nothing = functools.partial(servers.nbdkit_null, library=product.fast_path())
        cells = self._cells(
            "a warm overlay", serves | {NULL: nothing}, self.context.pick(2, 3), WARM, allocate=(QCOW2, COW, FILE)
        )
        best = self.best
        for kind, bars in (("randread4k", (1.2, 2.5, 0.85)), ("randwrite4k", (5, 5, 0.85))):
            for peer, label, bar in zip((COW, QCOW2, FILE), ("cow", "qcow2", "file"), bars, strict=True):
                self.ratio(f"{kind}_vs_{label}", best, peer, cells[kind], figures.at_least(bar), NULL)
        for kind, bar in (("randread256k", 0.9), ("randwrite256k", 0.9), ("qd1_read4k", 0.85), ("qd1_write4k", 0.85)):
            self.ratio(f"{kind}_vs_file", best, FILE, cells[kind], figures.at_least(bar))
        for name in ("randread4k", "randwrite4k"):
            self._processor(f"warm_{name}", best, cells[f"{name}, us"])
        if not self.context.quick:
            more = self._cells("more of it", serves, 1, MORE, allocate=(QCOW2, COW, FILE))
            for cell in MORE:
                self.ratio(f"{cell.name}_vs_file", best, FILE, more[cell.name], None)
                self._processor(f"warm_{cell.name}", best, more[f"{cell.name}, us"])

    def _stacked(
        self, server: product.Server, layers: Sequence[Sequence[tuple[int, int]]], base: Path, directory: Path
    ) -> AbstractContextManager[str]:
        return server.stacked(base, directory, layers)

    def _cells(
        self, what: str, serves: Mapping[str, Serve], rounds: int, cells: Sequence[fio.Cell], allocate: Sequence[str]
    ) -> Mapping[str, Samples]:
        """Every cell on one server a round; reads first, and the data is brought to the same state before."""

        def sample(name: str) -> dict[str, float]:
            with self.fresh(serves[name]) as uri:
                if name in allocate:
                    context.forget(self.base)
                    fio.allocate(uri, HOT, self.directory, "4k")
                context.settle()
                fio.once(uri, SEQUENTIAL_READ, HOT, self.directory)  # what was written may have left the page cache
                seconds, found = self.seconds, dict[str, float]()
                for cell in cells:
                    found[cell.name], found[f"{cell.name}, us"] = self._timed(uri, cell, HOT, seconds, 1)
                return found

        self.context.say(f"{what}: {', '.join(serves)}")
        return self.context.cells(rounds, {name: functools.partial(sample, name) for name in serves}, "IOPS")

    # ---- base, deep, filling ----

    def rest(self) -> None:
        """No overlay: what a guest has between checkpoints."""
        serves: dict[str, Serve] = {name: server.base for name, server in self.ours.items()}
        serves |= {RAW: servers.qemu_raw, FILE: servers.nbdkit_file}
        cells = self._cells("at rest", serves, 1, (*WARM, *MORE), allocate=())
        for cell in (*WARM, *MORE):
            self.ratio(f"{cell.name}_at_rest_vs_file", self.best, FILE, cells[cell.name], None)

    def deep(self) -> None:
        """Three overlays over each other, beside one with the same data."""
        server = self.ours[self.best]
        labels = {"one overlay": [[(0, HOT)]], "three overlays": _spread()}
        serves: dict[str, Serve] = {
            f"{self.best}, {label}": functools.partial(self._stacked, server, layers)
            for label, layers in labels.items()
        }
        cells = self._cells("deep", serves, self.context.pick(2, 3), (READ,), allocate=())
        one, three = serves
        self.ratio("depth3_vs_depth1", three, one, cells[READ.name], figures.at_least(0.9))
        if not self.context.quick:
            rest = [cell for cell in (*WARM, *MORE) if cell is not READ]
            more = self._cells("more of it", serves, 1, rest, allocate=())
            for cell in rest:
                self.ratio(f"{cell.name}_depth3_vs_depth1", three, one, more[cell.name], None)

    def filling(self) -> None:
        """Sequential reads of a disk that is being filled from its image, beside the raw base."""
        base = self.directory / "filling.raw"
        context.compressible_file(base, HOT * 4)
        server = self.ours[self.best]
        serves: dict[str, Serve] = {f"{self.best}, filling": server.filling, f"{self.best}, base": server.base}

        def sample(serve: Serve) -> float:
            context.warm(base)
            context.settle()
            with serve(base, self.directory) as uri:
                return fio.once(uri, SEQUENTIAL_READ, HOT * 4, self.directory)

        self.context.say("a restored disk that is being filled")
        samplers = {name: functools.partial(sample, serve) for name, serve in serves.items()}
        peers = self.context.round_robin(self.context.pick(2, 3), samplers, "IOPS")
        filling, raw = serves
        self.ratio("filling_read256k_vs_base", filling, raw, peers, figures.at_least(0.6))

    # ---- through QEMU ----

    def through_qemu(self) -> None:
        """QEMU's own NBD client, as a guest's disk has it, with ``qemu-img bench``."""
        serves: dict[str, Serve] = {
            name: functools.partial(self._stacked, server, [[(0, HOT)]]) for name, server in self.ours.items()
        }
        serves |= {QCOW2: servers.qemu_qcow2, FILE: servers.nbdkit_file}

        def sample(name: str) -> dict[str, float]:
            with self.fresh(serves[name]) as uri:
                if name in (QCOW2, FILE):
                    fio.allocate(uri, HOT, self.directory)
                count = self.context.pick(20000, 40000)
                return {"read": _qemu_bench(uri, count, []), "write": _qemu_bench(uri, count, ["-w"])}

        self.context.say("through QEMU's block layer (qemu-img bench)")
        cells = self.context.cells(
            self.context.pick(1, 3), {name: functools.partial(sample, name) for name in serves}, "IOPS"
        )
        for kind in ("read", "write"):
            self.ratio(f"qemu_{kind}4k_vs_file", self.best, FILE, cells[kind], None)

    def in_a_guest(self) -> None:
        """O_DIRECT in a real, emulated guest: overlays of ours, of QEMU, and a plain file."""
        self.context.say("writes inside a guest (TCG)")
        server = self.ours[self.best]
        span = [(0, inguest.SPAN_MIB << 20)]
        serves: dict[str, Serve] = {
            self.best: functools.partial(self._stacked, server, [span]), QCOW2: servers.qemu_qcow2,
            FILE: servers.nbdkit_file,
        }  # fmt: skip
        fresh = {name: functools.partial(self.fresh, serve) for name, serve in serves.items()}
        samplers = inguest.samplers(self.context, fresh, 5.0)
        peers = self.context.round_robin(1, samplers, "writes/s")
        self.ratio("guest_write_vs_file", self.best, FILE, peers, None)
        self.ratio("guest_write_vs_qcow2", self.best, QCOW2, peers, None, FILE)


def _qemu_bench(uri: str, count: int, options: list[str]) -> float:
    """4 KiB operations a second of QEMU's block layer at depth 32, a step of 68 KiB apart, inside HOT."""
    command = [servers.need("qemu-img"), "bench", "-f", "raw", "-c", str(min(count, HOT // 69632 - 1)), "-d", "32",
               "-s", "4096", "-S", "69632", *options, uri]  # fmt: skip
    rates = []
    for _ in range(max(1, count // (HOT // 69632))):
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode != 0:
            raise context.BenchError(f"qemu-img bench failed: {result.stderr.strip()[-300:]}")
        seconds = float(result.stdout.split("completed in ")[1].split()[0])
        rates.append((HOT // 69632 - 1) / seconds)
    return figures.Samples(rates, "IOPS").median


def _spread() -> list[list[tuple[int, int]]]:
    """HOT in pieces of 64 KiB, dealt at random to three layers."""
    rng, layers = random.Random(3), [[], [], []]  # type: tuple[random.Random, list[list[tuple[int, int]]]]
    for offset in range(0, HOT, 65536):
        layers[rng.randrange(3)].append((offset, 65536))
    return layers


def _parts(bench: Bench) -> Iterator[Callable[[], None]]:
    yield bench.overlays
    yield bench.warm
    yield bench.deep
    yield lambda: bench.found.extend(jobs.run(bench.context, bench.ours[bench.best], bench.best))
    yield bench.filling
    yield bench.through_qemu
    if not bench.context.quick:
        yield bench.rest
        yield lambda: bench.found.extend(jobs.matrix(bench.context, bench.ours[bench.best], bench.best, [*WARM, *MORE]))
        yield bench.in_a_guest


def run(context_: context.Context) -> list[figures.Figure]:
    bench = Bench(context_)
    if FAST not in bench.ours:
        context_.say("the C fast path is not built here: its figures are of the Python plugin alone")
    context_.say("making a 4 GiB base of random data")
    context.random_file(bench.base, SIZE)
    for part in _parts(bench):
        part()
    return bench.found

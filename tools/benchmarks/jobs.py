"""A guest's writes while a checkpoint is copied or an overlay committed, beside QEMU's ``drive-backup`` and
``block-commit`` of as much data.

A sample is one run: 4 KiB random writes at queue depth 32 at full speed, first alone, then beside the job until that
ends; rate and latency of the two windows are compared with each other, so nobody's absolute speed is in the figures.
The copy is of the whole disk of random data, throttled by nobody; the commit is of an overlay of the same size (ours
by way of an abort: the same commit, without the need for a copy before it).

The state of the page cache is the same before and during a job: the overlay has been written by 4 KiB, and the base
that a commit goes to is not cached.  A base that was written in large pieces is cached in large folios, and each small
write to one costs ext4 20 us more: guests' writes, which go to the base more and more while an overlay is committed,
then seem to suffer from the commit, whoever does it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import context, figures, fio, product, qemu
from blkckpt import errors

QEMU = {"copy": "qemu drive-backup", "commit": "qemu block-commit"}
SIZE = 512 << 20
MATRIX_SIZE = 256 << 20
SETTLE = 1.0
LIMIT_QUICK, LIMIT_FULL = 30.0, 120.0
"""Seconds that a job gets under full load; one that has not ended by then has not finished."""

WRITE = fio.Cell("randwrite4k", "randwrite")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job did to the guest: throughput kept, growth of the 99th percentile, and its own end."""

    kept: float
    slower: float
    seconds: float
    finished: bool


def _beside(uri: str, context_: context.Context, cell: fio.Cell, size: int, job: Callable[[], bool]) -> Outcome:
    """The load alone for a while, then with *job* until it ends.  :data:`SETTLE` of warming up are not counted."""
    rest = 2.0
    with fio.stream(uri, cell, size, context_.directory) as load:
        time.sleep(SETTLE + rest)  # a measured window, not a wait for anything
        began = time.time()
        finished = job()
        ended = time.time()
    alone, p99_alone = load.window(began - rest, began)
    with_job, p99 = load.window(began, ended)
    if not alone:
        raise context.BenchError("nothing was written before the job; see the server's log")
    return Outcome(with_job / alone, p99 / p99_alone, ended - began, finished)


class Disks:
    """Makes the same disk of *size* bytes for every sample, and puts the load *cell* on it."""

    def __init__(
        self, context_: context.Context, server: product.Server, *, cell: fio.Cell = WRITE, size: int = SIZE
    ) -> None:
        self._context, self._server, self._cell, self._size = context_, server, cell, size
        self._limit = context_.pick(int(LIMIT_QUICK), int(LIMIT_FULL))
        self._base = context_.directory / "jobs.raw"

    def _fresh(self, kind: str) -> Path:
        context.random_file(self._base, self._size)
        if kind == "commit":
            context.forget(self._base)
        return self._base

    def ours(self, kind: str) -> Outcome:
        base, directory = self._fresh(kind), self._context.directory
        with self._server.switched(base, directory) as (vm, connection, store):
            uri = product.uri(vm)
            fio.allocate(uri, self._size, directory, "4k")
            context.settle()
            begin = (lambda: connection.copy(store, {"vda": None})) if kind == "copy" else connection.abort

            def job() -> bool:
                try:
                    connection.finish(begin(), self._limit)
                except errors.DeadlineError:
                    return False
                return True

            return _beside(uri, self._context, self._cell, self._size, job)

    def qemu(self, kind: str) -> Outcome:
        base, directory = self._fresh(kind), self._context.directory
        with qemu.daemon(base, directory, overlay=kind == "commit") as served:
            if kind == "commit":
                fio.allocate(served.uri, self._size, directory, "4k")
            context.settle()

            def job() -> bool:
                wait = qemu.backup(served, directory, self._size) if kind == "copy" else qemu.commit(served)
                return wait(self._limit)

            return _beside(served.uri, self._context, self._cell, self._size, job)


def run(context_: context.Context, server: product.Server, label: str) -> list[figures.Figure]:
    """The figures of both jobs; *label* names ours."""
    disks = Disks(context_, server)
    found = []
    for kind, theirs in QEMU.items():
        context_.say(f"writes during a {kind}: {label}, {theirs}")
        outcomes: dict[str, list[Outcome]] = {label: [], theirs: []}

        def sample(name: str, take: Callable[[], Outcome], outcomes: dict[str, list[Outcome]] = outcomes) -> float:
            outcomes[name].append(take())
            return outcomes[name][-1].kept

        samplers = {
            label: functools.partial(sample, label, functools.partial(disks.ours, kind)),
            theirs: functools.partial(sample, theirs, functools.partial(disks.qemu, kind)),
        }
        kept = context_.round_robin(context_.pick(1, 3), samplers, "x")
        found += _figures(kind, label, theirs, kept, outcomes)
    (context_.directory / "jobs.raw").unlink(missing_ok=True)
    return found


def matrix(
    context_: context.Context, server: product.Server, label: str, cells: Sequence[fio.Cell]
) -> list[figures.Figure]:
    """What other loads than :data:`WRITE` keep of their throughput, and how their latency grows; ours alone, once."""
    found = []
    for kind in QEMU:
        context_.say(f"every load during a {kind}: {label}")
        for cell in cells:
            one = Disks(context_, server, cell=cell, size=MATRIX_SIZE).ours(kind)
            context_.say(f"  {cell.name}: keeps {one.kept:.2f}, 99th percentile x{one.slower:.1f}, {one.seconds:.1f} s")
            peers = {
                label: figures.Samples([one.kept], "x"),
                "99th percentile": figures.Samples([one.slower], "x"),
                "the job": figures.Samples([one.seconds], "s"),
            }
            found.append(figures.Figure(f"during_{kind}_{cell.name}", "x", one.kept, peers))
    return found


def _figures(
    kind: str, label: str, theirs: str, kept: dict[str, figures.Samples], outcomes: dict[str, list[Outcome]]
) -> list[figures.Figure]:
    slower = {name: figures.Samples([one.slower for one in each], "x") for name, each in outcomes.items()}
    seconds = {name: figures.Samples([one.seconds for one in each], "s") for name, each in outcomes.items()}
    found = [
        figures.Figure(f"during_{kind}_throughput", "x", kept[label].median, kept, figures.at_least(0.6)),
        figures.Figure(f"during_{kind}_p99", "x", slower[label].median, slower, figures.at_most(3)),
        figures.ratio(f"{kind}_impact_vs_qemu", label, theirs, kept, figures.at_least(1.0)),
        figures.Figure(f"{kind}_seconds_under_load", "s", seconds[label].median, seconds),
    ]
    if kind == "commit":
        ended = {name: figures.Samples([float(one.finished) for one in each], "x") for name, each in outcomes.items()}
        finished = float(all(one.finished for one in outcomes[label]))
        found.append(figures.Figure("commit_under_load_finishes", "x", finished, ended, figures.at_least(1)))
    return found

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import context, figures, fio, product, qemu
from blkckpt import errors

QEMU = {"copy": "qemu drive-backup", "commit": "qemu block-commit"}
SIZE = 512 << 20
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


def _beside(uri: str, context_: context.Context, job: Callable[[], bool], settle: float) -> Outcome:
    """Writes alone for a while, then with *job* until it ends.  *settle* seconds of warming up are not counted."""
    rest = context_.pick(2, 5)
    with fio.stream(uri, WRITE, SIZE, context_.directory) as load:
        time.sleep(settle + rest)  # a measured window, not a wait for anything
        began = time.time()
        finished = job()
        ended = time.time()
    alone, p99_alone = load.window(began - rest, began)
    with_job, p99 = load.window(began, ended)
    if not alone:
        raise context.BenchError("nothing was written before the job; see the server's log")
    return Outcome(with_job / alone, p99 / p99_alone, ended - began, finished)


class Disks:
    """Makes the same disk for every sample."""

    def __init__(self, context_: context.Context, server: product.Server) -> None:
        self._context, self._server = context_, server
        self._limit = context_.pick(int(LIMIT_QUICK), int(LIMIT_FULL))
        self._base = context_.directory / "jobs.raw"

    def _fresh(self, kind: str) -> Path:
        context.random_file(self._base, SIZE)
        if kind == "commit":
            context.forget(self._base)
        return self._base

    def ours(self, kind: str) -> Outcome:
        base, directory = self._fresh(kind), self._context.directory
        with self._server.switched(base, directory) as (vm, connection, store):
            uri = product.uri(vm)
            fio.allocate(uri, SIZE, directory, "4k")
            context.settle()
            begin = (lambda: connection.copy(store, {"vda": None})) if kind == "copy" else connection.abort

            def job() -> bool:
                try:
                    connection.finish(begin(), self._limit)
                except errors.DeadlineError:
                    return False
                return True

            return _beside(uri, self._context, job, 1.0)

    def qemu(self, kind: str) -> Outcome:
        base, directory = self._fresh(kind), self._context.directory
        with qemu.daemon(base, directory, overlay=kind == "commit") as served:
            if kind == "commit":
                fio.allocate(served.uri, SIZE, directory, "4k")
            context.settle()

            def job() -> bool:
                wait = qemu.backup(served, directory, SIZE) if kind == "copy" else qemu.commit(served)
                return wait(self._limit)

            return _beside(served.uri, self._context, job, 1.0)


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
        kept = context_.round_robin(context_.pick(1, 5), samplers, "x")
        found += _figures(kind, label, theirs, kept, outcomes)
    (context_.directory / "jobs.raw").unlink(missing_ok=True)
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

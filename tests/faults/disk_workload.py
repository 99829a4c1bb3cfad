"""A random life of a VM's disks, run under the recorder.

``python -m tests.faults.disk_workload HOME SEED STEPS END [retain]``

Writes, zeroes and trims of all sizes from one and two threads, flushes, FUA, and up to three stacked checkpoints in all
their stages with guest writes in between: prepared, switched, copied (a stand-in that reads the frozen layers),
committed, aborted, in any order.  Every request is announced to the log before it is issued and after it is
acknowledged.

With ``retain`` some checkpoints are retained: a file in ``HOME/kept`` stands for the manifest, and holds the digests of
the disks' contents at the switch.  Now and then one of them is given up again.

END is ``close`` for a clean stop; ``kill``: the process goes at once, as under kill -9, and its live maps stay; or
``rest``: it waits for the recovery's end, then stops.

Content is a function of the request's number, so the log need not carry it twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blkckpt import durable, paths
from blkckpt.disk import api, commit, disk, group, job
from blkckpt.disk import format as formats
from tests.faults import recorder

VM = "vm"
RESULT = '{"result":{"image":"%s","size":0,"read":0,"new":0,"chunks":0,"seconds":0}}' % ("0" * 32)
STAND_IN = ("/bin/sh", "-c", f"read job; echo '{RESULT}'")
"""In place of the copy child: takes its orders, answers that it is done."""

HOT = 64 << 10
"""Most requests fall into this many bytes, so that they meet each other in blocks and map pages."""

WINDOW = 32 << 10
"""So that a commit of these small disks has many windows, and guest writes and flushes between them."""

mark = recorder.Marker()


def content(request: int, length: int) -> bytes:
    """The bytes of request *request*: unlike those of any other."""
    return random.Random(request).randbytes(length)


class Round:
    """A checkpoint under way."""

    def __init__(self, name: str, retain: bool) -> None:
        self.name = name
        self.retain = retain
        self.contents: dict[str, str] = {}
        self.stage = "rest"


class Life:
    """One run of the workload."""

    def __init__(self, opened: group.DiskGroup, seed: int, kept: Path | None = None) -> None:
        """*kept*: where retained checkpoints are published, if there are to be some."""
        self.group = opened
        self.kept = kept
        self.rng = random.Random(seed)
        self.numbers = itertools.count(seed << 24)
        self.rounds: list[Round] = []
        self.jobs: list[job.Job] = []

    # ---- requests ----

    def request(self, rng: random.Random, name: str, offset: int, length: int) -> None:
        target = self.group.disks[name]
        number = next(self.numbers)
        kind = rng.choices(("write", "zero", "trim"), (8, 1, 1))[0]
        fua = rng.random() < 0.1
        mark(issue=number, disk=name, offset=offset, length=length, kind=kind, fua=fua)
        if kind == "write":
            target.pwrite(content(number, length), offset, fua)
        elif kind == "zero":
            target.zero(length, offset, fua, rng.random() < 0.5, False)
        else:
            target.trim(length, offset, fua)
        mark(ack=number)

    def flush(self, name: str) -> None:
        number = next(self.numbers)
        mark(flush=number, disk=name)
        self.group.disks[name].flush()
        mark(ack=number)

    def burst(self, count: int) -> None:
        """Requests of one thread, anywhere, aligned or not."""
        for _ in range(count):
            name = self.rng.choice(list(self.group.disks))
            offset, length = any_range(self.rng, self.group.disks[name])
            if self.rng.random() < 0.12:
                self.flush(name)
            else:
                self.request(self.rng, name, offset, length)

    def burst_of_two(self, count: int) -> None:
        """Two threads that share blocks but never a sector (a sector's versions must have an order)."""
        threads = [
            threading.Thread(target=self._one_of_two, args=(number, random.Random(self.rng.random()), count))
            for number in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one_of_two(self, number: int, rng: random.Random, count: int) -> None:
        try:
            for _ in range(count):
                name = rng.choice(list(self.group.disks))
                if rng.random() < 0.12:
                    self.flush(name)
                    continue
                offset, length = own_range(rng, self.group.disks[name].size, number)
                self.request(rng, name, offset, length)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    def work(self) -> None:
        if self.rng.random() < 0.4:
            self.burst_of_two(self.rng.randint(3, 12))
        else:
            self.burst(self.rng.randint(3, 20))

    # ---- the checkpoint ----

    def step(self) -> None:
        """Work, and begin a checkpoint, or go one stage on with one, or break one off."""
        self.work()
        if self.kept is not None and self.rng.random() < 0.1:
            self.give_up(self.kept)
        newest = self.rounds[-1] if self.rounds else None
        if newest is None or (newest.stage != "prepared" and len(self.rounds) < 3 and self.rng.random() < 0.4):
            self.begin()
            return
        one = self.rng.choice(self.rounds)
        if self.rng.random() < 0.15:
            self.end(one, "aborted", lambda: self.group.abort(one.name))
        elif one.stage == "prepared":
            self.move(one, "switched", lambda: self.switch(one))
        elif one.retain:
            self.publish(one)
        elif one.stage == "switched":
            first = next(other for other in self.rounds if other.stage == "switched")
            if first.retain:  # its map of changes is part of the next copy's
                self.publish(first)
                return
            self.move(first, "copied", lambda: self.copy(first.name))
        else:
            self.end(one, "committed", lambda: self.group.commit(one.name))

    def begin(self) -> None:
        while len(self.group.status().disks[0].overlays) >= 6:  # the recovery before, or commits that wait their turn
            self.work()
        retain = self.kept is not None and self.rng.random() < 0.6 and len(list(self.kept.iterdir())) < 5
        one = Round(f"c{next(self.numbers)}", retain)
        self.move(one, "prepared", lambda: self.group.prepare(one.name, retain=retain))
        self.rounds.append(one)

    def move(self, one: Round, stage: str, action: Callable[[], object]) -> None:
        mark(stage=f"{one.name} {stage}?")
        action()
        mark(stage=f"{one.name} {stage}")
        one.stage = stage

    def switch(self, one: Round) -> None:
        self.group.switch(one.name)
        if one.retain:
            one.contents = {name: digest(target) for name, target in self.group.disks.items()}

    def publish(self, one: Round) -> None:
        """The manifest; its commit is heard, or the driver dies before that."""
        assert self.kept is not None
        marks = {name: formats.Retained("/kept", one.name, "0" * 32, image(one.name, name)) for name in one.contents}
        self._end(self.group.start_retain(marks, one.name))
        durable.create_file(self.kept / one.name, json.dumps(one.contents).encode())
        self.end(one, "published", lambda: (self.group.commit, self.group.abort)[self.rng.random() < 0.3](one.name))

    def give_up(self, kept: Path) -> None:
        names = sorted(path.name for path in kept.iterdir())
        if names:
            durable.remove(kept / self.rng.choice(names))
            self._end(self.group.review())

    def copy(self, name: str) -> None:
        """The stand-in reads nothing: what is copied is not this test's matter, when it may begin is the group's."""
        parents = dict.fromkeys(self.group.disks)
        self._end(self.group.start_copy("/nonexistent", parents, command=STAND_IN, checkpoint=name))

    def end(self, one: Round, stage: str, action: Callable[[], job.Job]) -> None:
        """The job that it leaves may go on beside the next checkpoints' stages."""
        before = one.stage
        running: list[job.Job] = []
        self.move(one, stage, lambda: running.append(action()))
        self.rounds.remove(one)
        if before == "prepared" or self.rng.random() < 0.5:
            self._end(running[0])
        else:
            self.jobs += running

    def settle(self) -> None:
        for running in self.jobs:
            self._end(running)

    def _end(self, running: job.Job) -> None:
        """Guest writes while the job runs, and its end."""
        while running.running and self.rng.random() < 0.8:
            self.work()
        assert running.wait(60), f"the {running.kind} job does not end"
        running.outcome()


def digest(target: disk.Disk) -> str:
    """Of the whole content of a disk, as the guest reads it."""
    buffer = bytearray(target.size)
    target.pread(buffer, 0)
    return hashlib.sha256(buffer).hexdigest()


def image(checkpoint: str, name: str) -> str:
    """The image that stands for a disk of a retained checkpoint."""
    return hashlib.blake2b(f"{checkpoint}/{name}".encode(), digest_size=16).hexdigest()


def any_range(rng: random.Random, target: disk.Disk) -> tuple[int, int]:
    limit = min(HOT, target.size) if rng.random() < 0.7 else target.size
    kind = rng.randrange(4)
    if kind == 0:  # whole blocks
        offset = rng.randrange(0, limit, 4096)
        return offset, min(4096 * rng.randint(1, 8), target.size - offset)
    if kind == 1:  # sectors
        offset = rng.randrange(0, limit, 512)
        return offset, min(512 * rng.randint(1, 20), target.size - offset)
    offset = rng.randrange(limit)
    return offset, min(rng.randint(1, 6000 if kind == 2 else 40000), target.size - offset)


def own_range(rng: random.Random, size: int, number: int) -> tuple[int, int]:
    """A range of thread *number* alone: its own quarter, or its runs of three sectors in what is left."""
    quarter = size // 4 // 512 * 512
    if rng.random() < 0.4:
        start, stop = number * quarter, (number + 1) * quarter
    else:
        run = 3 * 512
        first = rng.randrange(2 * quarter, min(size - 2 * run, 2 * quarter + HOT), run) // run
        start = (first // 2 * 2 + number) * run
        start, stop = max(start, 2 * quarter), min(start + run, size)
    offset = rng.randrange(start, stop)
    return offset, rng.randint(1, min(stop - offset, 30000))


def main(home: str, seed: str, steps: str, end: str, retain: str = "") -> None:
    commit.WINDOW_BYTES, commit.WINDOW_RUNS = WINDOW, 3
    vm = paths.home(home).vm(VM)
    kept = Path(home) / "kept"
    opened = group.DiskGroup.open(vm, open_image=no_image, wanted=lambda mark: (kept / mark.checkpoint).exists())
    opened.start()
    mark(stage="rest" if opened.status().state is api.State.REST else "recovering")
    life = Life(opened, int(seed), kept if retain else None)
    for _ in range(int(steps)):
        life.step()
    if end == "kill":
        os._exit(0)
    if end == "rest":
        life.settle()
        while life.rounds:
            life.end(life.rounds[-1], "aborted", lambda: opened.abort(life.rounds[-1].name))
        life.settle()
        while opened.status().state is not api.State.REST:
            time.sleep(0.001)
    mark(stage="closing")
    opened.close()
    mark(stage="closed")


def no_image(_reference: api.ImageRef) -> api.Source:
    raise AssertionError("no disk here comes from a store")


if __name__ == "__main__":
    main(*sys.argv[1:])

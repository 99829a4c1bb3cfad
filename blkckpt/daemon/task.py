"""One VM's schedule at work: a thread that decides (:mod:`planner`), waits, and runs children (:mod:`jobs`).

There is one for each VM that has a schedule, so one VM is never checkpointed twice at a time by us, and a disk server
that hangs holds up nobody else.  Between two decisions the thread sleeps until a time, or until something happens: the
schedule changes, somebody asks for a checkpoint, a turn (:class:`Turns`) becomes free, the agent stops.

What it knows is written before it acts on it: see :mod:`record` for what a kill leaves at each point.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blkckpt import errors, log, paths
from blkckpt.agent import rundir
from blkckpt.daemon import jobs, planner, quiet, readings, record, schedule

PRUNE = "prune"
"""The reason of a failure to apply keep rules."""
PRUNE_SECONDS = 3600.0

logger = log.get(__name__)


class Events(Protocol):
    """Who counts what happens."""

    def taken(self, vm: str, document: Mapping[str, Any]) -> None: ...

    def failed(self, vm: str, reason: str) -> None: ...

    def skipped(self, vm: str) -> None: ...

    def pruned(self, vm: str, count: int) -> None: ...


class Turns:
    """So many checkpoints at a time on this host; the next in order of asking."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: list[Task] = []

    def take(self, who: Task) -> bool:
        """Whether it is the turn of *who*; if not it is woken when it may be."""
        with self._lock:
            if who not in self._waiting:
                self._waiting.append(who)
            if self._waiting.index(who) >= self._free:
                return False
            self._waiting.remove(who)
            self._free -= 1
            return True

    def leave(self, who: Task) -> None:
        """*who* does not wait any more."""
        with self._lock:
            if who in self._waiting:
                self._waiting.remove(who)
            self._wake_locked()

    def give_back(self) -> None:
        with self._lock:
            self._free += 1
            self._wake_locked()

    def _wake_locked(self) -> None:
        for task in self._waiting[: self._free]:
            task.wake()


@dataclass(frozen=True, slots=True)
class Host:
    """What the tasks of one agent share.  *ended* is called by a thread that ends."""

    home: paths.Home
    directory: Path
    turns: Turns
    events: Events
    ended: Callable[[], None]
    clock: Callable[[], int] = time.time_ns


@dataclass(slots=True)
class _Window:
    """The looks at a VM's disks since a time became due; *began* is monotonic."""

    began: float
    looks: list[quiet.Look]
    before: quiet.Counters | None = None
    at: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def look(self, vm: paths.VmPaths) -> None:
        counters, now = readings.counters(vm), self.elapsed
        self.looks.append(quiet.Look(now, quiet.load(self.before, counters, now - self.at)))
        self.before, self.at = counters, now


class Task:
    """The schedule *wanted* of *vm*, from :meth:`start` until :meth:`stop` or :meth:`retire`."""

    def __init__(self, host: Host, vm: paths.VmPaths, wanted: schedule.Schedule) -> None:
        self._host, self.vm = host, vm
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wanted = wanted
        self._asked = False
        self._leaving = False
        self.ended = False
        self._patience: float | None = None  # monotonic: until then a child may go on
        self._known = record.load(vm)
        self._doing = ""
        self._skipping = False
        self._window: _Window | None = None
        self._files = jobs.Files.of(host.directory, vm.name)
        self.thread = threading.Thread(target=self._run, name=f"schedule-{vm.name}", daemon=True)

    # What others call, from any thread.

    def start(self) -> None:
        self.thread.start()

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def update(self, wanted: schedule.Schedule) -> None:
        """Another schedule is in force; what is under way is not touched."""
        with self._lock:
            changed, self._wanted = self._wanted != wanted, wanted
        if changed:
            self.wake()

    def ask(self) -> None:
        """Take one as soon as possible."""
        with self._lock:
            self._asked = True
        self.wake()

    def retire(self) -> None:
        """End when what is under way has ended."""
        self._leaving = True
        self.wake()

    def stop(self, grace: float) -> None:
        """End; what is under way has *grace* seconds before it is taken back."""
        self._leaving = True
        self._patience = time.monotonic() + grace
        self.wake()

    def close(self) -> None:
        """After its thread has ended, and nobody else knows it any more."""
        os.close(self._wake)

    @property
    def wanted(self) -> schedule.Schedule:
        with self._lock:
            return self._wanted

    @property
    def known(self) -> record.Record:
        with self._lock:
            return self._known

    @property
    def doing(self) -> str:
        """For people."""
        return self._doing

    # The thread.

    def _run(self) -> None:
        try:
            self._find_child()
            while not self._leaving:
                self._step()
        except Exception:
            if self.vm.definition.exists():
                logger.exception("a schedule's thread failed", extra={"fields": {"vm": self.vm.name}})
        finally:
            self._host.turns.leave(self)
            self.ended = True
            self._host.ended()

    def _step(self) -> None:
        wanted, now = self.wanted, self._host.clock()
        known = planner.corrected(self.known, wanted, now)
        if known is not self.known:
            logger.warning("the clock was put back", extra={"fields": {"vm": self.vm.name}})
            self._save(known)
        step = planner.decide(now, wanted, known, self._situation(wanted, known, now))
        self._note(step)
        if step.do is planner.Do.RUN:
            if self._host.turns.take(self):
                self._window = None
                try:
                    self._attempt(wanted, step.why)
                finally:
                    self._host.turns.give_back()
            else:
                self._doing = "waits for another VM's checkpoint"
                self._sleep(planner.LONGEST_WAIT_NS)
            return
        self._host.turns.leave(self)
        if step.do is planner.Do.LOOK:
            self._look(step, now)
        else:
            self._window = None
            self._sleep(step.until_ns - now)

    def _situation(self, wanted: schedule.Schedule, known: record.Record, now: int) -> planner.Situation:
        with self._lock:
            asked = self._asked
        if not asked and now < planner.next_ns(wanted, known):
            return planner.Situation()
        window = self._window
        return planner.Situation(
            obstacle=readings.obstacle(self.vm, wanted),
            asked=asked,
            looks=() if window is None else window.looks,
            elapsed=0.0 if window is None else window.elapsed,
        )

    def _note(self, step: planner.Step) -> None:
        skipping = step.do is planner.Do.SKIP
        if skipping and not self._skipping:
            self._host.events.skipped(self.vm.name)
            logger.info("a checkpoint is due and waits", extra={"fields": {"vm": self.vm.name, "reason": step.why}})
        self._skipping = skipping
        self._doing = f"waits: {step.why}" if skipping else step.why

    def _look(self, step: planner.Step, now: int) -> None:
        if self._window is None:
            self._window = _Window(time.monotonic(), [])
            self._window.look(self.vm)  # the first says nothing: it is what the next is compared with
        self._sleep(step.until_ns - now)
        if not self._leaving:
            self._window.look(self.vm)

    def _sleep(self, nanoseconds: int) -> None:
        if jobs.ready([self._wake], max(0, nanoseconds) / 1e9):
            self._drain()

    def _drain(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _save(self, known: record.Record) -> None:
        """A record that cannot be written (no space) costs a checkpoint more after a restart, not the schedule."""
        with self._lock:
            self._known = known
        try:
            record.save(self.vm, known)
        except errors.BlkckptError as error:
            if self.vm.definition.exists():
                logger.error("not recorded", extra={"fields": {"vm": self.vm.name, "error": str(error)}})

    # Attempts.

    def _find_child(self) -> None:
        """What an agent before us has left under way."""
        child = self.known.running
        if child is None:
            return
        self._doing = "waits for a checkpoint that an agent before this one began"
        process = rundir.Process(child.pid, child.start)
        job = jobs.adopt(process, self._files) if child.boot == boot_id() else None
        fields = {"vm": self.vm.name, "pid": child.pid, "alive": job is not None}
        logger.info("an attempt of an agent before this one is taken over", extra={"fields": fields})
        if job is None:
            left: jobs.Result = jobs.leftover(self._files)
            if child.boot != boot_id():
                left = jobs.Failure(jobs.KILLED, "the machine was started again meanwhile")
            self._conclude(self.wanted, left)
            return
        with job:
            self._await(self.wanted, job, child.began_ns)

    def _attempt(self, wanted: schedule.Schedule, why: str) -> None:
        with self._lock:
            self._asked = False
        self._doing = f"takes a checkpoint ({why})"
        logger.info("a checkpoint begins", extra={"fields": {"vm": self.vm.name, "reason": why}})
        began = self._host.clock()
        try:
            started = jobs.start(self._host.home, wanted.checkpoint_words(self.vm.name), self._files)
        except OSError as error:
            self._conclude(wanted, jobs.Failure("failed", f"starting a process: {error}"))
            return
        with started as job:
            child = record.Child(job.process.pid, job.process.start, boot_id(), began)
            self._save(planner.begun(self.known, child))
            self._await(wanted, job, began)

    def _await(self, wanted: schedule.Schedule, job: jobs.Job, began: int) -> None:
        left = wanted.timeout_ns - max(0, self._host.clock() - began)
        limit = time.monotonic() + max(left, 0) / 1e9
        if self._watch(job, limit):
            self._conclude(wanted, job.result())
        elif self._patience is not None and time.monotonic() < limit:
            if job.end(jobs.Failure("interrupted", "the agent was stopped")):
                self._conclude(wanted, job.result(), ours=True)
            else:  # it stays recorded: the next agent looks for it
                logger.error("a checkpoint does not end", extra={"fields": {"vm": self.vm.name}})
        else:
            seconds = wanted.timeout_ns / 1e9
            job.end(jobs.Failure(jobs.TIMEOUT, f"not done within {seconds:g} s; it was ended"))
            self._conclude(wanted, job.result())

    def _watch(self, job: jobs.Job, limit: float) -> bool:
        """Until *job* has ended (True), its time is up, or the agent's patience is over."""
        while True:
            end = limit if self._patience is None else min(limit, self._patience)
            left = end - time.monotonic()
            found = jobs.ready([job.fileno(), self._wake], max(0.0, left))
            if job.fileno() in found:
                return True
            if not found and left <= 0:
                return False
            self._drain()

    def _conclude(self, wanted: schedule.Schedule, result: jobs.Result, *, ours: bool = False) -> None:
        """Count, log and record what came of an attempt; apply the keep rules after a success.

        *ours*: it was ended because the agent stops.
        """
        name, now = self.vm.name, self._host.clock()
        if isinstance(result, jobs.Failure):
            fields: dict[str, Any] = {"vm": name, "reason": result.kind, "error": result.text}
            if ours:
                logger.info("a checkpoint was taken back", extra={"fields": fields})
                self._save(planner.interrupted(self.known, now))
                return
            problem = record.Problem(now, result.kind, result.text[: record.MAX_TEXT])
            known = planner.failed(self.known, wanted, problem)
            fields |= {"failures": known.failures, "retry_seconds": ((known.retry_ns or now) - now) / 1e9}
            logger.warning("a checkpoint failed", extra={"fields": fields})
            self._host.events.failed(name, result.kind)
            self._save(known)
            return
        try:
            success = _success(result, now)
            self._host.events.taken(name, result)
        except (KeyError, TypeError, ValueError) as error:
            self._conclude(wanted, jobs.Failure(jobs.GARBLED, f"its result cannot be read: {error!r}"))
            return
        logger.info("a checkpoint was taken", extra={"fields": {"vm": name, **dataclasses.asdict(success)}})
        self._save(planner.succeeded(self.known, success))
        self._files.remove()
        self._prune(wanted)

    def _prune(self, wanted: schedule.Schedule) -> None:
        """What fails here is tried again after the next checkpoint."""
        words = wanted.prune_words(self.vm.name)
        if words is None or self._leaving:
            return
        self._doing = "removes what no rule keeps"
        files = jobs.Files.of(self._host.directory, f"{self.vm.name},prune")  # no VM is called so
        try:
            started = jobs.start(self._host.home, words, files)
        except OSError as error:
            logger.warning("old checkpoints stay", extra={"fields": {"vm": self.vm.name, "error": str(error)}})
            return
        with started as job:
            if not self._watch(job, time.monotonic() + PRUNE_SECONDS):
                job.end(jobs.Failure(jobs.TIMEOUT, "removing old checkpoints took too long, or the agent was stopped"))
            result = job.result()
        files.remove()
        fields: dict[str, Any] = {"vm": self.vm.name}
        if isinstance(result, jobs.Failure):
            self._host.events.failed(self.vm.name, PRUNE)
            logger.warning("old checkpoints stay", extra={"fields": {**fields, "error": result.text}})
            return
        removed = result.get("removed") or []
        self._host.events.pruned(self.vm.name, len(removed))
        if removed:
            logger.info("old checkpoints were removed", extra={"fields": {**fields, "removed": removed}})


def _success(document: Mapping[str, Any], now: int) -> record.Success:
    stopped = document["stopped_ms"]
    return record.Success(
        now,
        str(document["name"]),
        float(document["seconds"]),
        None if stopped is None else float(stopped),
        int(document["added_bytes"]),
    )


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

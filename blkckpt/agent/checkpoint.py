"""One checkpoint's actions: each method does one :class:`plan.Action`, and knows what the others left.

Timings (seconds, in the manifest)::

    prepare   overlays, receiver, settings, flush and arm; the guest runs
    prefault  migrate sent -> QEMU's STOP; the guest runs          (stop sent -> STOP with an explicit pause)
    stopped   QEMU's STOP -> RESUME, by QEMU's own event times
    switch    RESUME -> the disks' switch; negative: before it     (the guest is not held up by it)
    memory    migrate sent -> memory and device state durable
    copy      copy asked for -> the disks' images durable        (retained: -> their frozen layers durable)
    publish   the manifest
    commit    commit asked for -> the disks at rest                (added when it is over)
    total     everything, from the first request
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blkckpt import errors, paths
from blkckpt.agent import consistency, early, guard, history, machine, options, plan, receiver, turn
from blkckpt.control import client, messages
from blkckpt.disk import barrier
from blkckpt.store import contents, evidence, keeping, manifest
from blkckpt.store import store as stores
from blkckpt.vm import guestagent, qmp, screen

STALL_SECONDS = 300.0
"""Nothing moved for so long: a dead disk or store.  A copy at its rate limit moves all the time."""
ARM_SECONDS = 60.0
ARM_SECONDS_PER_GIB = 1.0
"""Pre-faulting took 130 to 260 ms per GiB; a machine that swaps is slower."""
WINDOW_INTERVAL = 0.1
"""Between two looks at the QMP socket while armed; what QEMU writes there ends the wait at once."""
LOOK_INTERVAL = 0.2
"""Between two looks at the copy while the memory is being received; the memory's end is noticed at once."""
LEASE_INTERVAL = 5.0
REPLY_SECONDS = 30.0

GUESTS = frozenset({
    plan.Action.RESUME_READING, plan.Action.END_MIGRATION, plan.Action.CONTINUE_GUEST,
    plan.Action.RESTORE_CAPABILITIES,
})  # fmt: skip
"""What an abort row does to the guest: nothing once our turn is over, when its QMP socket is another's."""

STOPPED_NOTE = "the guest was stopped while its memory was saved: QEMU cannot snapshot it in the background"

Progress = Callable[[str, int, int | None], None]


CheckpointOptions = options.CheckpointOptions


class Checkpoint:
    """The actions, and what they know of each other.  One method an action, named after it."""

    def __init__(
        self,
        vm: paths.VmPaths,
        store: stores.Store,
        options: CheckpointOptions,
        name: str,
        control: client.Client,
        guest: machine.Machine | None,
        held: turn.Turn,
        progress: Progress,
        meeting: consistency.Meeting | None = None,
        started: early.Children | None = None,
    ) -> None:
        """*started* are children that wait for something to do."""
        self._meeting, self._started = meeting, started
        self.vm, self._store, self._options, self.name = vm, store, options, name
        self._control, self._guest, self._turn, self._progress = control, guest, held, progress
        self._timings: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._notes = list(options.notes)
        self._id = os.urandom(16).hex()
        self._info: manifest.MachineInfo | None = None
        ram = guest.ram_size if guest else 0
        self._arm_seconds = min(messages.MAX_DEADLINE, ARM_SECONDS + ARM_SECONDS_PER_GIB * (ram >> 30))
        self._history = history.History(vm, store)
        self._created_ns = 0
        self._prepared = False
        self._guard: guard.Guard | None = None
        self._released: guard.Guard | None = None
        self._agent: guestagent.GuestAgent | None = None
        self._stream: int | None = None
        self._receiver: receiver.Receiver | None = None
        self._received: receiver.Received | None = None
        self._migrate: qmp.Reply | None = None
        self._migrate_at = 0.0
        self._copy: str | None = None
        self._copied: Mapping[str, Any] | None = None
        self._published: manifest.Manifest | None = None
        self._screen: bytes | None = None
        self._publishing = False
        self._frozen = False
        self._parted = False
        self._parents: dict[str, str | None] = {}

    def perform(self, action: plan.Action, mode: plan.Mode) -> None:
        """Do *action*; raises what went wrong."""
        if self._parted and action in GUESTS:
            return
        background = mode in (plan.Mode.BARRIER, plan.Mode.EXPLICIT)
        match action:
            case plan.Action.START_RECEIVER:
                self._start_receiver(background=background)
            case plan.Action.START_GUARD:
                self._start_guard(frozen=mode is plan.Mode.FROZEN)
            case plan.Action.SET_CAPABILITIES:
                self.guest.set_up(background=background)
            case plan.Action.MIGRATE:
                self._start_migration(armed=mode is plan.Mode.BARRIER)
                if mode is plan.Mode.STOPPED:
                    self._notes.append(STOPPED_NOTE)
            case plan.Action.CHECK_MIGRATION:
                self._check_migration(background=background)
            case plan.Action.END_MIGRATION:
                self.guest.end_migration(self._stream, background=background)
            case _:
                getattr(self, f"_{action.name.lower()}")()

    @property
    def full_name(self) -> str:
        return f"{self.vm.name}@{self.name}"

    @property
    def guest(self) -> machine.Machine:
        assert self._guest is not None
        return self._guest

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.monotonic() - began

    # --- before the instant ---

    def _prepare_disks(self) -> None:
        self._progress("prepare", 0, None)
        self._parents, compared = self._history.disk_parents(self._control.status()["disks"])
        self._notes += [] if self._options.retain else compared
        with self._timed("prepare"):
            self._control.prepare(self.name, retain=self._options.retain)
        self._prepared = True

    def _start_guard(self, *, frozen: bool) -> None:
        with self._timed("prepare"):
            if frozen:
                assert self._options.guest_agent is not None
                self._guard = guard.Guard(guard.GUEST_AGENT, str(self._options.guest_agent))
                self._agent = guestagent.GuestAgent(self._options.guest_agent)
            else:
                begun = self._started
                self._guard = begun.guard if begun else guard.Guard(guard.QMP, self.guest.session.path, self._stream)

    def _await_guard(self) -> None:
        assert self._guard is not None
        with self._timed("prepare"):
            self._guard.take_charge()

    def _start_receiver(self, *, background: bool) -> None:
        job = receiver.Job(
            self._store.path.resolve(),
            f"{self.vm.name}@{self.name}",
            self._history.memory_parents(),
            self._memory_directory,
            self._options.keep_memory > 0,
            once=background,
        )
        with self._timed("prepare"):
            taking = self._started.receiver if self._started else receiver.Receiver()
            self._stream = taking.stream  # we keep it: a receiver that fails must not break QEMU's stream
            try:
                taking.begin(job)
                self._receiver = taking
                self.guest.hand_stream(taking.sink)
            finally:
                os.close(taking.sink)

    @property
    def _memory_directory(self) -> Path:
        return self.vm.memory / self.name

    def _pause_reading(self) -> None:
        self.guest.leave_unread()

    def _arm(self) -> None:
        with self._timed("prepare"):
            descriptor = self.guest.session.duplicate()
            try:
                self._control.arm(descriptor, self._arm_seconds)
            finally:
                os.close(descriptor)

    # --- the instant ---

    def _start_migration(self, *, armed: bool) -> None:
        self._begun["memory"] = time.monotonic()
        self._migrate_at = time.time()
        self._migrate = self.guest.migrate()
        if not armed:
            self._migrate.result(REPLY_SECONDS)

    def _await_barrier(self) -> None:
        """Look ourselves; only what has been seen is asked of the disk server, which must see the same."""
        deadline = time.monotonic() + self._arm_seconds
        renewed = time.monotonic()
        watch = self.guest.watch
        while (state := watch.poll()) is barrier.BarrierState.WAITING:
            now = time.monotonic()
            if now > deadline:
                raise errors.DeadlineError(f"QEMU did not stop and resume the guest within {self._arm_seconds:g} s")
            if now - renewed > LEASE_INTERVAL:
                renewed = now
                self._ask_switch()
            watch.wait(WINDOW_INTERVAL)
        if state is barrier.BarrierState.VIOLATED:
            raise self._lost(watch.reason)
        switched = self._ask_switch()
        if not switched.switched:
            raise errors.StateError("the disks did not switch although the guest was resumed")
        self._note_instant(switched)

    def _ask_switch(self) -> messages.Switched:
        switched = self._control.switch(messages.SWITCH_BARRIER)
        if switched.violation:
            raise self._lost(switched.violation)
        return switched

    def _lost(self, reason: str) -> errors.BlkckptError:
        """Why the instant was lost: QEMU's own words if it has some, they come after the event."""
        with contextlib.suppress(errors.DeadlineError):
            self.guest.read_again()
            try:
                assert self._migrate is not None
                self._migrate.result(REPLY_SECONDS)
            except qmp.RefusedError as error:
                return error
            if failure := self.guest.failed():
                return failure
        return errors.HypervisorError(f"the instant of the checkpoint was lost: {reason}")

    def _note_instant(self, switched: messages.Switched) -> None:
        offset = time.time_ns() - time.monotonic_ns()
        self._created_ns = (switched.instant or time.monotonic_ns()) + offset

    def _resume_reading(self) -> None:
        self.guest.read_again()

    def _check_window(self) -> None:
        assert self._migrate is not None
        self._migrate.result(REPLY_SECONDS)
        times = self.guest.watch.times
        self._note_times(times.stop_us, times.resume_us)

    def _note_times(self, stop_us: int | None, resume_us: int | None) -> None:
        if stop_us and resume_us:
            self._timings["prefault"] = max(0.0, stop_us / 1e6 - self._migrate_at)
            self._timings["stopped"] = (resume_us - stop_us) / 1e6
            self._timings["switch"] = self._created_ns / 1e9 - resume_us / 1e6
            if self._meeting is not None:
                self._meeting.note(self.full_name, stop_us, resume_us)

    def _stop_guest(self) -> None:
        self._migrate_at = time.time()
        self.guest.stop()

    def _switch_now(self) -> None:
        switched = self._control.switch(messages.SWITCH_NOW)
        if not switched.switched:
            raise errors.StateError(f"the disks did not switch: {switched.violation or 'no reason given'}")
        self._note_instant(switched)

    def _await_running(self) -> None:
        self.guest.await_running(self._arm_seconds)
        self._note_times(*self.guest.stop_and_resume())

    def _continue_guest(self) -> None:
        self.guest.continue_guest()
        if self._received or self._migrate:
            self._note_times(*self.guest.stop_and_resume())

    def _freeze(self) -> None:
        assert self._agent is not None
        self._frozen = True
        self._agent.freeze()

    def _thaw(self) -> None:
        if self._agent is not None and self._frozen:
            self._agent.thaw()
            self._frozen = False

    def _release_guard(self) -> None:
        if self._guard is not None and not self._needs_guard:
            self._guard.release()
            self._guard, self._released = None, self._guard

    @property
    def _needs_guard(self) -> bool:
        guest = self._guest
        return self._frozen or (guest is not None and (guest.may_be_stopped or guest.migrating))

    # --- saving ---

    def _start_copy(self) -> None:
        self._begun["copy"] = time.monotonic()
        place = self._store.path.resolve()
        if self._options.retain:
            images = {name: os.urandom(16).hex() for name in self._control.welcome.disks}
            self._copy = self._control.retain(place, self._id, images)
        else:
            self._copy = self._control.copy(place, self._parents, self._options.rate)
        if self._guest is not None:
            self._info = self._guest.info()
            if self._options.screenshot:
                self._take_screen(self._guest)

    def _take_screen(self, guest: machine.Machine) -> None:
        """After the switch and QEMU's resume: the stop is none the longer.  It is a checkpoint without one, too."""
        with self._timed("screenshot"):
            try:
                self._screen = screen.take(guest.session.execute, self.vm.run)
            except errors.BlkckptError as error:
                self._notes.append(f"no screenshot: {error}")

    def _await_memory(self) -> None:
        contents.prepare()
        self._pump(lambda: self._received is not None)

    def _end_turn(self) -> None:
        """QEMU talks to one QMP connection at a time: ours ends, so that the next checkpoint can have one."""
        if self._guest is not None:
            self._guest.session.close()
        self._parted = True
        self._turn.give_back()

    def _await_copy(self) -> None:
        self._pump(lambda: self._copied is not None)

    def _check_migration(self, *, background: bool) -> None:
        if not background:
            self._pump(self.guest.migration_ended)
        self.guest.check_completed(background=background)

    def _pump(self, done: Callable[[], bool]) -> None:
        """Look after the receiver and the copy until *done*; asking about the copy renews the lease."""
        moved, before, asked = time.monotonic(), None, 0.0
        while not done():
            memory = self._look_after_memory()
            if self._copy is None and time.monotonic() - asked > LEASE_INTERVAL:
                asked = time.monotonic()
                self._control.status()
            now = (memory, self._look_after_copy())
            if now != before:
                moved, before = time.monotonic(), now
            if time.monotonic() - moved > STALL_SECONDS:
                raise errors.DeadlineError(f"nothing has moved for {STALL_SECONDS:g} s while saving the checkpoint")

    def _look_after_memory(self) -> tuple[int, int]:
        if self._receiver is None or self._received is not None:
            return (0, 0)
        try:
            self._received = self._receiver.wait(LOOK_INTERVAL)
        except errors.BlkckptError as error:
            raise self.guest.failed() or error from error
        if self._received is not None:
            self._timings["memory"] = time.monotonic() - self._begun["memory"]
        done, total = self._receiver.progress
        self._progress("memory", total if self._received else done, total)
        return (done, total)

    def _look_after_copy(self) -> tuple[int, int]:
        if self._copy is None or self._copied is not None:
            return (0, 0)
        busy = self._receiver is not None and self._received is None
        state = self._control.wait(self._copy, 0.0 if busy else 1.0)
        if state.failure:
            self._control.finish(self._copy, 1.0)  # raises it as its class
        self._progress("disks", state.done, state.total)
        if state.state == messages.DONE:
            self._timings["copy"] = time.monotonic() - self._begun["copy"]
            self._copied = state.result["disks"]
        return (state.done, state.total)

    def _restore_capabilities(self) -> None:
        self.guest.restore_settings()

    # --- the commit point and after ---

    def _publish(self) -> None:
        assert self._copied is not None
        copied = sorted(self._copied.items())
        disks = tuple(manifest.DiskImage(name, str(one["image"]), int(one["size"])) for name, one in copied)
        consistency = "machine" if self._guest else "filesystem" if self._agent else "crash"
        built = manifest.Manifest(
            vm=self.vm.name,
            name=self.name,
            id=self._id,
            created_ns=self._created_ns,
            disks=disks,
            parent=self._history.parent(self._created_ns),
            memory=self._received.memory if self._received else None,
            machine=self._info,
            consistency=consistency,
            timings=dict(self._timings),
            notes=tuple(self._notes),
            group=self._meeting.info() if self._meeting else None,
            retained=self._options.retain,
        )
        self._publishing = True
        with self._timed("publish"), contextlib.ExitStack() as claims:
            if built.retained:
                keeping.refer(self.vm, self._store, built, claims)
            self._store.put_manifest(built, self._options.labels)
        self._published = built
        if self._screen is not None:
            self._store.add_evidence(built, png=self._screen, source=evidence.AT_CHECKPOINT)

    def _commit(self) -> None:
        with self._timed("commit"):
            self._wait_job("commit", self._control.commit())

    def _wait_job(self, stage: str, job: str) -> None:
        moved, before = time.monotonic(), -1
        while (state := self._control.wait(job, 1.0)).state == messages.RUNNING:
            self._progress(stage, state.done, state.total)
            if state.done != before:
                moved, before = time.monotonic(), state.done
            if time.monotonic() - moved > STALL_SECONDS:
                raise errors.DeadlineError(f"the disks' {stage} has not moved for {STALL_SECONDS:g} s")
        self._control.finish(job, 1.0)
        self._progress(stage, state.total, state.total)

    def finished(self, total: float, error: BaseException | None) -> manifest.Manifest:
        """The manifest, with what could only be known after it was durable."""
        assert self._published is not None
        if error is not None:
            self._notes.append(f"the disks were left to return to rest by themselves: {error or 'interrupted'}")
        self._timings["total"] = total
        self._published = dataclasses.replace(self._published, timings=dict(self._timings), notes=tuple(self._notes))
        with contextlib.suppress(errors.BlkckptError):
            self._store.amend_manifest(self._published)
        self._forget_old_memory()
        return self._published

    def _forget_old_memory(self) -> None:
        with contextlib.suppress(errors.BlkckptError):
            under_way = {one["checkpoint"] for one in self._control.status()["rounds"]}
            self._history.forget_memory(self._options.keep_memory, under_way)

    # --- taking back ---

    def _stop_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.stop()

    def _abort_disks(self) -> None:
        """Back to rest.  Without a connection the server does it by itself (D7)."""
        if self._prepared:
            with contextlib.suppress(client.GoneError):
                self._wait_job("abort", self._control.abort())

    def _withdraw_manifest(self) -> None:
        """Only ours: another of the same name may have been there first."""
        if self._publishing:
            with contextlib.suppress(errors.NotFoundError):
                if self._store.manifest(self.vm.name, self.name).id == self._id:
                    self._store.remove(self.vm.name, self.name, pinned=True)
                    if self._options.retain:
                        with contextlib.suppress(client.GoneError):
                            self._wait_job("commit", self._control.review())

    def _remove_memory(self) -> None:
        if self._receiver is not None:
            shutil.rmtree(self._memory_directory, ignore_errors=True)

    def close(self) -> None:
        """Whatever happened: no child of ours stays, but for a guard with a guest to bring back."""
        if self._receiver is not None:
            self._receiver.stop()
        if self._guest is not None and self._guard is not None:
            self._guest.session.close()
        if self._agent is not None:
            self._agent.close()
        if self._guard is not None:
            self._guard.abandon()
        if self._released is not None:
            self._released.reap()
        if self._stream is not None and not (self._guest and self._guest.migrating):
            os.close(self._stream)  # else a thread of ours still reads it

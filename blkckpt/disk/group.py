"""All disks of one VM: the checkpoints under way, and what happens at start, at stop and after a crash.

Each checkpoint is a :class:`rounds.Round` (its stages are there).  The state of the disks as a whole follows::

    REST          no checkpoint is under way, no overlay is left
    PREPARED, ARMED, SWITCHED                      the stage of the newest checkpoint under way
    COMMITTING    none is, and overlays are on their way down

A new checkpoint may be prepared in any of them but PREPARED and ARMED.  An overlay whose checkpoint is over is free:
it is committed into the layer below it, whatever that is, one overlay at a time, the lowest free one first.  That
leaves the content of every view the same (D1): a frozen chain that has the layer below has the overlay too, except
that of the overlay's own checkpoint, which is over.

*Locks.*  ``_control`` serialises what a driver asks; it may be held for a sync.  The emptier has one of its own, held
while overlays are committed.  ``_states.lock`` makes one step of working a disk's state out, saving it, and taking it
over.  ``_gate_lock`` guards the rounds and the barrier, and is the lock of every disk's gate: the switch takes only
this one, so it waits for nobody, and a request that finds the barrier passed switches all disks by itself.  Order:
control or the emptier's, states, gate.

*State file.*  It names the layers that exist, and nothing else is needed: the switch writes nothing, because an empty
overlay is harmless and a filled one is found by its map.  A server that finds overlays at its start has no driver, so
it commits them back: a checkpoint whose manifest was durable loses nothing by that, one whose was not never existed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blkckpt import durable, errors, log, paths, units
from blkckpt.disk import api, background, copier, copying, disk, leaving, member, retaining, rounds, stack, statefile
from blkckpt.disk import barrier as barriers
from blkckpt.disk import format as formats
from blkckpt.disk import job as jobs
from blkckpt.disk import states as saved
from blkckpt.store import lowly

_log = log.get(__name__)
State = api.State
Stage = rounds.Stage
STOP_SECONDS = 30.0
COPY_COMMAND = lowly.command(sys.executable, "blkckpt.store.ingest")


class DiskGroup:
    """All disks of one VM; one state file, so that all change state in one atomic replace.

    Methods that take a *checkpoint* mean the newest under way when they are given none.
    """

    def __init__(self, vm: paths.VmPaths, file: statefile.StateFile, wanted: retaining.Wanted) -> None:
        """Use :meth:`open`."""
        self._vm = vm
        self._file = file
        self._control = threading.RLock()
        self._states = saved.States(file)
        self._gate_lock = threading.Lock()
        self._members = self._states.members
        self._under_way = rounds.UnderWay(self._gate_lock)
        self.checkpoints = self._under_way.names
        self._armed: rounds.Round | None = None
        self._warning: str | None = None
        self._jobs = jobs.Registry()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._filler = background.Filler(file, self._warn)
        self._leaver = leaving.Leaver(self._states, self._under_way, self._warn, self._stop)
        held = self._under_way.held_locked
        self._emptier = background.Emptier(self._states, self._gate_lock, held, self._warn, self._stop)
        self.retained = retaining.Retainer(self._states, self._gate_lock, held, wanted)
        self._started = False
        self._closed = False
        self.disks: Mapping[str, disk.Disk] = {}

    # ---- create, open, start ----

    @classmethod
    def create(cls, vm: paths.VmPaths, vm_id: str, disks: Sequence[api.DiskSpec]) -> None:
        """Write the first state.json (and the files of disks with a source)."""
        statefile.create(vm, vm_id, disks)

    @classmethod
    def open(
        cls,
        vm: paths.VmPaths,
        *,
        open_image: Callable[[api.ImageRef], api.Source],
        wanted: retaining.Wanted = lambda mark: True,
    ) -> DiskGroup:
        """Lock (D12), load, recover; starts no thread.  Every layer is checked, and damage is an error with a name.

        *wanted* says which retained checkpoints are still to be kept.
        """
        file = statefile.StateFile(vm)
        try:
            self = cls(vm, file, wanted)
            self._open_members(open_image)
        except BaseException:
            file.close()
            raise
        return self

    def _open_members(self, open_image: Callable[[api.ImageRef], api.Source]) -> None:
        state, boot = self._file.state, formats.boot_id()
        clean, same_boot = state.clean, state.boot == boot
        with contextlib.ExitStack() as undo:
            for entry in state.disks:
                place = stack.Place(self._vm, entry.name, entry.size, boot)
                image = open_image(entry.source) if entry.source is not None else None
                view, opened = stack.open_view(place, entry, image, clean=clean)
                added = member.Member(place, opened, view, self._gate_lock, self._ask_barrier)
                undo.callback(added.close)
                self._members[entry.name] = added
            changes = {name: item.state for name, item in self._members.items()}
            self._file.save(changes, clean=False, boot=boot)
            undo.pop_all()
        self._file.sweep()
        if not clean:
            how = "server died" if same_boot else "machine went down"
            _log.warning("unclean stop: the %s", how, extra={"fields": {"vm": self._vm.name}})
        self.disks = {name: item.disk for name, item in self._members.items()}

    def start(self, fill_after: float = 0.0) -> None:
        """Start the background work, restored disks' fill *fill_after* seconds later.  Call after nbdkit's fork."""
        with self._control:
            self._started, self._filler.after = True, fill_after
            threading.Thread(target=self._watch, name="disk-watch", daemon=True).start()
            kept = any(overlay.retained for item in self._members.values() for overlay in item.state.overlays)
            if kept or self._state() is State.COMMITTING:
                self._leave("commit", lambda running: None)
            else:
                self._rest()

    def _find(self, checkpoint: str | None, doing: str) -> rounds.Round:
        """The checkpoint of that name, else the newest; StateError if it is not under way."""
        self._check_open()
        return self._under_way.find(checkpoint, doing)

    # ---- 802 to 810 ----

    def prepare(self, checkpoint: str, lease: float | None = None, *, retain: bool = False) -> None:
        """802.  *lease*: seconds until the checkpoint is given up by itself (D7).  *retain*: it will not be copied.

        StateError while another has not switched yet, or when too many are under way.
        """
        units.check_name(checkpoint, "checkpoint name")
        with self._control:
            self._check_open()
            self._under_way.check_begin(checkpoint, list(self._members.values()))
            if retain:
                self.retained.check_room(checkpoint)
            self._check_sound()
            one = self._under_way.begin(checkpoint, lease, retain=retain)
            try:
                self._filler.stop()
                for item in self._members.values():
                    item.settle()
                with self._states.lock:
                    made = rounds.make_overlays(self._members, self._file, one)
                    with self._gate_lock:
                        rounds.put_overlays_locked(self._members, one, made)
            except BaseException:
                self._under_way.remove(one)
                self._rest()
                raise

    def renew(self, lease: float, checkpoint: str | None = None) -> None:
        """The driver is alive: *lease* more seconds from now.  No effect when nothing is under way."""
        with contextlib.suppress(errors.StateError):
            one = self._find(checkpoint, "renew")
            if one.lease is not None:
                one.lease = time.monotonic() + lease

    def arm(self, barrier: barriers.Barrier, deadline: float, checkpoint: str | None = None) -> None:
        """Flush, then let *barrier* decide when to switch.  *deadline* is a ``time.monotonic()`` value."""
        with self._control:
            one = self._find(checkpoint, "arm")
            one.require(Stage.PREPARED, "arm")
            self._check_sound()
            for item in self._members.values():
                item.disk.flush()
            with self._gate_lock:
                one.require(Stage.PREPARED, "arm")
                for each in self._members.values():
                    each.arm_locked()
                one.barrier, one.deadline, one.violation = barrier, deadline, None
                one.stage, self._armed = Stage.ARMED, one
            self._wake.set()

    def switch(self, checkpoint: str | None = None) -> api.ArmState:
        """810 now, all disks at one instant.  Idempotent."""
        with self._control:
            one = self._find(checkpoint, "switch")
            self._check_sound()
            with self._gate_lock:
                if one.stage in (Stage.PREPARED, Stage.ARMED) and one.violation is None:
                    self._switch_locked(one)
            return one.outcome

    def poll_barrier(self, checkpoint: str | None = None) -> api.ArmState:
        """Ask the barrier; switch if it has been passed."""
        one = self._find(checkpoint, "poll the barrier")
        self._ask_barrier()
        with self._gate_lock:
            return one.outcome

    def disarm(self, checkpoint: str | None = None) -> None:
        """Back to PREPARED if ARMED; no effect otherwise."""
        one = self._find(checkpoint, "disarm")
        with self._gate_lock:
            if one.stage is Stage.ARMED:
                self._disarm_locked(one, None)

    def _ask_barrier(self) -> None:
        """Look, and switch or disarm if that is what it shows.  Any thread; called before every armed write."""
        one = self._armed
        barrier = one.barrier if one is not None else None
        if one is None or barrier is None:
            return
        try:
            verdict, reason = barrier.poll(), barrier.reason
        except Exception as error:
            verdict, reason = barriers.BarrierState.VIOLATED, f"the barrier cannot be looked at: {error}"
        if verdict is barriers.BarrierState.WAITING:
            return
        with self._gate_lock:
            if one.barrier is not barrier:
                return
            if verdict is barriers.BarrierState.PASSED:
                self._switch_locked(one)
            else:
                self._disarm_locked(one, reason)

    def _switch_locked(self, one: rounds.Round) -> None:
        member.switch_locked(self._members, one.parts)
        one.instant = time.monotonic_ns()
        one.barrier = one.deadline = self._armed = None
        one.stage = Stage.SWITCHED

    def _disarm_locked(self, one: rounds.Round, violation: str | None) -> None:
        for item in self._members.values():
            item.disarm_locked()
        one.barrier = one.deadline = self._armed = None
        one.violation = violation
        one.stage = Stage.PREPARED

    # ---- 830 ----

    def start_copy(
        self,
        store: str,
        parents: Mapping[str, str | None],
        *,
        rate: int | None = None,
        label: str = "",
        command: Sequence[str] | None = None,
        checkpoint: str | None = None,
    ) -> jobs.Job:
        """830.  Result: ``{"disks": {name: {"image", "size", "read", "new", "chunks", "seconds"}}}``.

        *parents* are images to compare with where the changes since none are known.  Copies of earlier checkpoints
        come first.
        """
        with self._control:
            one = self._find(checkpoint, "copy")
            self._check_to_save(one, "copy", retain=False)
            program = tuple(command or COPY_COMMAND)
            options = {
                name: copier.CopyOptions(program, store, rate, f"{label}/{name}" if label else name)
                for name in self._members
            }
            work = copying.Work(one, self._members, self._under_way, options, store, parents, self._check_sound)
            one.copying = self._jobs.run("copy", work.run)
            return one.copying

    def start_retain(self, marks: Mapping[str, formats.Retained], checkpoint: str | None = None) -> jobs.Job:
        """Instead of 830: the chain below stays where it is.  *marks* are the disks'.  Result as a copy's."""
        with self._control:
            one = self._find(checkpoint, "retain")
            self._check_to_save(one, "retain", retain=True)
            if set(marks) != set(self._members):
                raise errors.InputError(f"checkpoint {one.checkpoint} has other disks than are to be retained")
            one.copying = self._jobs.run("retain", lambda running: self.retained.keep(one, marks))
            return one.copying

    def _check_to_save(self, one: rounds.Round, doing: str, *, retain: bool) -> None:
        one.require(Stage.SWITCHED, doing)
        if one.retain is not retain:
            raise errors.StateError(f"cannot {doing}: checkpoint {one.checkpoint} was not prepared for that")
        if one.images is not None or (one.copying is not None and one.copying.running):
            raise errors.StateError(f"the disks of checkpoint {one.checkpoint} are being copied already")

    # ---- 834, abort ----

    def commit(self, checkpoint: str | None = None) -> jobs.Job:
        """834, when the manifest is durable.  StateError unless the copy succeeded.

        The overlays of a checkpoint that is retained stay, and the VM goes on in them.
        """
        with self._control:
            one = self._find(checkpoint, "commit")
            one.require(Stage.SWITCHED, "commit")
            self._check_sound()
            if one.images is None:
                raise errors.StateError("cannot commit: the disks have not been copied; abort instead")
            if one.retain:
                one.stage, one.lease = Stage.OVER, None
                return self._leave("commit", lambda running: self._leaver.give_up([one], [one]))
            images = one.images
            with self._states.lock:
                parts = one.parts
                self._states.replace(
                    {name: item.keep_changes(parts[name], images[name]) for name, item in self._members.items()}
                )
            self._under_way.remember(one)
            self._under_way.remove(one)
            return self._leave("commit", lambda running: self._leaver.let_go(one))

    def abort(self, checkpoint: str | None = None) -> jobs.Job:
        """Give up that checkpoint, or without a name all of them, and go back to rest as far as others allow.

        A commit that has begun is not undone: the job returned ends when it has.
        """
        with self._control:
            self._check_open()
            if self._state() is State.REST:
                return jobs.Job("abort").run(lambda running: {})
            with self._gate_lock:
                leaving = self._under_way.named_locked(checkpoint)
                chosen = [one for one in leaving if one.stage is not Stage.OVER]
                for one in chosen:
                    if one.stage is Stage.ARMED:
                        self._disarm_locked(one, one.violation)
                    one.stage, one.lease = Stage.OVER, None
            return self._leave("abort", lambda running: self._leaver.give_up(chosen, leaving))

    # ---- retained checkpoints ----

    def flatten(self, checkpoint: str, *, rate: int | None = None, command: Sequence[str] | None = None) -> jobs.Job:
        """Copy the retained *checkpoint* into its store; it stays retained until its manifest says otherwise."""
        with self._control:
            self._check_open()
            self.retained.of(checkpoint)
            program, label = tuple(command or COPY_COMMAND), f"{self._vm.name}@{checkpoint}"
            return self._jobs.run(
                "flatten", lambda running: self.retained.flatten(checkpoint, program, rate, label, running)
            )

    def review(self) -> jobs.Job:
        """Let go of retained checkpoints that are none any more, and commit what is free then."""
        with self._control:
            self._check_open()
            return self._leave("commit", lambda running: None)

    def _leave(self, kind: str, first: Callable[[jobs.Job], None]) -> jobs.Job:
        """A job that does *first*, and then commits every overlay that is free, or that nobody wants retained."""

        def work(running: jobs.Job) -> Mapping[str, Any]:
            first(running)
            self.retained.review()
            self._emptier.run(running.progress)
            self._rest()
            return {}

        return self._jobs.run(kind, work)

    def _rest(self) -> None:
        """If nothing is under way: fill restored disks."""
        with self._gate_lock:
            if self._under_way.rounds or self._emptier.busy_locked or not self._started or self._stop.is_set():
                return
            self._filler.start([item for item in self._members.values() if item.filling])

    def job(self, job_id: str) -> jobs.Job:
        """The job with that id (the last ones are remembered); NotFoundError."""
        return self._jobs.find(job_id)

    # ---- background ----

    def _watch(self) -> None:
        """Mind the arming deadline and the drivers' leases (D7)."""
        while not self._stop.is_set():
            when = self._under_way.next_time()
            self._wake.wait(1.0 if when is None else min(1.0, max(0.0, when - time.monotonic())))
            self._wake.clear()
            with contextlib.suppress(errors.BlkckptError):
                self._expire(time.monotonic())
                if self.retained.unclaimed():
                    self.review()

    def _expire(self, now: float) -> None:
        with self._gate_lock:
            armed = self._armed
            if armed is not None and armed.deadline is not None and now >= armed.deadline:
                self._disarm_locked(armed, "the guest was not resumed before the deadline")
        for one in self._under_way.take_silent(now) if not self._stop.is_set() else ():
            self._warn(f"the driver of checkpoint {one.checkpoint} went silent: it is given up")
            self.abort(one.checkpoint)

    def _warn(self, text: str | None) -> None:
        self._warning = text
        if text is not None:
            _log.warning(text, extra={"fields": {"vm": self._vm.name}})

    def _check_open(self) -> None:
        if self._closed:
            raise errors.StateError(f"the disks of VM {self._vm.name} are not served any more")

    def _check_sound(self) -> None:
        """No checkpoint is acknowledged over a file whose fsync failed (D9)."""
        for item in self._members.values():
            item.check_sound()

    def _state(self) -> State:
        with self._gate_lock:
            return self._state_locked()

    def _state_locked(self) -> State:
        for one in reversed(self._under_way.rounds):
            if one.stage in (Stage.PREPARED, Stage.ARMED, Stage.SWITCHED):
                return State(one.stage.value)
        if self._under_way.rounds or self._emptier.busy_locked:
            return State.COMMITTING
        return State.REST

    def status(self) -> api.GroupStatus:
        with self._gate_lock:
            state, under_way = self._state_locked(), list(self._under_way.rounds)
        latest = self._jobs.latest()
        newest = under_way[-1] if under_way else None
        return api.GroupStatus(
            state=state,
            checkpoint=newest.checkpoint if newest else None,
            violation=newest.violation if newest else None,
            instant=newest.instant if newest else None,
            rounds=tuple(one.status for one in under_way),
            job=latest.status() if latest is not None else None,
            warning=self._warning,
            disks=tuple(item.status() for item in self._members.values()),
        )

    # ---- the end ----

    def close(self) -> None:
        """Clean stop: durable maps, clean flag, changed bits trusted (D13).  Idempotent.

        A commit under way stops after its window and goes on at the next start.  If something cannot be made durable
        the files are let go all the same, the state stays unclean, and the error is raised.
        """
        with self._control:
            if self._closed:
                return
            self._closed = True
            self._halt()
            try:
                self._settle()
            finally:
                self._release()

    def abandon(self) -> None:
        """Let go of everything as the process's death would: no flush, no state.  For harnesses."""
        with self._control:
            if not self._closed:
                self._closed = True
                self._halt()
                self._release()

    def _halt(self) -> None:
        self._stop.set()
        self._wake.set()
        for known in self._jobs.running():
            known.cancel()
            if not known.wait(STOP_SECONDS):
                raise errors.DeadlineError(f"the {known.kind} job did not stop; the next start treats this as a crash")
        self._filler.stop()

    def _settle(self) -> None:
        with self._gate_lock:
            if self._armed is not None:
                self._disarm_locked(self._armed, self._armed.violation)
        for item in self._members.values():
            item.disk.flush()
            item.state = item.merge_changes()
            item.save_changes()
        durable.sync_directory(self._vm.layers)
        self._file.save({name: item.state for name, item in self._members.items()}, clean=True)
        for item in self._members.values():
            item.remove_live()

    def _release(self) -> None:
        for item in self._members.values():
            item.close()
        self._file.close()

"""All disks of one VM: the state machine of a checkpoint, and what happens at start, at stop and after a crash.

States, and the method of each arrow::

    REST ──prepare──> PREPARED ──arm──> ARMED ──(barrier passed)──> SWITCHED ──commit──> COMMITTING ──> REST
                          │  <──disarm, violation, deadline──┘          │                    ▲
                          ├──────────────switch (explicit)──────────────┘                    │
                          └───────────────────────── abort, lease over ──────────────────────┘

*Locks.*  ``_control`` serialises what a driver asks; it may be held for a sync.  ``_gate_lock`` guards the state and
the barrier, and is the lock of every disk's gate: the switch takes only this one, so it waits for nobody, and a
request that finds the barrier passed switches all disks by itself.  ``_saving`` serialises the state file.  Order:
control, saving, gate.

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
from typing import Any, TypeVar

from blkckpt import durable, errors, log, paths, units
from blkckpt.disk import api, background, chain, copier, disk, layer, member, stack, statefile
from blkckpt.disk import barrier as barriers
from blkckpt.disk import format as formats
from blkckpt.disk import job as jobs

_log = log.get(__name__)
State = api.State
T = TypeVar("T")
STOP_SECONDS = 30.0
COPY_COMMAND = (sys.executable, "-m", "blkckpt.store.ingest")


class DiskGroup:
    """All disks of one VM; one state file, so that all change state in one atomic replace."""

    def __init__(self, vm: paths.VmPaths, file: statefile.StateFile) -> None:
        """Use :meth:`open`."""
        self._vm = vm
        self._file = file
        self._control = threading.RLock()
        self._gate_lock = threading.Lock()
        self._members: dict[str, member.Member] = {}
        self._state = State.REST
        self._barrier: barriers.Barrier | None = None
        self._deadline: float | None = None
        self._lease: float | None = None
        self._violation: str | None = None
        self._instant: int | None = None
        self._warning: str | None = None
        self._jobs: dict[str, jobs.Job] = {}
        self._images: dict[str, str] | None = None  # what the copy made, until commit or abort
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._filler = background.Filler(file, self._warn)
        self._started = False
        self._closed = False
        self.disks: Mapping[str, disk.Disk] = {}

    # ---- create, open, start ----

    @classmethod
    def create(cls, vm: paths.VmPaths, vm_id: str, disks: Sequence[api.DiskSpec]) -> None:
        """Write the first state.json (and the files of disks with a source)."""
        statefile.create(vm, vm_id, disks)

    @classmethod
    def open(cls, vm: paths.VmPaths, *, open_image: Callable[[api.ImageRef], api.Source]) -> DiskGroup:
        """Lock (D12), load, recover; starts no thread.  Every layer is checked, and damage is an error with a name."""
        file = statefile.StateFile(vm)
        try:
            self = cls(vm, file)
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
            self._file.save(changes, clean=False, boot=boot, checkpoint=None)
            undo.pop_all()
        self._file.sweep()
        if not clean:
            how = "server died" if same_boot else "machine went down"
            _log.warning("unclean stop: the %s", how, extra={"fields": {"vm": self._vm.name}})
        if any(item.to_commit() for item in self._members.values()):
            self._state = State.COMMITTING
        self.disks = {name: item.disk for name, item in self._members.items()}

    def start(self) -> None:
        """Start the background work.  Call after nbdkit's fork."""
        with self._control:
            self._started = True
            threading.Thread(target=self._watch, name="disk-watch", daemon=True).start()
            if self._state is State.COMMITTING:
                self._run("commit", self._go_to_rest)
            else:
                self._start_fill()

    # ---- 802 to 810 ----

    def prepare(self, checkpoint: str, lease: float | None = None) -> None:
        """802.  StateError if a checkpoint is under way.  *lease*: seconds until the disks abort by themselves (D7)."""
        units.check_name(checkpoint, "checkpoint name")
        with self._control:
            self._require(State.REST, doing=f"prepare checkpoint {checkpoint}")
            self._check_sound()
            self._filler.stop()
            try:
                self._make_overlays(checkpoint)
            except BaseException:
                self._start_fill()
                raise
            with self._gate_lock:
                for item in self._members.values():
                    item.put_overlay_locked()
                self._state = State.PREPARED
            self._violation = self._instant = self._images = None
            self._lease = None if lease is None else time.monotonic() + lease

    def _make_overlays(self, checkpoint: str) -> None:
        members = self._members
        try:
            changes = {name: item.make_overlay() for name, item in members.items()}
            durable.sync_directory(self._vm.layers)
            self._file.save(changes, checkpoint=checkpoint)
        except BaseException as error:
            for item in members.values():
                item.drop_overlay()
            self._file.sweep()
            if isinstance(error, OSError):
                raise errors.from_os_error(error, f"preparing checkpoint {checkpoint}") from error
            raise
        for name, item in members.items():
            item.state = changes[name]

    def renew(self, lease: float) -> None:
        """The driver is alive: *lease* more seconds from now.  No effect when nothing is under way."""
        if self._lease is not None:
            self._lease = time.monotonic() + lease

    def arm(self, barrier: barriers.Barrier, deadline: float) -> None:
        """Flush, then let *barrier* decide when to switch.  *deadline* is a ``time.monotonic()`` value."""
        with self._control:
            self._require(State.PREPARED, doing="arm")
            self._check_sound()
            for item in self._members.values():
                item.disk.flush()
            with self._gate_lock:
                for each in self._members.values():
                    each.arm_locked()
                self._barrier, self._deadline, self._violation = barrier, deadline, None
                self._state = State.ARMED
            self._wake.set()

    def switch(self) -> api.ArmState:
        """810 now, all disks at one instant.  Idempotent."""
        with self._control:
            self._check_sound()
            with self._gate_lock:
                if self._state in (State.PREPARED, State.ARMED) and self._violation is None:
                    self._switch_locked()
            return self._arm_state("switch")

    def poll_barrier(self) -> api.ArmState:
        """Ask the barrier; switch if it has been passed."""
        self._ask_barrier()
        return self._arm_state("poll the barrier")

    def disarm(self) -> None:
        """Back to PREPARED if ARMED; no effect otherwise."""
        with self._gate_lock:
            if self._state is State.ARMED:
                self._disarm_locked(None)

    def _ask_barrier(self) -> None:
        """Look, and switch or disarm if that is what it shows.  Any thread; called before every armed write."""
        barrier = self._barrier
        if barrier is None:
            return
        try:
            verdict, reason = barrier.poll(), barrier.reason
        except Exception as error:
            verdict, reason = barriers.BarrierState.VIOLATED, f"the barrier cannot be looked at: {error}"
        if verdict is barriers.BarrierState.WAITING:
            return
        with self._gate_lock:
            if self._barrier is not barrier:
                return
            if verdict is barriers.BarrierState.PASSED:
                self._switch_locked()
            else:
                self._disarm_locked(reason)

    def _switch_locked(self) -> None:
        for item in self._members.values():
            item.switch_locked()
        self._instant = time.monotonic_ns()
        self._barrier = self._deadline = None
        self._state = State.SWITCHED

    def _disarm_locked(self, violation: str | None) -> None:
        for item in self._members.values():
            item.disarm_locked()
        self._barrier = self._deadline = None
        self._violation = violation
        self._state = State.PREPARED

    def _arm_state(self, doing: str) -> api.ArmState:
        with self._gate_lock:
            if self._state not in (State.PREPARED, State.ARMED, State.SWITCHED):
                raise errors.StateError(
                    f"cannot {doing}: no checkpoint is under way (the disks are {self._state.value})"
                )
            switched, waiting = self._state is State.SWITCHED, self._state is State.ARMED
            return api.ArmState(switched, waiting, self._violation, self._instant)

    # ---- 830, 834, abort ----

    def start_copy(
        self,
        store: str,
        parents: Mapping[str, str | None],
        *,
        rate: int | None = None,
        label: str = "",
        command: Sequence[str] | None = None,
    ) -> jobs.Job:
        """830.  Result: ``{"disks": {name: {"image", "size", "read", "new", "chunks", "seconds"}}}``."""
        with self._control:
            self._require(State.SWITCHED, doing="copy")
            before = self._jobs.get("copy")
            if self._images is not None or (before is not None and before.running):
                raise errors.StateError("the disks of this checkpoint are being copied already")
            options = {
                name: copier.CopyOptions(
                    tuple(command or COPY_COMMAND), store, parents.get(name), rate, f"{label}/{name}" if label else name
                )
                for name in self._members
            }
            return self._run("copy", lambda running: self._copy(running, options))

    def _copy(self, running: jobs.Job, options: Mapping[str, copier.CopyOptions]) -> Mapping[str, Any]:
        frozen = [item.frozen(options[name].parent) for name, item in self._members.items()]
        results = copier.run_all(frozen, options, running)
        self._check_sound()
        self._images = {name: str(result["image"]) for name, result in results.items()}
        return {"disks": results}

    def commit(self) -> jobs.Job:
        """834, when the manifest is durable.  StateError unless the copy succeeded."""
        with self._control:
            self._require(State.SWITCHED, doing="commit")
            self._check_sound()
            images = self._images
            if images is None:
                raise errors.StateError("cannot commit: the disks have not been copied; abort instead")
            changes = {name: item.keep_changes(images[name]) for name, item in self._members.items()}
            self._file.save(changes)
            return self._leave(changes)

    def abort(self) -> jobs.Job:
        """From any state back to rest.  A commit that has begun is not undone: its job is returned."""
        with self._control:
            state = self._state
            if self._closed:
                raise errors.StateError(f"the disks of VM {self._vm.name} are not served any more")
            if state is State.REST:
                return jobs.Job("abort").run(lambda running: {})
            if state is State.COMMITTING:
                return self._jobs.get("abort") or self._jobs.get("commit") or self._run("commit", self._go_to_rest)
            return self._leave(None)

    def _leave(self, changes: Mapping[str, formats.DiskState] | None) -> jobs.Job:
        """Go back to rest: with *changes* saved (commit), or giving the checkpoint up."""
        with self._gate_lock:
            if self._state is State.ARMED:
                self._disarm_locked(self._violation)
            self._state = State.COMMITTING
        self._lease = None
        self._jobs.pop("abort", None)
        if changes is not None:
            self._end_checkpoint(changes)
            return self._run("commit", self._go_to_rest)
        return self._run("abort", self._give_up)

    def _give_up(self, running: jobs.Job) -> Mapping[str, Any]:
        copying = self._jobs.get("copy")
        if copying is not None and copying.running:
            copying.cancel()
            copying.wait()
        changes = {name: item.merge_changes() for name, item in self._members.items()}
        self._patiently(lambda: self._file.save(changes), "giving the checkpoint up")
        self._end_checkpoint(changes)
        return self._go_to_rest(running)

    def _end_checkpoint(self, changes: Mapping[str, formats.DiskState]) -> None:
        self._images = None
        for name, item in self._members.items():
            item.end_checkpoint(changes[name])

    def _go_to_rest(self, running: jobs.Job) -> Mapping[str, Any]:
        """Commit every overlay without a claim to stay, the bottom-most first; always ends (D8), unless stopped."""
        for item in self._members.values():
            while (overlay := item.to_commit()) is not None:
                self._commit_one(item, overlay, running)
        self._patiently(lambda: self._file.save({}, checkpoint=None), "ending the checkpoint")
        self._start_fill()  # before REST: whoever prepares next finds it running and stops it
        with self._gate_lock:
            self._state = State.REST
        return {}

    def _commit_one(self, item: member.Member, overlay: layer.Overlay, running: jobs.Job) -> None:
        pace = jobs.Pace(self._stop, lambda: item.disk.activity)

        def commit() -> formats.DiskState:
            item.empty(overlay, pace, running.progress)
            state = item.without(overlay)
            self._file.save({state.name: state})
            return state

        state = self._patiently(commit, f"committing disk {item.disk.name}")
        item.forget(overlay, state, self._stop)

    def _patiently(self, work: Callable[[], T], doing: str) -> T:
        return background.patiently(work, doing, self._warn, self._stop)

    def job(self, job_id: str) -> jobs.Job:
        """The job with that id (the last of each kind is remembered); NotFoundError."""
        for known in list(self._jobs.values()):
            if known.id == job_id:
                return known
        raise errors.NotFoundError(f"no job {job_id}")

    def _run(self, kind: str, work: Callable[[jobs.Job], Mapping[str, Any]]) -> jobs.Job:
        started = self._jobs[kind] = jobs.Job(kind)
        return started.start(work)

    # ---- background ----

    def _watch(self) -> None:
        """Mind the arming deadline and the driver's lease (D7)."""
        while not self._stop.is_set():
            now = time.monotonic()
            times = [when for when in (self._deadline, self._lease) if when is not None]
            self._wake.wait(min(1.0, max(0.0, min(times) - now)) if times else 1.0)
            self._wake.clear()
            with contextlib.suppress(errors.BlkckptError):
                self._expire(time.monotonic())

    def _expire(self, now: float) -> None:
        with self._gate_lock:
            if self._deadline is not None and now >= self._deadline:
                self._disarm_locked("the guest was not resumed before the deadline")
        if self._lease is not None and now >= self._lease and not self._stop.is_set():
            self._lease = None
            _log.warning("the driver of the checkpoint went silent: aborting", extra={"fields": {"vm": self._vm.name}})
            self.abort()

    def _start_fill(self) -> None:
        if self._started and not self._stop.is_set():
            self._filler.start([item for item in self._members.values() if item.filling])

    def _warn(self, text: str | None) -> None:
        self._warning = text
        if text is not None:
            _log.warning(text, extra={"fields": {"vm": self._vm.name}})

    def _require(self, wanted: State, *, doing: str) -> None:
        if self._closed:
            raise errors.StateError(f"cannot {doing}: the disks of VM {self._vm.name} are not served any more")
        if self._state is not wanted:
            name = self._file.state.checkpoint
            about = f" (checkpoint {name})" if name else ""
            raise errors.StateError(f"cannot {doing}: the disks are {self._state.value}{about}, not {wanted.value}")

    def _check_sound(self) -> None:
        """No checkpoint is acknowledged over a file whose fsync failed (D9)."""
        for item in self._members.values():
            reason = chain.failure(item.view)
            if reason is not None:
                raise errors.PoisonedError(f"{reason}; restart the server of VM {self._vm.name}")

    def status(self) -> api.GroupStatus:
        running = next((known for known in list(self._jobs.values()) if known.running), None)
        latest = running or next(reversed(self._jobs.values()), None)
        return api.GroupStatus(
            state=self._state,
            checkpoint=self._file.state.checkpoint,
            violation=self._violation,
            instant=self._instant,
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
        for known in list(self._jobs.values()):
            known.cancel()
            if not known.wait(STOP_SECONDS):
                raise errors.DeadlineError(f"the {known.kind} job did not stop; the next start treats this as a crash")
        self._filler.stop()

    def _settle(self) -> None:
        with self._gate_lock:
            if self._state is State.ARMED:
                self._disarm_locked(self._violation)
        for item in self._members.values():
            item.disk.flush()
            item.state = item.merge_changes()
            item.save_changes()
        durable.sync_directory(self._vm.layers)
        self._file.save({name: item.state for name, item in self._members.items()}, clean=True, checkpoint=None)
        for item in self._members.values():
            item.remove_live()

    def _release(self) -> None:
        for item in self._members.values():
            item.close()
        self._file.close()

"""Takes a checkpoint: performs the actions of :mod:`blkckpt.agent.plan`.

It talks to three peers: the disk
server over the control socket (whose connection is the lease: if we vanish, the disks go back to rest, D7), QEMU over
QMP, and the memory receiver, a child.  Every wait has a deadline (A2); waits for work of unknown length end when
nothing has moved for :data:`STALL_SECONDS`, and renew the lease by asking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from blkckpt import errors, log, paths, units
from blkckpt.agent import checkpoint, consistency, early, machine, plan, rundir, turn
from blkckpt.agent import options as asked
from blkckpt.control import client
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.vm import definition, qmp, writeprotect

CheckpointOptions = checkpoint.CheckpointOptions

logger = log.get(__name__)


def _ignore(stage: str, done: int, total: int | None) -> None:
    return None


def take(
    vm: paths.VmPaths,
    wanted: definition.VmDefinition,
    store: stores.Store,
    options: checkpoint.CheckpointOptions,
    progress: checkpoint.Progress = _ignore,
    meeting: consistency.Meeting | None = None,
    started: early.Children | None = None,
) -> manifest.Manifest:
    """Take a checkpoint of the running *vm* into *store*; returns its manifest.

    With a *meeting* it is one of a group's, and waits for the others where they meet.  *started* are its
    children if they were started early; the caller discards those that were not needed.
    Another checkpoint of the VM may be in its later stages meanwhile (:mod:`turn`).  Raises what failed, after
    everything has been taken back (A3); ``KeyboardInterrupt`` likewise.
    """
    if options.pause not in asked.PAUSES:
        raise errors.InputError(f"--pause {options.pause}: one of {', '.join(asked.PAUSES)}")
    began = time.monotonic()
    with turn.take(vm, options.wait) as held, store.hold(), contextlib.ExitStack() as stack:
        name = _choose_name(store, vm.name, options.name)
        control = stack.enter_context(client.Client.connect(vm.control_socket, name=f"checkpoint {name}"))
        if options.name is None:
            name = _choose_name(store, vm.name, None, {one["checkpoint"] for one in control.status()["rounds"]})
        _check_server(control, wanted)
        guest = None
        if not options.disks_only:
            session = stack.enter_context(_connect(vm, options.qmp))
            guest = machine.Machine(session)
            guest.check()
        mode = _choose_mode(options, guest)
        if meeting is not None and mode not in consistency.MODES:
            raise errors.InputError(
                "a checkpoint of a group stops its guests: leave out --disk-only and --pause barrier"
            )
        work = checkpoint.Checkpoint(vm, store, options, name, control, guest, held, progress, meeting, started)
        stack.callback(work.close)
        return _Runner(plan.Plan(mode), work, began, meeting).run()


def take_group(
    members: Sequence[tuple[paths.VmPaths, definition.VmDefinition, stores.Store]],
    options: checkpoint.CheckpointOptions,
    progress: checkpoint.Progress = _ignore,
) -> list[manifest.Manifest]:
    """One checkpoint of several VMs, of one name, all stopped at the same time (:mod:`consistency`).

    Raises the first error after all of them have been taken back.
    """
    if len({vm.name for vm, _, _ in members}) != len(members):
        raise errors.InputError("a VM is named twice")
    name = options.name or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    options = dataclasses.replace(options, name=name, pause=asked.EXPLICIT)
    meeting = consistency.Meeting([f"{vm.name}@{name}" for vm, _, _ in members])

    def told(vm: str) -> checkpoint.Progress:
        def tell(stage: str, done: int, total: int | None) -> None:
            meeting.check()
            progress(f"{vm}: {stage}", done, total)

        return tell

    takers = {
        f"{vm.name}@{name}": functools.partial(take, vm, wanted, store, options, told(vm.name), meeting)
        for vm, wanted, store in members
    }
    return consistency.together(takers, meeting)


def _connect(vm: paths.VmPaths, path: Path | None) -> qmp.QmpSession:
    """QEMU's monitor: *path*, or our own.

    It is silent while QEMU waits for a fault that nobody answers, as when agent and guard of a snapshot were killed
    together; then the guest's memory is freed.  A guard that is still at work has the monitor too, but it throws away
    what the snapshot saves, so to free the memory harms nothing.
    """
    try:
        return qmp.QmpSession(path or vm.qmp_socket)
    except errors.DeadlineError:
        running = None if path else rundir.find(vm)
        if running is None or running.machine is None or not writeprotect.release(running.machine.pid):
            raise
    logger.warning("the guest was left write-protected, and is freed", extra={"fields": {"vm": vm.name}})
    return qmp.QmpSession(vm.qmp_socket)


def _choose_name(store: stores.Store, vm: str, wanted: str | None, under_way: Collection[str] = ()) -> str:
    """*wanted*, else the time; the disk server refuses a wanted name that is under way."""
    taken = {name for _, name in store.names(vm)}.union(under_way)
    if wanted is not None:
        units.check_name(wanted, "checkpoint name")
        if wanted in taken:
            raise errors.StateError(f"{vm} has a checkpoint {wanted} already; choose another name or remove it")
        return wanted
    base = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in candidates if name not in taken)


def _check_server(control: client.Client, wanted: definition.VmDefinition) -> None:
    served = dict(control.welcome.disks)
    if control.welcome.vm != wanted.name or served != {disk.name: disk.size for disk in wanted.disks}:
        raise errors.StateError(
            f"the disk server serves other disks than VM {wanted.name} is defined with; stop it and start it again"
        )


def _choose_mode(options: checkpoint.CheckpointOptions, guest: machine.Machine | None) -> plan.Mode:
    if guest is None:
        return plan.Mode.FROZEN if options.guest_agent else plan.Mode.DISKS
    refusal = guest.try_background()
    if refusal is None:
        return plan.Mode.EXPLICIT if options.pause == asked.EXPLICIT else plan.Mode.BARRIER
    if options.pause != asked.BARRIER:
        return plan.Mode.STOPPED
    kind = errors.MissingError if "kernel" in str(refusal) else errors.HypervisorError
    raise kind(
        f"this guest cannot be saved while it runs ({refusal}); with --pause explicit it is stopped while its memory "
        "is saved, `blkckpt doctor` says what is missing"
    ) from refusal


class _Runner:
    """Walks the plan.  Decides nothing."""

    def __init__(
        self,
        walk: plan.Plan,
        work: checkpoint.Checkpoint,
        began: float,
        meeting: consistency.Meeting | None = None,
    ) -> None:
        self._plan, self._work, self._began, self._meeting = walk, work, began, meeting
        self._error: BaseException | None = None
        self._troubles: list[str] = []

    def run(self) -> manifest.Manifest:
        actions = self._plan.step(plan.Event.BEGIN)
        while not self._plan.ended:
            event = self._undo(actions) if self._plan.state is plan.State.ABORTING else self._do(actions)
            actions = self._plan.step(event)
        if self._plan.state is plan.State.FINISHED:
            return self._work.finished(time.monotonic() - self._began, self._error)
        assert self._error is not None
        if self._troubles:
            raise _with_troubles(self._error, self._troubles) from self._error
        raise self._error

    def _do(self, actions: tuple[plan.Action, ...]) -> plan.Event:
        try:
            if self._meeting is not None:
                self._meeting.meet(self._plan.state)
            for action in actions:
                logger.debug("%s", action.value)
                self._work.perform(action, self._plan.mode)
        except BaseException as error:  # whatever it is, it is taken back first and raised then
            self._error = error
            if self._meeting is not None:
                self._meeting.fail(self._work.full_name, error)
            fields = {"vm": self._work.vm.name, "state": self._plan.state.value, "error": str(error)}
            logger.debug("checkpoint fails", extra={"fields": fields})
            return plan.Event.FAILED
        return plan.Event.DONE

    def _undo(self, actions: tuple[plan.Action, ...]) -> plan.Event:
        with _undisturbed():
            for action in actions:
                try:
                    self._work.perform(action, self._plan.mode)
                except Exception as error:
                    self._troubles.append(f"could not {action.value}: {error}")
        return plan.Event.FAILED if self._troubles else plan.Event.DONE


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Disregard Ctrl-C while taking back: it is being done, and every action there has a deadline.

    Blocking the signal would not do: another thread would take it, and the interpreter would raise it here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _with_troubles(error: BaseException, troubles: list[str]) -> BaseException:
    """*error*, saying what could not be taken back."""
    if not isinstance(error, errors.BlkckptError):
        logger.error("taking back: %s", "; ".join(troubles))
        return error
    kind = type(error) if type(error) is not qmp.RefusedError else errors.HypervisorError
    return kind(f"{error}; besides, {'; '.join(troubles)}")

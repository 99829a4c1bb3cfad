"""Several machines from one checkpoint, side by side: ``restore`` many times, with what is common done once.

Common: the manifest and the skeleton are read once; the raw memory image is the checkpoint's own, or made once, and
every machine maps a hard link to it, so that all of them share its page cache; the disks read the same chunks.  Each
machine's own: its name, sockets, overlays, network addresses (:func:`blkckpt.restore.machine.readdressed`), generation
id, supervisor, nbdkit and QEMU.

All or none::

    reserve, disks, memory    of all, one after the other     a failure or Ctrl-C removes all that were made
    start, load               side by side, :func:`width` at  a failure or Ctrl-C stops all, and removes them
                              a time; no guest runs yet
    go on                     when all have loaded            likewise; some guests may have run for an instant

so there are as many machines as were asked for, or none (rule R3 holds for a fork as a whole), and what a guest would
do to the world outside does not happen before all can.  Nor do the first take processor time from those that still
start.  Killed in between (SIGKILL, power) it leaves ordinary VMs, listed, running or not, to be used or removed, and at
most one directory with the mark of an unfinished restore.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blkckpt import errors, log, paths
from blkckpt.agent import forget, rundir, supervisor
from blkckpt.restore import disks, machine, ram
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.vm import commandline, network

Progress = Callable[[str, int, int | None], None]

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What to make: VMs called *names* from *checkpoint*."""

    checkpoint: manifest.Manifest
    names: tuple[str, ...]
    readdress: bool = True
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """One machine that goes on."""

    prepared: machine.Prepared
    running: rundir.Running


def width(count: int) -> int:
    """How many start side by side: what a start waits for (sync, process start) is worth two a processor."""
    return max(1, min(count, 2 * (os.cpu_count() or 1)))


def check(home: paths.Home, request: Request) -> None:
    """Refuse at once what cannot be: names that are taken, and what only one machine can have."""
    taken = sorted(set(request.names) & set(home.vm_names()))
    if taken:
        raise errors.StateError(
            f"VM {taken[0]} exists already; choose another prefix (--as) or remove it: blkckpt vm rm {taken[0]}"
        )
    recorded = request.checkpoint.machine
    if request.checkpoint.memory is None or recorded is None:
        return
    if not request.isolated and (reason := network.exclusive(recorded.argv)):
        raise errors.InputError(f"{reason}; fork it cut off from the network: --network isolated")
    if reason := commandline.exclusive(recorded.argv):
        raise errors.InputError(f"{request.checkpoint.vm}@{request.checkpoint.name} cannot be forked: {reason}")


def fork(
    home: paths.Home,
    store: stores.Store,
    request: Request,
    waiting: Mapping[str, supervisor.Detached],
    progress: Progress,
) -> list[Fork]:
    """Make and start them all; *waiting* has a background process for each name.  All or none."""
    check(home, request)
    made: list[machine.Prepared] = []
    try:
        with store.hold():
            _prepare(home, store, request, made, progress)
        return _start(made, waiting)
    except BaseException:
        for name in request.names:
            waiting[name].abandon()
        for one in made:
            _undo(one.vm)
        raise


# --- what is prepared one after the other ---


def _prepare(
    home: paths.Home, store: stores.Store, request: Request, made: list[machine.Prepared], progress: Progress
) -> None:
    """Append a prepared machine for every name to *made*."""
    common: machine.Prepared | None = None
    for name in request.names:
        vm = home.vm(name)
        one = request.checkpoint
        with disks.reserved(vm, store, f"{one.vm}@{one.name}"):
            owner = disks.create(vm, store, one).id
            common = _first(home, vm, store, one, progress) if common is None else _next(vm, common, progress)
            prepared = dataclasses.replace(common, isolated=request.isolated)
            made.append(machine.readdressed(prepared, owner) if request.readdress else prepared)


def _first(
    home: paths.Home, vm: paths.VmPaths, store: stores.Store, one: manifest.Manifest, progress: Progress
) -> machine.Prepared:
    """The first machine; the others have their images from it (:func:`_next`), even when it runs already."""
    prepared = machine.prepare_memory(home, vm, store, one, mode=machine.LAZY, progress=progress)
    if prepared.memory is None:
        return prepared
    kept = dataclasses.replace(prepared.memory, kept=ram.directory(vm))
    return dataclasses.replace(prepared, memory=kept)


def _next(vm: paths.VmPaths, common: machine.Prepared, progress: Progress) -> machine.Prepared:
    lazy = ram.link_or_make(vm, common.memory, common.lazy, progress) if common.memory and common.lazy else common.lazy
    return dataclasses.replace(common, vm=vm, lazy=lazy)


# --- what is done side by side ---


def _start(made: Sequence[machine.Prepared], waiting: Mapping[str, supervisor.Detached]) -> list[Fork]:
    """Start all; the first failure is raised when nobody is starting any more."""
    given_up = threading.Event()

    def begin(one: machine.Prepared) -> Fork:
        if given_up.is_set():
            raise errors.StateError(f"VM {one.vm.name} is not started: another one failed")
        return Fork(one, machine.start(one, _quiet, waiting[one.vm.name], paused=True))

    pool = concurrent.futures.ThreadPoolExecutor(width(len(made)), "fork")
    try:
        starting = [pool.submit(begin, one) for one in made]
        concurrent.futures.wait(starting, return_when=concurrent.futures.FIRST_EXCEPTION)
        for one in starting:
            if one.done():
                one.result()
        ready = [one.result() for one in starting]
        for fork_ in ready:
            machine.go_on(fork_.prepared)
        return ready
    except BaseException:
        given_up.set()
        for detached in waiting.values():
            detached.abandon()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _quiet(_stage: str, _done: int, _total: int | None) -> None:
    """A fork's own share of reading is small, and eight bars for it say nothing."""


def _undo(vm: paths.VmPaths) -> None:
    """As if it had never been; what cannot be removed is said, and hinders nobody else."""
    try:
        forget.forget(vm)
    except errors.BlkckptError as error:
        _log.warning("a fork is left", extra={"fields": {"vm": vm.name, "error": str(error)}})
        with contextlib.suppress(errors.BlkckptError):
            ram.remove(vm)

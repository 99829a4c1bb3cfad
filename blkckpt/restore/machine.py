"""A machine goes on from a checkpoint: everything prepared, QEMU started, its memory given to it, ``cont``.

Steps, and who may fail at each (rule R3)::

    prepare   disks, memory images, command line      a failure leaves nothing of the new VM
    start     supervisor: nbdkit, QEMU with -S        a failure leaves the VM, stopped
    resume    QMP: migrate-incoming, wait, cont       a failure stops what was started

QEMU is started with ``-incoming defer`` and gets the stream through a pipe that is handed over its QMP socket
(``getfd``): no file, port or inherited descriptor is needed, and what QEMU says about a stream it does not like comes
back as an error.  The stream is made while it is sent, by a thread of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shlex
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from blkckpt import errors, paths
from blkckpt.agent import rundir, supervisor
from blkckpt.memory import nics
from blkckpt.restore import disks, fused, ram
from blkckpt.store import manifest
from blkckpt.store import store as stores
from blkckpt.vm import commandline, dialogue, network

LAZY = "lazy"
EAGER = "eager"

COPY_NOTE = (
    "to the outside this is the same machine (MAC addresses, host name, state of its random numbers; only a guest with "
    "a VMGENID device is told): keep it off the original's network, or give it other arguments after --"
)
RAW = "raw"
FUSE = "fuse"
"""Where a lazily restored machine's memory is read from: a raw image, or the store through a mount of its own."""

ADDRESS_NOTE = (
    "its network cards have addresses of their own, but a guest that runs goes on with the one it has read when its "
    "driver was bound: bind the driver anew (or reboot the guest) on a network that it shares with the original"
)
KEPT_NOTE = "the network card with address {address} keeps it: what QEMU saved of its kind is not known here"
FUSE_NOTE = (
    "its memory is read from the store by a process of its own: if that is killed, QEMU dies at the next page it has "
    "not read; `blkckpt prefetch {name}` ends that"
)
LAZY_NOTE = (
    "its memory is a private mapping of a file, which QEMU cannot snapshot in the background: "
    "for checkpoints with a short pause restore it with --mode eager"
)

RESUME_SECONDS = 600.0
"""Deadline for QEMU to load the stream: 4 TiB at 7 GB/s; a stalled one is noticed by the pipe long before."""

PIPE_BYTES = 1 << 20
"""What an unprivileged user may ask for; fewer wake-ups of the two sides than with 64 KiB."""

_FD_NAME = "blkckpt-incoming"

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A VM ready to go on; *memory* and *argv* are None for a checkpoint of disks only."""

    vm: paths.VmPaths
    checkpoint: manifest.Manifest
    memory: ram.Memory | None = None
    lazy: Mapping[str, Path] | None = None
    source: str = RAW
    cards: tuple[nics.Card, ...] | None = None
    """The network cards with new addresses (:func:`readdressed`); None: the machine keeps those it had."""
    owner: str = ""
    """What new addresses are derived from: the VM's id."""
    isolated: bool = False
    """Its networks lead nowhere."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.memory is None or self.checkpoint.machine is None:
            return ()
        copy = (COPY_NOTE,) if self.checkpoint.vm != self.vm.name and self.cards is None else ()
        lazy = (LAZY_NOTE,) if self.lazy else ()
        fuse = (FUSE_NOTE.format(name=self.vm.name),) if self.lazy and self.source == FUSE else ()
        return (*copy, *lazy, *fuse, *self._network_notes(), *commandline.review(self.checkpoint.machine.argv))

    def _network_notes(self) -> tuple[str, ...]:
        if self.cards is None or self.checkpoint.machine is None:
            return ()
        _, kept = _addresses(self, self.checkpoint.machine.argv)
        changed = (ADDRESS_NOTE,) if any(card.new for card in self.cards) else ()
        return (*changed, *(KEPT_NOTE.format(address=address) for address in kept))


def restore(
    home: paths.Home,
    store: stores.Store,
    checkpoint: manifest.Manifest,
    name: str,
    *,
    mode: str = LAZY,
    mount: fused.Mount | None = None,
    progress: Progress,
) -> Prepared:
    """Make VM *name* from *checkpoint*; nothing runs yet.  With a *mount*, a lazy one's memory is read from that."""
    vm = home.vm(name)
    with store.hold(), disks.reserved(vm, store, f"{checkpoint.vm}@{checkpoint.name}"):
        disks.create(vm, store, checkpoint)
        return prepare_memory(home, vm, store, checkpoint, mode=mode, progress=progress, mount=mount)


def prepare_memory(
    home: paths.Home,
    vm: paths.VmPaths,
    store: stores.Store,
    checkpoint: manifest.Manifest,
    *,
    mode: str,
    progress: Progress,
    mount: fused.Mount | None = None,
) -> Prepared:
    """The memory of *checkpoint* for *vm*, whose disks are those of the checkpoint already."""
    if checkpoint.memory is None:
        return Prepared(vm, checkpoint)
    if checkpoint.machine is None:
        raise errors.InputError(f"{checkpoint.vm}@{checkpoint.name} does not say how its machine was started")
    memory = ram.open_memory(store, checkpoint, home.vm(checkpoint.vm).memory / checkpoint.name)
    lazy: dict[str, Path] = {}
    if mode == LAZY:
        wanted = commandline.mappable(checkpoint.machine.argv, [block.name for block in ram.blocks(memory)])
        if mount is not None:
            every = [block.name for block in memory.skeleton.blocks]
            lazy = mount.files(checkpoint.vm, checkpoint.name, wanted, every)
        else:
            lazy = ram.link_or_make(vm, memory, wanted, progress)
    return Prepared(vm, checkpoint, memory, lazy, source=FUSE if mount is not None else RAW)


def readdressed(prepared: Prepared, owner: str) -> Prepared:
    """With network addresses of its own, derived from *owner* (the VM's id) and each card's old one.

    In the device state as well as on the command line: :mod:`blkckpt.memory.nics` says what a guest sees of it.
    """
    if prepared.memory is None:
        return prepared
    skeleton = prepared.memory.skeleton
    tail, cards = nics.rewrite(skeleton.tail, lambda old: derived_address(owner, old))
    memory = dataclasses.replace(prepared.memory, skeleton=dataclasses.replace(skeleton, tail=tail))
    return dataclasses.replace(prepared, memory=memory, cards=cards, owner=owner)


def derived_address(owner: str, old: bytes) -> bytes:
    """A locally administered unicast address: the same for the same card of the same VM, another for any other."""
    digest = hashlib.sha256(f"blkckpt-mac {owner} ".encode() + old).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


def _addresses(prepared: Prepared, words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """*words* with the new addresses, and the addresses that stay."""
    known = {card.old: card.new for card in prepared.cards or () if card.new}
    return network.readdress(words, known, lambda old: derived_address(prepared.owner, old))


# --- the command line ---


def argv(prepared: Prepared, incoming: str, *, paused: bool) -> tuple[str, ...]:
    """The recorded command line with the sockets, the memory and ``-incoming`` of this VM."""
    recorded = prepared.checkpoint.machine
    assert recorded is not None
    words = tuple(
        commandline.rewrite(
            recorded.argv,
            nbd_socket=prepared.vm.nbd_socket,
            qmp_socket=prepared.vm.qmp_socket,
            memory=prepared.lazy or {},
            incoming=incoming,
            paused=paused,
            machine_type=recorded.machine_type,
            name=prepared.vm.name if prepared.vm.name != prepared.checkpoint.vm else None,
        )
    )
    if prepared.isolated:
        words = network.isolated(words)
    return words if prepared.cards is None else _addresses(prepared, words)[0]


def shell_line(prepared: Prepared, progress: Progress) -> str:
    """A command for a person's shell; the stream it reads is made now and stays in the VM's ``incoming``."""
    assert prepared.memory is not None
    stream = ram.write_stream(prepared.vm, prepared.memory, _names(prepared), progress)
    words = argv(prepared, "fd:3", paused=False)
    return f"{shlex.join(words)} 3<{shlex.quote(str(stream))}"


def _names(prepared: Prepared) -> Collection[str]:
    return frozenset(prepared.lazy or ())


# --- running it ---


def start(
    prepared: Prepared, progress: Progress, background: supervisor.Detached | None = None, *, paused: bool = False
) -> rundir.Running:
    """Run it in the background, in *background* if it was started already; returns when the guest goes on.

    *paused*: when it could; :func:`go_on` lets it.
    """
    with background or supervisor.Detached() as detached:
        running = detached.start(prepared.vm, _machine(prepared))
    try:
        resume(prepared, progress, paused=paused)
    except BaseException:
        supervisor.stop(prepared.vm)
        raise
    return running


def run(prepared: Prepared, progress: Progress, ready: Callable[[rundir.Running], None]) -> int:
    """Run it in this process until it ends; *ready* is called when the guest goes on."""

    def go_on(running: rundir.Running) -> None:
        resume(prepared, progress)
        ready(running)

    return supervisor.run(prepared.vm, _machine(prepared), go_on)


def _machine(prepared: Prepared) -> supervisor.Machine | None:
    if prepared.memory is None:
        return None
    return supervisor.Machine(argv(prepared, "defer", paused=True), complete=True)


def go_on(prepared: Prepared) -> None:
    """Let a guest that was started *paused* go on.  No effect for a checkpoint of disks only."""
    if prepared.memory is not None:
        with dialogue.Dialogue(prepared.vm.qmp_socket) as session:
            session.execute("cont")


def resume(prepared: Prepared, progress: Progress, *, paused: bool = False) -> None:
    """Give the started QEMU its memory and let the guest go on.  No effect for a checkpoint of disks only."""
    if prepared.memory is None:
        return
    with (
        _Feeder(prepared.memory, _names(prepared), progress) as feeder,
        dialogue.Dialogue(prepared.vm.qmp_socket) as session,
    ):
        session.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        session.execute("getfd", {"fdname": _FD_NAME}, descriptors=[feeder.reader])
        feeder.start()
        try:
            session.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
            _wait_loaded(session)
            if not paused:
                session.execute("cont")
        except errors.HypervisorError as error:
            feeder.check()  # if the stream could not be made, that is the reason
            raise errors.HypervisorError(f"{error}; what QEMU says is in {prepared.vm.log / 'qemu.log'}") from error
    ram.remove(prepared.vm)


def _wait_loaded(session: dialogue.Dialogue) -> None:
    if session.wait_event("MIGRATION", "status", ("completed", "failed"), timeout=RESUME_SECONDS) == "failed":
        raise errors.HypervisorError("QEMU could not load the machine's state")


class _Feeder:
    """Writes the stream into a pipe from a thread of its own; a reader that goes away ends it."""

    def __init__(self, memory: ram.Memory, lazy: Collection[str], progress: Progress) -> None:
        self._memory, self._lazy, self._progress = memory, lazy, progress
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the limit of unprivileged users; the default works too
            fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._thread = threading.Thread(target=self._run, name="incoming", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> _Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        """Close our reading end: a thread that still writes gets EPIPE once QEMU's is closed too."""
        self._close_reader()
        if self._thread.ident is None:
            os.close(self._writer)

    def start(self) -> None:
        """To be called when QEMU has a duplicate of the reading end."""
        self._close_reader()
        self._thread.start()

    def check(self) -> None:
        """Raise what the making of the stream failed with, if it did."""
        if isinstance(self._error, errors.BlkckptError):
            raise self._error

    def _close_reader(self) -> None:
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def _run(self) -> None:
        total = sum(block.size for block in self._memory.image.blocks if block.name not in self._lazy)
        done = 0
        try:
            for piece in ram.stream(self._memory, self._lazy):
                ram.write_all(self._writer, piece)
                done += len(piece)
                self._progress("memory", min(done, total), total)
        except BaseException as error:
            self._error = error
        finally:
            os.close(self._writer)

"""The read-only NBD server of a checkpoint: started, found again, stopped.

One server exports one checkpoint's disks; a checkpoint has at most one (of a home) under its name, beside the
nameless ones that ``blkckpt export`` uses for itself.  It lives in a directory of its own below the home's run
directory, ``.nbd/DIGEST`` (DIGEST is of ``VM@CKPT``, so that the socket's path stays short)::

    lock           locked for as long as nbdkit lives: the lock is inherited, nobody else need stay
    export.json    what is served, by which process, where
    nbd.sock       0600, unless another path or a port was asked for
    nbdkit.log     what failed

nbdkit pins the images under its own process (:mod:`blkckpt.exchange.inuse`).  Nothing is ever lost by killing it: it
writes nothing, and whoever comes next finds the lock free and takes the directory over.  So it is stopped with
SIGTERM, and a second later, when an idle client keeps it, with SIGKILL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import sysconfig
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blkckpt import durable, errors, paths
from blkckpt.agent import nbdserver, rundir
from blkckpt.control import client
from blkckpt.exchange import inuse
from blkckpt.store import manifest
from blkckpt.store import store as stores

PLUGIN = "nbdkit_blkckpt_image.py"
LOOPBACK = "127.0.0.1"
READY_SECONDS = 60.0
TERM_SECONDS, KILL_SECONDS = 1.0, 10.0
_GREETING = 18
"""nbdkit's first bytes, NBDMAGIC, IHAVEOPT and flags: it has opened the images and serves."""

_GOODBYE = struct.pack(">I8sII", 3, b"IHAVEOPT", 2, 0)
"""Our flags and NBD_OPT_ABORT, so that it does not log a client that vanished.  Source: NBD ``doc/proto.md``."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that answers.  *place* is a socket's path, or ``127.0.0.1:PORT``."""

    vm: str
    checkpoint: str
    store: str
    disks: Mapping[str, int]
    place: str
    process: rundir.Process

    def uri(self, disk: str) -> str:
        """The NBD URI of a disk."""
        if self.place.startswith("/"):
            return f"nbd+unix:///{disk}?socket={urllib.parse.quote(self.place)}"
        return f"nbd://{self.place}/{disk}"


def directory(home: paths.Home, vm: str, checkpoint: str) -> Path:
    """Where the server of a checkpoint lives.  No VM is called ``.nbd``."""
    digest = hashlib.sha256(f"{vm}@{checkpoint}".encode()).hexdigest()[:16]
    return home.run / ".nbd" / digest


def start(
    home: paths.Home,
    place: stores.Store,
    one: manifest.Manifest,
    *,
    socket_path: Path | None = None,
    port: int | None = None,
    detach: bool = False,
) -> Serving:
    """Serve the disks of *one*; returns when it answers.

    On a socket of its own; or at *socket_path*, which must not exist; or on *port* of the loopback interface, where
    every user of the machine can read it (0: any port).  Without *detach* it ends with this thread.
    """
    where = directory(home, one.vm, one.name)
    for each in (home.run, where.parent, where):
        paths.private_directory(each)
    busy = f"{one.vm}@{one.name} is exported already; `blkckpt nbd --list` shows where"
    lock = rundir.take_lock(where / "lock", busy)
    try:
        target = where / "nbd.sock" if socket_path is None else socket_path
        with _listen(target, port, ours=socket_path is None) as listener:
            address = os.fspath(target) if port is None else f"{LOOPBACK}:{listener.getsockname()[1]}"
            try:
                process = _launch(where, place, one, listener, lock, detach=detach)
            except BaseException:
                if port is None:
                    target.unlink(missing_ok=True)
                raise
        disks = {disk.name: disk.size for disk in one.disks}
        serving = Serving(one.vm, one.name, str(place.path), disks, address, process)
        record = {**dataclasses.asdict(serving), "disks": disks}
        durable.write_file(where / "export.json", json.dumps(record).encode())
        return serving
    finally:
        os.close(lock)


@contextlib.contextmanager
def private(place: stores.Store, one: manifest.Manifest) -> Iterator[Serving]:
    """A nameless server for the length of the body, for a program that this process runs."""
    root = Path(tempfile.mkdtemp(prefix="blkckpt-nbd-"))
    try:
        lock = rundir.take_lock(root / "lock", "")
        try:
            with _listen(root / "nbd.sock", None, ours=True) as listener:
                process = _launch(root, place, one, listener, lock, detach=False)
        finally:
            os.close(lock)
        disks = {disk.name: disk.size for disk in one.disks}
        serving = Serving(one.vm, one.name, str(place.path), disks, os.fspath(root / "nbd.sock"), process)
        try:
            yield serving
        finally:
            _end(serving)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def complaints(serving: Serving) -> str | None:
    """The last failure that the server of :func:`private` logged."""
    lines = (Path(serving.place).parent / "nbdkit.log").read_text(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, AttributeError):
            if text := json.loads(line).get("error"):
                return str(text)
    return None


def find(home: paths.Home, vm: str, checkpoint: str) -> Serving | None:
    """The server of a checkpoint, if one runs."""
    return _read(directory(home, vm, checkpoint))


def running(home: paths.Home) -> list[Serving]:
    """Every server of this home."""
    found = [_read(path) for path in sorted((home.run / ".nbd").glob("*"))]
    return sorted((one for one in found if one), key=lambda one: (one.vm, one.checkpoint))


def stop(home: paths.Home, serving: Serving) -> None:
    """End a server and remove what it leaves."""
    _end(serving)
    if serving.place.startswith("/"):
        Path(serving.place).unlink(missing_ok=True)
    shutil.rmtree(directory(home, serving.vm, serving.checkpoint), ignore_errors=True)
    with contextlib.suppress(errors.NotFoundError), stores.Store.open(serving.store) as place:
        inuse.let_go(place)


def wait(serving: Serving) -> None:
    """Until the server ends by itself."""
    with contextlib.suppress(ProcessLookupError), _watched(serving.process) as pidfd:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)


def _read(where: Path) -> Serving | None:
    if not rundir.is_locked(where / "lock"):
        return None
    try:
        fields = json.loads(durable.read_small(where / "export.json", "record of an export", 1 << 20))
        return Serving(**{**fields, "process": rundir.Process(**fields["process"])})
    except errors.NotFoundError:
        return None  # it is just starting
    except (ValueError, KeyError, TypeError) as error:
        raise errors.CorruptError(f"{where / 'export.json'} is not a record of an export; remove it") from error


@contextlib.contextmanager
def _listen(path: Path, port: int | None, *, ours: bool) -> Iterator[socket.socket]:
    if port is not None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, port))
            listener.listen(rundir.BACKLOG)
        except OSError as error:
            listener.close()
            raise errors.from_os_error(error, f"listening on {LOOPBACK}:{port}") from error
    else:
        client.check_path(path)
        if not ours and (path.exists() or path.is_symlink()):
            raise errors.InputError(f"{path} exists already; choose another path for the socket, or remove it")
        listener = rundir.bind(path)
    with listener:
        yield listener


def _launch(
    where: Path, place: stores.Store, one: manifest.Manifest, listener: socket.socket, lock: int, *, detach: bool
) -> rundir.Process:
    """Start nbdkit on *listener* and wait for its greeting."""
    program = nbdserver.probe()
    nbdserver.check_interpreter(program)
    command = [
        program.path, "--foreground", "--readonly", "--log=stderr", *program.options,
        *(() if detach else ("--exit-with-parent",)),
        "python", str(nbdserver.plugin_path(PLUGIN)), f"site={sysconfig.get_path('purelib')}",
        f"store={place.path.absolute()}", f"stay={int(detach)}",
        *(f"image={disk.name}:{disk.image}" for disk in one.disks),
    ]  # fmt: skip
    with nbdserver.append_to(where / "nbdkit.log") as output, open(os.devnull, "rb") as null:
        start_of_log = output.tell()
        descriptors = [null.fileno(), output.fileno(), output.fileno(), listener.fileno(), lock]
        pid = nbdserver.spawn(command, descriptors, session=detach)
    process = rundir.Process.of(pid)
    try:
        with _watched(process) as pidfd, socket.socket(listener.family, socket.SOCK_STREAM) as probe:
            probe.connect(listener.getsockname())
            ready = nbdserver.wait_for([probe.fileno(), pidfd], READY_SECONDS)
            if probe.fileno() in ready and probe.recv(_GREETING).startswith(b"NBDMAGIC"):
                probe.sendall(_GOODBYE)
                return process
            if not ready:
                raise errors.DeadlineError(f"the export of {one.vm}@{one.name} was not ready in {READY_SECONDS:g} s")
        said = nbdserver.last_words(where / "nbdkit.log", start_of_log)
        raise nbdserver.failure(said, where / "nbdkit.log", f"the export of {one.vm}@{one.name}")
    except BaseException:
        _kill(process)
        raise


@contextlib.contextmanager
def _watched(process: rundir.Process) -> Iterator[int]:
    """A pidfd of *process*; ProcessLookupError when it has gone."""
    pidfd = os.pidfd_open(process.pid)
    try:
        if not process.alive:
            raise ProcessLookupError
        yield pidfd
    finally:
        os.close(pidfd)


def _end(serving: Serving) -> None:
    with contextlib.suppress(ProcessLookupError), _watched(serving.process) as pidfd:
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            signal.pidfd_send_signal(pidfd, number)
            if nbdserver.wait_for([pidfd], seconds):
                break
    _reap(serving.process.pid)


def _kill(process: rundir.Process) -> None:
    with contextlib.suppress(ProcessLookupError), _watched(process) as pidfd:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        nbdserver.wait_for([pidfd], KILL_SECONDS)
    _reap(process.pid)


def _reap(pid: int) -> None:
    """Collect it if it was our child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)

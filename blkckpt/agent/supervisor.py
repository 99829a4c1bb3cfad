"""Runs a VM: nbdkit and QEMU, as long as either is wanted; restarts nbdkit; stops both in order.

States, with what moves between them::

    (none) ── run directory locked, sockets bound, nbdkit and QEMU started ──> opening
    opening ── hello answered, QMP answers ──> serving, running (without a machine: serving)
    opening ── either of them ended ──> (none)       its error is raised, nothing is left
    serving, running ── nbdkit ended ──> the same, nbdkit started again: at once, then ever later (BACKOFF)
    running ── QEMU ended ──> stopping
    serving, running ── SIGTERM, SIGINT, SIGHUP ──> stopping
    stopping: QEMU ends, nbdkit is shut down, sockets and record are removed, the lock is given up

QEMU is started while nbdkit opens the disks: its connection waits in the queue of the listening socket until there
is an answer, and no guest runs before it has its disks.

While nbdkit is away QEMU's requests wait (``reconnect-delay``) and its new connection waits in the queue of the
listening socket, which is ours and never closed.  A supervisor that is killed takes nbdkit along, cleanly
(``--exit-with-parent``, or a socket that ends), but not QEMU: ``blkckpt serve`` gives such a guest its disks back,
and a second ``blkckpt run`` is refused as long as it lives, or two guests would write one disk.

Detached, the supervisor is a fork of the command, in a session of its own: loading another interpreter would cost
0.1 s of processor time while a restored guest waits.  It is told what to do through a pipe, two lines of JSON, and
answers through another, one JSON object: ready, or the error it gave up with.  It can be started before there is
anything to run (:class:`Detached`), and be told with the first line which VM it will be: then it starts nbdkit early
(:mod:`blkckpt.agent.nbdserver`), which takes longer to load than a VM to make, or has a loaded one forked
(:mod:`blkckpt.agent.template`).  The second line is the order to run it.  Without one it ends, and nbdkit with it.

Nothing here sleeps: the loop waits for the pidfds of its children and for signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from blkckpt import errors, lazy, log, paths
from blkckpt.agent import forked, nbdserver, qemuargs, rundir, template
from blkckpt.vm import definition

if TYPE_CHECKING:
    from blkckpt.control import wire
else:
    wire = lazy.Module("blkckpt.control.wire")

SIGNALS = forked.SIGNALS
BACKOFF = (0.0, 0.2, 1.0, 5.0, 15.0)
"""Seconds before nbdkit is started again after it ended 1, 2, 3 … times in a row.  It never gives up while a guest
waits: the guest's requests fail only when QEMU's reconnect-delay is over."""
SETTLED_SECONDS = 30.0
"""nbdkit that lived so long had no trouble starting: its end begins a new row."""
MACHINE_SECONDS = 20.0
"""QEMU's own end after SIGTERM: it flushes, and gives up requests that hang."""
QMP_SECONDS = 30.0
QMP_INTERVAL = 0.005
"""QEMU binds its QMP socket itself and there is nothing to wait on for it: ask so often, while watching its pidfd."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """How to start QEMU.  *complete*: the disks and the QMP socket are in *argv* already (a restored machine)."""

    argv: tuple[str, ...]
    complete: bool = False
    directory: str | None = None


Ready = Callable[[rundir.Running], None]


def _ignore(running: rundir.Running) -> None:
    return None


# --- what others call ---


def run(
    vm: paths.VmPaths, machine: Machine | None, ready: Ready = _ignore, server: nbdserver.NbdServer | None = None
) -> int:
    """Serve *vm*, and run *machine* if given, in this process until it ends or a signal comes.

    Returns QEMU's exit status (0 without one).  *ready* is called once everything answers.  Call it from the main
    thread: signals are handled there, and nbdkit ends with the thread that started it.  *server*: an early one.
    """
    wanted = definition.load(vm)
    with _Signals() as signals, _Supervisor(vm, wanted, signals, server) as supervisor:
        supervisor.bring_up(machine)
        ready(supervisor.running())
        return supervisor.loop()


def start(vm: paths.VmPaths, machine: Machine | None, deadline: float = nbdserver.READY_SECONDS) -> rundir.Running:
    """As :func:`run`, in a background process; returns when it is ready, raises what it gave up with."""
    definition.load(vm)
    with Detached() as detached:
        return detached.start(vm, machine, deadline)


class Detached:
    """A background process that will be the supervisor of the VM that :meth:`start` names.

    It loads meanwhile.  Leave the context without calling :meth:`start` and it is ended.  Its disk server comes from
    *source*, if there is one.
    """

    def __init__(self, source: template.Template | None = None) -> None:
        self._ordered = self._reaped = False
        self._expected: paths.VmPaths | None = None
        receiver, sender = os.pipe2(os.O_CLOEXEC)
        orders, self._orders = os.pipe2(os.O_CLOEXEC)
        self._answers = os.fdopen(receiver, "rb")
        shared = {source.fileno()} if source else set()
        self._pid = forked.fork(lambda: main(orders, sender, source), {orders, sender, *shared})
        os.close(orders)
        os.close(sender)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        if self._orders >= 0:
            os.close(self._orders)
            self._orders = -1
            if not self._ordered:  # it ends by itself: leave nothing behind
                os.waitpid(self._pid, 0)

    def expect(self, vm: paths.VmPaths) -> None:
        """Say which VM it will be: its disk server is loaded meanwhile.  Nothing of *vm* need exist."""
        self._expected = vm
        self._send({"home": str(vm.root.parent.parent), "vm": vm.name})

    def _send(self, line: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: it answers nothing
            os.write(self._orders, json.dumps(line).encode() + b"\n")

    def start(
        self, vm: paths.VmPaths, machine: Machine | None, deadline: float = nbdserver.READY_SECONDS
    ) -> rundir.Running:
        """Let it run *vm*; returns when it is ready, raises what it gave up with.  To be called once."""
        nbdserver.open_log(vm, "qemu.log").close()
        if self._expected is None:
            self.expect(vm)
        assert self._expected == vm
        self._ordered = True
        self._send({"machine": asdict(machine) if machine else None})
        if not nbdserver.wait_for([self._answers.fileno()], deadline + MACHINE_SECONDS):
            os.kill(self._pid, signal.SIGTERM)
            raise errors.DeadlineError(f"VM {vm.name} did not start within {deadline:g} s; it is being stopped")
        return _started(self._answers.read(wire.MAX_MESSAGE), vm)

    def abandon(self) -> None:
        """End what :meth:`start` has begun, wherever it is: in order.  For a caller that gives up, from any thread."""
        if not self._ordered or self._reaped:
            return  # leaving the context does it, or it has been done: the pid may be another's now
        self._reaped = True
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)


def find(vm: paths.VmPaths) -> rundir.Running | None:
    """Who runs *vm* now; None when nobody does."""
    return rundir.find(vm)


def stop(vm: paths.VmPaths, deadline: float = nbdserver.STOP_SECONDS + MACHINE_SECONDS) -> bool:
    """Ask the supervisor of *vm* to stop and wait for its end; False when nobody runs it."""
    running = rundir.find(vm)
    if running is None:
        return False
    with contextlib.ExitStack() as stack:
        try:
            pidfd = os.pidfd_open(running.supervisor.pid)
            stack.callback(os.close, pidfd)
            if not running.supervisor.alive:
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return True
        if not nbdserver.wait_for([pidfd], deadline):
            raise errors.DeadlineError(
                f"VM {vm.name} did not stop within {deadline:g} s (pid {running.supervisor.pid})"
            )
    return True


# --- the supervisor ---


class _Signals:
    """Turns the stop signals into a readable descriptor for as long as it is entered."""

    def __init__(self) -> None:
        self.stopping = False

    def __enter__(self) -> _Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, frame: object) -> None:
        self.stopping = True

    def fileno(self) -> int:
        return self._reader.fileno()


class _Supervisor:
    """One VM's processes.  Entered: the run directory is ours; left: everything is stopped and removed."""

    def __init__(
        self,
        vm: paths.VmPaths,
        wanted: definition.VmDefinition,
        signals: _Signals,
        server: nbdserver.NbdServer | None = None,
    ) -> None:
        """*server*: an early one of ours, still to be discarded by the caller if we do not come to start it."""
        self._vm, self._wanted, self._signals, self._early = vm, wanted, signals, server
        self._machine: subprocess.Popen[bytes] | None = None
        self._machine_fd = -1
        self._failures = 0
        self._started_at = 0.0
        self._restart_at: float | None = None

    def __enter__(self) -> _Supervisor:
        self._run = rundir.RunDirectory(self._vm)
        with contextlib.ExitStack() as stack:
            stack.callback(self._leave_directory)
            self._orphan = self._find_orphan()
            names = (self._vm.nbd_socket, self._vm.control_socket)
            unnamed = self._early.sockets if self._early else (None, None)
            self._listeners = [
                stack.enter_context(self._run.listen(path, one)) for path, one in zip(names, unnamed, strict=True)
            ]
            self._server = self._early or nbdserver.NbdServer(self._vm, *self._listeners)
            stack.callback(self._server.stop)
            stack.callback(self._stop_machine)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _find_orphan(self) -> rundir.Process | None:
        """QEMU of a supervisor that was killed."""
        before = rundir.read(self._vm)
        return before.machine if before and before.machine and before.machine.alive else None

    def _leave_directory(self) -> None:
        orphan = getattr(self, "_orphan", None)
        self._run.close(keep_record=orphan is not None and orphan.alive)

    def bring_up(self, machine: Machine | None) -> None:
        """Start nbdkit and QEMU side by side and wait until both answer."""
        if machine and self._orphan:
            raise errors.StateError(
                f"QEMU of VM {self._vm.name} (pid {self._orphan.pid}) is still running from before its supervisor was "
                f"killed; `blkckpt serve {self._vm.name}` gives it its disks back, or end it first"
            )
        self._server.start()
        self._started_at = time.monotonic()
        if machine:
            self._spawn(machine)
        self._run.record(self.running())
        try:
            self._server.wait_ready(interrupt=self._signals.fileno())
        except errors.BlkckptError:
            if self._machine:  # it waits for disks that nobody serves, and would not hear a SIGTERM there
                self._machine.kill()
            raise
        if machine:
            self._wait_for_qmp()

    def running(self) -> rundir.Running:
        server = rundir.Process.of(self._server.pid) if self._server.running else None
        machine = rundir.Process.of(self._machine.pid) if self._machine else self._orphan
        return rundir.Running(rundir.Process.of(os.getpid()), server, machine)

    def _spawn(self, machine: Machine) -> None:
        argv = list(machine.argv)
        if not machine.complete:
            names = [disk.name for disk in self._wanted.disks]
            argv = qemuargs.with_disks(argv, names, self._vm.nbd_socket, self._vm.qmp_socket)
        self._vm.qmp_socket.unlink(missing_ok=True)
        try:
            self._machine = subprocess.Popen(argv, cwd=machine.directory)
        except OSError as error:
            raise errors.from_os_error(error, f"starting {argv[0]}") from error
        self._machine_fd = os.pidfd_open(self._machine.pid)

    def _wait_for_qmp(self) -> None:
        """Until QEMU listens.  It greets when it has opened its disks."""
        end = time.monotonic() + QMP_SECONDS
        while not _answers(self._vm.qmp_socket):
            if self._signals.stopping:
                return
            if nbdserver.wait_for([self._machine_fd], QMP_INTERVAL):
                raise errors.HypervisorError(f"QEMU ended at once with status {self._reap_machine()}; see its messages")
            if time.monotonic() > end:
                raise errors.DeadlineError(f"QEMU does not answer on {self._vm.qmp_socket} after {QMP_SECONDS:g} s")

    # The loop.

    def loop(self) -> int:
        """Watch until QEMU ends or a signal comes; returns QEMU's exit status."""
        while not self._signals.stopping:
            ready = self._wait()
            if self._machine_fd in ready:
                return self._reap_machine()
            if self._server.running and self._server.pidfd in ready:
                self._note_server_end()
            if self._restart_at is not None and time.monotonic() >= self._restart_at:
                self._restart_server()
        return 0

    def _wait(self) -> set[int]:
        poller = select.poll()
        watched = [self._signals.fileno(), self._machine_fd, self._server.pidfd]
        for descriptor in watched:
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        timeout = None if self._restart_at is None else max(0.0, self._restart_at - time.monotonic()) * 1000
        return {descriptor for descriptor, _ in poller.poll(timeout)}

    def _note_server_end(self) -> None:
        status = self._server.reap()
        lived = time.monotonic() - self._started_at
        self._failures = 0 if lived > SETTLED_SECONDS else self._failures
        delay = BACKOFF[min(self._failures, len(BACKOFF) - 1)]
        self._failures += 1
        self._restart_at = time.monotonic() + delay
        code = None if status is None else os.waitstatus_to_exitcode(status)
        fields = {"vm": self._vm.name, "status": code, "again_in": delay}
        logger.error("nbdkit ended; the guest waits for it", extra={"fields": fields})
        self._run.record(self.running())

    def _restart_server(self) -> None:
        self._restart_at = None
        self._started_at = time.monotonic()
        try:
            self._server.start()
        except (OSError, errors.BlkckptError) as error:
            self._failures += 1
            self._restart_at = time.monotonic() + BACKOFF[-1]
            logger.error("nbdkit cannot be started", extra={"fields": {"vm": self._vm.name, "error": str(error)}})
        self._run.record(self.running())

    # The end.

    def _reap_machine(self) -> int:
        assert self._machine is not None
        code = self._machine.wait()
        os.close(self._machine_fd)
        self._machine, self._machine_fd = None, -1
        return code if code >= 0 else 128 - code

    def _stop_machine(self) -> None:
        if self._machine is None:
            return
        for ask, seconds in ((self._machine.terminate, MACHINE_SECONDS), (self._machine.kill, MACHINE_SECONDS)):
            ask()
            if nbdserver.wait_for([self._machine_fd], seconds):
                self._reap_machine()
                return
        self._orphan = rundir.Process.of(self._machine.pid)
        logger.error("QEMU does not end", extra={"fields": {"vm": self._vm.name, "pid": self._machine.pid}})


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(1)
        try:
            connection.connect(os.fspath(path))
        except OSError:
            return False
        return True


# --- detached ---


def _started(answer: bytes, vm: paths.VmPaths) -> rundir.Running:
    if not answer:
        raise errors.BlkckptError(f"the supervisor of VM {vm.name} ended without a word; see {vm.log / 'qemu.log'}")
    body = json.loads(answer)
    if "type" in body:
        raise wire.error_from(wire.Failure(0, body["message"], body["type"], None))
    running = rundir.find(vm)
    if running is None:
        raise errors.StateError(f"VM {vm.name} has ended already; see {vm.log / 'qemu.log'}")
    return running


def main(orders: int, answers: int, source: template.Template | None = None) -> int:
    """The detached supervisor: orders from one descriptor, one answer through the other."""
    with os.fdopen(orders, "rb") as lines, os.fdopen(answers, "wb") as pipe:
        expected = lines.readline()
        if not expected:
            return 0
        whom = json.loads(expected)
        vm = paths.home(whom["home"]).vm(whom["vm"])
        with contextlib.ExitStack() as stack:
            server = None
            with contextlib.suppress(errors.BlkckptError, OSError):  # said when there is an order and it fails again
                server = source.server(vm) if source else nbdserver.NbdServer.early(vm)
                stack.callback(server.discard)
            order = lines.readline()
            if not order:
                return 0
            machine = json.loads(order)["machine"]
            _take_output(vm)
            log.setup(as_json=True)
            wanted = Machine(tuple(machine["argv"]), machine["complete"], machine["directory"]) if machine else None
            return _run_and_tell(vm, wanted, pipe, server)


def _take_output(vm: paths.VmPaths) -> None:
    """Nothing to read, and a log for what we and QEMU say."""
    with open(os.devnull, "rb") as null, nbdserver.open_log(vm, "qemu.log") as output:
        for ours, standard in ((null, 0), (output, 1), (output, 2)):
            os.dup2(ours.fileno(), standard)


def _run_and_tell(
    vm: paths.VmPaths, machine: Machine | None, pipe: IO[bytes], server: nbdserver.NbdServer | None
) -> int:
    def tell(body: dict[str, Any]) -> None:
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(json.dumps(body).encode())

    try:
        return run(vm, machine, lambda _: tell({"ready": True}), server)
    except Exception as error:
        expected = isinstance(error, errors.BlkckptError)
        logger.error("not run", extra={"fields": {"vm": vm.name, "error": str(error)}}, exc_info=not expected)
        failure = wire.failure_from(error)
        tell({"type": failure.kind, "message": failure.message})
        return wire.OWN_ERRORS - failure.code

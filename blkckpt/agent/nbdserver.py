"""Starting nbdkit with our plugin, waiting until it answers, stopping it.

What nbdkit gets from us, and why:

* Both listening sockets, as descriptors: 3 is the NBD socket (``LISTEN_FDS=1``), 4 the control socket
  (``control_fd=4``).  They stay open here, so clients that connect while no nbdkit runs wait in their queues.
* ``LISTEN_PID`` must be nbdkit's own pid, known only after the fork: a one-line shell sets it, and what belongs to
  nbdkit's environment alone, and execs.
* A clean environment.  Its interpreter takes ``sys.prefix`` from the first ``python3`` on ``PATH``: an activated
  environment would silently change what can be imported.
* ``--exit-with-parent``: when the supervisor dies, nbdkit stops cleanly.  The kernel watches the *thread* that
  started it, so start it from the main thread.
* ``--threads=1`` before 1.33.10: a parallel server aborts there when a client vanishes with two or more requests
  queued, taking every disk with it.
* Its own process group: Ctrl-C is for the supervisor, which stops things in order.
* The fast path (:mod:`blkckpt.agent.fastfilter`), when one is built for this nbdkit and not switched off: as a filter,
  preloaded (``LD_PRELOAD``), since it stands in for some of libc's socket functions too, and its path as a parameter,
  by which the plugin finds the loaded instance.

It can be started *early* (:meth:`NbdServer.early`), before its VM exists: it loads its interpreter, the plugin and
what reads a store, which takes longer than making the VM, and waits on descriptor 5 (``start_fd=5``).  Its two
sockets have no name yet.  :meth:`NbdServer.start` sends it the log, which is the word to open the disks; the end of
the connection, before or after, ends it.  Many early ones come cheaper from :mod:`blkckpt.agent.template`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import blkckpt
from blkckpt import durable, errors, lazy, log, paths
from blkckpt.agent import fastfilter

if TYPE_CHECKING:
    from blkckpt.control import client, messages, wire
else:  # needed when nbdkit has been started and loads
    client, messages, wire = (lazy.Module(f"blkckpt.control.{name}") for name in ("client", "messages", "wire"))

CLEAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNWANTED = frozenset({"VIRTUAL_ENV", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "PYENV_VERSION"})
SAFE_THREADS = (1, 33, 10)
"""From this version on a vanished client does not abort a parallel server (measured on 1.32.5, where it does)."""

READY_SECONDS = 120.0
"""Opening replays what was under way and may have to read a block map of a large disk from a slow one."""
STOP_SECONDS = 120.0
"""A clean stop flushes everything the page cache holds of the layers."""
KILL_SECONDS = 10.0
MAX_LOG = 16 << 20
"""A log is begun anew when it is larger than this at a start."""
_TAIL = 64 << 10
_NOTE = "nbdkit.json"

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Program:
    """The nbdkit of this machine."""

    path: str
    version: tuple[int, ...]
    python: tuple[int, ...]

    @classmethod
    def decode(cls, body: Any) -> Program:
        """What :meth:`encode` gave, as JSON gives it back."""
        return cls(str(body["path"]), tuple(map(int, body["version"])), tuple(map(int, body["python"])))

    @property
    def options(self) -> list[str]:
        """Options that depend on the version."""
        return [] if self.version >= SAFE_THREADS else ["--threads=1"]


@functools.cache
def probe(notes: Path | None = None) -> Program:
    """Find nbdkit and ask its Python plugin.  Raises :class:`errors.MissingError` saying what to install.

    Asking starts an interpreter (0.05 s).  The answer is remembered in the private directory *notes*, and holds as
    long as nbdkit and its plugin are the same files.
    """
    path = shutil.which("nbdkit", path=CLEAN_PATH)
    if path is None:
        raise errors.MissingError("nbdkit is not installed; apt install nbdkit nbdkit-plugin-python")
    if notes and (known := _recall(notes / _NOTE, path)):
        return known
    asked = subprocess.run(
        [path, "python", "--dump-plugin"], env=clean_environment(), capture_output=True, text=True, timeout=30
    )
    said = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
    if asked.returncode or "python_version" not in said:
        raise errors.MissingError("nbdkit has no Python plugin; apt install nbdkit-plugin-python")
    program = Program(path, _numbers(said["version"]), _numbers(said["python_version"]))
    if notes:
        files = {name: _identity(name) for name in (path, said.get("path", path))}
        durable.write_file(notes / _NOTE, json.dumps({**asdict(program), "files": files}).encode())
    return program


def _recall(note: Path, path: str) -> Program | None:
    """What was found out about the nbdkit at *path*, if that is still true."""
    try:
        body = json.loads(durable.read_small(note, "note about nbdkit", 1 << 16))
        files = body["files"]
        same = path in files and all(_identity(name) == list(identity) for name, identity in files.items())
        return Program.decode(body) if same else None
    except (errors.BlkckptError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _identity(path: str) -> list[int]:
    """Another file, or another version of it, has another one."""
    found = os.stat(path)  # noqa: PTH116
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def check_interpreter(program: Program) -> None:
    """The plugin imports what this interpreter has installed: both must be of one Python release."""
    if program.python[:2] != sys.version_info[:2]:
        wanted, have = ".".join(map(str, program.python[:2])), ".".join(map(str, sys.version_info[:2]))
        raise errors.MissingError(
            f"nbdkit embeds Python {wanted} and blkckpt is installed for Python {have}; "
            "install it for /usr/bin/python3 (tools/setup does)"
        )


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without what changes which Python and which modules nbdkit finds, plus *more*."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name not in UNWANTED}
    return {**kept, "PATH": CLEAN_PATH, **(more or {})}


def fast_path(program: Program) -> Path | None:
    """The filter to load into *program*, or ``None``: not built, or switched off."""
    return fastfilter.find(program.version) if fastfilter.wanted() else None


def build_fast_path() -> Path:
    """Build the filter for this machine's nbdkit unless it is there.  MissingError says what that needs."""
    program = probe()
    return fastfilter.build(program.path, program.version, clean_environment({"LC_ALL": "C.UTF-8"}))


def plugin_path(name: str = "nbdkit_blkckpt.py") -> Path:
    """Our plugin *name*: inside an installed package, else beside the package in a checkout."""
    package = Path(blkckpt.__file__).parent
    for candidate in (package / "_plugins" / name, package.parent / "plugins" / name):
        if candidate.is_file():
            return candidate
    raise errors.MissingError(f"{name} is missing beside {package}; install blkckpt again")


class NbdServer:
    """nbdkit for one VM, on two listening sockets that outlive it.  Use it from one thread, the main one."""

    def __init__(
        self, vm: paths.VmPaths, nbd: socket.socket, control: socket.socket, *, plugin: Path | None = None
    ) -> None:
        self.vm = vm
        self._nbd, self._control = nbd, control
        self._plugin = plugin or plugin_path()
        self._gate: socket.socket | None = None
        self._leash: socket.socket | None = None
        self._adopted = False
        self._early_words = -1
        self._log_start = 0
        self.pid = 0
        self.pidfd = -1

    @property
    def running(self) -> bool:
        """Whether a process was started and not yet reaped."""
        return self.pidfd >= 0

    @classmethod
    def early(cls, vm: paths.VmPaths) -> NbdServer:
        """Start nbdkit for a *vm* that need not exist yet; :meth:`start` lets it go on, :meth:`discard` ends it."""
        ours, theirs = socket.socketpair()
        nbd, control = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        server = cls(vm, nbd, control)
        server._gate, server._early_words = ours, os.memfd_create("nbdkit-early")
        try:
            with theirs:
                server._spawn(server._early_words, [theirs.fileno()])
        except BaseException:
            server.discard()
            raise
        return server

    @classmethod
    def adopt(
        cls, vm: paths.VmPaths, sockets: tuple[socket.socket, socket.socket], gate: socket.socket, pid: int, pidfd: int
    ) -> NbdServer:
        """An early server that is not our child; all that is given is the result's from here on."""
        server = cls(vm, *sockets)
        server._gate, server.pid, server.pidfd, server._adopted = gate, pid, pidfd, True
        return server

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The NBD and the control socket."""
        return self._nbd, self._control

    def start(self) -> None:
        """Start nbdkit, or let an early one go on; returns at once.  See :meth:`wait_ready`."""
        with open_log(self.vm, "nbdkit.log") as output:
            self._log_start = output.tell()
            if self._gate is None:
                self._spawn(output.fileno())
            else:
                with contextlib.suppress(OSError):  # it has ended: wait_ready says why
                    socket.send_fds(self._gate, [b"\n"], [output.fileno()])
                self._gate, self._leash = None, self._gate
        logger.info("nbdkit started", extra={"fields": {"vm": self.vm.name, "pid": self.pid}})

    def discard(self) -> None:
        """End an early nbdkit that is not needed; no effect after :meth:`start`."""
        if self._gate is None:
            return
        if self.running:
            self._kill()
            self.reap()
        self._gate.close()
        self._gate = None
        for mine in self.sockets:
            mine.close()

    def _spawn(self, output: int, more: Sequence[int] = ()) -> None:
        command, preload = serving(self.vm.run.parent, self._plugin)
        command += [f"home={self.vm.root.parent.parent}", f"vm={self.vm.name}", "control_fd=4"]
        if more:
            command.append("start_fd=5")
        with open(os.devnull, "rb") as null:
            sources = [null.fileno(), output, output, self._nbd.fileno(), self._control.fileno(), *more]
            self.pid = spawn(command, sources, preload=preload)
        self.pidfd, self._adopted = os.pidfd_open(self.pid), False

    def wait_ready(self, deadline: float = READY_SECONDS, interrupt: int | None = None) -> messages.Welcome:
        """Wait until the control server answers hello.

        Raises what nbdkit failed with when it ends instead, :class:`errors.DeadlineError` after *deadline* seconds,
        :class:`errors.StateError` when the descriptor *interrupt* becomes readable.
        """
        with client.open_socket(self.vm.control_socket) as probe_socket:
            hello = messages.Hello(messages.VERSION, "supervisor").encode()
            probe_socket.sendall(wire.encode_request(wire.Request("hello", hello, 1)))
            ready = wait_for([probe_socket.fileno(), self.pidfd, *([] if interrupt is None else [interrupt])], deadline)
            if not ready:
                raise errors.DeadlineError(f"the disk server of VM {self.vm.name} was not ready in {deadline:g} s")
            if probe_socket.fileno() in ready:
                probe_socket.recv(wire.MAX_MESSAGE)
            if interrupt in ready:
                raise errors.StateError(f"VM {self.vm.name}: stopped while it was starting")
        if wait_for([self.pidfd], 0):
            self.reap()
            raise self.failure()
        with client.Client.connect(self.vm.control_socket, name="supervisor") as peer:
            return peer.welcome

    def failure(self) -> errors.BlkckptError:
        """Why nbdkit ended: what the plugin logged as fatal, else nbdkit's last words."""
        path = self.vm.log / "nbdkit.log"
        said = last_words(path, self._log_start)
        if not said and self._early_words >= 0:
            said = os.pread(self._early_words, _TAIL, 0)
        return failure(said, path, f"the disk server of VM {self.vm.name}")

    def reap(self) -> int | None:
        """Wait for an ending nbdkit and collect it; returns its wait status, None of one that is not our child."""
        if self._adopted:
            wait_for([self.pidfd], KILL_SECONDS)
        status = None if self._adopted else os.waitpid(self.pid, 0)[1]
        os.close(self.pidfd)
        self.pidfd = -1
        if self._leash:
            self._leash.close()
            self._leash = None
        return status

    def stop(self, deadline: float = STOP_SECONDS) -> None:
        """End nbdkit: asked on the control socket, then SIGTERM, then SIGKILL."""
        self.discard()
        if not self.running:
            return
        for ask, seconds in ((self._ask, deadline), (self._terminate, KILL_SECONDS), (self._kill, KILL_SECONDS)):
            ask()
            if wait_for([self.pidfd], seconds):
                self.reap()
                return
        raise errors.DeadlineError(f"nbdkit (pid {self.pid}) of VM {self.vm.name} does not end")

    def _ask(self) -> None:
        try:
            with client.Client.connect(self.vm.control_socket, name="supervisor", timeout=KILL_SECONDS) as peer:
                peer.shutdown()
        except errors.BlkckptError as error:
            logger.warning("shutdown was not heard", extra={"fields": {"vm": self.vm.name, "error": str(error)}})
            self._terminate()

    def _terminate(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def _kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


def last_words(path: Path, start: int) -> bytes:
    """The end of the log *path*, from byte *start* on at most."""
    with path.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read()


def failure(said: bytes, path: Path, what: str) -> errors.BlkckptError:
    """Why *what* ended, by what it *said*, which is in the log *path*."""
    lines = said.decode(errors="replace").splitlines()
    for line in reversed(lines):
        if told := _fatal(line):
            return told
    last = next((line for line in reversed(lines) if "error" in line), lines[-1] if lines else "it said nothing")
    return errors.BlkckptError(f"{what} ended: {last[:300]} (see {path})")


def serving(run: Path, plugin: Path) -> tuple[list[str], Path | None]:
    """The beginning of nbdkit's command line with *plugin*, for any VM of the home whose run directory is *run*.

    And what has to be preloaded.
    """
    program = probe(paths.private_directory(run.parent))  # the same for every home
    check_interpreter(program)
    fast = fast_path(program)
    command = [
        program.path, "--exit-with-parent", "--foreground", "--log=stderr", *program.options,
        *([] if fast is None else [f"--filter={fast}"]),
        "python", str(plugin), f"python={sys.executable}", f"site={sysconfig.get_path('purelib')}",
        *([] if fast is None else [f"fast={fast}"]),
    ]  # fmt: skip
    return command, fast


def spawn(
    command: Sequence[str], descriptors: Sequence[int], *, session: bool = False, preload: Path | None = None
) -> int:
    """Start nbdkit with *descriptors* as its 0, 1, 2 …, of which 3 is the listening NBD socket; returns its pid.

    In a process group of its own, or in a *session* of its own to outlive this terminal.  *preload* comes last in
    ``LD_PRELOAD``, whose separators (``ld.so(8)``: colons and spaces) cannot be in a name: then it does without.
    """
    script, name = 'LISTEN_PID=$$ exec "$@"', "sh"
    if preload is not None and not set(str(preload)) & set(": "):
        script = f"LD_PRELOAD=$0 {script}"
        name = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(preload)]))
    argv = ["/bin/sh", "-c", script, name, *command]
    raised = [_high(descriptor) for descriptor in descriptors]
    try:
        return os.posix_spawn(
            argv[0],
            argv,
            clean_environment({"LISTEN_FDS": "1"}),
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(raised)],
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
            **({"setsid": True} if session else {"setpgroup": 0}),
        )
    finally:
        for descriptor in raised:
            os.close(descriptor)


def open_log(vm: paths.VmPaths, name: str) -> IO[bytes]:
    """*vm*'s log *name*, 0600, for appending; begun anew when it has grown past ``MAX_LOG``."""
    return append_to(paths.private_directory(vm.log) / name)


def append_to(path: Path) -> IO[bytes]:
    """The log *path*, 0600, for appending; begun anew when it has grown past ``MAX_LOG``."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, f"opening the log {path}") from error
    output = os.fdopen(descriptor, "ab")
    if output.tell() > MAX_LOG:
        output.truncate(0)
        output.seek(0, os.SEEK_END)
    return output


def wait_for(descriptors: list[int], seconds: float) -> set[int]:
    """Those of *descriptors* that are readable (a pidfd: the process has ended), waiting at most *seconds* for one."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poller.poll(seconds * 1000)}


def _fatal(line: str) -> errors.BlkckptError | None:
    """The error that the plugin logged before it gave up, with its class (see :mod:`blkckpt.control.host`)."""
    try:
        body = json.loads(line)
    except ValueError:
        return None
    fatal = body.get("fatal") if isinstance(body, dict) else None
    if not isinstance(fatal, dict) or not isinstance(fatal.get("message"), str):
        return None
    return wire.error_from(wire.Failure(0, fatal["message"], str(fatal.get("type")), None))


def _high(descriptor: int) -> int:
    """A duplicate above those that the child gives a meaning to (0 to 5)."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)

"""Real guests for tests: the machine's arguments, its serial line, and the product around it.

Nothing here sleeps to wait: a :class:`Console` reads the serial line in a thread and wakes whoever waits for a line.
The harness listens on a unix socket and QEMU connects to it, so that the original and everything restored from it
(whose command line names the same socket) each get a :class:`Console` of their own, in the order they start.

The guest itself (modes, options, lines) is described in ``tests/support/guest/writer.c``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from blkckpt import paths

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / ".cache" / "guest"
BOOT_SECONDS = 60.0
"""A boot takes 3 s on an idle machine; the bound is for a busy one."""

BASE_ARGUMENTS = "console=ttyS0 mitigations=off nokaslr no_timer_check quiet"


class GuestError(AssertionError):
    """The guest said something wrong, or nothing."""


def ready() -> bool:
    """Has ``tools/guest-image`` been run?"""
    return (IMAGE / "vmlinuz").is_file() and (IMAGE / "initrd.img").is_file()


def machine(serial: Path, mode: str, *, memory: int = 256, link: Path | None = None, **options: int) -> list[str]:
    """The QEMU command line of a test guest without its disks; *options* are those of ``writer.c``.

    *link*: the unix socket that its second serial line goes to.
    """
    append = " ".join([BASE_ARGUMENTS, f"blk.mode={mode}", *(f"blk.{name}={value}" for name, value in options.items())])
    return [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(memory),
        "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", str(IMAGE / "vmlinuz"), "-initrd", str(IMAGE / "initrd.img"), "-append", append,
        "-serial", f"unix:{serial}", *(["-serial", f"unix:{link}"] if link else []),
    ]  # fmt: skip


def disk_arguments(files: Iterable[Path | str]) -> list[str]:
    """virtio disks for a guest started without the product; a string is taken as an NBD URI."""
    result = []
    for number, file in enumerate(files):
        source = f"driver=raw,file.driver=file,file.filename={file},cache.direct=on,discard=unmap"
        if isinstance(file, str):
            path, export = re.fullmatch(r"nbd\+unix:///(.*)\?socket=(.*)", file).group(2, 1)  # type: ignore[union-attr]
            source = f"driver=nbd,server.type=unix,server.path={path},export={export},cache.direct=on,discard=unmap"
        result += ["-blockdev", f"node-name=d{number},{source}", "-device", f"virtio-blk-pci,drive=d{number}"]
    return result


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat line."""

    seq: int
    token: str
    writes: int
    reads: int
    ram: int
    mismatches: int
    errors: int
    up: int

    @classmethod
    def parse(cls, line: str) -> Beat | None:
        fields = dict(re.findall(r"(\w+)=(\w+)", line))
        if not line.startswith("ok ") or fields.keys() != set(cls.__slots__):
            return None
        return cls(token=fields.pop("token"), **{name: int(value) for name, value in fields.items()})


class Console:
    """One serial connection: every line so far, and a way to wait for more."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._changed = threading.Condition()
        self.lines: list[str] = []
        self.closed = False
        self._thread = threading.Thread(target=self._read, name="console", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            with self._changed:
                *lines, rest = (rest + data).split(b"\n")
                self.lines += [line.decode(errors="replace").strip("\r") for line in lines]
                self.closed = not data
                self._changed.notify_all()
            if not data:
                return

    def wait(self, test: Callable[[str], Any], timeout: float, *, start: int = 0, what: str = "a line") -> Any:
        """The first true result of *test* over the lines from number *start* on."""
        deadline = time.monotonic() + timeout
        position = start
        with self._changed:
            while True:
                for position in range(position, len(self.lines)):  # noqa: B020  (goes on where it stopped)
                    if result := test(self.lines[position]):
                        return result
                position = len(self.lines)
                left = deadline - time.monotonic()
                if self.closed or left <= 0:
                    reason = "the guest is gone" if self.closed else f"not within {timeout:.0f} s"
                    raise GuestError(f"waiting for {what}: {reason}; last lines:\n" + "\n".join(self.lines[-8:]))
                self._changed.wait(left)

    def wait_ready(self, timeout: float = BOOT_SECONDS) -> str:
        """The boot token, once the guest's program runs."""
        line = self.wait(lambda line: line.startswith("guest ready") and line, timeout, what="the guest to be ready")
        return str(line.rpartition("token=")[2])

    def beat(self, timeout: float = 20.0) -> Beat:
        """The next heartbeat from now on."""
        found = self.wait(Beat.parse, timeout, start=len(self.lines), what="a heartbeat")
        assert isinstance(found, Beat)
        return found

    def beats(self) -> list[Beat]:
        return [beat for line in list(self.lines) if (beat := Beat.parse(line))]

    def send(self, command: str) -> None:
        self._socket.sendall(command.encode() + b"\n")

    def sweep(self, timeout: float = 60.0) -> int:
        """Let the guest read and compare everything it knows; the number of mismatches it has seen so far."""
        number = time.monotonic_ns()  # never one that the guest was asked for before it was checkpointed
        start = len(self.lines)
        self.send(f"sweep {number}")
        pattern = re.compile(rf"swept id={number} sectors=(\d+) pages=(\d+) mismatches=(\d+)")
        found = self.wait(pattern.match, timeout, start=start, what=f"sweep {number}")
        assert int(found[1]) + int(found[2]) > 0, "the sweep looked at nothing"
        return int(found[3])

    def file(self, path: str, text: str | None = None, timeout: float = 20.0) -> str:
        """The first line of a file in the guest; with *text*, which has no spaces, that is written to it instead."""
        start = len(self.lines)
        self.send(f"read {path}" if text is None else f"put {path} {text}")
        line = self.wait(lambda line: line.startswith(f"file {path} ") and line, timeout, start=start, what=path)
        found = str(line).removeprefix(f"file {path} ")
        if found.startswith("FAILED"):
            raise GuestError(f"{path}: {found}")
        return found

    def complaints(self) -> list[str]:
        """Every line that says something is wrong."""
        bad = ("MISMATCH", "IOERROR", "FATAL")
        return [line for line in list(self.lines) if line.startswith(bad) or "Kernel panic" in line or "Oops" in line]

    def check(self) -> None:
        """Fail if the guest has complained."""
        if bad := self.complaints():
            raise GuestError("\n".join(bad[:10]))

    def wait_closed(self, timeout: float = 20.0) -> None:
        """Until QEMU has gone."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.closed, timeout):
                raise GuestError(f"QEMU still there after {timeout:.0f} s")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()


class Serial:
    """Where serial lines arrive.  ``accept`` gives the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.consoles: list[Console] = []

    def accept(self, timeout: float = 60.0) -> Console:
        self._listener.settimeout(timeout)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError as error:
            raise GuestError(f"no QEMU connected its serial line within {timeout:.0f} s") from error
        connection.setblocking(True)
        self.consoles.append(Console(connection))
        return self.consoles[-1]

    def drop_pending(self) -> None:
        """Forget connections nobody accepted (a QEMU that failed to start)."""
        self._listener.setblocking(False)
        try:
            while True:
                self._listener.accept()[0].close()
        except OSError:
            pass

    def close(self) -> None:
        for console in self.consoles:
            console.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)


class Link:
    """A wire between the second serial lines of two guests; what is restored from them is connected to nothing."""

    def __init__(self, directory: Path) -> None:
        self.paths = (directory / "l0", directory / "l1")
        self._listeners = [socket.socket(socket.AF_UNIX) for _ in self.paths]
        for listener, path in zip(self._listeners, self.paths, strict=True):
            listener.bind(str(path))
            listener.listen(16)
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def connect(self, timeout: float = 60.0) -> None:
        """Both guests have started: from now on each gets what the other sends."""
        for listener in self._listeners:
            listener.settimeout(timeout)
            self._ends.append(listener.accept()[0])
            self._ends[-1].setblocking(True)
        for pair in (self._ends, self._ends[::-1]):
            self._threads.append(threading.Thread(target=self._carry, args=pair, name="wire", daemon=True))
            self._threads[-1].start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for end in (*self._ends, *self._listeners):
            end.close()
        for path in self.paths:
            path.unlink(missing_ok=True)


class PlainMachine:
    """A guest under QEMU without the product, on raw files or NBD exports; for what the product is compared with."""

    def __init__(self, directory: Path, command: list[str], serial: Serial) -> None:
        self.qmp_path = directory / "plain-qmp.sock"
        self.log = directory / "plain-qemu.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "-qmp", f"unix:{self.qmp_path},server=on,wait=off"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self.console = serial.accept()
        except GuestError as error:
            self.close()
            raise GuestError(f"{error}\n{self.log.read_text()}") from error

    def __enter__(self) -> PlainMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class CommandError(AssertionError):
    """A command of the product ended with another exit code than wanted."""

    def __init__(self, command: list[str], result: subprocess.CompletedProcess[str]) -> None:
        super().__init__(
            f"{' '.join(command)}: exit {result.returncode}\n{result.stdout[-4000:]}{result.stderr[-8000:]}"
        )
        self.result = result


class Sandbox:
    """A home of its own and the product's command line; leaves nothing behind.

    Works through the command line alone, as a user does.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.environment = {**os.environ, "BLKCKPT_HOME": str(self.home)}
        # The serial socket's path must fit sun_path, and pytest's directories are long.
        self._short = Path(f"/tmp/bt-{os.getpid()}-{id(self) & 0xFFFFFF:x}")
        self._short.mkdir(mode=0o700)
        self.serial = Serial(self._short / "s")
        self._machines: list[str] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "blkckpt.cli.main", "--quiet", *map(str, words)]

    def run(self, *words: str | Path, code: int = 0, timeout: float = 180.0) -> str:
        """Run ``blkckpt WORDS``; its standard output.  Another exit code than *code* is an error."""
        command = self.command(*words)
        result = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if result.returncode != code:
            raise CommandError(command, result)
        return result.stdout if code == 0 else result.stderr

    def json(self, *words: str | Path, timeout: float = 180.0) -> Any:
        return json.loads(self.run(*words, "--json", timeout=timeout))

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """``blkckpt WORDS`` in the background; the caller waits for it."""
        return subprocess.Popen(
            self.command(*words), env=self.environment, cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def create(self, name: str, disks: Mapping[str, int]) -> dict[str, Path]:
        """Define VM *name* with empty raw disks of these sizes in bytes."""
        files, words = {}, []
        for disk, size in disks.items():
            files[disk] = self.root / f"{name}-{disk}.raw"
            with files[disk].open("wb") as file:
                file.truncate(size)
            files[disk].chmod(0o600)
            words += ["--disk", f"{disk}={files[disk]}"]
        self.run("vm", "create", name, *words)
        return files

    def boot(self, name: str, mode: str, *, memory: int = 256, link: Path | None = None, **options: int) -> Console:
        """Run VM *name* and wait until its guest is ready."""
        self._machines.append(name)
        command = machine(self.serial.path, mode, memory=memory, link=link, **options)
        self.run("run", name, "--detach", "--", *command)
        console = self.serial.accept()
        console.wait_ready()
        return console

    def restore(self, checkpoint: str, name: str, *words: str) -> Console:
        """``blkckpt restore CHECKPOINT --as NAME``; the console of the new guest, already running."""
        self._machines.append(name)
        self.run("restore", checkpoint, "--as", name, "--detach", *words)
        return self.serial.accept()

    def stop(self, name: str) -> None:
        self.run("stop", name)

    def remove(self, name: str) -> None:
        self.run("vm", "rm", name, "--yes")

    def processes(self) -> dict[int, str]:
        """Every process whose environment or command line names this home: pid → its name and command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                text = (entry / "cmdline").read_bytes()
                named = str(self.home).encode() in text + (entry / "environ").read_bytes()
                if named or str(self.serial.path).encode() in text:
                    words = (entry / "comm").read_bytes().strip() + b" " + text.replace(b"\0", b" ")
                    found[int(entry.name)] = words.decode(errors="replace")
            except OSError:
                continue
        return found

    def find(self, *patterns: str) -> list[int]:
        """The pids of this home's processes whose name and command line match every one of *patterns*."""
        return [pid for pid, text in self.processes().items() if all(re.search(p, text) for p in patterns)]

    def close(self) -> None:
        """Stop everything that belongs to this home, by pid."""
        for name in self._machines:
            with contextlib.suppress(CommandError, subprocess.TimeoutExpired):
                self.run("stop", name, timeout=60)
        for _ in range(3):  # a supervisor may start a child once more while it is being killed
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.serial.close()
        self._short.rmdir()
        place = paths.home(self.home)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[4].startswith(f"{place.run}/"):  # of a machine that was killed with its mount's process
                subprocess.run(["fusermount3", "-u", "-z", line.split()[4]], check=False, timeout=20)
        for directory in (place.run, place.live):
            shutil.rmtree(directory, ignore_errors=True)

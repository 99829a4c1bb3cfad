"""The supervisor with a real nbdkit and a real QEMU that never boots (``-S``): starting, restarting, stopping.

QEMU's own block layer writes and reads through the added disk (``qemu-io`` of its monitor), as a guest would.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from blkckpt import errors, paths
from blkckpt.agent import nbdserver, rundir, supervisor, template
from blkckpt.control import client
from blkckpt.disk import api, group
from blkckpt.vm import definition
from tests.support import server

SIZE = 1 << 20
QEMU = (
    "stdbuf", "-oL", "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64",
    "-nodefaults", "-display", "none", "-S",
    "-device", "virtio-blk-pci,id=disk,drive=vda",
)  # fmt: skip
MACHINE = supervisor.Machine(QEMU)
SECONDS = 60.0


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[paths.VmPaths]:
    home = paths.home(tmp_path / "home")
    made = home.vm("test")
    base = tmp_path / "vda.raw"
    base.write_bytes(bytes(SIZE))
    base.chmod(0o600)
    os.utime(base, (1, 1))
    defined = definition.create(made, [definition.disk("vda", base)])
    group.DiskGroup.create(made, defined.id, [api.DiskSpec("vda", str(base), SIZE)])
    yield made
    left = rundir.read(made)
    for process in (left.supervisor, left.server, left.machine) if left else ():
        if process and process.alive and process.pid != os.getpid():
            os.kill(process.pid, signal.SIGKILL)
    for directory in (home.run, home.live):
        shutil.rmtree(directory, ignore_errors=True)


class Monitor:
    """As much of QMP as these tests need."""

    def __init__(self, vm: paths.VmPaths) -> None:
        self._output = vm.log / "qemu.log"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(vm.qmp_socket))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = json.loads(self._lines.readline())
            assert "error" not in message, message
            if "return" in message:
                return message["return"]

    def io(self, command: str) -> str:
        """One ``qemu-io`` command on the disk, through the device that the guest would use; what QEMU printed."""
        before = self._output.stat().st_size
        line = f'qemu-io -d /machine/peripheral/disk/virtio-backend "{command}"'
        assert not self.execute("human-monitor-command", **{"command-line": line})
        return self._output.read_bytes()[before:].decode()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_gone(process: rundir.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            assert nbdserver.wait_for([descriptor], SECONDS)
        finally:
            os.close(descriptor)


def assert_nothing_left(vm: paths.VmPaths, running: rundir.Running) -> None:
    assert rundir.find(vm) is None
    assert sorted(path.name for path in vm.run.iterdir()) == ["supervisor.lock"]
    for process in (running.supervisor, running.server, running.machine):
        assert process is None or not process.alive


def test_run_detached_and_stop(vm: paths.VmPaths, tmp_path: Path) -> None:
    running = supervisor.start(vm, MACHINE)
    assert running.server and running.machine
    assert supervisor.find(vm) == running
    with Monitor(vm) as monitor:
        assert "wrote 8192/8192" in monitor.io("write -P 0x41 4096 8192")
        monitor.io("flush")
    with server_disk(vm) as handle:
        assert handle.pread(2, 4095) == b"\0A"
    with client.Client.connect(vm.control_socket) as peer:
        assert peer.welcome.pid == running.server.pid
    with pytest.raises(errors.StateError, match="running already"):
        supervisor.start(vm, MACHINE)
    assert supervisor.stop(vm)
    assert_nothing_left(vm, running)
    assert (tmp_path / "vda.raw").read_bytes()[4096:12288] == b"A" * 8192
    assert not supervisor.stop(vm)


@contextlib.contextmanager
def server_disk(vm: paths.VmPaths) -> Iterator[Any]:
    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.connect_unix(str(vm.nbd_socket))
    yield handle
    server.hang_up(handle)


def test_qemu_survives_the_death_of_nbdkit(vm: paths.VmPaths) -> None:
    """The listening socket outlives nbdkit, QEMU reconnects, nothing it was answered is lost."""
    running = supervisor.start(vm, MACHINE)
    with Monitor(vm) as monitor:
        for number in range(3):
            monitor.io(f"write -P {65 + number} {number * 4096} 4096")
            before = supervisor.find(vm)
            assert before and before.server
            os.kill(before.server.pid, signal.SIGKILL)
            for known in range(number + 1):
                assert_read(monitor.io(f"read -P {65 + known} {known * 4096} 4096"))
            wait_until(functools.partial(restarted, vm, before.server), "nbdkit is started again")
    assert supervisor.stop(vm)
    assert_nothing_left(vm, running)


def assert_read(answer: str) -> None:
    assert "read 4096/4096" in answer, answer
    assert "failed" not in answer, answer


def restarted(vm: paths.VmPaths, old: rundir.Process) -> bool:
    now = supervisor.find(vm)
    return now is not None and now.server is not None and now.server != old and now.server.alive


def test_the_end_of_qemu_ends_everything(vm: paths.VmPaths) -> None:
    running = supervisor.start(vm, MACHINE)
    with Monitor(vm) as monitor:
        monitor.execute("quit")
    wait_gone(running.supervisor)
    assert_nothing_left(vm, running)


def test_serving_without_a_machine(vm: paths.VmPaths) -> None:
    running = supervisor.start(vm, None)
    assert running.machine is None
    with server_disk(vm) as handle:
        handle.pwrite(b"served", 0)
        assert supervisor.stop(vm), "although a client is connected"
    assert_nothing_left(vm, running)


def test_the_foreground_ends_with_qemus_status(vm: paths.VmPaths) -> None:
    seen = []

    def ready(running: rundir.Running) -> None:
        seen.append(running)
        assert running.machine
        os.kill(running.machine.pid, signal.SIGKILL)

    assert supervisor.run(vm, MACHINE, ready) == 128 + signal.SIGKILL
    assert seen[0].supervisor.pid == os.getpid()
    assert rundir.find(vm) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_the_foreground_in_order(vm: paths.VmPaths, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    assert supervisor.run(vm, MACHINE, lambda _: os.kill(os.getpid(), number)) == 0
    assert signal.getsignal(number) is before
    assert rundir.find(vm) is None


def test_a_signal_while_starting_stops_it(vm: paths.VmPaths) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(vm.root.parent.parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    process.send_signal(signal.SIGTERM)
    assert "stopped while it was starting" in process.stdout.read()
    assert process.wait(SECONDS) == 0
    process.stdout.close()
    assert rundir.find(vm) is None


STARTER = """
import sys
from blkckpt import errors, paths
from blkckpt.agent import nbdserver, supervisor
begin = nbdserver.NbdServer.wait_ready
def wait(self, *arguments, **options):
    print("begin", flush=True)
    self._terminate = self._kill
    import os, signal
    os.kill(self.pid, signal.SIGSTOP)
    return begin(self, *arguments, **options)
nbdserver.NbdServer.wait_ready = wait
nbdserver.STOP_SECONDS = nbdserver.KILL_SECONDS = 0.2
nbdserver.NbdServer.stop.__defaults__ = (0.2,)
try:
    supervisor.run(paths.home(sys.argv[1]).vm("test"), None)
except errors.StateError as error:
    print(error)
"""


def test_a_qemu_that_does_not_start(vm: paths.VmPaths) -> None:
    for argv, kind, words in (
        ((*QEMU, "-no-such-option"), errors.HypervisorError, "status 1"),
        (("/nonexistent/qemu",), errors.NotFoundError, "starting /nonexistent/qemu"),
        ((*QEMU, "-blockdev", "driver=null-co,node-name=vda"), errors.InputError, "node-name vda already"),
        ((), errors.InputError, "no QEMU command"),
    ):
        with pytest.raises(kind, match=words):
            supervisor.start(vm, supervisor.Machine(argv))
        assert rundir.find(vm) is None
    assert "no-such-option" in (vm.log / "qemu.log").read_text()


def test_disks_that_cannot_be_served_say_why(vm: paths.VmPaths, tmp_path: Path) -> None:
    """The plugin's own error, class and all, comes out of the launcher."""
    (tmp_path / "vda.raw").unlink()
    with pytest.raises(errors.NotFoundError, match=r"vda\.raw is missing"):
        supervisor.start(vm, MACHINE)
    (tmp_path / "vda.raw").write_bytes(bytes(4096))
    (tmp_path / "vda.raw").chmod(0o600)
    with pytest.raises(errors.InputError, match="shorter"):
        supervisor.start(vm, None)
    assert rundir.find(vm) is None


def test_a_vm_that_is_not_defined(vm: paths.VmPaths) -> None:
    with pytest.raises(errors.NotFoundError, match="no VM other"):
        supervisor.start(paths.home(vm.root.parent.parent).vm("other"), MACHINE)


def test_a_killed_supervisor_leaves_a_guest_that_can_be_saved(vm: paths.VmPaths) -> None:
    """nbdkit stops cleanly with it although QEMU is connected; run is refused, serve brings the disks back."""
    first = supervisor.start(vm, MACHINE)
    assert first.server and first.machine
    with Monitor(vm) as monitor:
        monitor.io("write -P 0x42 0 4096")
        os.kill(first.supervisor.pid, signal.SIGKILL)
        wait_gone(first.supervisor)
        wait_gone(first.server)
        assert supervisor.find(vm) is None
        with pytest.raises(errors.StateError, match="still running from before"):
            supervisor.start(vm, MACHINE)
        answers: list[str] = []
        reading = threading.Thread(target=lambda: answers.append(monitor.io("read -P 0x42 0 4096")))
        reading.start()
        second = supervisor.start(vm, None)
        assert second.machine == first.machine
        reading.join(SECONDS)
        assert_read(answers[0])
        assert supervisor.stop(vm)
        assert first.machine.alive, "what it did not start it does not end"
        with pytest.raises(errors.StateError, match="still running from before"):
            supervisor.start(vm, MACHINE)
    os.kill(first.machine.pid, signal.SIGKILL)
    wait_gone(first.machine)
    third = supervisor.start(vm, MACHINE)
    assert supervisor.stop(vm)
    assert_nothing_left(vm, third)


def test_environments_that_would_change_nbdkits_python(vm: paths.VmPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN §9: PATH, PYTHONPATH, PYTHONHOME, VIRTUAL_ENV are cleaned; a stale LISTEN_PID is not believed."""
    trap = vm.root / "trap"
    trap.mkdir()
    (trap / "python3").write_text("#!/bin/sh\nexit 1\n")
    (trap / "python3").chmod(0o755)
    (trap / "blkckpt.py").write_text("raise SystemExit('the wrong blkckpt')\n")
    environment = {
        **os.environ,
        "PATH": f"{trap}:/usr/bin:/bin",
        "PYTHONPATH": str(trap),
        "PYTHONHOME": "/nonexistent",
        "VIRTUAL_ENV": str(trap),
        "LISTEN_PID": "1",
        "LISTEN_FDS": "7",
    }
    monkeypatch.setattr(os, "environ", environment)
    cleaned = nbdserver.clean_environment()
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LISTEN_PID", "LISTEN_FDS"} & cleaned.keys()
    assert supervisor.run(vm, None, lambda _: os.kill(os.getpid(), signal.SIGTERM)) == 0


def test_a_server_of_another_version_of_python_is_refused() -> None:
    wrong = nbdserver.Program("/usr/bin/nbdkit", (1, 32, 5), (3, sys.version_info.minor + 1))
    with pytest.raises(errors.MissingError, match="embeds Python"):
        nbdserver.check_interpreter(wrong)
    assert wrong.options == ["--threads=1"]
    assert nbdserver.Program("", (1, 34, 0), (3, 11)).options == []
    assert nbdserver.probe().python[:2] == sys.version_info[:2]


def test_what_nbdkit_said_is_remembered_until_its_files_change(tmp_path: Path) -> None:
    nbdserver.probe.cache_clear()
    found = nbdserver.probe(tmp_path)
    note = tmp_path / "nbdkit.json"
    body = json.loads(note.read_text())
    assert {Path(name).name for name in body["files"]} == {"nbdkit", "nbdkit-python-plugin.so"}

    def again(**changed: object) -> nbdserver.Program:
        note.write_text(json.dumps({**body, **changed}))
        nbdserver.probe.cache_clear()
        return nbdserver.probe(tmp_path)

    assert again(version=[9, 9]).version == (9, 9)  # believed, not asked
    older = {name: [*identity[:3], identity[3] - 1] for name, identity in body["files"].items()}
    for files in (older, {}, None):
        assert again(version=[9, 9], files=files) == found
    note.write_text("{")
    nbdserver.probe.cache_clear()
    assert nbdserver.probe(tmp_path) == found


def _servers(vm: paths.VmPaths) -> list[int]:
    """Every nbdkit of *vm*."""
    wanted = {b"/usr/bin/nbdkit", f"home={vm.root.parent.parent}".encode(), f"vm={vm.name}".encode()}
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted <= set((entry / "cmdline").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return found


def test_an_early_server_whose_vm_does_not_come(vm: paths.VmPaths) -> None:
    """It is started before there is a VM, touches nothing of it, and ends with whoever expected it."""
    absent = paths.home(vm.root.parent.parent).vm("absent")
    with supervisor.Detached() as detached:
        detached.expect(absent)
        wait_until(lambda: bool(_servers(absent)), "the early server is there")
    wait_until(lambda: not _servers(absent), "the early server has ended")
    assert not absent.root.exists()
    assert not absent.run.exists()


def test_an_early_server_and_its_vm_in_time(vm: paths.VmPaths) -> None:
    """The disks are opened when there is the order, not before; the log is the VM's."""
    with supervisor.Detached() as detached:
        detached.expect(vm)
        wait_until(lambda: bool(_servers(vm)), "the early server is there")
        assert not rundir.find(vm)
        (early,) = _servers(vm)
        running = detached.start(vm, None)
    assert running.server is not None
    assert running.server.pid == early
    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.connect_unix(str(vm.nbd_socket))
    assert handle.get_size() == SIZE
    handle.shutdown()
    assert supervisor.stop(vm)
    assert "serving" in (vm.log / "nbdkit.log").read_text()
    assert_nothing_left(vm, running)


def test_an_early_server_of_a_vm_that_runs(vm: paths.VmPaths) -> None:
    """Rule D12: it is refused as ever, and the early server goes with the refusal."""
    running = supervisor.start(vm, None)
    with pytest.raises(errors.StateError, match="running already"):
        supervisor.start(vm, None)
    assert running.server is not None
    pid = running.server.pid
    wait_until(lambda: _servers(vm) == [pid], "the other one has ended")
    assert supervisor.stop(vm)


def _another(vm: paths.VmPaths) -> paths.VmPaths:
    """A second VM beside *vm*, whose disk holds ones."""
    made = paths.home(vm.root.parent.parent).vm("other")
    base = vm.root.parent.parent.parent / "other.raw"
    base.write_bytes(b"\1" * SIZE)
    base.chmod(0o600)
    os.utime(base, (1, 1))
    defined = definition.create(made, [definition.disk("vda", base)])
    group.DiskGroup.create(made, defined.id, [api.DiskSpec("vda", str(base), SIZE)])
    return made


def _first_byte(vm: paths.VmPaths) -> bytes:
    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.connect_unix(str(vm.nbd_socket))
    found = bytes(handle.pread(1, 0))
    handle.shutdown()
    return found


def test_servers_forked_from_one(vm: paths.VmPaths) -> None:
    """Each serves its own VM under its own name; it ends with its supervisor, and is started again like any other."""
    other = _another(vm)
    with template.Template(paths.home(vm.root.parent.parent)) as loaded, contextlib.ExitStack() as stack:
        both = {one: stack.enter_context(supervisor.Detached(loaded)) for one in (vm, other)}
        for one, detached in both.items():
            detached.expect(one)
        running = {one: detached.start(one, None) for one, detached in both.items()}
    for one, said in running.items():
        assert said.server is not None
        assert _servers(one) == [said.server.pid]
        assert os.getsid(said.server.pid) == os.getpgid(said.server.pid) == said.server.pid
    assert [_first_byte(one) for one in (vm, other)] == [b"\0", b"\1"]

    os.kill(running[vm].supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not _servers(vm), "the server has ended with its supervisor")
    state = json.loads(vm.state.read_bytes())
    assert state["clean"], "it was not stopped but killed"

    before = running[other].server
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: _servers(other) not in ([], [before.pid]), "another server is there")
    assert _first_byte(other) == b"\1"
    assert supervisor.stop(other)
    assert not _servers(other)
    assert_nothing_left(other, running[other])


def test_a_template_that_fails(vm: paths.VmPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is started as if there were none."""
    monkeypatch.setattr(nbdserver, "serving", lambda run, plugin: (["/bin/false"], None))
    loaded = template.Template(paths.home(vm.root.parent.parent))
    monkeypatch.undo()
    with loaded, supervisor.Detached(loaded) as detached:
        running = detached.start(vm, None)
    assert _first_byte(vm) == b"\0"
    assert supervisor.stop(vm)
    assert_nothing_left(vm, running)


def test_a_template_of_whom_nobody_asks(vm: paths.VmPaths) -> None:
    """It ends with its context, and with those who could still have asked."""
    home = paths.home(vm.root.parent.parent)
    absent = home.vm("absent")
    with template.Template(home) as loaded, supervisor.Detached(loaded) as unasked:
        with supervisor.Detached(loaded) as detached:
            detached.expect(absent)
            wait_until(lambda: bool(_servers(absent)), "the forked server is there")
        wait_until(lambda: not _servers(absent), "it has ended with who expected it")
        assert unasked
    assert not absent.root.exists()
    assert not absent.run.exists()


def test_logs_are_private(vm: paths.VmPaths) -> None:
    supervisor.start(vm, None)
    supervisor.stop(vm)
    for name in ("nbdkit.log", "qemu.log"):
        assert (vm.log / name).stat().st_mode & 0o777 == 0o600
    link = vm.log / "nbdkit.log"
    link.unlink()
    link.symlink_to("/etc/hostname")
    with pytest.raises(errors.BlkckptError, match=os.strerror(errno.ELOOP)):
        supervisor.start(vm, None)

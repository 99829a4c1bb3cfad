"""A real disk server for tests: a VM in a temporary home, nbdkit started with the supervisor's own functions.

nbdkit ends with the test process (``--exit-with-parent``), the sockets stay open across :meth:`Stand.kill` and
:meth:`Stand.start`, as under the supervisor.  Bytes are compared with models by the tests; nothing is mocked here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nbd

from blkckpt import paths
from blkckpt.agent import fastfilter, nbdserver, rundir
from blkckpt.control import client, messages
from blkckpt.disk import api, group
from blkckpt.store import store
from blkckpt.vm import definition
from tests.support import referee

HOOKED = Path(__file__).parent / "nbdkit_hooked.py"
SECONDS = 60.0


def pattern(length: int, seed: int) -> bytes:
    """*length* bytes that differ everywhere between seeds and offsets of 8."""
    words = (length + 7) // 8
    return b"".join((seed << 40 | number).to_bytes(8, "big") for number in range(words))[:length]


class Stand:
    """One VM and its server.  Enter it to make the VM; :meth:`start` serves it."""

    def __init__(self, root: Path, sizes: Mapping[str, int], *, hook: str | None = None) -> None:
        self.root = root
        self.fast = hook is None  # a hook replaces the interpreter's parts, so they must be what serves
        self.sizes = dict(sizes)
        self.home = paths.home(root / "home")
        self.vm = self.home.vm("test")
        self.store_path = root / "store"
        self.server: nbdserver.NbdServer
        self._hook = hook

    def base(self, name: str) -> Path:
        return self.root / f"{name}.raw"

    def __enter__(self) -> Self:
        for name, size in self.sizes.items():
            with self.base(name).open("wb") as file:
                file.truncate(size)
            self.base(name).chmod(0o600)
            os.utime(self.base(name), (1, 1))  # settled: `definition.disk` waits for a file modified just now
        made = definition.create(self.vm, [definition.disk(name, self.base(name)) for name in self.sizes])
        specs = [api.DiskSpec(disk.name, disk.path, disk.size) for disk in made.disks]
        group.DiskGroup.create(self.vm, made.id, specs)
        store.Store.init(self.store_path)
        self._run = rundir.RunDirectory(self.vm)
        listeners = [self._run.listen(path) for path in (self.vm.nbd_socket, self.vm.control_socket)]
        self._listeners = listeners
        plugin = HOOKED if self._hook else None
        self.server = nbdserver.NbdServer(self.vm, *listeners, plugin=plugin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill()
        finally:
            for listener in self._listeners:
                listener.close()
            self._run.close()
            for directory in (self.home.run, self.home.live):
                shutil.rmtree(directory, ignore_errors=True)

    def start(self) -> Self:
        """Start nbdkit and wait until it answers; with the C fast path if ``fast`` (and if it is built)."""
        if self._hook:
            os.environ["BLKCKPT_TEST_HOOK"] = self._hook
        with fast_path(self.fast):
            self.server.start()
        self.server.wait_ready(SECONDS)
        return self

    def kill(self) -> None:
        """As by the kernel: no warning, no cleanup.  No effect if it does not run."""
        if self.server.running:
            signal.pidfd_send_signal(self.server.pidfd, signal.SIGKILL)
            assert nbdserver.wait_for([self.server.pidfd], SECONDS)
            self.server.reap()

    def stop(self) -> None:
        """Cleanly."""
        self.server.stop(SECONDS)

    def restart(self, *, clean: bool) -> None:
        self.stop() if clean else self.kill()
        self.start()

    @contextlib.contextmanager
    def hooked(self, hook: str) -> Iterator[Self]:
        """Served with *hook* (see ``nbdkit_hooked``) for a while; the server must be stopped, and is afterwards."""
        plain, self.server = self.server, nbdserver.NbdServer(self.vm, *self._listeners, plugin=HOOKED)
        os.environ["BLKCKPT_TEST_HOOK"] = hook
        try:
            with fast_path(False):
                self.server.start()
            self.server.wait_ready(SECONDS)
            yield self
            self.stop()
        finally:
            self.kill()
            self.server = plain

    def log(self) -> str:
        return (self.vm.log / "nbdkit.log").read_text()

    # Clients.

    def nbd(self, export: str = "vda") -> Any:
        """A libnbd handle; its own checks are off, so that what the server says is what is seen."""
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.set_export_name(export)
        handle.add_meta_context("base:allocation")
        handle.connect_unix(str(self.vm.nbd_socket))
        return handle

    @contextlib.contextmanager
    def disk(self, export: str = "vda") -> Iterator[Any]:
        handle = self.nbd(export)
        try:
            yield handle
        finally:
            hang_up(handle)

    def control(self) -> client.Client:
        return client.Client.connect(self.vm.control_socket, name="test")

    def state(self) -> str:
        with self.control() as peer:
            return str(peer.status()["state"])

    def wait_for_rest(self, seconds: float = SECONDS) -> dict[str, Any]:
        """Until the disks are back on their bases; returns the status.  Asks: rest is not announced to anybody."""
        deadline = time.monotonic() + seconds
        with self.control() as peer:
            while True:
                status = peer.status()
                if status["state"] == "rest" and not any(disk["overlays"] for disk in status["disks"]):
                    return status
                assert time.monotonic() < deadline, f"not at rest: {status}"
                time.sleep(0.02)

    # A checkpoint, step by step.

    def checkpoint(self, peer: client.Client, name: str) -> dict[str, Any]:
        """Disk-only: prepare, switch, copy, commit; returns the copy's result by disk."""
        peer.prepare(name)
        assert peer.switch().switched
        copied = self.copy(peer)
        peer.finish(peer.commit(), SECONDS)
        return copied

    def copy(self, peer: client.Client, parents: Mapping[str, str | None] | None = None) -> dict[str, Any]:
        job = peer.copy(self.store_path, parents or dict.fromkeys(self.sizes))
        state = peer.finish(job, SECONDS)
        assert state.state == messages.DONE
        disks: dict[str, Any] = state.result["disks"]
        return disks

    def image(self, image: str) -> bytes:
        """The whole content of an image in the store."""
        with store.Store.open(self.store_path) as opened:
            reader = opened.image(image)
            return reader.read(0, reader.size)

    def residue(self) -> list[str]:
        """Layer files that are there although the disks are at rest."""
        return sorted(path.name for path in self.vm.layers.iterdir() if path.name.endswith((".data", ".map")))


@contextlib.contextmanager
def fast_path(on: bool) -> Iterator[None]:
    """Servers that are started meanwhile have the fast path, or not."""
    before = os.environ.get(fastfilter.VARIABLE)
    os.environ[fastfilter.VARIABLE] = "on" if on else "off"
    try:
        yield
    finally:
        del os.environ[fastfilter.VARIABLE]
        if before is not None:
            os.environ[fastfilter.VARIABLE] = before


@contextlib.contextmanager
def hammered(stand: Stand, disk: str = "vda") -> Iterator[int]:
    """Write all over the upper half of *disk* meanwhile, each write read back; in the end it holds all of them.

    Gives the length of the lower half, which is left alone.
    """
    half = stand.sizes[disk] // 2
    stopped = threading.Event()
    model = bytearray(half)

    def hammer() -> None:
        number = 0
        with stand.disk(disk) as handle:
            while not stopped.wait(0.0005):
                number += 1
                offset, data = number * 7919 % (half - 5000), pattern(1 + number * 131 % 5000, number)
                handle.pwrite(data, half + offset)
                model[offset : offset + len(data)] = data
                assert handle.pread(len(data), half + offset) == data

    with futures.ThreadPoolExecutor(1) as pool:
        work = pool.submit(hammer)
        try:
            yield half
        finally:
            stopped.set()
        work.result(SECONDS)
    with stand.disk(disk) as handle:
        assert handle.pread(half, half) == model[: stand.sizes[disk] - half]


def hang_up(handle: Any) -> None:
    """End a connection politely if it still stands."""
    with contextlib.suppress(nbd.Error):
        handle.shutdown()


def vanish(handle: Any) -> None:
    """End a connection as a killed client does: no disconnect request, answers unread."""
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def refereed(
    root: Path, sizes: Mapping[str, int], hook: str = "tests.support.referee"
) -> Iterator[tuple[Stand, referee.Referee]]:
    """A started server whose every file operation can be held or failed."""
    path = root / "referee.sock"
    os.environ[referee.VARIABLE] = str(path)
    try:
        with referee.Referee(path) as judge, Stand(root, sizes, hook=hook) as stand:
            stand.start()
            yield stand, judge
    finally:
        del os.environ[referee.VARIABLE]

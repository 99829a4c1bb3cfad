"""Our own server and machines, as a user starts them: through the command line, in a home of their own.

What the command line does not offer (a switch without a copy) is asked of the control socket, as the agent does.
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import blkckpt
from benchmarks import context
from blkckpt import paths
from blkckpt.agent import nbdserver
from blkckpt.control import client
from blkckpt.disk import format as formats
from blkckpt.disk import stack, statefile
from blkckpt.store import store as stores
from tests.support import guest

_NAME = "bench"
_KEEP_ALIVE_SECONDS = 10.0
"""The lease ends after 60 s of silence."""


def fast_path() -> Path | None:
    """The library with which servers started here serve the hot path from C, if it is built and wanted."""
    return nbdserver.fast_path(nbdserver.probe())


@contextlib.contextmanager
def sandbox(directory: Path, name: str = "sandbox", *, fast: bool = True) -> Iterator[guest.Sandbox]:
    """A home *name* below *directory*; every process and file of it is gone when the block ends.

    Without *fast* the servers in it leave the C fast path out.
    """
    compileall.compile_dir(Path(blkckpt.__file__).parent, quiet=1)  # as any installation does
    root = directory / name
    root.mkdir()
    try:
        with guest.Sandbox(root) as box:
            if not fast:
                box.environment["BLKCKPT_FAST_PATH"] = "off"
            yield box
    except guest.CommandError as error:
        raise context.BenchError(" ".join(str(error).split())[:600]) from error
    finally:
        context.remove_tree(root)


@contextlib.contextmanager
def served(box: guest.Sandbox, name: str, base: Path) -> Iterator[paths.VmPaths]:
    """VM *name* with disk ``vda`` = *base*, its disks served, no hypervisor."""
    box.run("vm", "create", name, "--disk", f"vda={base}")
    box.run("serve", name, "--detach")
    try:
        yield paths.home(box.home).vm(name)
    finally:
        box.stop(name)


def uri(vm: paths.VmPaths, disk: str = "vda") -> str:
    return f"nbd+unix:///{disk}?socket={vm.nbd_socket}"


@contextlib.contextmanager
def driver(vm: paths.VmPaths) -> Iterator[client.Client]:
    """A control connection that keeps its lease alive while the block lasts."""
    done = threading.Event()
    with client.Client.connect(vm.control_socket, name="bench") as connection:

        def keep_alive() -> None:
            while not done.wait(_KEEP_ALIVE_SECONDS):
                connection.status()

        thread = threading.Thread(target=keep_alive, daemon=True)
        thread.start()
        try:
            yield connection
        finally:
            done.set()
            thread.join(5)


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """Our disk server in the states that the I/O bench compares, with or without the C fast path."""

    fast: bool

    @contextlib.contextmanager
    def base(self, base: Path, directory: Path) -> Iterator[str]:
        """At rest: no overlay."""
        with sandbox(directory, fast=self.fast) as box, served(box, _NAME, base) as vm:
            yield uri(vm)

    @contextlib.contextmanager
    def overlay(self, base: Path, directory: Path) -> Iterator[str]:
        """Switched to a new and empty overlay, which is thrown away at the end."""
        with self.switched(base, directory) as (vm, _connection, _store):
            yield uri(vm)

    @contextlib.contextmanager
    def switched(self, base: Path, directory: Path) -> Iterator[tuple[paths.VmPaths, client.Client, Path]]:
        """The same, with the control connection and a store to copy into."""
        with sandbox(directory, fast=self.fast) as box, served(box, _NAME, base) as vm, driver(vm) as connection:
            store = box.home / "bench-store"
            stores.Store.init(store)
            connection.prepare("bench")
            connection.switch()
            yield vm, connection, store

    @contextlib.contextmanager
    def stacked(self, base: Path, directory: Path, layers: Sequence[Sequence[tuple[int, int]]]) -> Iterator[str]:
        """Over *base* one retained overlay for each of *layers*, oldest first, holding those ``(offset, length)``.

        Files and state are made before the server starts, by the code that makes them for a checkpoint: so every
        sample has the same layers, and they stay.
        """
        with sandbox(directory, fast=self.fast) as box:
            box.run("vm", "create", _NAME, "--disk", f"vda={base}")
            vm = paths.home(box.home).vm(_NAME)
            _retain(vm, layers)
            box.run("serve", _NAME, "--detach")
            try:
                yield uri(vm)
            finally:
                box.stop(_NAME)

    @contextlib.contextmanager
    def filling(self, base: Path, directory: Path) -> Iterator[str]:
        """A disk restored from a checkpoint of *base*, whose background fill has just begun.

        The store is in the page cache, like everybody's data: packs are written past it.
        """
        with sandbox(directory, fast=self.fast) as box:
            with served(box, _NAME, base):
                box.run("checkpoint", _NAME, "--name", "c", "--disk-only", timeout=600)
            for pack in sorted(box.home.rglob("*.pack")):
                context.warm(pack)
            box.run("restore", f"{_NAME}@c", "--as", "copy", "--detach")
            try:
                yield uri(paths.home(box.home).vm("copy"))
            finally:
                box.stop("copy")


def _retain(vm: paths.VmPaths, layers: Sequence[Sequence[tuple[int, int]]]) -> None:
    file = statefile.StateFile(vm)
    try:
        (disk,) = file.state.disks
        place = stack.Place(vm, disk.name, disk.size, formats.boot_id())
        for spans in layers:
            layer_id = stack.new_id()
            overlay = stack.create_overlay(place, layer_id)
            for offset, length in spans:
                for position in range(offset, offset + length, 4096):  # as a guest, and as fio for the peers
                    overlay.file.pwrite(os.urandom(4096), position)
                overlay.bits.mark(offset >> 12, (offset + length) >> 12)
            overlay.flush()
            overlay.bits.remove()
            overlay.close()
            kept = formats.Retained("/nowhere", "bench", layer_id, layer_id)
            disk = dataclasses.replace(disk, overlays=(formats.OverlayState(layer_id, kept), *disk.overlays))
        file.save({disk.name: disk}, clean=True)
    finally:
        file.close()

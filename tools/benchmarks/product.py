"""Our own server and machines, as a user starts them: through the command line, in a home of their own.

What the command line does not offer (a switch without a copy) is asked of the control socket, as the agent does.
"""

from __future__ import annotations

import compileall
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import blkckpt
from benchmarks import context
from blkckpt import paths
from blkckpt.control import client
from tests.support import guest

_NAME = "bench"
_KEEP_ALIVE_SECONDS = 10.0
"""The lease ends after 60 s of silence."""


@contextlib.contextmanager
def sandbox(directory: Path, name: str = "sandbox") -> Iterator[guest.Sandbox]:
    """A home *name* below *directory*; every process and file of it is gone when the block ends."""
    compileall.compile_dir(Path(blkckpt.__file__).parent, quiet=1)  # as any installation does
    root = directory / name
    root.mkdir()
    try:
        with guest.Sandbox(root) as box:
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


@contextlib.contextmanager
def overlay_server(base: Path, directory: Path) -> Iterator[str]:
    """A VM with *base* as its disk, switched to a new and empty overlay, which is thrown away at the end."""
    with sandbox(directory) as box, served(box, _NAME, base) as vm, driver(vm) as connection:
        connection.prepare("bench")
        connection.switch()
        yield uri(vm)

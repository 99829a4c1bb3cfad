"""The peers' NBD servers, each on a unix socket in a directory of its own, gone when the block ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import context

Server = Callable[[Path, Path], AbstractContextManager[str]]
"""``server(base, directory)`` serves raw file *base* and gives the NBD URI."""


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise context.BenchError(f"{program} is not installed; run tools/setup")
    return found


@contextlib.contextmanager
def _serving(command: list[str], directory: Path, socket: Path) -> Iterator[str]:
    with context.process(command, log=directory / "server.log") as child:
        context.wait_for(socket.exists, f"{command[0]}'s socket", 10, child)
        yield f"nbd+unix:///?socket={socket}"
    socket.unlink(missing_ok=True)


def nbdkit_file(base: Path, directory: Path) -> AbstractContextManager[str]:
    """nbdkit's C file plugin: no overlay, the ceiling."""
    socket = directory / "nbdkit-file.sock"
    return _serving([need("nbdkit"), "-f", "-U", str(socket), "file", str(base)], directory, socket)


def nbdkit_null(base: Path, directory: Path, library: Path | None = None) -> AbstractContextManager[str]:
    """nbdkit's null plugin, of *base*'s size: no I/O at all, so what it reaches is the client's limit.

    In one thread, which is faster here, and with *library* preloaded.
    """
    socket = directory / "nbdkit-null.sock"
    preload = [] if library is None else ["env", f"LD_PRELOAD={library}"]
    options = ["-f", "--threads=1", "-U", str(socket), "null", str(base.stat().st_size)]
    return _serving([*preload, need("nbdkit"), *options], directory, socket)


def nbdkit_cow(base: Path, directory: Path) -> AbstractContextManager[str]:
    """nbdkit's own overlay, which lives as long as the server."""
    socket = directory / "nbdkit-cow.sock"
    return _serving([need("nbdkit"), "-f", "-U", str(socket), "--filter=cow", "file", str(base)], directory, socket)


def qemu_raw(base: Path, directory: Path) -> AbstractContextManager[str]:
    """qemu-nbd on the raw file itself: no overlay."""
    socket = directory / "qemu-raw.sock"
    command = [need("qemu-nbd"), "--persistent", "--shared=8", "-f", "raw", "-k", str(socket), str(base)]
    return _serving(command, directory, socket)


def qemu_qcow2(base: Path, directory: Path) -> AbstractContextManager[str]:
    """qemu-nbd with a new qcow2 overlay (QEMU's defaults) on the raw file."""
    overlay, socket = directory / "overlay.qcow2", directory / "qemu-qcow2.sock"
    overlay.unlink(missing_ok=True)
    subprocess.run(
        [need("qemu-img"), "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)], check=True
    )
    command = [need("qemu-nbd"), "--persistent", "--shared=8", "-f", "qcow2", "-k", str(socket), str(overlay)]
    return _serving(command, directory, socket)


def processor_seconds(directory: Path) -> float:
    """Processor time that the disk server of *directory*, the one that runs there now, has used so far."""
    used = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name, _, fields = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            if name in ("nbdkit", "qemu-nbd") and os.fsencode(directory) in (entry / "cmdline").read_bytes():
                used += sum(map(int, fields.split()[11:13]))
    return used / os.sysconf("SC_CLK_TCK")

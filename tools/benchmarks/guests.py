"""The guests that benches measure: the project's test guest, started by us or plainly, with a monitor for the bench."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import context, monitor
from tests.support import guest


@dataclass(frozen=True, slots=True)
class Guest:
    """A running guest: its serial line, and a QMP monitor beside the product's."""

    console: guest.Console
    monitor: monitor.Monitor


def need_image() -> None:
    if not guest.ready():
        raise context.BenchError("there is no guest image; run tools/guest-image")


def _command(serial: Path, qmp: Path, mode: str, memory: int, options: dict[str, int]) -> list[str]:
    return [*guest.machine(serial, mode, memory=memory, **options), "-qmp", f"unix:{qmp},server=on,wait=off"]


@contextlib.contextmanager
def ours(box: guest.Sandbox, name: str, mode: str, memory: int, disk: int, **options: int) -> Iterator[Guest]:
    """A guest that blkckpt runs, with one raw disk of *disk* bytes."""
    box.create(name, {"vda": disk})
    qmp = box.serial.path.with_name(f"{name}.qmp")
    command = _command(box.serial.path, qmp, mode, memory, options)
    try:
        box.run("run", name, "--detach", "--", *command)
        console = box.serial.accept()
        console.wait_ready(300)
        with monitor.Monitor(qmp) as own:
            yield Guest(console, own)
    finally:
        box.stop(name)
        qmp.unlink(missing_ok=True)


@contextlib.contextmanager
def plain(directory: Path, command: list[str], serial: guest.Serial, *, booted: bool = True) -> Iterator[Guest]:
    """A guest under QEMU alone."""
    with guest.PlainMachine(directory, command, serial) as machine:
        if booted:
            machine.console.wait_ready(300)
        context.wait_for(machine.qmp_path.exists, "QEMU's monitor", 10, None)
        with monitor.Monitor(machine.qmp_path) as own:
            yield Guest(machine.console, own)


@contextlib.contextmanager
def serial(directory: Path) -> Iterator[guest.Serial]:
    """Where plain guests connect their serial line."""
    result = guest.Serial(context.short_path(directory))
    try:
        yield result
    finally:
        result.close()

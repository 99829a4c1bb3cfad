"""4 KiB writes with O_DIRECT inside a guest, through QEMU's own NBD client and virtio.

The guest is emulated (TCG): its processor, not the server, sets the pace, so what is compared is whether it can tell
the servers apart at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import context, fio, guests
from tests.support import guest

SPAN_MIB = 64
_OPTIONS = {"span": SPAN_MIB, "threads": 8, "rate": 0, "fsync": 0, "small": 0, "zero": 0, "verify": 0, "dirty": 0}


def writes(serve: AbstractContextManager[str], directory: Path, seconds: float) -> float:
    """Writes a second of a guest whose disk is what *serve* gives; what it writes to has been written before."""
    guests.need_image()
    with serve as uri, guests.serial(directory) as serial:
        fio.allocate(uri, SPAN_MIB << 20, directory, "4k")
        context.settle()
        command = [*guest.machine(serial.path, "writer", memory=192, **_OPTIONS), *guest.disk_arguments([uri])]
        with guests.plain(directory, command, serial) as running:
            running.console.beat()  # the first ones are of a guest that is still starting
            begun, first = time.monotonic(), running.console.beat()
            time.sleep(seconds)  # a measured window, not a wait for anything
            last = running.console.beat()
            running.console.check()
            return (last.writes - first.writes) / (time.monotonic() - begun)


Sampler = Callable[[], float]


def samplers(
    context_: context.Context, serves: dict[str, Callable[[], AbstractContextManager[str]]], seconds: float
) -> dict[str, Sampler]:
    """One sampler a server, by its name."""

    def sampler(serve: Callable[[], AbstractContextManager[str]]) -> Sampler:
        return lambda: writes(serve(), context_.directory, seconds)

    return {name: sampler(serve) for name, serve in serves.items()}

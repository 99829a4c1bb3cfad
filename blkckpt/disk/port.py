"""What the C fast path is told of a disk: its views in C's terms, its exclusive tickets, and what it has done.

A view is told as it is, or not at all: one with a layer whose file is not plainly a :class:`fileio.File` (a harness
that must see every access) leaves all requests to the interpreter.  A floor that is an image is told as no file, so
that reads of blocks that lie in layers are served and the others passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blkckpt.disk import chain, epoch, fastpath, fileio, maps


class Port(epoch.NoPort[chain.View]):
    """No fast path: it has done nothing."""

    loaded = False

    def counters(self) -> tuple[int, int, int, int]:
        """Reads, writes, bytes read, bytes written by the fast path."""
        return 0, 0, 0, 0

    def forget(self) -> None:
        """No new connection finds the disk."""


class FastPort(Port):
    """One disk of the loaded fast path."""

    loaded = True

    def __init__(self, library: fastpath.Library, name: str, size: int) -> None:
        self._library = library
        self.disk = fastpath.Disk(library, name, size)

    def publish(self, view: chain.View | None) -> None:
        self.disk.publish(None if view is None else told(self._library, view))

    def exclude(self, runs: Sequence[tuple[int, int]]) -> Any:
        return self.disk.exclude(runs)

    def include(self, excluded: Any) -> None:
        self.disk.include(excluded)

    def watch(self, runs: Sequence[tuple[int, int]]) -> Any:
        return self.disk.watch(runs)

    def noted(self) -> Sequence[tuple[int, int]]:
        return self.disk.noted()

    def unwatch(self, watched: Any) -> None:
        self.disk.unwatch(watched)

    def settle(self, seconds: float) -> bool:
        return self.disk.settle(seconds)

    def counters(self) -> tuple[int, int, int, int]:
        return self.disk.counters()

    def forget(self) -> None:
        self.disk.forget()


def of(name: str, size: int) -> Port:
    """The port of a disk: to the fast path if one is in use."""
    library = fastpath.library()
    return Port() if library is None else FastPort(library, name, size)


def told(library: fastpath.Library, view: chain.View) -> fastpath.View | None:
    """*view* for the fast path; ``None`` if it cannot serve it."""
    layers = []
    for overlay in view.layers:
        if overlay.file.fast is None or overlay.bits.fast is None:
            return None
        layers.append((overlay.file.fast, overlay.bits.fast))
    changed: maps.LiveMap = view.changed
    floor = view.floor.fast if isinstance(view.floor, fileio.File) else None
    if changed.fast is None or (floor is None and isinstance(view.floor, fileio.File)):
        return None
    return fastpath.View(
        library,
        view.size,
        layers,
        floor,
        changed.fast,
        target=view.target,
        bottom=view.bottom,
        commit=view.commit,
        armed=view.armed,
    )

"""Main memory out of the store, chunk by chunk, through a mount of the restored machine's own.

The mount lies in the VM's run directory and shows the checkpoints of the VM that was restored from; QEMU maps
``memory/blocks/NAME.img`` privately, as it does raw images.  Nothing is written anywhere, whatever the machine's size.
It ends when QEMU has gone.  Its process is started first of all, and loads while the machine is being prepared; this
module therefore loads little itself.

What it means.  The guest's memory is *read when touched*, from a process: if that is killed, the guest's next touch of
a page that is not in the page cache is a SIGBUS, and QEMU dies.  Its disks lose nothing, its memory is gone.
:mod:`blkckpt.restore.prefetch` ends that dependence.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Self

from blkckpt import errors, paths
from blkckpt.memory import image
from blkckpt.view import starting, touched

if TYPE_CHECKING:
    from blkckpt.store import manifest
    from blkckpt.store import store as stores

DIRECTORY = "memory"


class Mount:
    """The mount of VM *vm* over the checkpoints of VM *origin*, being made while the rest is prepared.

    Leave the context without :meth:`files` having been called and it is ended.
    """

    def __init__(self, home: paths.Home, vm: paths.VmPaths, origin: str) -> None:
        for directory in (home.run, vm.run):
            paths.private_directory(directory)
        self._place = paths.private_directory(vm.run / DIRECTORY)
        if os.path.ismount(self._place):
            raise errors.StateError(
                f"{self._place} is still mounted: a QEMU of VM {vm.name} uses it, or was killed (`blkckpt doctor`)"
            )
        self._home = home
        self._used = False
        self._starting = starting.Starting(home, starting.Orders(str(self._place), vm=origin, user=vm.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._used:
            return
        self._starting.cancel()
        for directory in (self._place, self._place.parent):
            with contextlib.suppress(OSError):  # somebody else's things are in it
                directory.rmdir()

    def expect(self, store: stores.Store, checkpoint: manifest.Manifest) -> None:
        """This is what the machine goes on from: have the disk fetch what it touched the last time meanwhile."""
        blocks = checkpoint.memory.blocks if checkpoint.memory else ()
        known = [(block.image, found) for block in blocks if (found := touched.load(self._home, block.image))]

        def announce() -> None:
            with contextlib.suppress(errors.BlkckptError):  # a hint; what is wrong shows when it is read
                for image_id, ranges in known:
                    store.image(image_id).announce(ranges)

        if known:
            threading.Thread(target=announce, name="touched", daemon=True).start()

    def files(self, vm: str, checkpoint: str, wanted: Collection[str], every: Collection[str]) -> dict[str, Path]:
        """The files of the blocks *wanted*, when the mount is usable; *every* block of the checkpoint in its order."""
        self._starting.wait()
        self._used = True
        base = self._place / vm / checkpoint / "memory" / "blocks"
        return {block: base / name for name, block in image.view_names(every).items() if block in wanted}

"""Images in use by a process: pins that end with it.

An export, a copy to a file, a bundle read a checkpoint's images for a while, and the checkpoint may be removed and
collected meanwhile.  They pin what they read (:mod:`blkckpt.store.pins`) under a name that tells the process::

    use.KIND.BOOT.PID.START.NUMBER      boot: 8 digits of the kernel's boot id; start: field 22 of /proc/PID/stat

A process that is killed leaves its pin; :func:`let_go`, called before every collection by hand, removes the pins of
processes that are gone.  So nothing is kept for ever, and nothing that is read is taken away.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator

from blkckpt import errors
from blkckpt.agent import rundir
from blkckpt.disk import format as formats
from blkckpt.store import store

PREFIX = "use."
_numbers = itertools.count()


@contextlib.contextmanager
def using(place: store.Store, image_ids: Iterable[str], kind: str) -> Iterator[None]:
    """Keep *image_ids* in *place* until the body ends or this process dies; *kind* is for people who look."""
    owner = f"{_prefix(kind)}.{os.getpid()}.{rundir.start_time(os.getpid())}.{next(_numbers)}"
    place.pin(owner, image_ids)
    try:
        yield
    finally:
        with contextlib.suppress(errors.BlkckptError):  # the next let_go removes it
            place.unpin(owner)


def let_go(place: store.Store) -> int:
    """Remove the pins of processes that are gone; returns how many."""
    dead = [owner for owner in place.pins() if owner.startswith(PREFIX) and not _alive(owner)]
    for owner in dead:
        place.unpin(owner)
    return len(dead)


def _prefix(kind: str) -> str:
    return f"{PREFIX}{kind}.{formats.boot_id()[:8]}"


def _alive(owner: str) -> bool:
    """Whether the process in a pin's name lives.  A name of another form is not ours to judge."""
    parts = owner.split(".")
    if len(parts) != 6 or not (parts[3].isdigit() and parts[4].isdigit()):
        return True
    return parts[2] == formats.boot_id()[:8] and rundir.start_time(int(parts[3])) == int(parts[4])

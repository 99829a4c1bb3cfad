"""What a machine touched of its memory when it went on from a checkpoint: the next one will touch the same first.

The mount that a machine has its memory from notes what is read in the first seconds.  The next restore of that image
tells the disk to fetch it while its own programs start (:mod:`blkckpt.restore.fused`), and decodes it ahead of QEMU.
It is a hint: without it, or with a wrong one, the guest gets the same bytes, later.

``HOME/touched/IMAGE.json`` (0600), IMAGE being the store's id of the memory image: ``version`` 1, ``ranges``
[[offset, length] …] in bytes, in the order in which they were read.  :data:`KEPT` of them are kept, the newest.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blkckpt import durable, errors, log, paths

SECONDS = 3.0
"""How long is noted, from the first read on."""

MAX_BYTES = 256 << 20
MAX_RANGES = 4096
KEPT = 64
VERSION = 1

Ranges = list[tuple[int, int]]

logger = log.get(__name__)


def place(home: paths.Home, image: str) -> Path:
    return home.root / "touched" / f"{image}.json"


def load(home: paths.Home, image: str) -> Ranges:
    """What was read of *image*, in order; nothing if that is not known, or the file is no such file."""
    try:
        body = json.loads(durable.read_small(place(home, image), "list of touched memory"))
        if body["version"] != VERSION:
            return []
        found = [(int(offset), int(length)) for offset, length in body["ranges"][:MAX_RANGES]]
    except (errors.BlkckptError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return found if all(offset >= 0 and length > 0 for offset, length in found) else []


def save(home: paths.Home, image: str, ranges: Ranges) -> None:
    """Keep *ranges* for :func:`load`, and let go of the oldest of others."""
    path = place(home, image)
    paths.private_directory(path.parent)
    durable.write_file(path, json.dumps({"version": VERSION, "ranges": ranges}).encode())
    others = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
    for old in others[:-KEPT]:
        old.unlink(missing_ok=True)


class Notes:
    """What is being read of one image.  Kept by *keep*, once: after :data:`SECONDS`, or when it is closed before."""

    def __init__(self, keep: Callable[[Ranges], None]) -> None:
        self._keep = keep
        self._ranges: Ranges = []
        self._bytes = 0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._ends = float("inf")

    def note(self, offset: int, length: int) -> None:
        """This range is read."""
        if time.monotonic() > self._ends or self._bytes >= MAX_BYTES:
            return
        with self._lock:
            if self._timer is None:
                self._ends = time.monotonic() + SECONDS
                self._timer = threading.Timer(SECONDS, self.close)
                self._timer.daemon = True
                self._timer.start()
            self._bytes += length
            last = self._ranges[-1] if self._ranges else (0, 0)
            if last[0] + last[1] == offset and last[1]:
                self._ranges[-1] = (last[0], last[1] + length)
            elif len(self._ranges) < MAX_RANGES:
                self._ranges.append((offset, length))

    def close(self) -> None:
        """No more of it."""
        with self._lock:
            found, self._ranges, self._ends = self._ranges, [], float("-inf")
            if self._timer is not None:
                self._timer.cancel()
        if not found:
            return
        try:
            self._keep(found)
        except (errors.BlkckptError, OSError) as error:
            logger.warning("not noted what was touched first", extra={"fields": {"error": str(error)}})


class First:
    """Of every image that a machine opens: what was touched is decoded ahead, or noted when that is not known."""

    def __init__(self, home: paths.Home) -> None:
        self._home = home
        self._notes: dict[str, Notes] = {}

    def opened(self, image: str, ahead: Callable[[Ranges], None]) -> Notes | None:
        """*image* is open now; *ahead* decodes ranges of it in the background.  What is read is to be noted in this."""
        known = load(self._home, image)
        if known:
            with contextlib.suppress(errors.BlkckptError):  # whoever reads it gets the error
                ahead(known)
            return None
        if image not in self._notes:
            self._notes[image] = Notes(lambda ranges: save(self._home, image, ranges))
        return self._notes[image]

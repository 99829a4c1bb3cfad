"""The disk of a retained checkpoint as a file of a view: read from the VM's layers while that is asked for.

Reading keeps the layers where they are (:mod:`blkckpt.disk.claim`), and a mount may stand for weeks.  So the reader is
closed when nobody has read for :data:`IDLE` seconds, and opened anew for the next read: by then the checkpoint may have
been flattened, and it reads the image.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from blkckpt.store import images
from blkckpt.store import store as stores
from blkckpt.view import content

IDLE = 5.0
STEP = 1 << 20

_T = TypeVar("_T")


class Layers:
    """A :class:`content.Content`."""

    def __init__(self, store: stores.Store, image: str, size: int) -> None:
        self._store, self._image = store, image
        self.size = size
        self.images = frozenset((image,))
        self._lock = threading.Lock()
        self._reader: images.ImageReader | None = None
        self._used = 0.0
        self._timer: threading.Timer | None = None

    def pieces(self, offset: int, length: int) -> list[bytes]:
        end = offset + length
        steps = [(start, min(STEP, end - start)) for start in range(offset, end, STEP)]
        return self._with(lambda reader: [reader.read(*step) for step in steps])

    def used(self) -> int:
        return content.used(self)

    def data_at(self, offset: int) -> int | None:
        return self._with(lambda reader: _find(reader, offset, zero=False))

    def hole_at(self, offset: int) -> int:
        found = self._with(lambda reader: _find(reader, offset, zero=True))
        return self.size if found is None else found

    def ahead(self, offset: int, length: int) -> None:
        """The kernel reads ahead in the layers' files by itself."""

    def _with(self, work: Callable[[images.ImageReader], _T]) -> _T:
        with self._lock:
            if self._reader is None:
                self._reader = self._store.image(self._image)
            try:
                return work(self._reader)
            finally:
                self._used = time.monotonic()
                if self._timer is None:
                    self._start(IDLE)

    def _start(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._tidy)
        self._timer.daemon = True
        self._timer.start()

    def _tidy(self) -> None:
        with self._lock:
            left = self._used + IDLE - time.monotonic()
            if left > 0:
                self._start(left)
                return
            self._timer = None
            if self._reader is not None:
                self._reader.close()
                self._reader = None


def _find(reader: images.ImageReader, offset: int, *, zero: bool) -> int | None:
    """The first offset from *offset* on that is, or is not, in a hole; None if there is none."""
    if offset < reader.size:
        for start, _, is_zero in reader.extents(offset, reader.size - offset):
            if is_zero is zero:
                return start
    return None

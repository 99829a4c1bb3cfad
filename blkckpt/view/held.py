"""What is open stays: images that files of a view are being read from are pinned in their store.

One pin for each mount and store (``view-ID``), durable as every pin is, with the images that are open now and those
closed within the last :data:`LINGER` seconds; so that ``tar`` over a thousand checkpoints writes it a few hundred
times, not once a file.  A pin left by a killed mount is removed by whoever clears up after it
(:mod:`blkckpt.view.mounts`); until then it keeps a little too much, which harms nothing.

The pin is written under the store's lock, after a look that the image is still there: a collection that runs at the
same time has either seen the pin, or the image is gone and the opening fails.  If it cannot be written (no space,
which is when people look for what to delete) the file is opened all the same, with a line in the log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable

from blkckpt import errors, log
from blkckpt.store import images, lock, pins
from blkckpt.store import store as stores

LINGER = 5.0
LOCK_SECONDS = 60.0
"""A collection's sweep takes seconds."""

logger = log.get(__name__)


def owner(mount: str) -> str:
    """The pin's name of mount *mount*."""
    return f"view-{mount}"


class Held:
    """The pins of one mount.  Thread-safe; ``close`` removes them."""

    def __init__(self, mount: str) -> None:
        self._owner = owner(mount)
        self._changed = threading.Condition()
        self._stores: dict[str, _Pin] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._tidy, name="view-pins", daemon=True)
        self._thread.start()

    def take(self, store: stores.Store, image_ids: Iterable[str]) -> None:
        """Hold these images until :meth:`release`; NotFoundError if one is gone already."""
        wanted = frozenset(image_ids)
        with self._changed:
            pin = self._stores.setdefault(str(store.path), _Pin(store, self._owner))
            self._changed.notify()
        pin.take(wanted)

    def release(self, store: stores.Store, image_ids: Iterable[str]) -> None:
        self._stores[str(store.path)].release(frozenset(image_ids))
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for pin in self._stores.values():
            pin.remove()

    def _tidy(self) -> None:
        """Write the pins anew when something has been closed for long enough."""
        while True:
            with self._changed:
                due = [when for pin in self._stores.values() if (when := pin.due()) is not None]
                timeout = max(min(due) - time.monotonic(), 0.0) if due else None
                if not self._closed and (timeout is None or timeout > 0):
                    self._changed.wait(timeout)
                if self._closed:
                    return
                known = list(self._stores.values())
            for pin in known:
                pin.tidy()


class _Pin:
    """The pin in one store."""

    def __init__(self, store: stores.Store, owner_: str) -> None:
        self._store, self._owner = store, owner_
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._closed: dict[str, float] = {}
        self._written: frozenset[str] = frozenset()

    def take(self, wanted: frozenset[str]) -> None:
        with self._lock:
            self._open.update(wanted)
            if wanted <= self._written:
                return
            try:
                self._write(frozenset(self._open) | frozenset(self._closed), wanted)
            except errors.NotFoundError:
                self._forget(wanted)
                raise
            except errors.BlkckptError as error:
                fields = {"store": str(self._store.path), "error": str(error)}
                logger.error("open without a pin: do not collect this store now", extra={"fields": fields})

    def release(self, wanted: frozenset[str]) -> None:
        with self._lock:
            for image in wanted:
                if self._open[image] == 1:
                    self._closed[image] = time.monotonic() + LINGER
            self._forget(wanted)

    def due(self) -> float | None:
        """When there is something to let go of."""
        with self._lock:
            return min(self._closed.values(), default=None)

    def tidy(self) -> None:
        with self._lock:
            now = time.monotonic()
            kept = {image: until for image, until in self._closed.items() if until > now}
            if len(kept) == len(self._closed):
                return
            self._closed = kept
            with contextlib.suppress(errors.BlkckptError):  # too much is pinned until the next time
                self._write(frozenset(self._open) | frozenset(kept), frozenset())

    def remove(self) -> None:
        with self._lock, contextlib.suppress(errors.BlkckptError):
            self._store.unpin(self._owner)

    def _forget(self, wanted: frozenset[str]) -> None:
        self._open.subtract(wanted)
        self._open = +self._open

    def _write(self, every: frozenset[str], wanted: frozenset[str]) -> None:
        """Pin *every*; NotFoundError if one of *wanted* is gone.

        An image that is open without a pin (it could not be written then) may be gone too: no pin may name it, since
        a collection would take it for one whose data is lost.
        """
        backend = self._store.packs.backend
        with lock.shared(self._store.path / "lock", LOCK_SECONDS):
            for image in every - self._written:
                try:
                    if self._store.reference(image) is None:
                        images.load_table(self._store.packs, image)
                except errors.NotFoundError:
                    if image in wanted:
                        raise
                    every -= {image}
            if every:
                backend.put(pins.key(self._owner), pins.encode(self._owner, sorted(every)))
            else:
                backend.delete(pins.key(self._owner))
        self._written = every

"""From the raw images to the store, chunk by chunk as they are completed.

The feeder takes complete chunks from the raw image, that is from the page cache, so that the receiver never waits
for hashing, compression or the store's disk: what the store cannot take yet waits in the page cache.  Where every
page comes once the chunks are mapped, else they are copied: a chunk that changed between its hash and its
compression would be stored under a hash that is not its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

from blkckpt import errors
from blkckpt.memory import assemble, intake
from blkckpt.store import layout, store, writer

FEED = 4 << 20
"""Bytes taken and handed to the store at once: one of its jobs."""


class Feeder:
    """Hands complete chunks to the store, one writer for each main block.

    :meth:`add` is the receiver's, everything else the feeder thread's.
    """

    def __init__(
        self, where: store.Store, label: str, parents: Mapping[str, str | None], cancel: intake.Cancel
    ) -> None:
        self._store = where
        self._label = label
        self._parents = parents
        self._cancel = cancel
        self._ready = threading.Condition()
        self._queue: deque[tuple[assemble.Block, int, int]] = deque()
        self._writers: dict[str, writer.ImageWriter] = {}
        self._zero_too: set[str] = set()
        self._closed = False
        self.new = 0

    def add(self, block: assemble.Block, low: int, high: int) -> None:
        with self._ready:
            if self._queue and self._queue[-1][0] is block and self._queue[-1][2] == low:
                self._queue[-1] = (block, self._queue[-1][1], high)
            else:
                self._queue.append((block, low, high))
            self._ready.notify()

    def close(self) -> None:
        """Nothing more will be added."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def run(self) -> None:
        """Feed until closed and empty."""
        while True:
            self._cancel.check()
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if not self._queue:
                    return
                item = self._queue.popleft()
            self._feed(*item)

    def finish(self, block: assemble.Block) -> str:
        """Feed what is left of *block* and make its image durable; returns the image's id."""
        name = block.info.name
        if block.stale and name in self._writers:
            self._writers.pop(name).abort()
        for low, high in block.rest():
            self._feed(block, low, high, last=True)
        info = self._writer(block).finish()
        self.new += info.new_bytes
        return info.image

    def put(self, data: bytes, label: str) -> str:
        """Store *data* as an image of its own."""
        with self._store.image_writer(len(data), kind="stream", label=label) as target:
            target.write(0, data)
            info = target.finish()
        self.new += info.new_bytes
        return info.image

    def abort(self) -> None:
        for target in self._writers.values():
            target.abort()

    def _feed(self, block: assemble.Block, low: int, high: int, *, last: bool = False) -> None:
        if block.stale and not last:
            return
        target = self._writer(block)
        data = block.data_chunks(low, high)
        for start, stop in assemble.runs(data):
            end = min((low + stop) * layout.CHUNK, block.info.size)
            for offset in range((low + start) * layout.CHUNK, end, FEED):
                self._cancel.check()
                take = block.raw.view if block.once else block.raw.read
                target.write(offset, take(offset, min(FEED, end - offset)), stable=True)
        if block.info.name in self._zero_too:
            for start, stop in assemble.runs(~data):
                offset = (low + start) * layout.CHUNK
                target.zero(offset, min((low + stop) * layout.CHUNK, block.info.size) - offset)

    def _writer(self, block: assemble.Block) -> writer.ImageWriter:
        name = block.info.name
        if name not in self._writers:
            parent = self._parent(block)
            if parent:
                self._zero_too.add(name)
            label = f"{self._label}/{name}"
            self._writers[name] = self._store.image_writer(block.info.size, parent=parent, kind="memory", label=label)
        return self._writers[name]

    def _parent(self, block: assemble.Block) -> str | None:
        """The image to deduplicate against, if it is still there and of the same size."""
        parent = self._parents.get(block.info.name)
        if parent is None:
            return None
        try:
            return parent if self._store.image(parent).size == block.info.size else None
        except (errors.NotFoundError, errors.CorruptError, errors.InputError):
            return None

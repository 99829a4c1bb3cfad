"""One disk of a group: its gate, its place in the procedure, and the moves between views.

Methods ending in ``_locked`` are called under the group's gate lock, for all members at one instant; they wait for
nothing.  The others are called by the group one at a time.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from blkckpt import errors, log
from blkckpt.disk import api, blocks, chain, commit, copier, disk, epoch, fill, job, layer, maps, stack
from blkckpt.disk import format as formats

DRAIN_SECONDS = 60.0
"""How long requests in flight may take before a copy fails; a commit tries again."""

_log = log.get(__name__)


class Member:
    """A disk and what its checkpoint needs."""

    def __init__(
        self,
        place: stack.Place,
        state: formats.DiskState,
        view: chain.View,
        lock: threading.Lock,
        ask_barrier: Callable[[], None],
    ) -> None:
        self.place = place
        self.state = state
        self.gate = epoch.Gate[chain.View](lock, view)
        self.disk = disk.Disk(state.name, state.path, state.size, self.gate, ask_barrier)
        self.ended: epoch.Epoch[chain.View] | None = None  # the epoch that the switch ended
        self._overlay: layer.Overlay | None = None  # made by prepare
        self._next: maps.LiveMap | None = None  # takes the changes from the switch on

    @property
    def view(self) -> chain.View:
        return self.gate.current.view

    @property
    def filling(self) -> bool:
        return self.state.source is not None

    # ---- to the switch ----

    def make_overlay(self) -> formats.DiskState:
        """Create the files of a checkpoint's overlay; returns the state that names them."""
        overlay_id, changed_id = stack.new_id(), stack.new_id()
        self._next = maps.LiveMap.create(self.place.live(changed_id), changed_id, self.place.size, self.place.boot)
        self._overlay = stack.create_overlay(self.place, overlay_id)
        return dataclasses.replace(
            self.state,
            overlays=(formats.OverlayState(overlay_id), *self.state.overlays),
            changed=formats.ChangedState(changed_id),
            frozen=self.state.changed,
        )

    def drop_overlay(self) -> None:
        """Prepare failed: close what :meth:`make_overlay` made.  The group sweeps the files."""
        if self._overlay is not None:
            self._overlay.close()
        if self._next is not None:
            self._next.close()
        self._overlay = self._next = None

    def put_overlay_locked(self) -> None:
        """802: the empty overlay goes on top; writes go on to the layer below it."""
        assert self._overlay is not None
        self.gate.advance_locked(self.view.replace(layers=(self._overlay, *self.view.layers), target=1))

    def arm_locked(self) -> None:
        self.gate.close_fast_locked()
        self.gate.advance_locked(self.view.replace(armed=True))

    def disarm_locked(self) -> None:
        self.gate.advance_locked(self.view.replace())
        self.gate.open_fast_locked()

    def switch_locked(self) -> None:
        """810: writes go to the overlay.  O(1)."""
        if self.view.armed:
            self.gate.open_fast_locked()
        self.ended = self.gate.advance_locked(self.view.replace(target=0, changed=self._next))

    # ---- the copy ----

    def frozen(self, parent: str | None) -> copier.FrozenDisk:
        """What the copy child reads.  Waits for the writes in flight at the switch (830, 812)."""
        assert self.ended is not None
        self.gate.wait_drained(self.ended, time.monotonic() + DRAIN_SECONDS)
        view = self.ended.view
        below = view.replace(layers=view.layers[1:], target=0)
        since = self.state.frozen.since if self.state.frozen is not None else None
        changed = view.changed if since is not None and since == parent else None
        return copier.FrozenDisk(self.state.name, below, self.state.source, changed)

    def keep_changes(self, image: str) -> formats.DiskState:
        """The checkpoint is durable as *image*: what changes now is relative to it."""
        changed = dataclasses.replace(self.state.changed, since=image)
        return dataclasses.replace(self.state, changed=changed, frozen=None)

    def merge_changes(self) -> formats.DiskState:
        """The checkpoint is given up: join both maps of changes in the one in force (waits for the old epochs)."""
        frozen, changed = self.state.frozen, self.state.changed
        if frozen is None or self._next is None:
            return self.state
        if self.ended is None:  # before the switch nothing went to the next map
            return dataclasses.replace(self.state, changed=frozen, frozen=None)
        self.drain(self.ended, threading.Event())
        self._next.absorb(self.ended.view.changed)
        return dataclasses.replace(self.state, changed=formats.ChangedState(changed.id, frozen.since), frozen=None)

    def end_checkpoint(self, state: formats.DiskState) -> None:
        """*state* is saved: let go of the map of changes that it does not name any more."""
        gone = self.ended.view.changed if self.ended is not None else self._next
        if gone is not None:
            gone.remove()
        self.state = state
        self.ended = self._overlay = self._next = None

    # ---- back to rest ----

    def to_commit(self) -> layer.Overlay | None:
        """The bottom-most overlay that has no claim to stay."""
        for overlay in reversed(self.view.layers):
            if any(item.id == overlay.id and not item.retained for item in self.state.overlays):
                return overlay
        return None

    def empty(self, overlay: layer.Overlay, pace: job.Pace, progress: Callable[[int, int], None]) -> None:
        """834: commit *overlay* into the layer below it.  May be called again after an error."""
        with self.gate.lock:
            top = self.view.layers[0] is overlay
            old = self.gate.advance_locked(self.view.replace(target=0, commit=top))
        self.drain(old, pace.stop)
        commit.run(self.gate, overlay, pace, progress)

    def without(self, overlay: layer.Overlay) -> formats.DiskState:
        kept = tuple(item for item in self.state.overlays if item.id != overlay.id)
        return dataclasses.replace(self.state, overlays=kept)

    def forget(self, overlay: layer.Overlay, state: formats.DiskState, stop: threading.Event) -> None:
        """*state*, saved, does not name the empty *overlay*: remove it once no request uses it."""
        self.state = state
        with self.gate.lock:
            layers = tuple(item for item in self.view.layers if item is not overlay)
            old = self.gate.advance_locked(self.view.replace(layers=layers, target=0))
        self.drain(old, stop)
        stack.remove_overlay(self.place, overlay)

    def drain(self, old: epoch.Epoch[chain.View], stop: threading.Event) -> None:
        """Wait for requests in flight, however long they take; StateError when stopped."""
        while True:
            try:
                return self.gate.wait_drained(old, time.monotonic() + 1.0)
            except errors.DeadlineError:
                if stop.is_set():
                    raise errors.StateError("stopped while requests were in flight") from None

    # ---- restored disks ----

    def fill(self, pace: job.Pace, progress: Callable[[int, int], None]) -> formats.DiskState:
        """Fill the file from the image; returns the state of a disk that has a base of its own."""
        view = self.view
        assert isinstance(view.floor, layer.ImageFloor)
        fill.run(self.gate, view.layers[-1], view.floor, pace, progress)
        return dataclasses.replace(self.state, source=None, fill=None)

    def drop_source(self, state: formats.DiskState, stop: threading.Event) -> None:
        """*state*, saved, has no source: the file is the base now."""
        self.state = state
        with self.gate.lock:
            view = self.view
            file, image = view.layers[-1], view.floor
            old = self.gate.advance_locked(view.replace(layers=view.layers[:-1], floor=file.file))
        self.drain(old, stop)
        image.close()
        file.durable.close()
        file.bits.close()
        stack.unlink_overlay(self.place, file.id)

    # ---- the end ----

    def save_changes(self) -> None:
        """Clean stop: write the changed bits for the next start (D13)."""
        stack.save_changed(self.place, self.state.changed, self.view.changed)

    def remove_live(self) -> None:
        """Clean stop: the durable maps are complete and say so."""
        for overlay in self.view.layers:
            overlay.bits.remove()
        self.view.changed.remove()

    def close(self) -> None:
        """Close every file, whatever is in it."""
        view = self.view
        for overlay in view.layers:
            overlay.close()
        view.floor.close()
        view.changed.close()

    def status(self) -> api.DiskStatus:
        shown, view = self.disk, self.view
        state = self.state
        filled = view.layers[-1] if not isinstance(view.floor, layer.RawFloor) else None
        overlays = [overlay for overlay in view.layers if overlay is not filled]
        return api.DiskStatus(
            name=state.name,
            path=state.path,
            size=state.size,
            overlays=tuple(api.OverlayStatus(item.id, _held(item, state.size), item.retained) for item in overlays),
            source=state.source,
            filled=None if filled is None else _held(filled, state.size),
            changed_since=(state.frozen or state.changed).since,
            changed_bytes=min(view.changed.count() << blocks.SHIFT, state.size),
            reads=shown.reads,
            writes=shown.writes,
            read_bytes=shown.read_bytes,
            written_bytes=shown.written_bytes,
            flushes=shown.flushes,
            copy_ups=sum(overlay.copy_ups for overlay in view.layers),
            error=chain.failure(view),
        )


def _held(overlay: layer.Overlay, size: int) -> int:
    return min(overlay.bits.count() << blocks.SHIFT, size)

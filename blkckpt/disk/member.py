"""One disk of a group: its gate, its layers, its part in each checkpoint, and the moves between views.

*View.*  What requests see follows from a few fields (:meth:`Member._view_locked`): the overlays, whether the newest is
only prepared, whether the disk is armed, which overlay is being emptied.  Every move changes one of them and puts the
view that follows in force, so moves of several checkpoints and of a commit may come in any order.

*Changed blocks.*  A map of changes begins at each switch, and says what came into the bottom layer since then.  The
oldest ones belong to checkpoints that are not over; the newest is in force.  ``since`` of a map is the image that its
changes are relative to.  A checkpoint that becomes durable gives the following map its image as ``since`` and drops
its own and all older ones; one that is given up hands its map's changes and ``since`` to the following map.

An overlay holds writes of one period (or more, when a newer one was committed into it).  Before the commit clears a
bit of it, the block is marked in the map of its period, ``overlay.changes``: a copy that is to start reads the
overlays' bits first and the map second, so it cannot miss a block that moves meanwhile.

Methods ending in ``_locked`` are called under the group's gate lock, for all members at one instant; they wait for
nothing.  The others are called by the group one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

from blkckpt import errors, log
from blkckpt.disk import api, blocks, chain, commit, copier, disk, epoch, fill, job, layer, maps, port, stack
from blkckpt.disk import format as formats

DRAIN_SECONDS = 60.0
"""How long requests in flight may take before a copy or a prepare fails; a commit tries again."""

_log = log.get(__name__)


class Part:
    """A disk's part in one checkpoint.

    *before* is the map of changes that ends at the switch, *next* the one that begins there; *ended* is the epoch
    that the switch ended, ``None`` before it.
    """

    __slots__ = ("before", "ended", "next", "overlay")

    def __init__(self, overlay: layer.Overlay, before: maps.LiveMap, following: maps.LiveMap) -> None:
        self.overlay = overlay
        self.before = before
        self.next = following
        self.ended: epoch.Epoch[chain.View] | None = None


class Member:
    """A disk and what its checkpoints need."""

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
        self.port = port.of(state.name, state.size)
        self.gate = epoch.Gate[chain.View](lock, view, self.port)
        self.disk = disk.Disk(state.name, state.path, state.size, self.gate, ask_barrier)
        self._changes = {state.changed.id: view.changed}
        self._prepared = self._armed = False
        self._emptying = view.layers[0] if view.commit else None
        for overlay in view.layers:
            overlay.changes = view.changed

    @property
    def view(self) -> chain.View:
        return self.gate.current.view

    def check_sound(self) -> None:
        """PoisonedError over a file whose fsync failed (D9)."""
        reason = chain.failure(self.view)
        if reason is not None:
            raise errors.PoisonedError(f"{reason}; restart the server of VM {self.place.vm.name}")

    @property
    def activity(self) -> int:
        """Grows with every guest request, whoever serves it."""
        reads, writes, _, _ = self.port.counters()
        return self.disk.activity + reads + writes

    @property
    def passing(self) -> int:
        """How many overlays are there that will go down by themselves."""
        return sum(overlay.retained is None for overlay in self.state.overlays)

    @property
    def filling(self) -> bool:
        return self.state.source is not None

    def _view_locked(self, layers: tuple[layer.Overlay, ...], changed: maps.LiveMap) -> chain.View:
        target = 1 if self._prepared else 0
        commit = self._emptying is not None and target < len(layers) and layers[target] is self._emptying
        return self.view.replace(layers=layers, changed=changed, target=target, commit=commit, armed=self._armed)

    def _advance_locked(
        self, layers: tuple[layer.Overlay, ...] | None = None, changed: maps.LiveMap | None = None
    ) -> epoch.Epoch[chain.View]:
        """Put the view that follows from the fields in force; returns the epoch that ended."""
        view = self.view
        return self.gate.advance_locked(
            self._view_locked(view.layers if layers is None else layers, view.changed if changed is None else changed)
        )

    # ---- to the switch ----

    def settle(self) -> None:
        """Wait for requests of ended epochs, before new ones are begun: their number stays small."""
        self.gate.wait_drained(self.gate.current, time.monotonic() + DRAIN_SECONDS)

    def make_overlay(self, number: int) -> tuple[Part, formats.DiskState]:
        """Create the files of checkpoint *number*'s overlay; returns the state that names them too."""
        overlay_id, changed_id = stack.new_id(), stack.new_id()
        following = maps.LiveMap.create(self.place.live(changed_id), changed_id, self.place.size, self.place.boot)
        try:
            overlay = stack.create_overlay(self.place, overlay_id)
        except BaseException:
            following.remove()
            raise
        overlay.changes, overlay.number = following, number
        state = dataclasses.replace(
            self.state,
            overlays=(formats.OverlayState(overlay_id), *self.state.overlays),
            changed=formats.ChangedState(changed_id),
            frozen=(*self.state.frozen, self.state.changed),
        )
        return Part(overlay, self.view.changed, following), state

    def drop_overlay(self, part: Part) -> None:
        """Prepare failed: close what :meth:`make_overlay` made.  The group sweeps the files."""
        part.overlay.close()
        part.next.close()

    def put_overlay_locked(self, part: Part, state: formats.DiskState) -> None:
        """802: the empty overlay goes on top; writes go on to the layer below it.  *state* names it and is saved."""
        self.state = state
        self._changes[state.changed.id] = part.next
        self._prepared = True
        self._advance_locked((part.overlay, *self.view.layers))

    def arm_locked(self) -> None:
        self._armed = True
        self._advance_locked()

    def disarm_locked(self) -> None:
        self._armed = False
        self._advance_locked()

    def switch_locked(self, part: Part) -> None:
        """810: writes go to the overlay.  O(1).  See :func:`switch_locked`."""
        self._armed = self._prepared = False
        part.ended = self._advance_locked(changed=part.next)

    # ---- the copy ----

    def freeze(self, part: Part, parent: str | None, number: int | None) -> copier.FrozenDisk:
        """What the copy child of *part*'s checkpoint reads.  Waits for the writes in flight at the switch (830, 812).

        *number*: the changes are relative to *parent*, the image of the checkpoint of that number (0: older than this
        server).  ``None``: what changed since *parent* is not known.

        The layers are those below the checkpoint's overlay as of now: what was committed since the switch has left
        their content the same (D1).  They are kept from being closed until the caller releases the disk.
        """
        assert part.ended is not None
        self.gate.wait_drained(part.ended, time.monotonic() + DRAIN_SECONDS)
        held = contextlib.ExitStack()
        admitted = self.gate.enter()
        held.callback(self.gate.leave, admitted)
        view = admitted.view
        below = view.replace(layers=view.layers[view.layers.index(part.overlay) + 1 :], target=0)
        known = parent is not None and number is not None
        inherited = frozenset(item.id for item in below.layers if item.number < (number or 0)) if known else frozenset()
        changed = part.before if known else None
        return copier.FrozenDisk(self.state.name, below, self.state.source, changed, parent, inherited, held)

    def since(self, part: Part) -> str | None:
        """The image that *part*'s map of changes is relative to, if that is known (D13)."""
        position = self._position(part)
        return None if position is None else self.state.frozen[position].since

    def _position(self, part: Part) -> int | None:
        """Where *part*'s map is among the frozen ones; ``None`` if a later checkpoint has dropped it."""
        for position, changed in enumerate(self.state.frozen):
            if self._changes[changed.id] is part.before:
                return position
        return None

    def keep_changes(self, part: Part, image: str) -> formats.DiskState:
        """The checkpoint is durable as *image*: what changed from its switch on is relative to it."""
        position = self._position(part)
        return self.state if position is None else _dropped(self.state, 0, position, image)

    def hand_on_changes(self, part: Part) -> formats.DiskState:
        """The checkpoint is given up: its changes go to the map that follows (waits for the old epochs)."""
        state = self.state
        if part.ended is None:  # nothing went to its overlay, nor to the map that follows
            return dataclasses.replace(
                state, overlays=state.overlays[1:], changed=state.frozen[-1], frozen=state.frozen[:-1]
            )
        position = self._position(part)
        if position is None:
            return state
        entries = (*state.frozen, state.changed)
        following = self._changes[entries[position + 1].id]
        self._redirect(part.before, following)
        following.absorb(part.before)
        return _dropped(state, position, position, entries[position].since)

    def _redirect(self, old: maps.LiveMap, new: maps.Marks) -> None:
        """Overlays that mark *old* mark *new* from now on; nobody marks *old* any more when this returns."""
        with self.gate.lock:
            for overlay in self.view.layers:
                if overlay.changes is old:
                    overlay.changes = new
            ended = self._advance_locked()
        self.drain(ended, threading.Event())

    def let_go(self, part: Part) -> None:
        """The saved state does not know *part*'s checkpoint any more: let go of what it does not name."""
        if part.ended is None and self._prepared:
            self._take_away(part.overlay)
        named = {changed.id for changed in (*self.state.frozen, self.state.changed)}
        for gone in [name for name in self._changes if name not in named]:
            unnamed = self._changes.pop(gone)
            self._redirect(unnamed, maps.UNMARKED)
            unnamed.remove()

    def _take_away(self, overlay: layer.Overlay) -> None:
        """Remove the prepared, empty *overlay*, which the saved state does not name."""
        with self.gate.lock:
            self._prepared = False
            old = self._advance_locked(self.view.layers[1:])
        self.drain(old, threading.Event())
        stack.remove_overlay(self.place, overlay)

    def merge_changes(self) -> formats.DiskState:
        """Clean stop: every checkpoint under way is given up, and all changes are in one map again."""
        state, current = self.state, self.view.changed
        if not state.frozen:
            return state
        inforce = next(changed for changed in (*state.frozen, state.changed) if self._changes[changed.id] is current)
        for changed in state.frozen:
            if (frozen := self._changes[changed.id]) is not current:
                current.absorb(frozen)
        kept = formats.ChangedState(inforce.id, state.frozen[0].since)
        return dataclasses.replace(state, changed=kept, frozen=())

    # ---- retained checkpoints (:mod:`blkckpt.disk.retaining`) ----

    def flush_below(self, part: Part) -> None:
        """Make all that is below *part*'s overlay durable."""
        assert part.ended is not None
        self.gate.wait_drained(part.ended, time.monotonic() + DRAIN_SECONDS)
        with self.gate.admitted() as admitted:
            chain.flush(admitted.view, admitted.view.layers.index(part.overlay) + 1)

    def marked(self, overlay_id: str, kept: formats.Retained | None) -> formats.DiskState:
        """The state in which what is below that overlay is *kept*, or is not."""
        overlays = tuple(
            dataclasses.replace(item, retained=kept) if item.id == overlay_id else item for item in self.state.overlays
        )
        return dataclasses.replace(self.state, overlays=overlays)

    def follow_marks_locked(self) -> None:
        """The saved state says which overlays are retained: the views say so too, from now on."""
        kept = {item.id for item in self.state.overlays if item.retained}
        for overlay in self.view.layers:
            overlay.retained = overlay.id in kept
        self._advance_locked()

    def freeze_below(self, overlay_id: str) -> copier.FrozenDisk:
        """What the copy child of a retained checkpoint reads: all that is below that overlay."""
        held = contextlib.ExitStack()
        view = held.enter_context(self.gate.admitted()).view
        index = next(number for number, overlay in enumerate(view.layers) if overlay.id == overlay_id)
        below = view.replace(layers=view.layers[index + 1 :], target=0)
        return copier.FrozenDisk(self.state.name, below, self.state.source, None, None, frozenset(), held)

    def make_rewound(self, kept: formats.Retained) -> tuple[layer.Overlay, formats.DiskState]:
        """An empty overlay to take the place of the newest one, and the state that has it so.

        What the newest holds is marked as changed: it is not in the disk any more.
        """
        gone, overlay_id = self.view.layers[0], stack.new_id()
        self.view.changed.absorb(gone.bits)
        overlay = stack.create_overlay(self.place, overlay_id)
        overlay.changes, overlay.retained = self.view.changed, True
        overlays = (formats.OverlayState(overlay_id, kept), *self.state.overlays[1:])
        return overlay, dataclasses.replace(self.state, overlays=overlays)

    def rewind(self, overlay: layer.Overlay, state: formats.DiskState) -> None:
        """*state*, saved, has *overlay* in place of the newest one, whose files go."""
        self.state = state
        gone = self.view.layers[0]
        with self.gate.lock:
            old = self._advance_locked((overlay, *self.view.layers[1:]))
        self.drain(old, threading.Event())
        stack.remove_overlay(self.place, gone)

    # ---- back to rest ----

    def to_commit(self, held: frozenset[str]) -> layer.Overlay | None:
        """The lowest overlay without a claim to stay: not retained, and not of a checkpoint under way (*held*)."""
        for overlay in reversed(self.view.layers):
            known = any(item.id == overlay.id for item in self.state.overlays)
            if known and not overlay.retained and overlay.id not in held:
                return overlay
        return None

    def empty(self, overlay: layer.Overlay, pace: job.Pace, progress: Callable[[int, int], None]) -> None:
        """834: commit *overlay* into the layer below it.  May be called again after an error."""
        with self.gate.lock:
            self._emptying = overlay
            old = self._advance_locked()
        self.drain(old, pace.stop)
        commit.run(self.gate, overlay, pace, progress)

    def without(self, overlay: layer.Overlay) -> formats.DiskState:
        kept = tuple(item for item in self.state.overlays if item.id != overlay.id)
        return dataclasses.replace(self.state, overlays=kept)

    def forget(self, overlay: layer.Overlay, stop: threading.Event) -> None:
        """The saved state does not name the empty *overlay*: remove it once no request uses it."""
        with self.gate.lock:
            self._emptying = None
            old = self._advance_locked(tuple(item for item in self.view.layers if item is not overlay))
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
        for changed in self._changes.values():
            changed.remove()

    def close(self) -> None:
        """Close every file, whatever is in it."""
        self.gate.shut()
        self.port.forget()
        view = self.view
        for overlay in view.layers:
            overlay.close()
        view.floor.close()
        for changed in self._changes.values():
            changed.close()

    def status(self) -> api.DiskStatus:
        shown, view = self.disk, self.view
        reads, writes, read_bytes, written_bytes = self.port.counters()
        state = self.state
        filled = view.layers[-1] if not isinstance(view.floor, layer.RawFloor) else None
        overlays = [overlay for overlay in view.layers if overlay is not filled]
        kept = {item.id: item.retained.checkpoint for item in state.overlays if item.retained}
        return api.DiskStatus(
            name=state.name,
            path=state.path,
            size=state.size,
            overlays=tuple(api.OverlayStatus(item.id, _held(item, state.size), kept.get(item.id)) for item in overlays),
            source=state.source,
            filled=None if filled is None else _held(filled, state.size),
            changed_since=(*state.frozen, state.changed)[0].since,
            changed_bytes=min(view.changed.count() << blocks.SHIFT, state.size),
            reads=shown.reads + reads,
            writes=shown.writes + writes,
            read_bytes=shown.read_bytes + read_bytes,
            written_bytes=shown.written_bytes + written_bytes,
            flushes=shown.flushes,
            copy_ups=sum(overlay.copy_ups for overlay in view.layers),
            fast_requests=reads + writes if self.port.loaded else None,
            epoch=self.gate.current.number,
            in_flight=self.gate.in_flight(),
            waits=self.gate.waits,
            drains=self.gate.drains,
            drain_seconds=self.gate.drain_seconds,
            error=chain.failure(view),
        )


def switch_locked(members: Mapping[str, Member], parts: Mapping[str, Part]) -> None:
    """810: all disks at one instant, for the fast path too (F3)."""
    for item in members.values():
        item.gate.close_fast_locked()
    for name, item in members.items():
        item.switch_locked(parts[name])


def _held(overlay: layer.Overlay, size: int) -> int:
    return min(overlay.bits.count() << blocks.SHIFT, size)


def _dropped(state: formats.DiskState, first: int, last: int, since: str | None) -> formats.DiskState:
    """*state* without the frozen maps *first* to *last*; the map that follows them is relative to *since*."""
    entries = [*state.frozen, state.changed]
    entries[last + 1] = dataclasses.replace(entries[last + 1], since=since)
    kept = entries[:first] + entries[last + 1 :]
    return dataclasses.replace(state, changed=kept[-1], frozen=tuple(kept[:-1]))

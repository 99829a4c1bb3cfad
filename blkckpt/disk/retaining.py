"""Retained checkpoints: the frozen chain stays where it is and *is* the checkpoint's disk; nothing is copied.

::

    copy      SWITCHED ── copied into the store ── manifest ── overlay committed into the base
    retain    SWITCHED ── chain durable, overlay marked ── manifest ── the VM goes on in the overlay, for good
                                                                  └── flatten: copied into the store meanwhile,
                                                                      then let go: committed into the base

The *mark* is in the state file, at the overlay that was made for the checkpoint: "all below me is the disk of that
checkpoint" (:class:`format.Retained`).  It says nothing of which layers those are, so what leaves every view's content
as it is (D1) may go on below it: an older checkpoint's overlay is still committed into the layer beneath.  Overlays of
later checkpoints are committed down to the youngest marked one and no further; it is what the base is otherwise, the
lowest layer that takes writes, and the changes since an image are marked when they come to it.

A retained checkpoint has no image that changes could be relative to.  Its map of changes goes to the one that follows,
as if it had been given up, so the next copy is relative to the last *copied* checkpoint, and reads the blocks of the
overlays since, as it does for stacked checkpoints.

*Who decides.*  Whether a mark stays is for the store to say: the checkpoint's manifest is there and says that it is
retained.  A mark is durable before the manifest (S2), and goes after it.  So a mark is reviewed when the server starts,
when a checkpoint under way is over (a driver that died before its manifest leaves a mark that nobody wants), and when
somebody has flattened or removed a checkpoint and says so.  What cannot be found out is kept.  Who is about to put a
manifest, and who reads the layers, holds a *claim* (:mod:`blkckpt.disk.claim`); what is claimed is let go later.

Crash windows: *chain durable, no mark yet*: the overlay is committed back, there was no checkpoint.  *Mark, no
manifest*: the review lets go.  *Mark and manifest*: retained.  *Flattening*: the copy is garbage, and is made again.
*Flattened, mark still there*: the review lets go.  *Let go*: the overlay is like any that is free.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blkckpt import errors, log
from blkckpt.disk import claim, copier, job, member, rounds, states
from blkckpt.disk import format as formats

MAX_RETAINED = 8
"""Each is an overlay for good, and a read looks at one map after the other."""

Wanted = Callable[[formats.Retained], bool]
"""Whether that checkpoint is still retained; raises or says yes when that cannot be known."""

_log = log.get(__name__)


class Retainer:
    """Marks overlays, copies what they keep, lets go.  *wanted* says what is still a retained checkpoint.

    *held* says which overlays checkpoints under way need; *gate_lock* is the group's.
    """

    def __init__(
        self,
        states: states.States,
        gate_lock: threading.Lock,
        held: Callable[[], frozenset[str]],
        wanted: Wanted,
    ) -> None:
        self._states = states
        self._members = states.members
        self._gate_lock = gate_lock
        self._held = held
        self._wanted = wanted
        self._turn = threading.Lock()
        self._claimed: list[Path] = []

    def check_room(self, checkpoint: str) -> None:
        """StateError unless *checkpoint* can be a retained one."""
        for item in self._members.values():
            if item.filling:
                raise errors.StateError(
                    f"cannot retain checkpoint {checkpoint}: disk {item.disk.name} is still being filled from the "
                    "checkpoint it was restored from; wait until it is, or take it without --retain"
                )
            if sum(overlay.retained is not None for overlay in item.state.overlays) >= MAX_RETAINED:
                vm = item.place.vm.name
                raise errors.StateError(
                    f"cannot retain checkpoint {checkpoint}: {MAX_RETAINED} are retained already; flatten them "
                    f"(`blkckpt flatten {vm}`) or give some up (`blkckpt commit {vm}@CKPT`)"
                )

    # ---- keep ----

    def keep(self, one: rounds.Round, marks: Mapping[str, formats.Retained]) -> Mapping[str, Any]:
        """Make the chain below each overlay of *one* durable, then mark them; as if copied, but for the time."""
        for name, item in self._members.items():
            item.flush_below(one.parts[name])
            item.check_sound()
        with self._states.lock:
            self._mark({
                name: item.marked(one.parts[name].overlay.id, marks[name]) for name, item in self._members.items()
            })  # fmt: skip
        one.store, one.images = next(iter(marks.values())).store, {name: mark.image for name, mark in marks.items()}
        sizes = {name: item.state.size for name, item in self._members.items()}
        return {"disks": {name: {"image": mark.image, "size": sizes[name]} for name, mark in marks.items()}}

    def _mark(self, changes: Mapping[str, formats.DiskState]) -> None:
        """The states *changes* have other marks: save them, and have the views follow."""
        self._states.replace(changes)
        with self._gate_lock:
            for name in changes:
                self._members[name].follow_marks_locked()

    # ---- flatten ----

    def of(self, checkpoint: str) -> dict[str, formats.OverlayState]:
        """Each disk's overlay that keeps *checkpoint*; StateError if it is not retained here."""
        found = {
            name: overlay
            for name, item in self._members.items()
            for overlay in item.state.overlays
            if overlay.retained is not None and overlay.retained.checkpoint == checkpoint
        }
        if set(found) != set(self._members):
            raise errors.StateError(f"the disks do not retain a checkpoint {checkpoint}")
        return found

    def flatten(
        self, checkpoint: str, command: Sequence[str], rate: int | None, label: str, running: job.Job
    ) -> Mapping[str, Any]:
        """Copy what is kept of *checkpoint* into its store, under the ids of the images that stand for it there."""
        kept = self.of(checkpoint)
        options = {}
        with contextlib.ExitStack() as claims:
            for name, overlay in kept.items():
                assert overlay.retained is not None
                claims.callback(os.close, claim.shared(self._members[name].place.data(overlay.id)))
                mark = overlay.retained
                options[name] = copier.CopyOptions(command, mark.store, rate, f"{label}/{name}", mark.image)
            sizes = {name: item.state.size for name, item in self._members.items()}
            results = copier.run_all(
                sizes, lambda name: self._members[name].freeze_below(kept[name].id), options, running
            )
            for item in self._members.values():
                item.check_sound()
        return {"disks": results}

    # ---- let go ----

    def review(self) -> bool:
        """Let go of what is no retained checkpoint any more, and is not being read; whether there was any."""
        with self._turn:
            gone, claimed = False, []
            for item in self._members.values():
                for overlay in item.state.overlays:
                    if overlay.retained is None or not self._may_go(overlay):
                        continue
                    if self._let_go(item, overlay):
                        gone = True
                    else:
                        claimed.append(item.place.data(overlay.id))
            self._claimed = claimed
            return gone

    def unclaimed(self) -> bool:
        """Whether nobody reads any more what the last review would have let go.  Costs next to nothing."""
        for path in self._claimed:
            with claim.exclusive(path) as free:
                if free:
                    return True
        return False

    def _may_go(self, overlay: formats.OverlayState) -> bool:
        assert overlay.retained is not None
        with self._gate_lock:
            if overlay.id in self._held():
                return False
        try:
            return not self._wanted(overlay.retained)
        except (errors.BlkckptError, OSError) as error:
            fields = {"checkpoint": overlay.retained.checkpoint, "error": str(error)}
            _log.warning("whether a checkpoint is still retained cannot be known; it is kept", extra={"fields": fields})
            return False

    def _let_go(self, item: member.Member, overlay: formats.OverlayState) -> bool:
        with claim.exclusive(item.place.data(overlay.id)) as free:
            if not free:
                return False
            if self._may_go(overlay):  # whoever put its manifest has been faster
                with self._states.lock:
                    self._mark({item.state.name: item.marked(overlay.id, None)})
            return True

    # ---- go back ----

    def rewind(self, checkpoint: str) -> bool:
        """Take the disks back to *checkpoint* without copying: an empty overlay in place of the newest.

        False, and nothing has changed, unless *checkpoint* is the youngest retained one, nothing is above its overlay
        and nobody reads it.  No request may come meanwhile.
        """
        kept = self.of(checkpoint)
        with self._states.lock, contextlib.ExitStack() as claims:
            for name, item in self._members.items():
                overlay = kept[name]
                if item.state.overlays[0] != overlay:
                    return False
                if not claims.enter_context(claim.exclusive(item.place.data(overlay.id))):
                    return False
            made = {name: item.make_rewound(_mark_of(kept[name])) for name, item in self._members.items()}
            self._states.file.sync_layers()
            self._states.file.save({name: state for name, (_, state) in made.items()})
            for name, (overlay_made, state) in made.items():
                self._members[name].rewind(overlay_made, state)
        return True


def _mark_of(overlay: formats.OverlayState) -> formats.Retained:
    assert overlay.retained is not None
    return overlay.retained

"""Labels: what a user says about a checkpoint after it was taken — tags, notes, and a pin that keeps it.

They change, and a manifest does not: it is what was taken, its copies elsewhere stay equal to it byte for byte, and
nothing that goes wrong while a word is changed may cost a checkpoint.  So they are an object of their own beside it,
replaced whole (rules S1 and S6: an old or a new one, never a torn one), and a checkpoint without one has no labels.

``labels/VM/NAME.json`` is sealed as a manifest is (:mod:`blkckpt.store.manifest`): ``version`` (1), ``requires``,
``id`` (that of the manifest), ``tags`` and ``notes`` (lists of strings), ``pinned``, ``checksum``.  The ``id`` binds
it: labels of another id are those of a checkpoint that is gone, count for nothing, and go with the next collection.
The labels a checkpoint is taken with are written before its manifest, so it is never there without them.

Changing is read, change, replace under the lock ``labels.lock``, which removing a checkpoint takes too: nobody's
change is lost, and a checkpoint that has just been pinned is not removed.  Labels that cannot be read pin their
checkpoint, since they may have; :meth:`blkckpt.store.store.Store.relabel` with *anew* replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from blkckpt import errors, units
from blkckpt.store import backend, layout, manifest

MAX_TAGS = 64
MAX_NOTES = 256
MAX_NOTE = 4096
"""Characters a note."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one checkpoint.  *tags* are names, sorted; *notes* in the order in which they were made."""

    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pinned: bool = False

    def tag(self, tags: Iterable[str]) -> Labels:
        """With *tags*."""
        wanted = {*self.tags, *(units.check_name(tag, "tag") for tag in tags)}
        if len(wanted) > MAX_TAGS:
            raise errors.InputError(f"a checkpoint can have {MAX_TAGS} tags, not {len(wanted)}")
        return replace(self, tags=tuple(sorted(wanted)))

    def untag(self, tags: Iterable[str]) -> Labels:
        """Without *tags*; InputError naming one that it does not have."""
        gone = list(tags)
        for tag in gone:
            if tag not in self.tags:
                raise errors.InputError(f"it has no tag {tag[:80]!r} ({', '.join(self.tags) or 'it has none'})")
        return replace(self, tags=tuple(tag for tag in self.tags if tag not in gone))

    def note(self, notes: Iterable[str]) -> Labels:
        """With *notes* after those that are there."""
        found = (*self.notes, *notes)
        if len(found) > MAX_NOTES:
            raise errors.InputError(f"a checkpoint can have {MAX_NOTES} notes, not {len(found)}")
        for note in found:
            if not note.strip() or len(note) > MAX_NOTE or "\0" in note:
                raise errors.InputError(f"a note is text of 1 to {MAX_NOTE} characters")
        return replace(self, notes=found)


NONE = Labels()


def key(vm: str, name: str) -> str:
    return f"labels/{units.check_name(vm, 'VM name')}/{units.check_name(name, 'checkpoint name')}.json"


def encode(labels: Labels, checkpoint_id: str) -> bytes:
    """The object for *labels* of the checkpoint whose manifest has *checkpoint_id*."""
    return manifest.seal({
        "version": manifest.VERSION, "requires": [], "id": layout.check_id(checkpoint_id, "checkpoint id"),
        "tags": list(labels.tags), "notes": list(labels.notes), "pinned": labels.pinned,
    })  # fmt: skip


def decode(data: bytes, what: str) -> tuple[Labels, str]:
    """The labels in *data* and the id of their checkpoint; CorruptError naming *what*."""
    fields = manifest.unseal(data, what)
    try:
        tags, notes, pinned = _strings(fields["tags"]), _strings(fields["notes"]), fields["pinned"]
        if not isinstance(pinned, bool):
            raise TypeError("pinned is neither true nor false")
        return Labels(pinned=pinned).tag(tags).note(notes), layout.check_id(fields["id"])
    except (errors.InputError, TypeError, KeyError) as error:
        raise errors.CorruptError(f"{what} are damaged ({error!r:.120})") from error


def load(where: backend.Backend, vm: str, name: str, checkpoint_id: str | None) -> Labels:
    """The labels of a checkpoint: none if there is no object, or one of another id.

    *checkpoint_id* None, of a manifest that cannot be read, takes whatever is there.  CorruptError if that cannot be
    read.
    """
    place, what = key(vm, name), f"the labels of {vm}@{name}"
    try:
        labels, owner = _read(where, place, what)
    except errors.NotFoundError:
        return NONE
    except errors.CorruptError as error:
        raise errors.CorruptError(f"{error}; `blkckpt unpin {vm}@{name}` sets them anew") from error
    return labels if checkpoint_id in (None, owner) else NONE


def _read(where: backend.Backend, place: str, what: str) -> tuple[Labels, str]:
    """Read and decode; again, if they were replaced by longer or shorter ones in the middle of it."""
    while True:
        size = where.size(place)
        if size > manifest.MAX_SIZE:
            raise errors.CorruptError(f"{what} are longer than any can be")
        try:
            return decode(where.get(place, 0, size), what)
        except errors.CorruptError:
            if where.size(place) == size:
                raise


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return value

"""What a store keeps beside checkpoints, in a bundle: tags and notes, the outcome of resuming, the screen's picture.

It was said and seen of the checkpoint, wherever that is, so it travels with it, with the times at which it was seen.  A
pin does not: what a store must keep is for its owner to say.  A checkpoint that the receiver has already keeps what
is beside it there.

What comes in is bound to a manifest of the bundle by its id, checked and bounded as in the store (rules S4, X3).
Pictures wait in a file without a name, so memory holds one at a time, and nothing of this is in the store before the
manifest that it belongs to (:meth:`blkckpt.store.store.Store.put_manifest`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from blkckpt import errors
from blkckpt.exchange import bundle
from blkckpt.store import evidence, labels, manifest
from blkckpt.store import store as stores

Record = Callable[[int, bytes], None]
"""Writes a record of a kind."""

Wanted = Callable[[int], bytes | None]
"""The payload of the next record, if it is of this kind."""


class Outgoing:
    """What there is beside *chosen* now.  CorruptError if labels cannot be read."""

    def __init__(self, place: stores.Store, chosen: Sequence[manifest.Manifest]) -> None:
        self._place = place
        found = [(one, dataclasses.replace(place.labels(one), pinned=False)) for one in chosen]
        self._labels = [(one, said) for one, said in found if said != labels.NONE]
        self._seen = [one for one in chosen if place.evidence(one) != evidence.NONE]

    def __bool__(self) -> bool:
        return bool(self._labels or self._seen)

    def send(self, record: Record) -> None:
        """All of it; a picture that is not whole stays behind."""
        for one, said in self._labels:
            record(bundle.LABELS, labels.encode(said, one.id))
        for one in self._seen:
            seen, picture = self._place.evidence(one), self._place.picture(one)
            if picture is None or not _is_of(picture, seen):
                seen, picture = dataclasses.replace(seen, screen=None), None
            record(bundle.EVIDENCE, evidence.encode(seen, one.id))
            if picture is not None:
                record(bundle.SCREEN, picture)


class Incoming:
    """What a bundle has beside its checkpoints.  A context manager."""

    def __init__(self, wanted: Wanted, ids: Collection[str], directory: Path) -> None:
        """Reads the records from *wanted*; *ids* are those of the bundle's manifests.  CorruptError."""
        self._spool = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by close
        self._labels: dict[str, labels.Labels] = {}
        self._seen: dict[str, evidence.Evidence] = {}
        self._places: dict[str, int] = {}
        try:
            self._read(wanted, ids)
        except BaseException:
            self._spool.close()
            raise

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def _read(self, wanted: Wanted, ids: Collection[str]) -> None:
        for data in iter(lambda: wanted(bundle.LABELS), None):
            said, owner = labels.decode(data, "labels in the bundle")
            _check_owner("labels", owner, ids, self._labels)
            self._labels[owner] = dataclasses.replace(said, pinned=False)
        for data in iter(lambda: wanted(bundle.EVIDENCE), None):
            seen, owner = evidence.decode(data, "evidence in the bundle")
            _check_owner("evidence", owner, ids, self._seen)
            self._seen[owner] = seen
            if seen.screen is not None:
                self._keep(owner, wanted(bundle.SCREEN), seen)

    def _keep(self, owner: str, picture: bytes | None, seen: evidence.Evidence) -> None:
        if picture is None or not _is_of(picture, seen):
            raise errors.CorruptError(f"the bundle's picture of checkpoint {owner} is not the one that was taken")
        self._places[owner] = self._spool.tell()
        try:
            self._spool.write(picture)
        except OSError as error:
            raise errors.from_os_error(error, "keeping a picture of the bundle") from error

    def labels(self, one: manifest.Manifest) -> labels.Labels:
        return self._labels.get(one.id, labels.NONE)

    def evidence(self, one: manifest.Manifest) -> evidence.Evidence:
        return self._seen.get(one.id, evidence.NONE)

    def picture(self, one: manifest.Manifest) -> bytes | None:
        screen = self.evidence(one).screen
        if screen is None:
            return None
        self._spool.seek(self._places[one.id])
        return self._spool.read(screen.size)


def _is_of(picture: bytes, seen: evidence.Evidence) -> bool:
    return seen.screen is not None and picture.startswith(evidence.PNG) and evidence.is_of(picture, seen.screen)


def _check_owner(what: str, owner: str, ids: Collection[str], known: Collection[str]) -> None:
    if owner not in ids or owner in known:
        raise errors.CorruptError(f"the bundle has {what} of a checkpoint {owner} that it does not have, or has twice")

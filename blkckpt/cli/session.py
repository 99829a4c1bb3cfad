"""What every verb starts from: the home, its VMs, their stores, the checkpoints in them."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blkckpt import errors, paths
from blkckpt.agent import rundir
from blkckpt.cli import names, progress
from blkckpt.vm import definition

if TYPE_CHECKING:
    from blkckpt.store import evidence, labels, manifest, store


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint and the store it is in."""

    store: store.Store
    manifest: manifest.Manifest

    @property
    def labels(self) -> labels.Labels:
        """Its tags, notes and pin, as they are now."""
        return self.store.labels(self.manifest)

    @property
    def evidence(self) -> evidence.Evidence:
        """What was seen of its guest."""
        return self.store.evidence(self.manifest)


@dataclass(frozen=True, slots=True)
class Session:
    """The options given before the verb."""

    home: paths.Home
    quiet: bool = False

    def reporter(self) -> progress.Reporter:
        return progress.reporter(quiet=self.quiet)

    # VMs

    def vm(self, name: str) -> tuple[paths.VmPaths, definition.VmDefinition]:
        """The VM called *name*, which must be defined."""
        vm = self.home.vm(name)
        return vm, definition.load(vm)

    def is_running(self, vm: paths.VmPaths) -> bool:
        """Whether a supervisor serves the disks of *vm*."""
        return rundir.find(vm) is not None

    # Stores

    def store_path(self, name: str | None) -> Path:
        """Where the checkpoints of VM *name* are kept; the home's store for None and for a VM not defined here."""
        if name is not None and name in self.home.vm_names():
            chosen = definition.load(self.home.vm(name)).store
            return Path(chosen) if chosen else self.home.store
        return self.home.store

    def store_for_writing(self, name: str) -> store.Store:
        """The store of VM *name*, made now if there is none yet."""
        return _stores().open_or_init(self.store_path(name))

    def open_or_make(self, path: Path | None) -> store.Store:
        """The store at *path*, or the home's, made now if there is none yet."""
        return _stores().open_or_init(self.home.store if path is None else path.absolute())

    def stores(self, name: str | None = None) -> list[store.Store]:
        """The stores that are there: of VM *name*, or of all VMs and the home."""
        found = [self.store_path(name)]
        for one in self.home.vm_names() if name is None else ():
            with contextlib.suppress(errors.CorruptError):  # a damaged VM hides no checkpoint of another
                found.append(self.store_path(one))
        return [_stores().open(path) for path in dict.fromkeys(found) if path.exists()]

    def checkpoints(self, name: str | None = None) -> list[Found]:
        """The checkpoints of VM *name*, or all, the oldest first.  CorruptError if one cannot be read."""
        found = [Found(place, one) for place in self.stores(name) for one in place.manifests(name)]
        return sorted(found, key=lambda one: one.manifest.created_ns)

    def checkpoint(self, target: names.Target) -> Found:
        """The checkpoint that *target* names; ``latest`` is the newest, ``tag:TAG`` the newest with that tag."""
        if target.is_newest:
            for one in reversed(self.checkpoints(target.vm)):
                if target.tag is None or target.tag in one.labels.tags:
                    return one
            raise self._no_checkpoint(target)
        place, name = self.locate(target)
        return Found(place, place.manifest(target.vm, name))

    def locate(self, target: names.Target) -> tuple[store.Store, str]:
        """The store that has the checkpoint, and the checkpoint's name; its manifest need not be readable."""
        if target.is_newest:
            found = self.checkpoint(target)
            return found.store, found.manifest.name
        for place in self.stores(target.vm):
            if (target.vm, target.checkpoint) in place.names(target.vm):
                assert target.checkpoint is not None
                return place, target.checkpoint
        raise self._no_checkpoint(target)

    def _no_checkpoint(self, target: names.Target) -> errors.NotFoundError:
        if any(place.names(target.vm) for place in self.stores(target.vm)):
            hint = f"`blkckpt list {target.vm}` shows those there are"
            return errors.NotFoundError(f"there is no checkpoint {target}; {hint}")
        if target.vm not in self.home.vm_names():
            return errors.NotFoundError(f"there is no VM {target.vm}; `blkckpt vm list` shows those there are")
        return errors.NotFoundError(f"VM {target.vm} has no checkpoint yet; take one: blkckpt checkpoint {target.vm}")


def _stores() -> type[store.Store]:
    """Loaded with the first use: numpy and SQLite, which several verbs do without."""
    found: type[store.Store] = importlib.import_module("blkckpt.store.store").Store
    return found

"""What a checkpoint owes to those before it: parents of its images, its place in the VM's line, old memory images."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from blkckpt import errors, paths
from blkckpt.agent import turn
from blkckpt.store import store as stores
from blkckpt.vm import lineage


class History:
    """The checkpoints of *vm* in *store*, as of when this was made."""

    def __init__(self, vm: paths.VmPaths, store: stores.Store) -> None:
        self._vm, self._store = vm, store
        self._previous = store.manifests(vm.name)
        self._images = set(store.image_ids())

    def disk_parents(self, disks: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str | None], list[str]]:
        """Each disk's previous image: the one its changed blocks are counted from, else that of the last checkpoint.

        *disks* as the disk server's status has them.  With them notes for the user: which disks are compared as a
        whole, since nothing says what has changed on them (after an unclean stop, for example; D13).
        """
        last = {disk.name: disk for one in self._previous if not one.retained for disk in one.disks}
        found: dict[str, str | None] = {}
        for disk in disks:
            name, since = disk["name"], disk.get("changed_since")
            before = last.get(name)
            fallback = before.image if before and before.size == disk["size"] else None
            chosen = since if since in self._images else fallback
            found[name] = chosen if chosen in self._images else None
        whole = [disk["name"] for disk in disks if found[disk["name"]] not in (None, disk.get("changed_since"))]
        return found, [f"{name} was compared as a whole: what had changed on it was not known" for name in whole]

    def memory_parents(self) -> dict[str, str | None]:
        """RAM block → its image in the last checkpoint with memory."""
        with_memory = [one.memory for one in self._previous if one.memory]
        blocks = with_memory[-1].blocks if with_memory else ()
        return {block.name: block.image for block in blocks if block.image in self._images}

    def parent(self, instant_ns: int) -> str | None:
        """The checkpoint that one of *instant_ns* came after, of those that are there by now."""
        others = [(one.created_ns, one.name) for one in self._store.manifests(self._vm.name)]
        return lineage.parent(self._vm.name, lineage.read(self._vm), others, instant_ns)

    def forget_memory(self, keep: int, under_way: Collection[str]) -> None:
        """Remove the raw memory images of all but the newest *keep* checkpoints, and those *under_way*.

        The store has them all; these only made a lazy restore quicker.  One that has its turn may not be known to the
        disk server yet; then the forgetting is left to it.
        """
        with contextlib.suppress(errors.BlkckptError), turn.take(self._vm):
            kept = [one.name for one in self._store.manifests(self._vm.name) if one.memory]
            stay = {*(kept[-keep:] if keep else ()), *under_way}
            for directory in self._vm.memory.iterdir() if self._vm.memory.is_dir() else ():
                if directory.name not in stay:
                    shutil.rmtree(directory, ignore_errors=True)

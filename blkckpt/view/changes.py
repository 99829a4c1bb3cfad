"""What two checkpoints differ in: their disks and RAM blocks, paired by name and compared by their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkckpt import errors, lazy
from blkckpt.store import compare, images, manifest, store
from blkckpt.view import heatmap

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")

PAGE = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints."""

    store: store.Store
    manifest: manifest.Manifest

    def __str__(self) -> str:
        return f"{self.manifest.vm}@{self.manifest.name}"


@dataclass(frozen=True, slots=True)
class Part:
    """A disk or RAM block (*kind* ``disk`` or ``memory``): both images, None where it is not, and their difference."""

    kind: str
    name: str
    old: images.ImageReader | None
    new: images.ImageReader | None
    difference: compare.Difference

    def map(self, cells: int = heatmap.CELLS) -> heatmap.Map:
        label = f"{self.kind} {self.name}"
        return heatmap.Map(label, self.difference.size, self.difference.bytes, self.difference.heat(cells))


def parts(old: Side | None, new: Side) -> list[Part]:
    """Every disk, then every RAM block, of either checkpoint, by name; without *old* all of *new* is new.

    Reads tables only.  InputError when the stores name chunks by different hashes: their tables cannot be compared.
    """
    if old and old.store.info.hash_name != new.store.info.hash_name:
        raise errors.InputError(
            f"{old} and {new} are in stores with different hashes ({old.store.info.hash_name}, "
            f"{new.store.info.hash_name}); their tables cannot be compared"
        )
    disks = _pairs("disk", *(((one.name, one.image) for one in _disks(side)) for side in (old, new)))
    memory = _pairs("memory", *(((one.name, one.image) for one in _blocks(side)) for side in (old, new)))
    return [_part(old, new, *pair) for pair in (*disks, *memory)]


def changed_bytes(part: Part, progress: Progress | None = None) -> int:
    """The number of bytes that differ.  Reads the chunks that do."""
    return sum(
        int(np.count_nonzero(mask)) for _, mask in compare.refine(part.old, part.new, part.difference, 1, progress)
    )


def changed_pages(part: Part, progress: Progress | None = None) -> int:
    """The number of 4 KiB pages that differ.  Reads the chunks that do."""
    found = compare.refine(part.old, part.new, part.difference, PAGE, progress)
    return sum(int(np.count_nonzero(mask)) for _, mask in found)


def _disks(side: Side | None) -> Iterable[manifest.DiskImage]:
    return side.manifest.disks if side else ()


def _blocks(side: Side | None) -> Iterable[manifest.RamBlock]:
    return side.manifest.memory.blocks if side and side.manifest.memory else ()


def _pairs(
    kind: str, old: Iterable[tuple[str, str]], new: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str, str | None, str | None]]:
    before, after = dict(old), dict(new)
    for name in dict.fromkeys((*before, *after)):
        yield kind, name, before.get(name), after.get(name)


def _part(old: Side | None, new: Side, kind: str, name: str, before: str | None, after: str | None) -> Part:
    left = old.store.image(before) if old and before else None
    right = new.store.image(after) if after else None
    return Part(kind, name, left, right, compare.compare(left, right))

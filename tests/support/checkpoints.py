"""Checkpoints without a guest: images of given bytes or files, named by manifests, in the store of a home."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from blkckpt import paths
from blkckpt.store import layout, manifest, store

CHUNK = layout.CHUNK


def image(place: store.Store, data: bytes | Path, kind: str = "disk", parent: str | None = None) -> str:
    """An image with this content; holes of a file and zeros cost nothing."""
    content = data.read_bytes() if isinstance(data, Path) else data
    with place.image_writer(len(content), kind=kind, parent=parent, workers=1) as writer:
        for offset in range(0, len(content), CHUNK):
            writer.write(offset, content[offset : offset + CHUNK])
        return writer.finish().image


def checkpoint(
    home: paths.Home,
    name: str,
    disks: Mapping[str, bytes | Path],
    *,
    vm: str = "web",
    memory: Mapping[str, bytes] | None = None,
    number: int = 1,
    parent: str | None = None,
    timings: Mapping[str, float] | None = None,
    notes: Iterable[str] = (),
) -> manifest.Manifest:
    """Checkpoint ``VM@NAME`` with these disks and RAM blocks, taken *number* minutes after a certain one."""
    with store.Store.open_or_init(home.store) as place, place.hold():
        blocks = tuple(
            manifest.RamBlock(block, len(data), 4096, image(place, data, "memory"))
            for block, data in (memory or {}).items()
        )
        skeleton = image(place, b"device state", "stream") if blocks else ""
        made = manifest.Manifest(
            vm=vm,
            name=name,
            id=f"{number:032x}",
            created_ns=1_700_000_000 * 10**9 + number * 60 * 10**9,
            disks=tuple(
                manifest.DiskImage(
                    disk, image(place, data), len(data) if isinstance(data, bytes) else data.stat().st_size
                )
                for disk, data in disks.items()
            ),
            parent=parent,
            memory=manifest.MemoryImage(blocks, skeleton, 12) if blocks else None,
            timings=timings or {},
            notes=tuple(notes),
        )
        place.put_manifest(made)
    return made

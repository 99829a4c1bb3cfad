"""The files of a disk's layers: creating, opening after any kind of stop, saving, removing.

==========================  ==================================================================================
``layers/DISK.ID.data``     an overlay's data
``layers/DISK.ID.map``      its durable map (also that of the file of a restored disk, whose data is the base)
``layers/DISK.ID.changed``  the base's changed bits, written by a clean stop only (D13)
``LIVE/DISK.ID.live``       a live map, on tmpfs
==========================  ==================================================================================

The state file alone says which layers exist.  Files are made durable before it names them and unlinked after it has
forgotten them, so a file that it does not name is left over from a crash in between; :func:`sweep` removes those.

*Opening.*  After kill -9 (same boot) the live map is the truth, and the durable pages that it is ahead of are dirty
again; but what the dead server handed down is taken back if the file system has lost writes (D9).  After a clean stop
or power loss there is none (or one of another boot), and the durable map is loaded into a new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from blkckpt import durable, errors, log, paths
from blkckpt.disk import api, chain, fileio, layer, maps
from blkckpt.disk import format as formats

_log = log.get(__name__)
_NAME = re.compile(r"(?:.+\.([0-9a-f]{32})\.(?:data|map|changed|live))|(?:\.new-([0-9a-f]{32}))")


def new_id() -> str:
    """A layer id."""
    return secrets.token_hex(16)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where one disk's layer files are, and the boot they live in."""

    vm: paths.VmPaths
    disk: str
    size: int
    boot: str

    def data(self, layer_id: str) -> Path:
        return self.vm.layers / f"{self.disk}.{layer_id}.data"

    def map(self, layer_id: str) -> Path:
        return self.vm.layers / f"{self.disk}.{layer_id}.map"

    def changed(self, layer_id: str) -> Path:
        return self.vm.layers / f"{self.disk}.{layer_id}.changed"

    def live(self, layer_id: str) -> Path:
        return self.vm.live / f"{self.disk}.{layer_id}.live"


# ---- overlays ----


def create_overlay(place: Place, layer_id: str) -> layer.Overlay:
    """A new, empty overlay.  Its files are durable, their names once the caller has synced the directory."""
    with contextlib.ExitStack() as undo:
        undo.callback(unlink_overlay, place, layer_id)
        file = fileio.create_own(place.data(layer_id), place.size)
        undo.callback(file.close)
        file.datasync()
        durable_map = maps.DurableMap.create(place.map(layer_id), layer_id, place.size)
        undo.callback(durable_map.close)
        bits = maps.LiveMap.create(place.live(layer_id), layer_id, place.size, place.boot)
        undo.pop_all()
    return layer.Overlay(layer_id, file, bits, durable_map)


def open_overlay(place: Place, overlay: formats.OverlayState, *, clean: bool) -> layer.Overlay:
    """An overlay that the state names."""
    file = fileio.open_own(place.data(overlay.id), "overlay")
    if file.size() != place.size:
        found = file.size()
        file.close()
        raise errors.CorruptError(f"the overlay {file.path} has {found} bytes, the disk {place.size}; it was cut")
    return _open_mapped(place, overlay.id, file, clean=clean, retained=overlay.retained is not None)


def open_fill(place: Place, layer_id: str, path: Path, *, clean: bool) -> layer.Overlay:
    """The file of a restored disk, with the map of what it holds already."""
    return _open_mapped(place, layer_id, fileio.open_base(path, place.size), clean=clean)


def _open_mapped(
    place: Place, layer_id: str, file: fileio.File, *, clean: bool, retained: bool = False
) -> layer.Overlay:
    with contextlib.ExitStack() as undo:
        undo.callback(file.close)
        durable_map, pages = maps.DurableMap.load(place.map(layer_id), layer_id, place.size, clean=clean)
        undo.callback(durable_map.close)
        bits = None if clean else maps.LiveMap.load(place.live(layer_id), layer_id, place.size, place.boot)
        if bits is None:
            bits = _live_from(place, layer_id, pages)
        else:
            bits.give_back(bits.differing(pages))
        undo.pop_all()
    return layer.Overlay(layer_id, file, bits, durable_map, retained=retained)


def _live_from(place: Place, layer_id: str, pages: maps.Pages) -> maps.LiveMap:
    return maps.LiveMap.create(place.live(layer_id), layer_id, place.size, place.boot, pages)


def remove_overlay(place: Place, overlay: layer.Overlay) -> None:
    """Close and unlink an overlay that the state has forgotten and no request uses."""
    overlay.close()
    unlink_overlay(place, overlay.id)


def unlink_overlay(place: Place, layer_id: str) -> None:
    for path in (place.data(layer_id), place.map(layer_id), place.live(layer_id)):
        path.unlink(missing_ok=True)


def create_map(path: Path, layer_id: str, size: int) -> None:
    """A durable map, all clear."""
    maps.DurableMap.create(path, layer_id, size).close()


# ---- changed bits ----


def open_changed(place: Place, layer_id: str, *, clean: bool) -> maps.LiveMap | None:
    """The map of changes that the state names, or ``None`` when what changed is not known (D13).

    It is known after a clean stop (the saved pages) or on the same boot (the live map).
    """
    if not clean:
        return maps.LiveMap.load(place.live(layer_id), layer_id, place.size, place.boot)
    if not place.changed(layer_id).exists():
        return None
    saved, pages = maps.DurableMap.load(place.changed(layer_id), layer_id, place.size, clean=True)
    saved.close()
    return _live_from(place, layer_id, pages)


def save_changed(place: Place, state: formats.ChangedState, bits: maps.LiveMap) -> None:
    """Write the changed bits for the next start; the name is durable once the caller has synced the directory."""
    place.changed(state.id).unlink(missing_ok=True)
    saved = maps.DurableMap.create(place.changed(state.id), state.id, place.size)
    try:
        saved.write(bits.all_pages())
    finally:
        saved.close()


# ---- a whole disk ----


def open_view(
    place: Place, state: formats.DiskState, image: api.Source | None, *, clean: bool
) -> tuple[chain.View, formats.DiskState]:
    """Open every layer; returns the view to start in and the state as it is to be written.

    Checkpoints that were under way are given up: their frozen changed bits are merged back.  A lone overlay without
    a claim to stay starts as the target of a commit view, so that the base takes what it can from the first request.
    """
    with contextlib.ExitStack() as undo:
        layers = []
        for overlay in state.overlays:
            layers.append(open_overlay(place, overlay, clean=clean))
            undo.callback(layers[-1].close)
        if state.fill is not None:
            assert image is not None
            layers.append(open_fill(place, state.fill, Path(state.path), clean=clean))
            undo.callback(layers[-1].close)
            floor: layer.Floor = layer.ImageFloor(image)
        else:
            floor = fileio.open_base(Path(state.path), place.size)
        undo.callback(floor.close)
        bits, changed = _open_changes(place, state, clean=clean)
        undo.callback(bits.close)
        commit = len(state.overlays) == 1 and not state.overlays[0].retained
        view = chain.View(place.size, tuple(layers), floor, bits, commit=commit)
        if not clean and chain.take_back_of_killed(view):
            _log.warning(
                "the file system has lost writes: blocks that were being committed are read from their overlay again",
                extra={"fields": {"vm": place.vm.name, "disk": place.disk}},
            )
        undo.pop_all()
    return view, dataclasses.replace(state, changed=changed, frozen=())


def _open_changes(place: Place, state: formats.DiskState, *, clean: bool) -> tuple[maps.LiveMap, formats.ChangedState]:
    """The map of changes to go on with.

    When they are not known it is a new map of a new id, so that a server killed before the state says so does not
    leave a map that looks known.
    """
    bits, claimed = open_changed(place, state.changed.id, clean=clean), state.changed
    known = bits is not None
    for position, ended in enumerate(state.frozen):
        if position == 0:
            claimed = dataclasses.replace(claimed, since=ended.since)
        frozen = open_changed(place, ended.id, clean=clean)
        known = known and frozen is not None
        if frozen is not None:
            if bits is not None:
                bits.absorb(frozen)
            frozen.close()
    if known and bits is not None:
        return bits, claimed
    if bits is not None:
        bits.close()
    if claimed.since is not None:
        _log.warning(
            "changed blocks are not known after an unclean stop: the next checkpoint compares the whole disk",
            extra={"fields": {"vm": place.vm.name, "disk": place.disk}},
        )
    fresh = formats.ChangedState(new_id())
    return maps.LiveMap.create(place.live(fresh.id), fresh.id, place.size, place.boot), fresh


def sweep(vm: paths.VmPaths, disks: Iterable[formats.DiskState]) -> None:
    """Remove layer files that none of *disks* names, and the changed bits of the clean stop that is over."""
    known: set[str] = set()
    for disk in disks:
        known.update(overlay.id for overlay in disk.overlays)
        known.update(item.id for item in (disk.changed, *disk.frozen))
        known.update({disk.fill} if disk.fill is not None else ())
    for directory in (vm.layers, vm.live):
        removed = False
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and ((match[1] or match[2]) not in known or path.suffix == ".changed"):
                _log.info("removing a left-over layer file", extra={"fields": {"path": str(path)}})
                path.unlink()
                removed = True
        if removed:
            durable.sync_directory(directory)

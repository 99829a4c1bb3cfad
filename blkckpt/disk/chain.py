"""Reads and writes across layers.

A :class:`View` is immutable: the layers newest first, the floor below them, and the *target*, the layer that takes
writes.  ``resolve(block)`` is the newest layer whose bit is set, else the floor, the same in every view; views differ
in where writes go:

==================  ======================================================================================
plain view          a write goes to layer ``target``.  Blocks not present there are made present: covered
                    whole, or filled first from below (copy-up)
commit view         layer ``target`` is being emptied.  A write to a block present there goes there, to any
                    other block to the layer below: so the commit always ends, whatever the guest writes
==================  ======================================================================================

Layers above the target are empty for the requests of that view (prepared, or filled by a later epoch).  In an
*armed* view the barrier is asked before a mutating request is applied; the flag is the view's, not the disk's, so that
a request admitted just before somebody else switched still knows that it has to look.

*Order inside a write:* the bottom's changed bits first (a change without its bit would be missed by the next
incremental checkpoint; a bit without a change costs one read), then data, then present bits (a present bit without
its data would be wrong data).

Callers hold a ticket (:mod:`blkckpt.disk.epoch`), exclusive when :func:`needs_copy_up` said so of the same view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from blkckpt.disk import blocks, fileio, layer, maps

Buffer = fileio.Buffer
SHIFT, MASK = blocks.SHIFT, blocks.MASK
HOLE, ZERO = 1, 2
"""Extent bits of NBD's base:allocation; what is not known to be a hole is reported as data."""

_ZEROS = bytes(blocks.SIZE)


class View:
    """What an epoch's requests see.  Never changed once it is in force."""

    __slots__ = ("armed", "bottom", "changed", "commit", "floor", "layers", "size", "target")

    def __init__(
        self,
        size: int,
        layers: tuple[layer.Overlay, ...],
        floor: layer.Floor,
        changed: maps.LiveMap,
        *,
        target: int = 0,
        commit: bool = False,
        armed: bool = False,
    ) -> None:
        self.size = size
        self.layers = layers
        self.floor = floor
        self.changed = changed
        self.target = target
        self.commit = commit
        self.armed = armed
        self.bottom = _bottom(layers, floor)

    def replace(
        self,
        *,
        layers: tuple[layer.Overlay, ...] | None = None,
        floor: layer.Floor | None = None,
        changed: maps.LiveMap | None = None,
        target: int | None = None,
        commit: bool = False,
        armed: bool = False,
    ) -> View:
        """Another view of the same disk; it is a commit view or an armed one only if that is said again."""
        return View(
            self.size,
            self.layers if layers is None else layers,
            self.floor if floor is None else floor,
            self.changed if changed is None else changed,
            target=self.target if target is None else target,
            commit=commit,
            armed=armed,
        )


def _bottom(layers: tuple[layer.Overlay, ...], floor: layer.Floor) -> int:
    """The lowest layer that takes writes, where changes are marked: what is below a retained overlay is kept."""
    for index, overlay in enumerate(layers):
        if overlay.retained:
            return index
    return len(layers) if isinstance(floor, fileio.File) else len(layers) - 1


# ---- reads ----


def read(view: View, buf: Buffer, offset: int) -> None:
    """Fill *buf*, which is not empty and inside the disk."""
    if view.layers:
        read_below(view, 0, buf, offset)
    else:
        view.floor.pread_into(buf, offset)


def read_below(view: View, index: int, buf: Buffer, offset: int) -> None:
    """Read what layers ``index`` and below hold."""
    layers = view.layers
    first, end = offset >> SHIFT, (offset + len(buf) + MASK) >> SHIFT
    if end - first == 1:
        for overlay in layers[index:] if index else layers:
            if overlay.bits.test(first):
                return overlay.file.pread_into(buf, offset)
        return view.floor.pread_into(buf, offset)
    for position in range(index, len(layers)):
        overlay = layers[position]
        bits = overlay.bits
        if bits.none_set(first, end):
            continue
        if bits.all_set(first, end):
            overlay.file.pread_into(buf, offset)
        else:
            _read_mixed(view, position, buf, offset, first, end)
        return None
    return view.floor.pread_into(buf, offset)


def _read_mixed(view: View, index: int, buf: Buffer, offset: int, first: int, end: int) -> None:
    overlay = view.layers[index]
    with memoryview(buf) as whole:
        for low, high, present in overlay.bits.runs(first, end):
            start, stop = max(offset, low << SHIFT), min(offset + len(whole), high << SHIFT)
            with whole[start - offset : stop - offset] as part:
                if present:
                    overlay.file.pread_into(part, start)
                else:
                    read_below(view, index + 1, part, start)


def extents(view: View, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cover the range by ``(offset, length, type)``, neighbours of one type joined."""
    start, until, kind = offset, offset, 0
    for position, count, zero in _segments(view, 0, offset, length):
        found = HOLE | ZERO if zero else 0
        if found != kind and until > start:
            yield start, until - start, kind
            start = position
        kind = found
        until = position + count
    if until > start:
        yield start, until - start, kind


def _segments(view: View, index: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    if index == len(view.layers):
        yield from view.floor.segments(offset, length)
        return
    overlay, until = view.layers[index], offset + length
    for low, high, present in overlay.bits.runs(offset >> SHIFT, (until + MASK) >> SHIFT):
        start = max(offset, low << SHIFT)
        count = min(until, high << SHIFT) - start
        if present:
            yield from overlay.file.segments(start, count)
        else:
            yield from _segments(view, index + 1, start, count)


# ---- writes ----


def needs_copy_up(view: View, first: int, end: int, head: bool, tail: bool) -> bool:
    """Whether a write that covers its *head* or *tail* block in part must fill that block first."""
    return (head and _must_fill(view, first)) or (tail and _must_fill(view, end - 1))


def _must_fill(view: View, block: int) -> bool:
    index, layers = view.target, view.layers
    if index == len(layers):
        return False
    if layers[index].bits.test(block):
        return False
    if not view.commit:
        return True
    index += 1
    return index < len(layers) and not layers[index].bits.test(block)


def write(view: View, buf: Buffer, offset: int) -> None:
    """Write *buf*, which is not empty and inside the disk."""
    index = view.target
    if index == len(view.layers):
        _write_floor(view, buf, offset)
    elif not view.commit:
        _write_overlay(view, index, buf, offset)
    else:
        _write_commit(view, buf, offset)


def write_at(view: View, index: int, buf: Buffer, offset: int) -> None:
    """Write into layer *index* (or the floor), making its blocks present."""
    if index == len(view.layers):
        _write_floor(view, buf, offset)
    else:
        _write_overlay(view, index, buf, offset)


def _write_floor(view: View, buf: Buffer, offset: int) -> None:
    view.changed.mark(offset >> SHIFT, (offset + len(buf) + MASK) >> SHIFT)
    cast(fileio.File, view.floor).pwrite(buf, offset)


def _write_overlay(view: View, index: int, buf: Buffer, offset: int) -> None:
    overlay = view.layers[index]
    bits = overlay.bits
    until = offset + len(buf)
    first, end = offset >> SHIFT, (until + MASK) >> SHIFT
    if index == view.bottom:
        view.changed.mark(first, end)
    if bits.all_set(first, end):
        overlay.file.pwrite(buf, offset)
        return
    if not (offset | until) & MASK:
        overlay.file.pwrite(buf, offset)
        bits.mark(first, end)
        return
    start, parts = offset, [buf]
    if offset & MASK and not bits.test(first):
        start = first << SHIFT
        parts.insert(0, _fill(view, index, start, offset))
    stop = min(end << SHIFT, view.size)
    if until < stop and not bits.test(end - 1):
        parts.append(_fill(view, index, until, stop))
    if len(parts) == 1:
        overlay.file.pwrite(buf, offset)
    else:
        overlay.file.pwritev(parts, start)
    bits.mark(first, end)


def _fill(view: View, index: int, start: int, stop: int) -> bytearray:
    """The bytes below layer *index* that complete a block written in part (copy-up)."""
    buf = bytearray(stop - start)
    read_below(view, index + 1, buf, start)
    view.layers[index].copy_ups += 1
    return buf


def _write_commit(view: View, buf: Buffer, offset: int) -> None:
    index, until = view.target, offset + len(buf)
    overlay = view.layers[index]
    first, end = offset >> SHIFT, (until + MASK) >> SHIFT
    if overlay.bits.none_set(first, end):
        write_at(view, index + 1, buf, offset)
        return
    with memoryview(buf) as whole:
        for low, high, present in overlay.bits.runs(first, end):
            start, stop = max(offset, low << SHIFT), min(until, high << SHIFT)
            with whole[start - offset : stop - offset] as part:
                write_at(view, index + (not present), part, start)


def zero(view: View, offset: int, length: int, *, punch: bool, fast: bool) -> None:
    """Make the range read as zeros (D11): explicit zeros in an overlay, a hole or zeros in the base.

    With *fast*, EOPNOTSUPP is raised before anything has changed if a file can only write zeros.
    """
    index = view.target
    if index == len(view.layers) or not view.commit:
        zero_at(view, index, offset, length, punch=punch, fast=fast)
        return
    overlay, until = view.layers[index], offset + length
    for low, high, present in overlay.bits.runs(offset >> SHIFT, (until + MASK) >> SHIFT):
        start = max(offset, low << SHIFT)
        count = min(until, high << SHIFT) - start
        zero_at(view, index + (not present), start, count, punch=punch, fast=fast)


def zero_at(view: View, index: int, offset: int, length: int, *, punch: bool = True, fast: bool = False) -> None:
    """:func:`zero` in layer *index* (or the floor)."""
    if index == len(view.layers):
        view.changed.mark(offset >> SHIFT, (offset + length + MASK) >> SHIFT)
        cast(fileio.File, view.floor).zero(offset, length, punch=punch, fast=fast)
        return
    cut = blocks.cut(offset, length, view.size)
    if cut.body < cut.stop:
        _zero_blocks(view, index, cut.body, cut.stop, punch=punch, fast=fast)
    until = offset + length
    if cut.first < cut.body:
        stop = min(until, cut.body << SHIFT)
        _write_overlay(view, index, _ZEROS[: stop - offset], offset)
    if cut.stop < cut.end:
        start = cut.stop << SHIFT
        _write_overlay(view, index, _ZEROS[: until - start], start)


def _zero_blocks(view: View, index: int, first: int, end: int, *, punch: bool, fast: bool) -> None:
    overlay = view.layers[index]
    if index == view.bottom:
        view.changed.mark(first, end)
    offset, length = blocks.byte_range(first, end, view.size)
    overlay.file.zero(offset, length, punch=punch, fast=fast)
    overlay.bits.mark(first, end)


# ---- durability ----


def flush(view: View, index: int = 0) -> None:
    """Make layers ``index`` and below durable (D2, D3): map pages are taken from the top down, then the layers synced
    from the bottom up, so that a bit that was cleared meanwhile becomes durable with the next flush.

    When a sync fails, the layers above take back what they handed down and is not known to be durable there (D9).
    """
    layers = view.layers[index:]
    try:
        with contextlib.ExitStack() as taken:
            finishes = [taken.enter_context(overlay.flushing()) for overlay in layers]
            view.floor.datasync()
            for finish in reversed(finishes):
                finish()
    except BaseException:
        for position, overlay in enumerate(layers):
            take_back(view, index + position, overlay)
        raise


def take_back(view: View, index: int, overlay: layer.Overlay) -> None:
    """Have *overlay*, layer *index*, take back what it handed down, if a sync below it has failed (D9)."""
    if failure(view, index + 1) is not None:
        overlay.take_back()


def take_back_of_killed(view: View) -> bool:
    """:func:`take_back` for a server that was killed between a failed sync and its own; whether there was need to.

    Before the first request.  That server has left no word of the failure, but the file system has.  It is asked only
    if something was handed down that no flush had covered: the asking writes out all of it.
    """
    lost = False
    for index, overlay in enumerate(view.layers):
        if overlay.handed_by_killed() and any(file.lost_writes() for file in _files(view, index + 1)):
            overlay.take_back()
            lost = True
    return lost


def failure(view: View, index: int = 0) -> str | None:
    """Why the disk, or layers ``index`` and below, only serve reads, if they do (D9)."""
    return next((file.failed for file in _files(view, index) if file.failed is not None), None)


def _files(view: View, index: int) -> list[fileio.File]:
    """Those of layers ``index`` and below that writes go to."""
    files = [overlay.file for overlay in view.layers[index:]]
    return [*files, view.floor] if isinstance(view.floor, fileio.File) else files

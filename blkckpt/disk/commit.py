"""Commit (834): move an overlay's blocks into the layer below, online (rule D8).

Nothing sets bits in the overlay any more: it is the target of a commit view, where other blocks are written below, or
it is not the target at all; and the epochs before that view are drained.  So one pass over the map ends it, whatever
the guest writes.  Per window of at most :data:`WINDOW_BYTES`:

1. hold off writers of exactly these blocks (readers go on: the overlay's data stays where it is);
2. mark them in the overlay's map of changes, and copy them down, holes as holes (an overlay below sets present bits,
   and D2's order with them);
3. make the layer below durable, all of it;
4. clear the bits in the live map.

*Crash windows.*  Before 4 the bits are set, live and durable: the overlay's version is read, copying again writes the
same bytes.  Between 4 and the next flush the durable bits are still set: after power loss the overlay's version is
read again, older only than writes that were not flushed; a flush that must cover such a write writes the map page,
after the base (:func:`chain.flush`).  At the end the overlay is flushed, so every bit is durably clear, and only then
may the caller take it out of the state file and unlink it.

Any layer can be below: the base, the file of a restored disk, or an older overlay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from blkckpt.disk import blocks, chain, epoch, job, layer, maps

WINDOW_BYTES = 4 << 20
"""Bounds how long a guest write can wait: about 10 ms of copying and one sync on a local SSD."""

WINDOW_RUNS = 256
"""A window is a set of runs, not a span, so that a sync is shared by scattered blocks without holding off writers of
what lies between.  More runs than this gain little: the sync is already shared 256 times."""

HOLE_SHARE = 256
"""A hole costs its window this fraction of its length (a punch and some bits): half a TiB that was trimmed took 16 s
when holes counted in full."""

COPY_STEP = 1 << 20

Gate = epoch.Gate[chain.View]


def run(gate: Gate, overlay: layer.Overlay, pace: job.Pace, progress: Callable[[int, int], None]) -> int:
    """Empty *overlay*; returns the bytes moved.  On return its bits are durably clear.

    Raises the ``OSError`` of the file that failed (nothing of that window is cleared; call again to go on),
    :class:`errors.PoisonedError` (D9), or :class:`errors.StateError` when stopped.
    """
    total = overlay.bits.count() << blocks.SHIFT
    done = 0
    scratch = bytearray(min(COPY_STEP, WINDOW_BYTES))
    progress(0, total)
    for window in windows(overlay, gate.current.view.size):
        pace.check()
        moved = _move(gate, overlay, window, scratch)
        done += moved
        progress(min(done, total), total)
        pace.rest(moved)
    assert overlay.bits.next_set(0, overlay.bits.blocks) is None, "a commit view's target gained a block"
    overlay.flush()
    progress(total, total)
    return done


def windows(overlay: layer.Overlay, size: int) -> Iterator[list[tuple[int, int]]]:
    """Present blocks in ascending order, as lists of runs."""
    window: list[tuple[int, int]] = []
    room = WINDOW_BYTES
    for start, length, hole in _present(overlay, size):
        share = HOLE_SHARE if hole else 1
        while length:
            step = min(length, room * share)
            window.append((start >> blocks.SHIFT, blocks.count(start + step)))
            start, length = start + step, length - step
            room -= blocks.count(-(-step // share)) << blocks.SHIFT  # whole blocks, so that steps end at block borders
            if room <= 0 or len(window) == WINDOW_RUNS:
                yield window
                window, room = [], WINDOW_BYTES
    if window:
        yield window


def _present(overlay: layer.Overlay, size: int) -> Iterator[tuple[int, int, bool]]:
    """The present blocks as ``(offset, length, is a hole)``, as of now: a guest may fill a hole at any time."""
    for first, end in overlay.bits.set_runs(0, overlay.bits.blocks):
        offset, length = blocks.byte_range(first, end, size)
        yield from blocks.round_segments(overlay.file.segments(offset, length), offset, offset + length)


def _move(gate: Gate, overlay: layer.Overlay, window: Sequence[tuple[int, int]], scratch: bytearray) -> int:
    _sync_below(gate, overlay)
    ticket = gate.exclude(window)
    try:
        view = ticket.view.replace(changed=cast(maps.LiveMap, maps.UNMARKED))
        index = view.layers.index(overlay)
        for first, end in window:
            overlay.changes.mark(first, end)
        moved = sum(copy_down(view, index, first, end, scratch) for first, end in window)
        chain.flush(view, index + 1)
        for first, end in window:
            overlay.bits.unmark(first, end)
        return moved
    finally:
        gate.finish(ticket)


def _sync_below(gate: Gate, overlay: layer.Overlay) -> None:
    """Sync what the guest wrote below since the last window, so that the sync inside the window is short."""
    admitted = gate.enter()
    try:
        chain.flush(admitted.view, admitted.view.layers.index(overlay) + 1)
    finally:
        gate.leave(admitted)


def copy_down(view: chain.View, index: int, first: int, end: int, scratch: bytearray) -> int:
    """Copy blocks ``[first, end)`` of layer *index* into the layer below; returns the bytes."""
    file = view.layers[index].file
    offset, length = blocks.byte_range(first, end, view.size)
    for start, count, hole in blocks.round_segments(file.segments(offset, length), offset, offset + length):
        if hole:
            chain.zero_at(view, index + 1, start, count)
        else:
            _copy(view, index, start, count, scratch)
    return length


def _copy(view: chain.View, index: int, offset: int, length: int, scratch: bytearray) -> None:
    with memoryview(scratch) as whole:
        for start, count in blocks.pieces(offset, length, len(scratch)):
            with whole[:count] as part:
                view.layers[index].file.pread_into(part, start)
                chain.write_at(view, index + 1, part, start)

"""Commit (834): move an overlay's blocks into the layer below, online (rule D8).

Nothing sets bits in the overlay any more: it is the target of a commit view, where other blocks are written below, or
it is not the target at all; and the epochs before that view are drained.  Per window of at most :data:`WINDOW_BYTES`:

1. watch who writes to these blocks from now on; nobody waits;
2. mark them in the overlay's map of changes, and copy them down, holes as holes (an overlay below sets present bits,
   and D2's order with them);
3. hold writers of these blocks off, for microseconds, and clear the live bits of those that nobody wrote to since 1.

Nothing is synced: a flush, the guest's or the last one here, makes the layer below durable before it writes a map page
with a cleared bit (:func:`chain.flush`).  A sync a window would write out all that the guest wrote meanwhile, and took
two thirds of its throughput.

A block that was written to meanwhile is still present above, where the write went; what was copied of it is masked and
is copied again by the next pass over the map.  What a guest rewrites all the time would never be left alone, so the
last of :data:`PASSES` holds its writers off from 1 to 3.  So it always ends, whatever the guest writes.

*Crash windows.*  Before 3 the bits are set, live and durable: the overlay's version is read, copying again writes the
same bytes.  Between 3 and the next flush the durable bits are still set: after power loss the overlay's version is
read again, older only than writes that were not flushed; a flush that must cover such a write writes the map page,
after the base.  After kill -9 the live bits are clear, what was copied is in the page cache, and the next flush does
the same.  If a sync below fails (D9), the live bits of what no flush has covered are set again, for the overlay has it
(:meth:`layer.Overlay.take_back`).  At the end the overlay is flushed, so every bit is durably clear, and only then may
the caller take it out of the state file and unlink it.

Any layer can be below: the base, the file of a restored disk, or an older overlay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from blkckpt.disk import blocks, chain, epoch, job, layer, maps

WINDOW_BYTES = 4 << 20
"""About 4 ms of copying: how long a write to a hot block can wait in the last pass."""

PASSES = 3
"""Random writes at full speed meet about one block in 200 of a window; after two passes next to nothing is left."""

WINDOW_RUNS = 256
"""A window is a set of runs, not a span, so that waiting for requests in flight is shared by scattered blocks without
holding off writers of what lies between.  More runs than this gain little: it is already shared 256 times."""

HOLE_SHARE = 256
"""A hole costs its window this fraction of its length (a punch and some bits): half a TiB that was trimmed took 16 s
when holes counted in full."""

Gate = epoch.Gate[chain.View]


def run(gate: Gate, overlay: layer.Overlay, pace: job.Pace, progress: Callable[[int, int], None]) -> int:
    """Empty *overlay*; returns the bytes moved.  On return its bits are durably clear.

    Raises the ``OSError`` of the file that failed (no bit has durably been cleared for it; call again to go on),
    :class:`errors.PoisonedError` (D9), or :class:`errors.StateError` when stopped.
    """
    total = overlay.bits.count() << blocks.SHIFT
    done = 0
    scratch = bytearray(blocks.PIECE)
    progress(0, total)
    for number in range(PASSES):
        move = _move if number < PASSES - 1 else _move_alone
        for window in windows(overlay, gate.current.view.size):
            pace.check()
            done += move(gate, overlay, window, scratch, pace)
            progress(min(done, total), total)
    assert overlay.empty, "a commit view's target gained a block"
    _flush(gate, overlay)
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


def _move(
    gate: Gate, overlay: layer.Overlay, window: Sequence[tuple[int, int]], scratch: bytearray, pace: job.Pace
) -> int:
    """Move what nobody writes to meanwhile; returns its bytes."""
    with gate.watch(window) as watch:
        admitted = gate.enter()
        try:
            _copy_window(admitted.view, overlay, window, scratch, pace.rest)
        finally:
            gate.leave(admitted)
        ticket = gate.exclude(window)
        try:
            return _clear(ticket.view, overlay, watch.untouched())
        finally:
            gate.finish(ticket)


def _move_alone(
    gate: Gate, overlay: layer.Overlay, window: Sequence[tuple[int, int]], scratch: bytearray, pace: job.Pace
) -> int:
    """Move all of *window*, whose writers wait."""
    ticket = gate.exclude(window)
    try:
        _copy_window(ticket.view, overlay, window, scratch, lambda moved: None)
        return _clear(ticket.view, overlay, window)
    finally:
        gate.finish(ticket)


def _copy_window(
    view: chain.View,
    overlay: layer.Overlay,
    window: Sequence[tuple[int, int]],
    scratch: bytearray,
    rest: Callable[[int], None],
) -> None:
    """Step 2."""
    view = view.replace(changed=cast(maps.LiveMap, maps.UNMARKED))
    index = view.layers.index(overlay)
    for first, end in window:
        overlay.changes.mark(first, end)
    for first, end in window:
        copy_down(view, index, first, end, scratch, rest)


def _clear(view: chain.View, overlay: layer.Overlay, runs: Sequence[tuple[int, int]]) -> int:
    """Step 3; returns the bytes of *runs*."""
    overlay.hand_down(runs)
    chain.take_back(view, view.layers.index(overlay), overlay)  # a flush may have failed before the bits were cleared
    return sum(blocks.byte_range(first, end, view.size)[1] for first, end in runs)


def _flush(gate: Gate, overlay: layer.Overlay) -> None:
    """Make *overlay*'s cleared bits durable, and all that is below before them."""
    admitted = gate.enter()
    try:
        chain.flush(admitted.view, admitted.view.layers.index(overlay))
    finally:
        gate.leave(admitted)


def copy_down(
    view: chain.View, index: int, first: int, end: int, scratch: bytearray, rest: Callable[[int], None]
) -> None:
    """Copy blocks ``[first, end)`` of layer *index* into the layer below; *rest* is told of each piece."""
    file = view.layers[index].file
    offset, length = blocks.byte_range(first, end, view.size)
    for start, count, hole in blocks.round_segments(file.segments(offset, length), offset, offset + length):
        if hole:
            chain.zero_at(view, index + 1, start, count)
            rest(count)
        else:
            _copy(view, index, start, count, scratch, rest)


def _copy(
    view: chain.View, index: int, offset: int, length: int, scratch: bytearray, rest: Callable[[int], None]
) -> None:
    with memoryview(scratch) as whole:
        for start, count in blocks.pieces(offset, length, len(scratch)):
            with whole[:count] as part:
                view.layers[index].file.pread_into(part, start)
                for at, step in blocks.pieces(start, count, blocks.FOLIO):
                    with part[at - start : at - start + step] as written:
                        chain.write_at(view, index + 1, written, at)
            rest(count)

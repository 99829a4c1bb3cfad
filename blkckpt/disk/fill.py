"""Background fill: copy the image below a restored disk into its file, until the image is not needed.

The file is a layer with a map like an overlay; a block the guest wrote is present and is left alone.  Image data is
read before writers are held off (it never changes; decompressing is slow); then, for the blocks that are still not
present, data is written and the bits are set, so that no guest write in between is overwritten.  The map's order (D2)
is that of :meth:`layer.Overlay.flush`.  Stopping anywhere loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blkckpt.disk import blocks, chain, epoch, job, layer

DATA_STEP = 256 << 10
ZERO_STEP = 256 << 20
"""A stretch of zeros costs one punch and some bits, so its step is only bounded by the time to set them."""

Gate = epoch.Gate[chain.View]


def run(
    gate: Gate, file: layer.Overlay, image: layer.ImageFloor, pace: job.Pace, progress: Callable[[int, int], None]
) -> None:
    """Make every block of *file* present and durable.  Raises what the image raises; StateError if stopped."""
    bits = file.bits
    size = gate.current.view.size
    done = bits.count() << blocks.SHIFT
    for first, end in missing_runs(file):
        offset, length = blocks.byte_range(first, end, size)
        segments = blocks.round_segments(image.segments(offset, length), offset, offset + length)
        for start, count, is_zero in segments:
            for position, step in blocks.pieces(start, count, ZERO_STEP if is_zero else DATA_STEP):
                pace.check()
                _fill(gate, file, image, position, step, is_zero)
                done += step
                progress(min(done, size), size)
                pace.rest(step)
    file.flush()


def missing_runs(file: layer.Overlay) -> Iterator[tuple[int, int]]:
    """Runs of blocks that are not present."""
    for first, end, present in file.bits.runs(0, file.bits.blocks):
        if not present:
            yield first, end


def _fill(gate: Gate, file: layer.Overlay, image: layer.ImageFloor, offset: int, length: int, is_zero: bool) -> None:
    first, end = offset >> blocks.SHIFT, blocks.count(offset + length)
    data = bytearray(0 if is_zero else length)
    if not is_zero and not file.bits.all_set(first, end):
        image.pread_into(data, offset)
    ticket = gate.exclude([(first, end)])
    try:
        for low, high, present in file.bits.runs(first, end):
            if present:
                continue
            start, count = blocks.byte_range(low, high, ticket.view.size)
            if is_zero:
                file.file.zero(start, count)
            else:
                _write(file, data, start - offset, start, count)
            file.bits.mark(low, high)
    finally:
        gate.finish(ticket)


def _write(file: layer.Overlay, data: bytearray, position: int, start: int, count: int) -> None:
    """Write ``data[position : position + count]`` at *start*."""
    with memoryview(data) as whole:
        for at, step in blocks.pieces(start, count, blocks.FOLIO):
            low = position + at - start
            with whole[low : low + step] as part:
                file.file.pwrite(part, at)

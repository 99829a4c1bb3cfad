"""The copy child (step 830), which reads a disk's frozen layers into an image.

``python -m blkckpt.store.lowly blkckpt.store.ingest``.  One job, one line of JSON on standard input, which stays open:
its end means that the parent has gone or wants an end, as SIGTERM does.  The descriptors are inherited.  The job and
the answers are described in :mod:`blkckpt.disk.copier`; layers in :mod:`blkckpt.store.frozen`.

What is read:

======================  ====================================================================================
parent, ``changed``     chunks with a changed block or a block in an overlay that the parent does not have; the
                        rest is the parent's, as it stands in the parent's table
parent, null            everything that is not a hole, compared by hash; holes become zeros
no parent, an image     as with that image as parent and nothing changed, if it is in this store: what is
at the bottom           below the overlays is the image
no parent               everything that is not a hole
======================  ====================================================================================

A parent of another size is no parent.  The child gives way (:mod:`blkckpt.store.lowly`), keeps to a rate if one is
given, and holds the store's lock only for itself: the agent holds it until the manifest
(:meth:`blkckpt.store.store.Store.hold`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

import numpy as np

from blkckpt import errors, log
from blkckpt.store import frozen, images, layout, lowly, reference, store

_FAST_ENOUGH = 192 << 20
"""Bytes a second.  Beside a guest that writes at full speed on two processors, half a GiB took 2.3 s instead of 1.5,
and the guest kept 0.81 of its throughput instead of 0.55."""

_INTERVAL = 0.2
"""Seconds between progress lines."""

_MAX_JOB = 1 << 20
_MAX_LAYERS = 64
_logger = log.get(__name__)


class _StoppedError(Exception):
    """SIGTERM, or standard input has ended."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a job: an overlay (fd, map_fd, inherited), a raw file (fd), or an image (store, image)."""

    kind: str
    fd: int = -1
    map_fd: int = -1
    store: str = ""
    image: str = ""
    inherited: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """What the parent asks for."""

    size: int
    layers: tuple[Layer, ...]
    changed_fd: int | None
    store: str
    parent: str | None
    rate: int | None
    label: str
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Which chunks to read (packed bits a segment), relative to what."""

    wanted: dict[int, bytes]
    chunks: int
    parent: str | None
    inherits: bool


def parse(line: bytes) -> Job:
    """The job in *line*; ProtocolError saying what is wrong."""
    try:
        fields = json.loads(line)
        if fields["version"] != 1:
            raise errors.ProtocolError(f"a copy job of version {fields['version']!r:.20}; this child knows version 1")
        changed = fields["changed"]
        layers = tuple(_layer(item) for item in fields["layers"])
        job = Job(
            size=_integer(fields["size"]),
            layers=layers,
            changed_fd=None if changed is None else _integer(changed["map_fd"]),
            store=str(fields["store"]),
            parent=None if fields["parent"] is None else layout.check_id(fields["parent"]),
            rate=None if fields["rate"] is None else _integer(fields["rate"]),
            label=str(fields["label"]),
            image=None if fields.get("image") is None else layout.check_id(fields["image"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, errors.InputError) as error:
        raise errors.ProtocolError(f"the copy job cannot be read: {error!r:.200}") from error
    if len(layers) > _MAX_LAYERS or any(layer.kind != "overlay" for layer in layers[:-1]):
        raise errors.ProtocolError("the copy job's layers are not overlays over one raw file or image")
    return job


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _layer(fields: Any) -> Layer:
    kind = fields["kind"]
    if kind == "overlay":
        return Layer(
            kind, fd=_integer(fields["fd"]), map_fd=_integer(fields["map_fd"]), inherited=bool(fields["inherited"])
        )
    if kind == "raw":
        return Layer(kind, fd=_integer(fields["fd"]))
    if kind == "image":
        return Layer(kind, store=str(fields["store"]), image=layout.check_id(fields["image"]))
    raise ValueError(f"{kind!r:.40} is not a kind of layer")


def run(job: Job, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Do *job*; returns the result message."""
    begun = time.monotonic()
    with store.Store.open(job.store) as target:
        if job.image is not None and target.reference(job.image) is None:
            return _flat_already(job, target.image(job.image), begun)
        disk = open_layers(job, target)
        plan = make_plan(job, disk, target)
        with target.image_writer(job.size, parent=plan.parent, kind="disk", label=job.label, image=job.image) as out:
            total = plan.chunks * layout.CHUNK
            done = 0
            with contextlib.closing(_Pace(job.rate)) as pace:
                for first, count in _windows(disk, plan):
                    data = disk.read(first, count)
                    out.write(first * layout.CHUNK, data if isinstance(data, bytes) else memoryview(data))
                    done += len(data)
                    progress(done, total)
                    pace.wait(done)
            if plan.parent and not plan.inherits:
                _zero_the_rest(disk, plan, out.zero)
            info = out.finish()
        progress(total, total)
    return {
        "image": info.image, "size": info.size, "read": done, "new": info.new_bytes, "chunks": info.chunks,
        "new_chunks": info.new_chunks, "parent": plan.parent, "seconds": round(time.monotonic() - begun, 3),
    }  # fmt: skip


def _flat_already(job: Job, reader: images.ImageReader, begun: float) -> dict[str, Any]:
    """The result for an image that an earlier job, interrupted before it was heard, has made."""
    if reader.size != job.size:
        raise errors.CorruptError(f"image {job.image} has {reader.size} bytes, the disk {job.size}")
    return {
        "image": job.image, "size": job.size, "read": 0, "new": 0, "chunks": 0, "new_chunks": 0, "parent": None,
        "seconds": round(time.monotonic() - begun, 3),
    }  # fmt: skip


def open_layers(job: Job, target: store.Store) -> frozen.Frozen:
    """The job's layers, ready to be read."""
    overlays = []
    floor: frozen.Floor | None = None
    for number, layer in enumerate(job.layers):
        if layer.kind == "overlay":
            present = frozen.MapFile(layer.map_fd, job.size, f"map of layer {number}")
            overlays.append(frozen.Overlay(frozen.RawFile(layer.fd), present, layer.inherited))
        elif layer.kind == "raw":
            floor = frozen.RawFile(layer.fd)
        else:
            floor = frozen.ImageFloor(_open_image(layer, target))
    return frozen.Frozen(job.size, overlays, floor)


def _open_image(layer: Layer, target: store.Store) -> images.ImageReader:
    same = os.path.realpath(layer.store) == os.path.realpath(target.path)
    return (target if same else store.Store.open(layer.store)).image(layer.image)


def make_plan(job: Job, disk: frozen.Frozen, target: store.Store) -> Plan:
    """Which chunks are to be read (see the table above)."""
    bottom = job.layers[-1] if job.layers else None
    parent = _usable_parent(job, target)
    changed = None
    if parent and job.changed_fd is not None:
        changed = frozen.MapFile(job.changed_fd, job.size, "map of changed blocks")
    inherits = changed is not None
    if bottom and bottom.kind == "image" and not inherits and _is_here(bottom, job.size, target):
        parent, inherits = bottom.image, True
    wanted: dict[int, bytes] = {}
    total = 0
    for segment in range(disk.segments):
        _, count = disk.chunk_range(segment)
        mask = disk.overlaid(segment, known=changed is not None) if inherits else disk.with_data(segment)
        if changed:
            mask = mask | frozen.by_chunk(changed.bits(segment))[:count]
        if selected := int(np.count_nonzero(mask)):
            wanted[segment] = np.packbits(mask).tobytes()
            total += selected
    return Plan(wanted, total, parent, inherits)


def _usable_parent(job: Job, target: store.Store) -> str | None:
    if job.parent is None:
        return None
    try:
        if images.load_table(target.packs, job.parent).size == job.size:
            return job.parent
        reason = "it has another size"
    except (errors.NotFoundError, errors.CorruptError, reference.RetainedError) as error:
        reason = str(error)
    _logger.warning("no parent for the copy: everything is read", extra={"fields": {"reason": reason}})
    return None


def _is_here(layer: Layer, size: int, target: store.Store) -> bool:
    """Whether *layer* is an image of this store and of this size, with a table of its own."""
    if os.path.realpath(layer.store) != os.path.realpath(target.path) or target.reference(layer.image) is not None:
        return False
    return target.image(layer.image).size == size


def _mask(disk: frozen.Frozen, plan: Plan, segment: int) -> frozen.Bools:
    _, count = disk.chunk_range(segment)
    packed = plan.wanted.get(segment)
    if packed is None:
        return np.zeros(count, np.bool_)
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).view(np.bool_)


def _windows(disk: frozen.Frozen, plan: Plan) -> Iterator[tuple[int, int]]:
    for segment in sorted(plan.wanted):
        yield from frozen.windows(_mask(disk, plan, segment), disk.chunk_range(segment)[0])


def _zero_the_rest(disk: frozen.Frozen, plan: Plan, zero: Callable[[int, int], None]) -> None:
    """What is in no layer is zeros, whatever the parent has there."""
    for segment in range(disk.segments):
        first, _ = disk.chunk_range(segment)
        for low, high in frozen.runs(~_mask(disk, plan, segment)):
            offset = (first + low) * layout.CHUNK
            zero(offset, min((first + high) * layout.CHUNK, disk.size) - offset)


class _Pace:
    """Keeps reading to *rate* bytes a second, and gives way the more the better it gets on."""

    def __init__(self, rate: int | None) -> None:
        self._rate, self._begun = rate, time.monotonic()
        self._leftover = lowly.Leftover(min(_FAST_ENOUGH, rate // 2) if rate else _FAST_ENOUGH)

    def wait(self, done: int) -> None:
        self._leftover.told(done)
        if self._rate:
            late = self._begun + done / self._rate - time.monotonic()
            if late > 0:
                time.sleep(late)

    def close(self) -> None:
        self._leftover.end()


class _Progress:
    """Writes progress lines, at most five a second, and always the last."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._next = out, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + _INTERVAL
            say(self._out, {"progress": {"done": done, "total": total}})


def say(out: IO[bytes], message: dict[str, Any]) -> None:
    """One line of JSON; a reader that has gone is no error (standard input tells)."""
    try:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()
    except BrokenPipeError:
        pass


def error_message(error: BaseException) -> dict[str, Any]:
    """The error line for *error*."""
    if isinstance(error, OSError):
        error = errors.from_os_error(error, "copying the disk")
    kind = type(error).__name__ if isinstance(error, errors.BlkckptError) else "BlkckptError"
    text = str(error) if isinstance(error, errors.BlkckptError) else f"the copy failed: {error!r:.300}"
    return {"error": {"type": kind, "message": text, "errno": getattr(error, "errno", None)}}


def _stop(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: what follows is tidying up
    raise _StoppedError


def _watch_input(descriptor: int) -> None:
    """End this process, in order, when standard input ends."""
    while os.read(descriptor, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Read the job, do it, say how it went; the exit status is 0 or 1."""
    log.setup()
    out = sys.stdout.buffer
    try:
        signal.signal(signal.SIGTERM, _stop)
        job = parse(sys.stdin.buffer.readline(_MAX_JOB))
        threading.Thread(target=_watch_input, args=(sys.stdin.fileno(),), daemon=True).start()
        result = run(job, _Progress(out))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except _StoppedError:
        say(out, error_message(errors.StateError("the copy was stopped")))
        return 1
    except Exception as error:
        _logger.debug("copy failed", exc_info=True)
        say(out, error_message(error))
        return 1
    say(out, {"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())

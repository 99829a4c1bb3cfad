"""The copy child (830): its own interpreter, so that hashing and compressing never hold the guest's.

Per disk one child is started with the frozen layers' descriptors, read-only, and this job as one line of JSON on its
standard input, which then stays open: end of file there means that the parent is gone, or wants it to stop::

    {"version": 1, "disk": "vda", "size": N,
     "layers": [{"kind": "overlay", "fd": 5, "map_fd": 6, "inherited": false}, …, {"kind": "raw", "fd": 7} or
                {"kind": "image", "store": "/path", "image": "id"}],       newest first
     "changed": {"map_fd": 8} or null, "store": "/path", "parent": "image id" or null,
     "rate": bytes a second or null, "label": "VM@CKPT/vda",
     "image": "id" or null}

``map_fd`` is a live map file (:mod:`blkckpt.disk.format`).  ``inherited``: the parent has what this overlay holds.
``changed`` null: not known, read and compare everything.  ``image``: the id that the new image is to have, which may
stand for these layers until then; null: any.
The child answers with lines of JSON: any number of ``{"progress": {"done", "total"}}``, then exactly one
``{"result": {…}}`` (exit 0) or ``{"error": {"type", "message", "errno"}}`` (exit 1).  Anything else, silence at the
end, or a signal is a failed copy: no checkpoint (A3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from blkckpt import childenv, errors
from blkckpt.disk import api, chain, fileio, job, maps

MAX_LINE = 1 << 20
NICE = 19
KILL_AFTER = 5.0
"""Seconds a child has to end by itself after its input was closed."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenDisk:
    """One disk as of the switch.  The view is drained; *changed* is ``None`` when it is not known (D13).

    *parent* is the image that *changed* is relative to, else one to compare with; it has the writes of the overlays
    *inherited* (ids).  The layers' files stay open until :meth:`release`, which may be called more than once.
    """

    name: str
    view: chain.View
    source: api.ImageRef | None
    changed: maps.LiveMap | None
    parent: str | None
    inherited: frozenset[str]
    held: contextlib.ExitStack

    def release(self) -> None:
        self.held.close()


@dataclasses.dataclass(frozen=True, slots=True)
class CopyOptions:
    """Where to, how fast, by which program."""

    command: Sequence[str]
    store: str
    rate: int | None
    label: str
    image: str | None = None


def copy(frozen: FrozenDisk, options: CopyOptions, progress: Callable[[int, int], None], stop: threading.Event) -> Any:
    """Run the child of one disk to its end; returns its result.  Raises what it reported, or StateError if stopped."""
    with contextlib.ExitStack() as stack:
        described, descriptors = _describe(frozen, options, stack)
        frozen.release()
        child = _spawn(options.command, descriptors)
        stack.callback(_reap, child)
        watcher = threading.Thread(target=_stop_on, args=(child, stop), daemon=True, name="copy-stop")
        watcher.start()
        return _converse(child, described, progress, stop)


def _describe(
    frozen: FrozenDisk, options: CopyOptions, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], list[int]]:
    descriptors: list[int] = []

    def share(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        descriptors.append(descriptor)
        return descriptor

    layers: list[dict[str, Any]] = [
        {
            "kind": "overlay",
            "fd": share(overlay.file.reopen()),
            "map_fd": share(overlay.bits.reopen()),
            "inherited": overlay.id in frozen.inherited,
        }
        for overlay in frozen.view.layers
    ]
    if isinstance(frozen.view.floor, fileio.File):
        layers.append({"kind": "raw", "fd": share(frozen.view.floor.reopen())})
    elif frozen.source is not None:
        layers.append({"kind": "image", **dataclasses.asdict(frozen.source)})
    changed = {"map_fd": share(frozen.changed.reopen())} if frozen.changed is not None else None
    described = {
        "version": 1,
        "disk": frozen.name,
        "size": frozen.view.size,
        "layers": layers,
        "changed": changed,
        "store": options.store,
        "parent": frozen.parent,
        "rate": options.rate,
        "label": options.label,
        "image": options.image,
    }
    return described, descriptors


def _spawn(command: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            ["nice", "-n", str(NICE), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=childenv.computing(),
            cwd="/",
        )
    except OSError as error:
        raise errors.from_os_error(error, f"starting the copy child {command[0]}") from error


def _converse(
    child: subprocess.Popen[bytes],
    described: Mapping[str, Any],
    progress: Callable[[int, int], None],
    stop: threading.Event,
) -> Any:
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(described).encode() + b"\n")
        child.stdin.flush()
    message = _read(child.stdout, progress)
    code = child.wait()
    if stop.is_set():
        raise errors.StateError("the copy was stopped")
    if message is None:
        raise errors.BlkckptError(f"the copy child ended without a result (exit status {code}); see the server's log")
    if "error" in message:
        raise _error(message["error"])
    if code != 0:
        raise errors.BlkckptError(f"the copy child reported a result and then failed (exit status {code})")
    return message["result"]


def _read(stream: IO[bytes], progress: Callable[[int, int], None]) -> dict[str, Any] | None:
    """The final message, or ``None`` if there is none."""
    final: dict[str, Any] | None = None
    while line := stream.readline(MAX_LINE):
        try:
            message = json.loads(line)
            if final is not None:
                raise errors.ProtocolError("the copy child went on after its result")
            if "progress" in message:
                progress(int(message["progress"]["done"]), int(message["progress"]["total"]))
            elif "result" in message or "error" in message:
                final = message
            else:
                raise KeyError("neither progress, result nor error")
        except (ValueError, KeyError, TypeError) as error:
            raise errors.ProtocolError(f"the copy child said {line[:80]!r}") from error
    return final


def _error(report: Mapping[str, Any]) -> errors.BlkckptError:
    """The error a child reported, as the class it named."""
    kind = getattr(errors, str(report.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, errors.BlkckptError)):
        kind = errors.BlkckptError
    result = kind(str(report.get("message") or report.get("type") or "the copy child failed"))
    if isinstance(report.get("errno"), int):
        result.errno = report["errno"]
    return result


def _stop_on(child: subprocess.Popen[bytes], stop: threading.Event) -> None:
    """End the child when *stop* is set: close its input, and kill it if that is not enough."""
    while child.poll() is None:
        if not stop.wait(0.25):
            continue
        _close_input(child)
        try:
            child.wait(KILL_AFTER)
        except subprocess.TimeoutExpired:
            child.kill()
        return


def _close_input(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if child.stdin is not None:
            child.stdin.close()


def _reap(child: subprocess.Popen[bytes]) -> None:
    _close_input(child)
    if child.poll() is None:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def run_all(
    sizes: Mapping[str, int],
    freeze: Callable[[str], FrozenDisk],
    options: Mapping[str, CopyOptions],
    running: job.Job,
) -> dict[str, Any]:
    """Copy disk after disk (name → size); the job's progress is that of all of them."""
    totals = dict(sizes)
    finished: dict[str, Any] = {}
    for name in sizes:
        before = sum(total for other, total in totals.items() if other in finished)

        def tell(done: int, total: int, name: str = name, before: int = before) -> None:
            totals[name] = total
            running.progress(before + done, sum(totals.values()))

        frozen = freeze(name)
        try:
            finished[name] = copy(frozen, options[name], tell, running.cancelled)
        finally:
            frozen.release()
    return finished

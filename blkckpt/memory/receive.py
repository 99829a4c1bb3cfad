"""The memory receiver: a child process that takes QEMU's stream in at full speed.

``python -m blkckpt.memory.receive``, or a fork of its driver, with the stream's descriptor inherited.

Standard input: one line, the job::

    {"version": 1, "stream_fd": N, "store": path, "label": "VM@CKPT", "parents": {block: image or null},
     "raw_dir": directory, "keep_raw": bool, "once": bool}

and nothing more; it must stay open.  **Its end means that the driver is gone**, and so is the job then.  ``once``
(false if left out): the stream is a background snapshot's, in which every page comes once.

Standard output: JSON lines, ``{"progress": {"done": bytes, "total": bytes}}`` at most five a second, then exactly one
of ::

    {"result": {"blocks": [{"name", "size", "page_size", "image", "raw": path or null}], "skeleton": image,
                "skeleton_size", "new", "stream_bytes", "pages", "zero_pages", "seconds", "stream_seconds"}}
    {"error": {"type": class, "message", "errno"}}

``blocks`` are the main blocks; the small ones are in the skeleton.  ``new`` is what the store grew by.  The exit status
is 0 or 1.

A process of its own takes the stream in (:mod:`blkckpt.memory.apart`): pipe → buffer → parser → assembler → raw image
(page cache).  Here are three threads::

    main      watches standard input and signals, prints
    listener  what the intake tells: chunks that are whole, the stream's end
    feeder    blkckpt.memory.feed: complete chunks, from the page cache → the store's writers

The feeder and the store's threads run at a nice value of 5: when the processors are short, the guest comes first, and
QEMU, whose thread saves it.  What is not stored meanwhile waits in the page cache.  (At 10 a host with other work to do
starved them: tens of seconds for what takes five.)

Everything that is not finished is gone when the process ends: raw images have no name before they are complete,
and images in the store that no manifest names are garbage there.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from blkckpt import errors, paths
from blkckpt.memory import apart, assemble, feed, image, intake
from blkckpt.store import store

NICE = 5
PROGRESS_EVERY = 0.25
MAX_JOB = 1 << 20
_GRACE = 20.0
"""Seconds that threads get to end after a cancellation; fsync of a pack is the longest thing they do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to do (the format is the module's)."""

    stream_fd: int
    store: Path
    label: str
    parents: Mapping[str, str | None]
    raw_dir: Path
    keep_raw: bool
    once: bool = False


def parse_job(line: bytes) -> Job:
    """Read the job; raises :class:`errors.InputError`."""
    try:
        job = json.loads(line)
        if job["version"] != 1:
            raise errors.InputError(f"memory receiver: a job of version {job['version']!r}, only 1 is understood")
        parsed = Job(
            job["stream_fd"],
            Path(job["store"]),
            job["label"],
            job["parents"] or {},
            Path(job["raw_dir"]),
            job["keep_raw"],
            job.get("once", False),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise errors.InputError(f"memory receiver: the job is not one ({error})") from error
    good = (
        isinstance(parsed.stream_fd, int)
        and isinstance(parsed.label, str)
        and isinstance(parsed.parents, dict)
        and isinstance(parsed.keep_raw, bool)
        and isinstance(parsed.once, bool)
        and all(parent is None or isinstance(parent, str) for parent in parsed.parents.values())
    )
    if not good:
        raise errors.InputError("memory receiver: the job has a field of the wrong type")
    return parsed


class Work:
    """One job in its two threads; the main thread starts it, watches it and takes the result."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.cancel = intake.Cancel()
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        self.error: BaseException | None = None
        self.result: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        paths.private_directory(job.raw_dir)
        self._store = store.Store.open(job.store)
        self._intake: apart.Intake | None = None
        self._feeder = feed.Feeder(self._store, job.label, job.parents, self.cancel)
        self._taken: apart.Taken | None = None
        self._threads = [
            threading.Thread(target=self._guard, args=(part,), name=name, daemon=True)
            for name, part in (("listener", self._listen), ("feeder", self._feed))
        ]

    def start(self, ours: tuple[int, ...] = ()) -> None:
        """Fork the intake, which does not get the descriptors *ours*; then begin."""
        self._intake = apart.Intake(self._job.stream_fd, self._job.raw_dir, once=self._job.once, closed=ours)
        os.close(self._job.stream_fd)  # after an error QEMU's migration fails at once, and the guest runs on
        for thread in self._threads:
            thread.start()

    def progress(self) -> dict[str, int]:
        taking = self._intake
        if taking is None:
            return {"done": 0, "total": 0}
        return {"done": min(taking.pages * taking.page_size, taking.total), "total": taking.total}

    def stop(self, reason: errors.BlkckptError | None = None) -> bool:
        """End the threads; false if one of them did not end in time."""
        if reason is not None:
            self._fail(reason)
        assert self._intake is not None
        deadline = time.monotonic() + _GRACE
        if self.error is not None:
            self._intake.hang_up()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._intake.stop(max(0.0, deadline - time.monotonic()))
        if self.error is not None:
            self._feeder.abort()
        self._store.close()
        return True

    def _guard(self, part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # it becomes the job's outcome, said by the main thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self.error is None and self.result is None:
                self.error = error
        stopped = errors.StateError("memory receiver: stopped")
        self.cancel.set(error if isinstance(error, errors.BlkckptError) else stopped)
        self._feeder.close()
        os.eventfd_write(self.done, 1)

    def _listen(self) -> None:
        assert self._intake is not None
        self._taken = self._intake.listen(self._feeder.add)
        self._feeder.close()

    def _feed(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # the store's threads inherit it
        with self._store.hold():
            self._feeder.run()
            self.cancel.check()
            result = self._finish()
        with self._lock:
            self.result = result
        os.eventfd_write(self.done, 1)

    def _finish(self) -> dict[str, Any]:
        """The stream has ended well: make the images durable, name the raw ones."""
        taken, taking = self._taken, self._intake
        assert taken is not None
        assert taking is not None
        images = {block.info.name: self._feeder.finish(block) for block in taking.main}
        state = self._feeder.put(taken.skeleton, f"{self._job.label}/state")
        raws = self._publish(taking.main, images)
        return {
            "blocks": [
                {"name": b.info.name, "size": b.info.size, "page_size": b.info.page_size,
                 "image": images[b.info.name], "raw": raws.get(b.info.name)}
                for b in taking.main
            ],
            "skeleton": state, "skeleton_size": len(taken.skeleton), "new": self._feeder.new,
            "stream_bytes": taken.bytes, "pages": taken.pages, "zero_pages": taken.zeros,
            "seconds": time.monotonic() - self._begun, "stream_seconds": taken.seconds,
        }  # fmt: skip

    def _publish(self, blocks: Sequence[assemble.Block], images: Mapping[str, str]) -> dict[str, str]:
        if not self._job.keep_raw:
            return {}
        names = image.file_names(list(images))
        raws = {}
        for block in blocks:
            path = self._job.raw_dir / names[block.info.name]
            block.raw.publish(path, images[block.info.name])
            raws[block.info.name] = str(path)
        return raws


def watch(work: Work, control: int, say: Callable[[dict[str, Any]], None]) -> errors.BlkckptError | None:
    """Report progress until the work is done; returns a reason to stop it, if one came."""
    poll = select.poll()
    for descriptor in (work.done, work.cancel.fd, control):
        poll.register(descriptor, select.POLLIN)
    before: dict[str, int] = {}
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(PROGRESS_EVERY * 1000)}
        if work.done in ready:
            say({"progress": work.progress()})
            return None
        if work.cancel.fd in ready:
            return work.cancel.reason
        if control in ready and not os.read(control, 4096):
            return errors.StateError("memory receiver: its driver is gone")
        if (progress := work.progress()) != before:
            say({"progress": progress})
            before = progress


def main(_: Sequence[str], control: IO[bytes], output: IO[bytes]) -> int:
    """Do one job; the exit status.  *control* is not buffered."""

    def say(message: dict[str, Any]) -> None:
        output.write(json.dumps(message).encode() + b"\n")
        output.flush()

    try:
        job = parse_job(control.readline(MAX_JOB))
        work = Work(job)
    except errors.BlkckptError as error:
        say(_error(error))
        return 1
    stopped = errors.StateError("memory receiver: stopped by a signal")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: work.cancel.set(stopped))
    work.start((control.fileno(), output.fileno()))
    reason: errors.BlkckptError | None = errors.StateError("memory receiver: nobody reads its answers")
    told = False
    with contextlib.suppress(BrokenPipeError):
        reason = watch(work, control.fileno(), say)
        if told := work.result is not None:
            say({"result": work.result})  # all is durable: nobody has to wait for our end
    ended = work.stop(reason)
    if not told:  # the result may have come while it was being stopped
        with contextlib.suppress(BrokenPipeError):
            say({"result": work.result} if work.error is None else _error(work.error))
    if not ended:
        os._exit(1)  # a thread hangs in the kernel; nothing of ours has a name
    return 0 if work.error is None else 1


def _error(error: BaseException) -> dict[str, Any]:
    if isinstance(error, OSError):
        error = errors.from_os_error(error, "memory receiver")
    return {"error": errors.describe(error, "memory receiver: ")}


if __name__ == "__main__":
    with open(0, "rb", buffering=0, closefd=False) as standard_input:
        status = main([], standard_input, sys.stdout.buffer)
    os._exit(status)  # all is flushed and closed; to take the interpreter down would cost the guest 40 ms of processor

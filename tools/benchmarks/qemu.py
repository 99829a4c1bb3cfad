"""QEMU's own block jobs under load: ``qemu-storage-daemon`` serves a disk over NBD and is told on a QMP socket.

``blockdev-backup`` is ``drive-backup`` by its newer name: before a guest's write the old cluster is copied away.
``block-commit`` of the active layer mirrors it into the base; when it has caught up it is told to complete.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import context, monitor, servers


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running storage daemon: the NBD URI of its export ``disk``, and its monitor."""

    uri: str
    monitor: monitor.Monitor


@contextlib.contextmanager
def daemon(base: Path, directory: Path, *, overlay: bool) -> Iterator[Daemon]:
    """Serve *base* itself (node ``disk``), or a new qcow2 *overlay* on it."""
    nbd, qmp = directory / "qsd-nbd.sock", directory / "qsd-qmp.sock"
    nodes = [f"driver=file,filename={base},node-name=basefile", "driver=raw,file=basefile,node-name=base"]
    top = "base"
    if overlay:
        path = directory / "qsd.qcow2"
        path.unlink(missing_ok=True)
        subprocess.run([servers.need("qemu-img"), "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw",
                        str(path)], check=True)  # fmt: skip
        nodes += [
            f"driver=file,filename={path},node-name=topfile",
            "driver=qcow2,file=topfile,backing=base,node-name=top",
        ]
        top = "top"
    command = [servers.need("qemu-storage-daemon"), *(word for node in nodes for word in ("--blockdev", node)),
               "--nbd-server", f"addr.type=unix,addr.path={nbd}",
               "--export", f"type=nbd,id=e,node-name={top},name=disk,writable=on",
               "--chardev", f"socket,id=c,path={qmp},server=on,wait=off", "--monitor", "chardev=c"]  # fmt: skip
    try:
        with context.process(command, log=directory / "qsd.log") as child:
            context.wait_for(lambda: nbd.exists() and qmp.exists(), "qemu-storage-daemon's sockets", 10, child)
            with monitor.Monitor(qmp) as own:
                yield Daemon(f"nbd+unix:///disk?socket={nbd}", own)
    finally:
        for leftover in (nbd, qmp, directory / "qsd.qcow2"):
            leftover.unlink(missing_ok=True)


def backup(served: Daemon, directory: Path, size: int) -> Callable[[float], bool]:
    """Begin copying the disk as of now into a raw file; the result waits for its end, up to some seconds."""
    target = directory / "backup.raw"
    with target.open("wb") as file:
        file.truncate(size)
    served.monitor.execute(
        "blockdev-add", **{"driver": "raw", "node-name": "target", "file": {"driver": "file", "filename": str(target)}}
    )
    served.monitor.execute("blockdev-backup", **{"job-id": "job", "device": "base", "target": "target", "sync": "full"})

    def wait(seconds: float) -> bool:
        try:
            return _ended(served.monitor, seconds)
        finally:
            target.unlink(missing_ok=True)

    return wait


def commit(served: Daemon) -> Callable[[float], bool]:
    """Begin committing the active overlay into its base; as :func:`backup`."""
    served.monitor.execute("block-commit", **{"job-id": "job", "device": "top"})
    return lambda seconds: _ended(served.monitor, seconds)


def _ended(own: monitor.Monitor, seconds: float) -> bool:
    """Whether the job ended well within *seconds*; it is cancelled otherwise."""
    limit = time.monotonic() + seconds
    completing = False
    while time.monotonic() < limit:
        jobs = own.execute("query-block-jobs")
        if not jobs:
            failed = [data for name, _, data in own.events if name == "BLOCK_JOB_COMPLETED" and "error" in data]
            if failed:
                raise context.BenchError(f"QEMU's block job failed: {failed[0]['error']}")
            return True
        if jobs[0].get("ready") and not completing:
            own.execute("block-job-complete", device="job")
            completing = True
        time.sleep(0.02)
    own.execute("block-job-cancel", device="job", force=True)
    return False

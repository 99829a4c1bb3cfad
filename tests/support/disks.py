"""Disks for tests: a VM directory of one's own, images in memory, files that block, fail or record."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blkckpt import paths
from blkckpt.disk import api, barrier, copier, fileio, group, retaining
from blkckpt.disk import format as formats
from blkckpt.store import reference, retained

IMAGE = api.ImageRef("/nowhere", "image-0")
VM_ID = "ef" * 16


class MemoryImage:
    """A store image in memory; holes of whole 4 KiB blocks are told as zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        for start in range(offset, offset + length, 4096):
            count = min(4096, offset + length - start)
            yield start, count, not any(self.data[start : start + count])


class Switch(barrier.Barrier):
    """A barrier set by hand."""

    def __init__(self) -> None:
        self.state = barrier.BarrierState.WAITING
        self.why = ""
        self.polls = 0

    def poll(self) -> barrier.BarrierState:
        self.polls += 1
        return self.state

    @property
    def reason(self) -> str:
        return self.why


class Rig:
    """The disks of one VM in a directory; opened again after any kind of stop."""

    def __init__(self, root: Path, sizes: dict[str, int], image: bytes | None = None) -> None:
        self.vm = paths.home(root).vm("vm")
        self.root = root
        self.image = image
        self.sizes = sizes
        self.wanted: retaining.Wanted = lambda mark: True
        specs = []
        for name, size in sizes.items():
            path = self.base(name)
            if image is None:
                path.write_bytes(b"")
                os.truncate(path, size)
            specs.append(api.DiskSpec(name, str(path), size, IMAGE if image is not None else None))
        group.DiskGroup.create(self.vm, VM_ID, specs)
        self.group = self.open()

    def base(self, name: str = "vda") -> Path:
        return self.root / f"{name}.raw"

    def open(self, *, start: bool = True) -> group.DiskGroup:
        self.group = group.DiskGroup.open(
            self.vm, open_image=lambda ref: MemoryImage(self.image or b""), wanted=lambda mark: self.wanted(mark)
        )
        if start:
            self.group.start()
        return self.group

    def kill(self, *, start: bool = True) -> group.DiskGroup:
        """kill -9 and restart on the same boot: live maps stay."""
        self.group.abandon()
        return self.open(start=start)

    def stop(self, *, start: bool = True) -> group.DiskGroup:
        """A clean stop and a start."""
        self.group.close()
        return self.open(start=start)

    def lose_power(self, *, start: bool = True) -> group.DiskGroup:
        """Power loss, coarsely: every file keeps what was written to it, the live maps and the boot are gone."""
        self.group.abandon()
        shutil.rmtree(self.vm.live)
        return self.open(start=start)

    def marks(self, checkpoint: str) -> dict[str, formats.Retained]:
        """What the disks are told to keep *checkpoint* as."""
        return {
            name: formats.Retained("/nowhere", checkpoint, "ab" * 16, self.kept_image(checkpoint, name))
            for name in self.sizes
        }

    def kept_image(self, checkpoint: str, name: str) -> str:
        """The image that stands for a disk of a retained checkpoint."""
        return hashlib.blake2b(f"{checkpoint}/{name}".encode(), digest_size=16).hexdigest()

    def retained(self, checkpoint: str, name: str = "vda") -> retained.RetainedReader | None:
        """A reader of a retained disk, from its files, as another process would open it."""
        found = reference.Reference(
            self.kept_image(checkpoint, name), str(self.root), "vm", VM_ID, name, self.sizes[name], checkpoint
        )
        return retained.open_image(found)

    def read(self, name: str = "vda") -> bytes:
        buf = bytearray(self.sizes[name])
        self.group.disks[name].pread(buf, 0)
        return bytes(buf)

    def layer_files(self) -> list[str]:
        return sorted(path.name for path in self.vm.layers.iterdir())

    def clean_up(self) -> None:
        self.group.abandon()
        shutil.rmtree(self.vm.live, ignore_errors=True)
        shutil.rmtree(self.vm.live.parent, ignore_errors=True)


class Files:
    """A factory of files whose calls can be held, failed and seen.  Install with :func:`install`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int, int]] = []
        self.fail: dict[tuple[str, str], int] = {}  # (call, part of the path) → errno
        self.hold: Callable[[str, Path, int, int], threading.Event | None] = lambda *what: None
        self.held = threading.Semaphore(0)

    def make(self, descriptor: int, path: Path, writable: bool) -> fileio.File:
        return _TestFile(self, descriptor, path, writable)

    def happen(self, call: str, path: Path, offset: int = 0, length: int = 0) -> None:
        self.events.append((call, path.name, offset, length))
        event = self.hold(call, path, offset, length)
        if event is not None:
            self.held.release()
            assert event.wait(20), "nobody let the call go on"
        for (what, part), code in self.fail.items():
            if what == call and part in path.name:
                raise OSError(code, os.strerror(code))

    def calls(self, call: str, part: str = "") -> list[tuple[str, str, int, int]]:
        return [event for event in self.events if event[0] == call and part in event[1]]


class _TestFile(fileio.File):
    def __init__(self, files: Files, descriptor: int, path: Path, writable: bool) -> None:
        super().__init__(descriptor, path, writable)
        self._files = files

    def pread_into(self, buf: Any, offset: int) -> None:
        self._files.happen("read", self.path, offset, len(buf))
        super().pread_into(buf, offset)

    def pwrite(self, buf: Any, offset: int) -> None:
        self._files.happen("write", self.path, offset, len(buf))
        super().pwrite(buf, offset)

    def pwritev(self, bufs: Any, offset: int) -> None:
        self._files.happen("write", self.path, offset, sum(map(len, bufs)))
        super().pwritev(bufs, offset)

    def zero(self, offset: int, length: int, *, punch: bool = True, fast: bool = False) -> None:
        self._files.happen("zero", self.path, offset, length)
        super().zero(offset, length, punch=punch, fast=fast)

    def allocate(self, offset: int, length: int) -> None:
        self._files.happen("allocate", self.path, offset, length)
        super().allocate(offset, length)

    def sync_now(self) -> None:
        self._files.happen("sync", self.path)
        super().sync_now()


def install(monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files()
    monkeypatch.setattr(fileio, "factory", files.make)
    return files


def other_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the machine has been rebooted."""
    fresh = os.urandom(16).hex()
    monkeypatch.setattr(formats, "boot_id", lambda: fresh)


def stub_copies(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[copier.FrozenDisk, str | None], str] | None = None
) -> None:
    """In place of copy children: *look* at the frozen disk and its parent, and name the image."""

    def copy(frozen: copier.FrozenDisk, options: copier.CopyOptions, progress: Any, stop: threading.Event) -> Any:
        size = frozen.view.size
        progress(size, size)
        return {"image": look(frozen, frozen.parent) if look else f"image-of-{frozen.name}", "size": size}

    monkeypatch.setattr(copier, "copy", copy)


def finish(running: Any) -> Any:
    """Wait for a job and return its result; raises its error."""
    assert running.wait(30), "the job does not end"
    return running.outcome()


NO_SPACE = errno.ENOSPC
EIO = errno.EIO

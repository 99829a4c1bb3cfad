"""The copy child: hand-made frozen layers against a bytearray, through the real process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.store import frozen, ingest, layout, lowly, store

BLOCK = frozen.BLOCK
SIZES = [1, BLOCK, 3 * BLOCK + 512, layout.CHUNK, 5 * layout.CHUNK + 777, 40 << 20]


class Layers:
    """Layer files in a directory, and the bytes a reader of them all should see."""

    def __init__(self, root: Path, size: int, seed: int) -> None:
        self.root, self.size, self.random = root, size, random.Random(seed)
        self.model = bytearray(size)
        self.layers: list[dict[str, Any]] = []
        self.descriptors: list[int] = []
        self.blocks = -(-size // BLOCK)
        self.present: set[int] = set()

    def raw(self) -> None:
        """A raw base with data and holes."""
        descriptor = self._file("base")
        os.ftruncate(descriptor, self.size)
        for first, end in self._ranges(6):
            self._write(descriptor, first, end)
        self.layers.insert(0, {"kind": "raw", "fd": descriptor})

    def overlay(self) -> None:
        """An overlay on top: present blocks with data, and present blocks that are holes."""
        data, bits = self._file("data"), bytearray(-(-self.blocks // 8))
        os.ftruncate(data, self.size)
        for number, (first, end) in enumerate(self._ranges(12)):
            self.present |= set(range(first, end))
            for block in range(first, end):
                bits[block >> 3] |= 1 << (block & 7)
            if number % 3 == 0:
                stop = min(end * BLOCK, self.size)
                os.pwrite(data, bytes(stop - first * BLOCK), first * BLOCK)
                self.model[first * BLOCK : stop] = bytes(stop - first * BLOCK)
            else:
                self._write(data, first, end)
        self.layers.insert(0, {"kind": "overlay", "fd": data, "map_fd": self.map(bytes(bits)), "inherited": False})

    def map(self, bits: bytes) -> int:
        descriptor = self._file("map")
        length = frozen.MAP_HEADER + -(-max(len(bits), 1) // 4096) * 4096
        os.ftruncate(descriptor, length)
        os.pwrite(descriptor, frozen.MAP_MAGIC, 0)
        os.pwrite(descriptor, bits, frozen.MAP_HEADER)
        return descriptor

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def _file(self, name: str) -> int:
        path = self.root / f"{name}{len(self.descriptors)}"
        self.descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        return self.descriptors[-1]

    def _write(self, descriptor: int, first: int, end: int) -> None:
        stop = min(end * BLOCK, self.size)
        data = self.random.randbytes(stop - first * BLOCK)
        os.pwrite(descriptor, data, first * BLOCK)
        self.model[first * BLOCK : stop] = data

    def _ranges(self, count: int) -> Iterator[tuple[int, int]]:
        for _ in range(count):
            first = self.random.randrange(self.blocks)
            yield first, min(first + self.random.choice([1, 1, 2, 7, 16, 33]), self.blocks)


@contextmanager
def layers_of(root: Path, size: int, seed: int, overlays: int = 0) -> Iterator[Layers]:
    root.mkdir()
    made = Layers(root, size, seed)
    try:
        made.raw()
        for _ in range(overlays):
            made.overlay()
        yield made
    finally:
        made.close()


def job(made: Layers, target: Path, **more: object) -> dict[str, Any]:
    return {
        "version": 1, "disk": "vda", "size": made.size, "layers": made.layers, "changed": None,
        "store": str(target), "parent": None, "rate": None, "label": "vm@c/vda", **more,
    }  # fmt: skip


def start(described: Mapping[str, Any], descriptors: list[int]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        lowly.command(sys.executable, "blkckpt.store.ingest"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=descriptors,
    )  # fmt: skip
    assert child.stdin
    child.stdin.write(json.dumps(described).encode() + b"\n")
    child.stdin.flush()
    return child


def finish(child: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    assert child.stdout and child.stdin and child.stderr
    lines = [json.loads(line) for line in child.stdout]
    child.wait(60)
    for stream in (child.stdin, child.stdout, child.stderr):
        stream.close()
    return lines


def copy(described: Mapping[str, Any], made: Layers) -> dict[str, Any]:
    lines = finish(start(described, made.descriptors))
    assert "result" in lines[-1], lines
    assert all("progress" in line for line in lines[:-1])
    result: dict[str, Any] = lines[-1]["result"]
    return result


def content(target: Path, image: str) -> bytes:
    with store.Store.open(target) as opened:
        reader = opened.image(image)
        return reader.read(0, reader.size)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    store.Store.init(tmp_path / "store").close()
    return tmp_path / "store"


@pytest.mark.parametrize("size", SIZES)
def test_the_image_is_what_the_layers_show(target: Path, tmp_path: Path, size: int) -> None:
    with layers_of(tmp_path / "layers", size, size, overlays=3) as made:
        result = copy(job(made, target), made)
        assert content(target, result["image"]) == made.model
        assert result["size"] == size


def test_in_process_with_many_shapes(target: Path, tmp_path: Path) -> None:
    """The same without a process, for many random layers."""
    for seed in range(40):
        size = random.Random(seed).randrange(1, 3 << 20)
        with layers_of(tmp_path / f"layers{seed}", size, seed, overlays=seed % 4) as made:
            result = ingest.run(ingest.parse(json.dumps(job(made, target)).encode()), lambda done, total: None)
            assert content(target, result["image"]) == made.model


def test_changed_blocks_are_read_and_the_rest_is_the_parents(target: Path, tmp_path: Path) -> None:
    size = 24 << 20
    with layers_of(tmp_path / "layers", size, 1, overlays=1) as made:
        first = copy(job(made, target), made)
        made.overlay()
        bits = bytearray(-(-made.blocks // 8))
        for block in (1234, 77, next(iter(made.present)), made.blocks - 1):
            data = made.random.randbytes(BLOCK)
            os.pwrite(made.layers[-1]["fd"], data, block * BLOCK)
            bits[block >> 3] |= 1 << (block & 7)
            if block not in made.present:
                made.model[block * BLOCK : (block + 1) * BLOCK] = data
        second = copy(job(made, target, parent=first["image"], changed={"map_fd": made.map(bytes(bits))}), made)
        assert content(target, second["image"]) == made.model
        assert 0 < second["read"] < size // 2
        assert second["parent"] == first["image"]


def test_what_the_changed_map_does_not_name_is_not_read(target: Path, tmp_path: Path) -> None:
    """The parent is inherited exactly: a change the map does not tell of stays unseen."""
    with layers_of(tmp_path / "layers", 8 << 20, 2) as made:
        first = copy(job(made, target), made)
        os.pwrite(made.layers[-1]["fd"], b"x" * BLOCK, 0)
        changed = {"map_fd": made.map(bytes(made.blocks // 8))}
        second = copy(job(made, target, parent=first["image"], changed=changed), made)
        assert second["read"] == 0
        assert content(target, second["image"]) == made.model


def test_unknown_changes_are_found_by_comparing(target: Path, tmp_path: Path) -> None:
    """Rule D13: with ``changed`` null everything is read, and holes become zeros over the parent."""
    with layers_of(tmp_path / "one", 40 << 20, 3) as made:
        first = copy(job(made, target), made)
    with layers_of(tmp_path / "two", 40 << 20, 4, overlays=1) as made:
        second = copy(job(made, target, parent=first["image"]), made)
        assert content(target, second["image"]) == made.model
        third = copy(job(made, target, parent=second["image"]), made)
        assert third["new"] < 1000, "nothing new: no pack, only a table"
        assert content(target, third["image"]) == made.model


def test_an_image_at_the_bottom_is_inherited(target: Path, tmp_path: Path) -> None:
    with layers_of(tmp_path / "one", 8 << 20, 5) as made:
        first = copy(job(made, target), made)
        made.overlay()
        made.layers[-1] = {"kind": "image", "store": str(target), "image": first["image"]}
        second = copy(job(made, target), made)
        assert content(target, second["image"]) == made.model
        assert second["read"] < 4 << 20
        other = tmp_path / "other"
        store.Store.init(other).close()
        third = copy(job(made, other), made)
        assert content(other, third["image"]) == made.model


def test_a_parent_of_another_size_is_no_parent(target: Path, tmp_path: Path) -> None:
    with layers_of(tmp_path / "one", 1 << 20, 6) as made:
        first = copy(job(made, target), made)
    with layers_of(tmp_path / "two", 2 << 20, 7) as made:
        changed = {"map_fd": made.map(bytes(made.blocks // 8))}
        second = copy(job(made, target, parent=first["image"], changed=changed), made)
        assert content(target, second["image"]) == made.model


def test_a_sparse_terabyte_is_quick(target: Path, tmp_path: Path) -> None:
    size = 1 << 40
    with layers_of(tmp_path / "layers", BLOCK, 8) as made:
        made.size = size
        base = made.layers[-1]["fd"]
        os.ftruncate(base, size)
        os.pwrite(base, b"end", size - 3)
        bits = made._file("map")
        os.ftruncate(bits, frozen.MAP_HEADER + size // BLOCK // 8)
        os.pwrite(bits, frozen.MAP_MAGIC, 0)
        data = made._file("data")
        os.ftruncate(data, size)
        os.pwrite(data, b"middle", size // 2)
        os.pwrite(bits, b"\1", frozen.MAP_HEADER + size // 2 // BLOCK // 8)
        made.layers.insert(0, {"kind": "overlay", "fd": data, "map_fd": bits, "inherited": False})
        began = time.monotonic()
        result = copy(job(made, target), made)
        assert time.monotonic() - began < 20
        assert os.fstat(bits).st_blocks * 512 < 1 << 20, "reading the map must not allocate it"
    with store.Store.open(target) as opened:
        reader = opened.image(result["image"])
        assert reader.read(size - 3, 3) == b"end"
        assert reader.read(size // 2, 6) == b"middle"
        assert reader.read(size // 4, 4096) == bytes(4096)
        assert sum(length for _, length, zero in reader.extents(0, size) if not zero) <= 3 * layout.CHUNK


@pytest.mark.parametrize("how", ["SIGTERM", "EOF"])
def test_a_stopped_child_leaves_nothing(target: Path, tmp_path: Path, how: str) -> None:
    with layers_of(tmp_path / "layers", 64 << 20, 9, overlays=1) as made:
        os.pwrite(made.layers[-1]["fd"], os.urandom(64 << 20), 0)
        child = start(job(made, target, rate=4 << 20), made.descriptors)
        assert child.stdout
        assert b"progress" in child.stdout.readline()
        if how == "SIGTERM":
            child.send_signal(signal.SIGTERM)
        else:
            assert child.stdin
            child.stdin.close()
        lines = finish(child)
        assert lines[-1]["error"]["type"] == "StateError", lines
        assert child.returncode == 1
    assert not list(target.glob("tmp/*"))
    with store.Store.open(target) as opened:
        assert list(opened.image_ids()) == []


def test_errors_are_reported_by_class(target: Path, tmp_path: Path) -> None:
    with layers_of(tmp_path / "layers", 1 << 20, 10) as made:
        lines = finish(start(job(made, tmp_path / "nowhere"), made.descriptors))
        assert lines[-1]["error"]["type"] == "NotFoundError"
        made.layers[-1]["fd"] = 9999
        lines = finish(start(job(made, target), made.descriptors))
        assert lines[-1]["error"]["errno"] == 9


def test_a_full_store_is_said_by_name(target: Path, tmp_path: Path) -> None:
    with layers_of(tmp_path / "layers", 16 << 20, 11) as made:
        os.pwrite(made.layers[-1]["fd"], os.urandom(16 << 20), 0)
        script = (
            "import errno, os, sys\n"
            "real = os.pwrite\n"
            "def pwrite(fd, data, offset):\n"
            "    if offset >= 4 << 20: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
            "    return real(fd, data, offset)\n"
            "os.pwrite = pwrite\n"
            "from blkckpt.store import ingest\n"
            "sys.exit(ingest.main())\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=made.descriptors,
        )  # fmt: skip
        assert child.stdin
        child.stdin.write(json.dumps(job(made, target)).encode() + b"\n")
        child.stdin.flush()
        lines = finish(child)
        assert lines[-1]["error"]["type"] == "NoSpaceError"
        assert lines[-1]["error"]["errno"] == 28
    assert not list(target.glob("tmp/*"))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"size": -1}, {"size": "x"}, {"layers": 3}, {"layers": [{"kind": "tape"}]}, {"parent": "../x"},
        {"layers": [{"kind": "raw", "fd": 3}, {"kind": "raw", "fd": 3}]}, {"changed": 1}, {"rate": True},
        {"layers": [{"kind": "overlay", "fd": 0, "map_fd": 0, "inherited": False}] * 65},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_jobs(change: dict[str, Any]) -> None:
    good = {
        "version": 1, "disk": "vda", "size": 1, "layers": [], "changed": None, "store": "/x", "parent": None,
        "rate": None, "label": "",
    }  # fmt: skip
    ingest.parse(json.dumps(good).encode())
    with pytest.raises(errors.ProtocolError):
        ingest.parse(json.dumps(good | change).encode())
    with pytest.raises(errors.ProtocolError):
        ingest.parse(b"not json")


def test_a_map_that_is_none(tmp_path: Path) -> None:
    with layers_of(tmp_path / "layers", 1 << 20, 12) as made:
        with pytest.raises(errors.CorruptError, match="not a live map"):
            frozen.MapFile(made.layers[-1]["fd"], made.size, "map")
        with pytest.raises(errors.CorruptError, match="too few"):
            frozen.MapFile(made.map(b""), 1 << 40, "map")

"""Streams of real QEMUs: what is received is the guest's memory, and what is written is loaded and runs."""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blkckpt.memory import generate, image, skeleton
from blkckpt.store import store
from tests.support import guest

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 25.0

DEVICES = [
    *("-device", "virtio-net-pci", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"),
    *("-device", "virtio-serial-pci", "-device", "virtio-vga"),
]
NUMA = [
    *("-object", "memory-backend-ram,id=m0,size=24M", "-object", "memory-backend-memfd,id=m1,size=40M"),
    *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1", "-smp", "2"),
]


@dataclass(frozen=True)
class Machine:
    """*ram* are the main RAM's blocks in the order of guest-physical addresses (all below 4 GiB here)."""

    arguments: list[str]
    ram: Mapping[str, int]
    memory: int = 64

    def command(self) -> list[str]:
        return ["-accel", "tcg", "-m", str(self.memory), *self.arguments]

    def lazy(self, images: Mapping[str, Path]) -> list[str]:
        """The command line with the RAM mapped privately from *images*."""
        words = self.command()
        if len(self.ram) == 1:
            (name,) = self.ram
            words[words.index("-machine") + 1] += f",memory-backend={name}"
            backend = f"memory-backend-file,id={name},size={self.ram[name]},mem-path={images[name]},share=off"
            return [*words, "-object", backend + ",x-use-canonical-path-for-ramblock-id=off"]
        for at, word in enumerate(words):
            if word.startswith("memory-backend-"):
                name = word.split("id=")[1].split(",")[0]
                size = self.ram[name]
                words[at] = f"memory-backend-file,id={name},size={size},mem-path={images[name]},share=off"
        return words


MACHINES = {
    "q35": Machine(["-machine", "q35", "-vga", "std"], {"pc.ram": 64 * MIB}),
    "pc": Machine(["-machine", "pc", "-vga", "none"], {"pc.ram": 64 * MIB}),
    "microvm": Machine(["-machine", "microvm", "-nodefaults"], {"microvm.ram": 64 * MIB}),
    "devices": Machine(["-machine", "q35", "-nodefaults", *DEVICES], {"pc.ram": 64 * MIB}),
    "numa": Machine(["-machine", "q35", "-vga", "none", *NUMA], {"m0": 24 * MIB, "m1": 40 * MIB}),
    "pc-4.2": Machine(["-machine", "pc-q35-4.2", "-vga", "cirrus"], {"pc.ram": 64 * MIB}),
}


class Qemu:
    """A QEMU and its QMP socket."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.settimeout(DEADLINE)
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-display", "none", "-chardev", f"socket,id=q,fd={theirs.fileno()}",
             "-mon", "chardev=q,mode=control", *arguments],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._file = ours.makefile("rb")
        self._directory = directory
        assert b"QMP" in self._file.readline()
        self.do("qmp_capabilities")

    def do(self, command: str, fd: int | None = None, **arguments: Any) -> Any:
        data = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        self._socket.sendmsg([data], rights)
        while line := self._file.readline():
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, (command, answer)
                return answer["return"]
        raise AssertionError(f"QEMU has gone during {command}")

    def capability(self, name: str) -> None:
        self.do("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])

    def migrated(self) -> None:
        deadline = time.monotonic() + DEADLINE
        while (state := self.do("query-migrate").get("status")) != "completed":
            assert state != "failed" and time.monotonic() < deadline, state
            time.sleep(0.01)

    def save(self, stream: int) -> None:
        """Migrate into descriptor *stream*, which is closed here."""
        self.do("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.do("getfd", fd=stream, fdname="out")
        os.close(stream)
        self.do("migrate", uri="fd:out")
        self.migrated()

    def load(self, pieces: Iterator[bytes | memoryview]) -> None:
        """Feed an incoming migration (QEMU was started with ``-incoming defer``)."""
        reader, writer = os.pipe()
        self.do("getfd", fd=reader, fdname="in")
        os.close(reader)
        self.do("migrate-incoming", uri="fd:in")
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(writer, view) :]
        os.close(writer)
        self.migrated()

    def memory(self, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """Guest-physical memory as rows of pages."""
        path = self._directory / "pmem"
        self.do("pmemsave", val=0, size=size, filename=str(path))
        rows = np.fromfile(path, np.uint8).reshape(-1, 4096)
        path.unlink()
        return rows

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def qemu(directory: Path, arguments: list[str]) -> Iterator[Qemu]:
    machine = Qemu(directory, arguments)
    try:
        yield machine
    finally:
        machine.close()


def receive(directory: Path, source: Qemu) -> dict[str, Any]:
    """Save *source* into a receiver; its result."""
    store.Store.open_or_init(directory / "store").close()
    reader, writer = os.pipe()
    job = {
        "version": 1, "stream_fd": reader, "store": str(directory / "store"), "label": "vm@c", "parents": None,
        "raw_dir": str(directory / "raw"), "keep_raw": True,
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "blkckpt.memory.receive"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[reader], cwd=ROOT,
    )  # fmt: skip
    os.close(reader)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
        with contextlib.suppress(AssertionError):  # a receiver that refuses makes the migration fail
            source.save(writer)
        last: dict[str, Any] = json.loads(child.stdout.read().splitlines()[-1])
    finally:
        child.kill()
        child.communicate()
    return last


class Checkpoint:
    """What was received, opened."""

    def __init__(self, directory: Path, result: dict[str, Any]) -> None:
        self.result = result
        self.raw = {block["name"]: Path(block["raw"]) for block in result["blocks"]}
        self.store = store.Store.open(directory / "store")
        state = self.store.image(result["skeleton"])
        self.skeleton = skeleton.decode(state.read(0, state.size))
        self.readers = {block["name"]: self.store.image(block["image"]) for block in result["blocks"]}

    def rows(self, blocks: Collection[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """The blocks' raw images one after the other as pages; checked against the store's images."""
        parts = []
        for name in blocks:
            parts.append(np.fromfile(self.raw[name], np.uint8))
            reader = self.readers[name]
            assert reader.read(0, reader.size) == parts[-1].tobytes()
        return np.concatenate(parts).reshape(-1, 4096)


@contextlib.contextmanager
def checkpoint(directory: Path, source: Qemu) -> Iterator[Checkpoint]:
    taken = receive(directory, source)
    assert "result" in taken, taken
    opened = Checkpoint(directory, taken["result"])
    with opened.store:
        yield opened


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Equal but for the range 640 KiB to 1 MiB, where VGA and ROMs lie over the RAM."""
    return bool((one[:0xA0] == other[:0xA0]).all() and (one[0x100:] == other[0x100:]).all() and one.any())


@pytest.mark.parametrize("name", MACHINES)
def test_machines(tmp_path: Path, name: str) -> None:
    """Each kind of machine: a background snapshot, received, restored in full and lazily with the same memory."""
    machine = MACHINES[name]
    with qemu(tmp_path, machine.command()) as source:
        time.sleep(0.5)  # the firmware is somewhere
        source.capability("background-snapshot")
        with checkpoint(tmp_path, source) as taken:
            assert taken.result["pages"] > 10
            told = skeleton.describe(taken.skeleton)
            assert told.machine
            assert told.devices is not None
            assert {device["name"] for device in told.devices["devices"]} > {"timer", "cpu"}
            assert sum(block.size for block in taken.skeleton.blocks) >= machine.memory * MIB
            want = taken.rows(machine.ram)
            with qemu(tmp_path, [*machine.command(), "-S", "-incoming", "defer"]) as restored:
                restored.load(generate.full(taken.skeleton, taken.readers))
                assert same(restored.memory(machine.memory * MIB), want)
                runs(restored)
            before = {path: path.stat().st_mtime_ns for path in taken.raw.values()}
            with qemu(tmp_path, [*machine.lazy(taken.raw), "-S", "-incoming", "defer"]) as restored:
                others = {n: reader for n, reader in taken.readers.items() if n not in machine.ram}
                restored.load(generate.lean(taken.skeleton, others, machine.ram.keys()))
                assert same(restored.memory(machine.memory * MIB), want)
                runs(restored)
            assert {path: path.stat().st_mtime_ns for path in taken.raw.values()} == before


def runs(machine: Qemu) -> None:
    machine.do("cont")
    time.sleep(0.2)
    assert machine.do("query-status")["status"] == "running"


@pytest.mark.parametrize("name", ["q35", "numa"])
def test_plain_migration_is_the_sources_memory(tmp_path: Path, name: str) -> None:
    """A plain migration leaves the source stopped with the very memory that was sent: compare all of it."""
    machine = MACHINES[name]
    with qemu(tmp_path, machine.command()) as source:
        time.sleep(0.5)
        with checkpoint(tmp_path, source) as taken:
            assert source.do("query-status")["status"] == "postmigrate"
            assert same(source.memory(machine.memory * MIB), taken.rows(machine.ram))


def test_a_foreign_capability_is_named(tmp_path: Path) -> None:
    with qemu(tmp_path, MACHINES["pc"].command()) as source:
        if "compress" not in {one["capability"] for one in source.do("query-migrate-capabilities")}:
            pytest.skip("this QEMU compresses no pages")  # gone in 9.1
        source.capability("compress")
        time.sleep(0.3)
        error = receive(tmp_path, source)["error"]
        assert error["type"] == "ProtocolError"
        assert "'compress' must be off" in error["message"]
        assert list((tmp_path / "raw").iterdir()) == []


@pytest.fixture
def serial(tmp_path: Path) -> Iterator[guest.Serial]:
    serial = guest.Serial(Path(f"/tmp/bs-{os.getpid()}.serial"))
    yield serial
    serial.close()


def test_a_running_guest_goes_on(tmp_path: Path, serial: guest.Serial) -> None:
    """A Linux guest that keeps changing its RAM is saved twice as it runs; every restore finds its memory whole."""
    command = guest.machine(serial.path, "fill", memory=128, fill=24, dirty=1000)[1:]
    machine = Machine([word for word in command if word not in ("-display", "none")], {"pc.ram": 128 * MIB})
    with qemu(tmp_path, machine.arguments) as source:
        console = serial.accept()
        token = console.wait_ready()
        source.capability("background-snapshot")
        for way in ("lazy", "full"):
            at = console.beat()
            with checkpoint(tmp_path, source) as taken:
                assert console.beat().seq > at.seq  # it runs on
                assert taken.result["pages"] > 24 * MIB // 4096
                lazy = way == "lazy"
                words = machine.lazy(taken.raw)[4:] if lazy else machine.arguments
                with qemu(tmp_path, [*words, "-incoming", "defer"]) as restored:
                    again = serial.accept()
                    if lazy:
                        restored.load(generate.lean(taken.skeleton, {}, ["pc.ram"]))
                    else:
                        restored.load(generate.full(taken.skeleton, taken.readers))
                    beat = again.beat()
                    assert beat.token == token
                    assert beat.seq >= at.seq
                    assert again.sweep() == 0
                    again.check()
                for path in taken.raw.values():
                    image.discard(path)
            shutil.rmtree(tmp_path / "store")
        assert console.sweep() == 0

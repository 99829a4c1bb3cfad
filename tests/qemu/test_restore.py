"""A new machine from a checkpoint, in every way, beside the original that goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest


@pytest.fixture(scope="module")
def token(box: guest.Sandbox, writer: guest.Console) -> str:
    """One checkpoint, ``v@c``, of the writing guest; its boot token."""
    token = writer.beat().token
    box.run("checkpoint", "v", "--name", "c")
    return token


@pytest.fixture
def name(box: guest.Sandbox, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a new VM, gone after the test."""
    name = "n" + request.node.name[5:40].strip("[]").replace("[", "-")
    yield name
    if (box.home / "vms" / name).exists():
        box.run("stop", name)
        box.remove(name)


def check_goes_on(console: guest.Console, token: str) -> None:
    """It resumed, its bytes are right, and it works."""
    first = console.beat()
    assert first.token == token, "the guest was booted, not resumed"
    assert console.sweep() == 0, console.complaints()
    assert console.beat().writes > first.writes
    console.check()


def machine_of(box: guest.Sandbox, name: str) -> list[str]:
    """The command line of the QEMU that runs VM *name*."""
    pid = status(box, name)["machine"]
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def status(box: guest.Sandbox, name: str) -> dict[str, Any]:
    return dict(box.json("status", name)["vms"][0])


def wait_filled(box: guest.Sandbox, name: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while any(disk["filled"] is not None for disk in status(box, name)["disks"]):
        assert time.monotonic() < deadline, "the background fill does not end"
        time.sleep(0.2)


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_goes_on_beside_the_original(
    box: guest.Sandbox, writer: guest.Console, token: str, name: str, mode: str
) -> None:
    console = box.restore("v@c", name, "--mode", mode)
    check_goes_on(console, token)
    mapped = any("memory-backend-file" in word for word in machine_of(box, name))
    assert mapped == (mode == "lazy")
    assert not (box.home / "vms" / name / "incoming").exists()
    assert writer.sweep() == 0, "the copy wrote to the original's disk"
    writer.check()


def test_the_memory_image_is_never_written(box: guest.Sandbox, token: str, name: str) -> None:
    """R4: two copies run from one raw image, and it stays as it was."""
    (image,) = (box.home / "vms/v/memory/c").glob("*.raw")
    before = (image.stat().st_mtime_ns, hashlib.sha256(image.read_bytes()).digest())
    other = name + "-2"
    consoles = [box.restore("v@c", one) for one in (name, other)]
    for console in consoles:
        check_goes_on(console, token)
    assert (image.stat().st_mtime_ns, hashlib.sha256(image.read_bytes()).digest()) == before
    box.stop(other)
    box.remove(other)


def test_without_a_kept_image_it_is_made_from_the_store(box: guest.Sandbox, token: str, name: str) -> None:
    kept = box.home / "vms/v/memory/c"
    aside = kept.rename(box.root / "aside")
    try:
        console = box.restore("v@c", name)
        check_goes_on(console, token)
        assert any("memory-backend-file" in word for word in machine_of(box, name))
    finally:
        aside.rename(kept)


def test_a_kept_image_that_is_not_whole_is_not_used(box: guest.Sandbox, token: str, name: str) -> None:
    """A kept image without a note of this boot, as after a power cut, holds nothing one may rely on."""
    (image,) = (box.home / "vms/v/memory/c").glob("*.raw")
    note = image.with_name(image.name + ".json")
    saved = note.read_bytes()
    note.unlink()
    try:
        check_goes_on(box.restore("v@c", name), token)
    finally:
        note.write_bytes(saved)
        note.chmod(0o600)


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_printed_command_runs(box: guest.Sandbox, token: str, name: str, mode: str) -> None:
    line = box.run("restore", "v@c", "--as", name, "--print", "--mode", mode).strip().splitlines()[-1]
    assert line.startswith("qemu-system-x86_64 ")
    box.run("serve", name, "--detach")
    process = subprocess.Popen(["sh", "-c", f"exec {line}"], stdin=subprocess.DEVNULL)
    try:
        check_goes_on(box.serial.accept(), token)
    finally:
        process.kill()
        process.wait()


def test_once_filled_the_store_is_not_needed(box: guest.Sandbox, token: str, name: str) -> None:
    console = box.restore("v@c", name)
    wait_filled(box, name)
    store = box.home / "store"
    away = store.rename(box.root / "away")
    try:
        check_goes_on(console, token)
        box.stop(name)
        box.run("serve", name, "--detach")
        assert status(box, name)["state"] == "serving"
    finally:
        away.rename(store)


def test_an_eagerly_restored_machine_is_checkpointed_again(box: guest.Sandbox, token: str, name: str) -> None:
    console = box.restore("v@c", name, "--mode", "eager")
    console.beat()
    box.run("checkpoint", name, "--name", "again")
    check_goes_on(console, token)
    second = name + "-2"
    check_goes_on(box.restore(f"{name}@again", second), token)
    box.stop(second)
    box.remove(second)


def test_a_lazily_restored_machine_is_checkpointed_again(box: guest.Sandbox, token: str, name: str) -> None:
    """QEMU cannot write-protect its memory in the background: the guest is stopped meanwhile, but it works."""
    console = box.restore("v@c", name)
    console.beat()
    box.run("checkpoint", name, "--name", "again")
    check_goes_on(console, token)
    second = name + "-2"
    check_goes_on(box.restore(f"{name}@again", second), token)
    box.stop(second)
    box.remove(second)


def test_bad_input(box: guest.Sandbox, token: str, name: str) -> None:
    before = sorted((box.home / "vms").iterdir())
    assert "no checkpoint" in box.run("restore", "v@nothing", "--as", name, "--detach", code=4)
    assert "exists already" in box.run("restore", "v@c", "--as", "v", "--detach", code=5)
    assert "name" in box.run("restore", "v@c", "--as", "a/b", "--detach", code=3)
    assert sorted((box.home / "vms").iterdir()) == before


def test_a_failed_restore_leaves_nothing(box: guest.Sandbox, token: str, name: str) -> None:
    """R3: the store is damaged where the memory is; the name is free again and no process is left."""
    kept = box.home / "vms/v/memory/c"
    aside = kept.rename(box.root / "aside")
    packs = sorted((box.home / "store/packs").rglob("*.pack"))
    copies = [shutil.copy2(pack, box.root / pack.name) for pack in packs]
    processes = set(box.processes())
    try:
        for pack in packs:
            damage(pack)
        box.run("restore", "v@c", "--as", name, "--detach", code=6)
        assert not (box.home / "vms" / name).exists()
        assert set(box.processes()) <= processes
    finally:
        for copy, pack in zip(copies, packs, strict=True):
            os.replace(copy, pack)
        aside.rename(kept)
    check_goes_on(box.restore("v@c", name), token)


def damage(pack: Path) -> None:
    """Change bytes all over the payloads, not the header and the index."""
    pack.chmod(0o600)
    size = pack.stat().st_size
    with pack.open("r+b") as file:
        for place in range(4096, size - size // 8, 4096):
            file.seek(place)
            file.write(b"\xa5" * 8)

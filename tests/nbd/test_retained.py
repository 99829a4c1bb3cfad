"""Retained checkpoints through a real server, with fast path, store, copy children and verbs (D1, D8, D13)."""

from __future__ import annotations

import contextlib
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.control import client
from blkckpt.restore import flatten
from blkckpt.store import keeping, manifest
from blkckpt.store import store as stores
from blkckpt.vm import definition
from tests.nbd.conftest import MIB, SIZES
from tests.nbd.test_cli import Cli, cli, web  # noqa: F401  (fixtures)
from tests.support import server

SLOW = 1 * MIB
"""Bytes a second of a copy that is to be under way for a while."""


def write(handle: Any, number: int, model: bytearray) -> None:
    """Aligned, not aligned, and zeros, at a place of its own and at one that every number overwrites."""
    for offset in (number * 300_000, 5000, 65536 * number):
        data = server.pattern(70_000, number)
        handle.pwrite(data, offset)
        model[offset : offset + len(data)] = data
    handle.zero(8192 + number, 200_000)
    model[200_000 : 208_192 + number] = bytes(8192 + number)


def retain(stand: server.Stand, peer: client.Client, name: str, *, publish: bool = True) -> manifest.Manifest:
    """A retained checkpoint, as the agent takes it."""
    peer.prepare(name, retain=True)
    assert peer.switch().switched
    one = manifest.Manifest(
        "test",
        name,
        uuid.uuid4().hex,
        time.time_ns(),
        tuple(manifest.DiskImage(disk, uuid.uuid4().hex, size) for disk, size in stand.sizes.items()),
        retained=True,
    )
    peer.finish(peer.retain(stand.store_path, one.id, {disk.name: disk.image for disk in one.disks}), 60)
    if publish:
        with stores.Store.open(stand.store_path) as place, contextlib.ExitStack() as claims, place.hold():
            keeping.refer(stand.vm, place, one, claims)
            place.put_manifest(one)
        peer.finish(peer.commit(), 60)
    return one


def content(stand: server.Stand, one: manifest.Manifest) -> bytes:
    return stand.image(one.disks[0].image)


def flat(stand: server.Stand, one: manifest.Manifest, rate: int | None = None) -> bool:
    with stores.Store.open(stand.store_path) as place:
        return flatten.flatten(
            stand.vm, definition.load(stand.vm), place, one, rate, lambda stage, done, total: None
        )  # fmt: skip


def test_retained_and_copied_ones_in_turns_and_flattened(stand: server.Stand) -> None:
    with stand.disk() as a, stand.control() as peer:
        model = bytearray(server.pattern(SIZES["vda"], 1))
        a.pwrite(bytes(model), 0)
        taken: list[tuple[manifest.Manifest, bytes]] = []
        copied: list[tuple[str, bytes]] = []
        for number in range(6):
            write(a, number, model)
            if number % 2:
                peer.prepare(f"copy{number}")
                peer.switch()
                result = stand.copy(peer, {"vda": copied[-1][0]} if copied else None)
                peer.finish(peer.commit(), 60)
                if copied:
                    assert result["vda"]["read"] < SIZES["vda"] // 2, "D13: only what changed since the last copy"
                copied.append((result["vda"]["image"], bytes(model)))
            else:
                taken.append((retain(stand, peer, f"kept{number}"), bytes(model)))
            write(a, 7 + number % 3, model)
        for image, version in copied:
            assert stand.image(image) == version
        for one, version in taken:
            assert content(stand, one) == version
        assert a.pread(SIZES["vda"], 0) == model
        stand.restart(clean=False)
    with stand.disk() as a, stand.control() as peer:
        write(a, 3, model)
        base = stand.base("vda").read_bytes()
        assert flat(stand, taken[1][0])
        for one, version in taken:
            assert content(stand, one) == version
        assert stand.base("vda").read_bytes() == base, "the oldest one needs it as it is"
        for one in (taken[0][0], taken[2][0]):
            write(a, 1, model)
            assert flat(stand, one)
        for one, version in taken:
            assert content(stand, one) == version
        assert a.pread(SIZES["vda"], 0) == model
        result = stand.checkpoint(peer, "after")
        assert stand.image(result["vda"]["image"]) == model
    stand.wait_for_rest()
    assert stand.residue() == []
    stand.stop()
    assert stand.base("vda").read_bytes() == model


def test_killed_while_it_is_flattened(stand: server.Stand) -> None:
    """The server, and then who drives it: the checkpoint stays retained and whole, and the next attempt ends."""
    with stand.disk() as a, stand.control() as peer:
        model = bytearray(server.pattern(SIZES["vda"], 1))
        a.pwrite(bytes(model), 0)
        one = retain(stand, peer, "kept")
        version = bytes(model)
        write(a, 2, model)
        job = peer.flatten("kept", SLOW)
        until(lambda: peer.wait(job, 0.2).done > 0)
        stand.kill()
    stand.start()
    assert content(stand, one) == version
    with stand.disk() as a:
        assert a.pread(SIZES["vda"], 0) == model
        with stand.control() as driver:
            job = driver.flatten("kept", SLOW)
            until(lambda: driver.wait(job, 0.2).done > 0)
        with stand.control() as peer:  # the driver's connection has ended
            until(lambda: peer.wait(job, 1.0).state == "failed")
            assert content(stand, one) == version and [one["retained"] for one in overlays(peer)] == ["kept", "kept"]
        assert flat(stand, one)
        assert content(stand, one) == version and a.pread(SIZES["vda"], 0) == model
    stand.wait_for_rest()
    assert stand.residue() == []


def test_a_driver_that_dies_before_its_manifest_leaves_nothing(stand: server.Stand) -> None:
    """A3, and by another way S2: what has been given up cannot be published any more."""
    with stand.disk() as a:
        with stand.control() as peer:
            one = retain(stand, peer, "lost", publish=False)
        a.pwrite(b"x" * 4096, 0)
        stand.wait_for_rest()
        assert stand.residue() == []
        with (
            stores.Store.open(stand.store_path) as place,
            contextlib.ExitStack() as claims,
            pytest.raises(errors.StateError, match="do not keep test@lost"),
        ):
            keeping.refer(stand.vm, place, one, claims)
    assert stand.base("vda").read_bytes()[:4096] == b"x" * 4096


def test_writers_race_with_what_is_retained_and_flattened(stand: server.Stand) -> None:
    """D1 beneath the fast path: the quiet half is in every checkpoint what it was; the other half is being written."""
    with stand.disk() as a, stand.control() as peer:
        with server.hammered(stand) as half:
            for number in range(4):
                data = server.pattern(half, number)
                a.pwrite(data, 0)
                one = retain(stand, peer, f"c{number}")
                a.pwrite(server.pattern(half, number + 100), 0)
                assert content(stand, one)[:half] == data
                if number % 2:
                    before = content(stand, one)
                    assert flat(stand, one)
                    assert content(stand, one) == before
        for disk in peer.status()["disks"]:
            assert [one["retained"] for one in disk["overlays"]] == ["c2", "c0"]


def overlays(peer: client.Client) -> list[dict[str, Any]]:
    return [one for disk in peer.status()["disks"] for one in disk["overlays"]]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


def exported(cli: Cli, name: str) -> bytes:  # noqa: F811
    path = cli.root / "out.raw"
    path.unlink(missing_ok=True)
    cli.run("export", name, "-o", str(path))
    return path.read_bytes()


def test_the_verbs(cli: Cli, web: Path) -> None:  # noqa: F811
    """Taken, read, restored from, reverted to, refused, given up, flattened: while it runs and while it does not."""
    model = bytearray(web.read_bytes())
    cli.serve("web")
    taken = cli.json("checkpoint", "web", "--disk-only", "--retain", "--name", "a")
    assert taken["retained"] and taken["added_bytes"] == 0
    first = bytes(model)
    handle = cli.connect("web")
    handle.pwrite(b"w" * 100_000, 50_000)
    handle.shutdown()
    model[50_000:150_000] = b"w" * 100_000
    cli.run("checkpoint", "web", "--disk-only", "--retain", "--name", "b")
    assert exported(cli, "web@a") == first and exported(cli, "web@b") == model
    assert web.read_bytes() == first
    assert "crash, retained" in cli.run("list", "web", "--tree") and "flatten web@a" in cli.run("show", "web@a")
    assert cli.json("verify", "web")["retained"] == 2 and "flattened" in cli.run("verify", "web")
    cli.run("gc")
    for words in (("diff", "web@a", "web@b"), ("bundle", "web@b", "-o", str(cli.root / "x"))):
        assert "is retained" in (said := cli.run(*words, code=5)) and "blkckpt flatten web@" in said
    assert "--rate" in cli.run("checkpoint", "web", "--disk-only", "--retain", "--rate", "1M", code=3)
    cli.vms.append("copy")
    cli.json("restore", "web@a", "--as", "copy", "--detach")
    copy = cli.connect("copy")
    assert copy.pread(len(first), 0) == first
    copy.shutdown()
    until(lambda: all(disk["filled"] is None for disk in cli.status("copy")["disks"]))  # it reads them until then
    assert "add --yes" in cli.run("commit", "web@b", code=3)
    assert cli.json("commit", "web@b", "--yes") == {"committed": ["web@b"], "still_read": []}
    assert "no checkpoint web@b" in cli.run("show", "web@b", code=4)
    cli.run("stop", "web")
    assert "flatten web" in cli.run("vm", "rm", "web", "--yes", code=5)
    assert cli.json("revert", "web@a", "--yes")["disks"] == [{"name": "vda", "compared": 0, "written": 0}]
    assert exported(cli, "web@a") == first == web.read_bytes()
    cli.serve("web")
    handle = cli.connect("web")
    assert handle.pread(len(first), 0) == first
    handle.pwrite(b"v" * 5000, 5000)
    handle.shutdown()
    cli.run("pin", "web@a")
    assert "pinned" in cli.run("commit", "web", "--yes", code=5)
    cli.run("stop", "web")
    assert cli.json("flatten", "web") == {"flattened": ["web@a"], "still_read": []}
    assert web.read_bytes()[5000:10_000] == b"v" * 5000 and exported(cli, "web@a") == first
    assert not [path for path in (cli.home / "vms/web/layers").iterdir() if path.suffix == ".data"]
    assert "not retained" in cli.run("flatten", "web@a", code=5)
    cli.run("stop", "copy")
    cli.run("vm", "rm", "web", "--yes")


def test_a_copy_that_is_not_filled_keeps_its_source(cli: Cli, web: Path) -> None:  # noqa: F811
    """R5: also while it is not served; and it reads from the store once the checkpoint is flattened."""
    first = web.read_bytes()
    cli.serve("web")
    cli.run("checkpoint", "web", "--disk-only", "--retain", "--name", "a")
    handle = cli.connect("web")
    handle.pwrite(bytes(4 * MIB), 0)
    handle.shutdown()
    cli.run("restore", "web@a", "--as", "copy", "--print", code=3)  # no machine to print: ready to be served
    for verb in ("rm", "commit"):
        assert "VM copy still reads its disks; flatten it" in cli.run(verb, "web@a", "--yes", code=5)
    assert exported(cli, "web@a") == first
    cli.run("flatten", "web")
    assert web.read_bytes() == bytes(4 * MIB)
    cli.serve("copy")
    copy = cli.connect("copy")
    assert copy.pread(4 * MIB, 0) == first
    copy.shutdown()


def test_interrupted_flattening_leaves_it_retained(cli: Cli, web: Path) -> None:  # noqa: F811
    cli.serve("web")
    cli.run("checkpoint", "web", "--disk-only", "--retain", "--name", "a")
    first = web.read_bytes()
    process = cli.popen("flatten", "web", "--rate", "500k")
    until(lambda: (cli.status("web")["job"] or {}).get("kind") == "flatten")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.count("blkckpt: interrupted") == 1
    assert cli.json("show", "web@a")["retained"] and exported(cli, "web@a") == first
    assert cli.json("flatten", "web")["flattened"] == ["web@a"]
    assert exported(cli, "web@a") == first

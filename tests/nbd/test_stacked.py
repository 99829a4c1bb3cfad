"""Checkpoints during checkpoints, through a real server with real copy children and a store (D1, D7, D13)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.control import client
from blkckpt.disk import rounds
from tests.nbd.conftest import MIB, SIZES
from tests.support import server

SLOW = 2 * MIB
"""Bytes a second of a copy that is to be under way for a while: three seconds for all disks."""


@contextlib.contextmanager
def begun(stand: server.Stand, peer: client.Client, name: str, rate: int | None = None) -> Iterator[str]:
    """A checkpoint whose copy has been asked for; gives the job."""
    peer.prepare(name)
    peer.switch()
    yield peer.copy(stand.store_path, {}, rate)


def drivers(stand: server.Stand, count: int, stack: contextlib.ExitStack) -> list[client.Client]:
    return [stack.enter_context(stand.control()) for _ in range(count)]


def write(handle: Any, number: int, model: bytearray) -> None:
    """A record of its own place and one that every number overwrites."""
    for offset in (number * 300_000, 5000):
        data = server.pattern(70_000, number)
        handle.pwrite(data, offset)
        model[offset : offset + len(data)] = data


def test_each_checkpoint_is_of_its_own_instant(stand: server.Stand) -> None:
    """The second and third begin while the first is copied slowly; what each reads is what changed before it."""
    with stand.disk() as a, contextlib.ExitStack() as stack:
        model = bytearray(server.pattern(SIZES["vda"], 1))
        a.pwrite(bytes(model), 0)
        peers = drivers(stand, 4, stack)
        versions, jobs = [], []
        for number, peer in enumerate(peers[:3]):
            write(a, number, model)
            with begun(stand, peer, f"c{number}", SLOW if number == 0 else None) as job:
                versions.append(bytes(model))
                jobs.append(job)
        write(a, 7, model)
        status = peers[3].status()
        assert [one["checkpoint"] for one in status["rounds"]] == ["c0", "c1", "c2"]
        assert [one["copied"] for one in status["rounds"]] == [False] * 3, "copies are made in their order"
        with pytest.raises(errors.StateError, match="of that name"):
            peers[3].prepare("c1")
        images = [
            peer.finish(job, 60).result["disks"]["vda"] for peer, job in zip(peers[:3], jobs, strict=True)
        ]  # fmt: skip
        for image, version in zip(images, versions, strict=True):
            assert stand.image(image["image"]) == version
        for image in images[1:]:
            assert image["read"] <= 4 * 65536, "two records of 70 kB touch two or three chunks each"
        for peer in reversed(peers[:3]):  # they end in any order
            peer.finish(peer.commit(), 60)
        assert a.pread(SIZES["vda"], 0) == model
    status = stand.wait_for_rest()
    assert [len(disk["overlays"]) for disk in status["disks"]] == [0, 0]
    assert stand.residue() == []
    stand.stop()
    assert stand.base("vda").read_bytes() == model


def test_a_checkpoint_in_the_middle_is_given_up(stand: server.Stand) -> None:
    """D7, D13: its writes are the next one's, whose copy reads all that changed since the one before it."""
    with stand.disk() as a, contextlib.ExitStack() as stack:
        model = bytearray(server.pattern(SIZES["vda"], 1))
        a.pwrite(bytes(model), 0)
        first, second, third = drivers(stand, 3, stack)
        with begun(stand, first, "first", SLOW) as one:
            write(a, 1, model)
        with begun(stand, second, "second"):
            write(a, 2, model)
        with begun(stand, third, "third") as three:
            version = bytes(model)
            write(a, 3, model)
            second.close()
            first.finish(one, 60)
            image = third.finish(three, 60).result["disks"]["vda"]
            assert stand.image(image["image"]) == version
            assert image["read"] <= 8 * 65536
            first.finish(first.commit(), 60)
            third.finish(third.commit(), 60)
        third.prepare("fourth")
        third.switch()
        image = stand.copy(third, {"vda": image["image"]})["vda"]
        assert stand.image(image["image"]) == model and image["read"] <= 4 * 65536
    stand.wait_for_rest()
    stand.stop()
    assert stand.base("vda").read_bytes() == model


@pytest.mark.parametrize("clean", [False, True], ids=["kill -9", "stop"])
def test_a_server_that_ends_gives_all_of_them_up(stand: server.Stand, clean: bool) -> None:
    with stand.disk() as a, contextlib.ExitStack() as stack:
        model = bytearray(server.pattern(SIZES["vda"], 1))
        a.pwrite(bytes(model), 0)
        for number, peer in enumerate(drivers(stand, 3, stack)):
            with begun(stand, peer, f"c{number}", SLOW):
                write(a, number, model)
        stand.restart(clean=clean)
    with stand.disk() as a:
        assert a.pread(SIZES["vda"], 0) == model
        stand.wait_for_rest()
        assert a.pread(SIZES["vda"], 0) == model
    assert stand.residue() == []


def test_there_is_a_limit(stand: server.Stand) -> None:
    with contextlib.ExitStack() as stack:
        peers = drivers(stand, rounds.MAX_OVERLAYS + 1, stack)
        for number, peer in enumerate(peers[:-1]):
            peer.prepare(f"c{number}")
            peer.switch()
        with pytest.raises(errors.StateError, match="8 overlays are still to be saved"):
            peers[-1].prepare("one-too-many")
        peers[0].finish(peers[0].abort(), 60)
        peers[-1].prepare("one-more")


def test_writers_race_with_a_stack_that_comes_and_goes(stand: server.Stand) -> None:
    """D1: the quiet half of the disk is in every image what it was at the switch; the other half is being written."""
    with stand.disk() as a, contextlib.ExitStack() as stack, server.hammered(stand) as half:
        peers = drivers(stand, 3, stack)
        waiting: list[tuple[client.Client, str, bytes]] = []
        for number in range(9):
            peer = peers[number % 3]
            if len(waiting) == 3:
                end(stand, *waiting.pop(0))
            data = server.pattern(half, number)
            a.pwrite(data, 0)
            with begun(stand, peer, f"c{number}") as job:
                waiting.append((peer, job, data))
        for one in waiting:
            end(stand, *one)
    stand.wait_for_rest()
    assert stand.residue() == []


def end(stand: server.Stand, peer: client.Client, job: str, quiet: bytes) -> None:
    image = peer.finish(job, 60).result["disks"]["vda"]["image"]
    assert stand.image(image)[: len(quiet)] == quiet
    peer.finish(peer.commit(), 60)

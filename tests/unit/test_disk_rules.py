"""The rules D3, D4 (812), D8 to D13 one by one, on files that block, fail and record.  No sleeps: events."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkckpt import durable, errors, paths
from blkckpt.disk import api, chain, commit, fileio, group, maps
from blkckpt.disk import format as formats
from tests.support import disks

SIZE = 64 * 4096 + 512
WAIT = 20.0


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> disks.Files:
    return disks.install(monkeypatch)


@pytest.fixture
def rig(tmp_path: Path, files: disks.Files) -> Iterator[disks.Rig]:
    made = disks.Rig(tmp_path, {"vda": SIZE})
    yield made
    files.fail.clear()
    files.hold = lambda *what: None
    made.clean_up()


@pytest.fixture
def disk(rig: disks.Rig) -> Disk:
    return Disk(rig)


class Disk:
    """The rig's disk, also after a restart."""

    def __init__(self, rig: disks.Rig) -> None:
        self.rig = rig

    def write(self, data: bytes, offset: int, fua: bool = False) -> None:
        self.rig.group.disks["vda"].pwrite(data, offset, fua)

    def read(self, length: int, offset: int) -> bytes:
        buf = bytearray(length)
        self.rig.group.disks["vda"].pread(buf, offset)
        return bytes(buf)

    def flush(self) -> None:
        self.rig.group.disks["vda"].flush()


class Background:
    """A call in a thread; ``end`` waits for it and raises what it raised."""

    def __init__(self, work: object, *arguments: object) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, arguments), daemon=True)
        self._thread.start()

    def _run(self, work: object, arguments: tuple[object, ...]) -> None:
        assert callable(work)
        try:
            work(*arguments)
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


def held(files: disks.Files) -> None:
    assert files.held.acquire(timeout=WAIT), "no call arrived"


def hold(files: disks.Files, call: str, part: str) -> threading.Event:
    """Hold the next *call* on a file whose name contains *part*, once."""
    event = threading.Event()
    armed = [True]

    def decide(what: str, path: Path, offset: int, length: int) -> threading.Event | None:
        if what == call and part in path.name and armed:
            armed.clear()
            return event
        return None

    files.hold = decide
    return event


def checkpoint(rig: disks.Rig) -> None:
    rig.group.prepare("c1")
    rig.group.switch()


# ---- 812, D1, D4 ----


def test_812_a_write_in_flight_at_the_switch_finishes_in_the_old_layer(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    rig.group.prepare("c1")
    release = hold(files, "write", "vda.raw")
    old = Background(disk.write, b"o" * 8192, 0)
    held(files)
    rig.group.switch()  # does not wait
    assert rig.group.status().state is api.State.SWITCHED
    disk.write(b"n" * 4096, 8192)  # other blocks go on, into the overlay
    release.set()
    old.end()
    assert rig.base().read_bytes()[:12288] == b"o" * 8192 + bytes(4096)
    assert disk.read(12288, 0) == b"o" * 8192 + b"n" * 4096


def test_d4_a_partial_write_waits_for_an_older_write_of_its_block(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    """812: the copy-up must not copy a block that an in-flight old write is still changing."""
    rig.group.prepare("c1")
    release = hold(files, "write", "vda.raw")
    old = Background(disk.write, b"o" * 4096, 0)
    held(files)
    rig.group.switch()
    gate = rig.group.disks["vda"].gate
    new = Background(disk.write, b"n" * 100, 50)
    while len(gate._tickets) < 2 or not gate._waiting:
        assert new.running
    assert not files.calls("write", ".data"), "the partial write did not wait"
    release.set()
    old.end()
    new.end()
    assert disk.read(4096, 0) == b"o" * 50 + b"n" * 100 + b"o" * (4096 - 150)
    assert rig.base().read_bytes()[:4096] == b"o" * 4096, "D1: the frozen layer is the exact prefix"


def test_d4_two_partial_writes_of_one_block_exclude_each_other(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    disk.write(b"b" * 4096, 0)
    checkpoint(rig)
    release = hold(files, "write", ".data")
    one = Background(disk.write, b"1" * 10, 0)
    held(files)
    two = Background(disk.write, b"2" * 10, 4000)
    gate = rig.group.disks["vda"].gate
    while len(gate._tickets) < 2 or not gate._waiting:
        assert two.running
    release.set()
    one.end()
    two.end()
    assert disk.read(4096, 0) == b"1" * 10 + b"b" * 3990 + b"2" * 10 + b"b" * 86


def test_d4_a_full_write_waits_for_a_copy_up_of_its_block(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    """Otherwise the copy-up would put old bytes over it."""
    checkpoint(rig)
    release = hold(files, "write", ".data")
    partial = Background(disk.write, b"p", 7)
    held(files)
    full = Background(disk.write, b"f" * 4096, 0)
    gate = rig.group.disks["vda"].gate
    while len(gate._tickets) < 2 or not gate._waiting:
        assert full.running
    release.set()
    partial.end()
    full.end()
    assert disk.read(4096, 0) == b"f" * 4096


def test_d1_nothing_written_after_the_switch_reaches_the_frozen_base(rig: disks.Rig, disk: Disk) -> None:
    disk.write(os.urandom(SIZE), 0)
    checkpoint(rig)
    frozen = rig.base().read_bytes()
    disk.write(b"x" * SIZE, 0)
    rig.group.disks["vda"].zero(5000, 100)
    disk.flush()
    assert rig.base().read_bytes() == frozen


# ---- D2, D3 ----


def names(files: disks.Files, since: int) -> list[tuple[str, str]]:
    """``(call, kind of file)`` of the writes and syncs since event number *since*."""
    return [(call, name.rsplit(".", 1)[1]) for call, name, _, _ in files.events[since:] if call in ("write", "sync")]


def test_d2_flush_writes_data_sync_map_sync(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    checkpoint(rig)
    disk.flush()
    start = len(files.events)
    disk.write(b"x" * 4096, 4096)
    disk.flush()
    assert names(files, start) == [("write", "data"), ("sync", "data"), ("write", "map"), ("sync", "map")]


def test_d3_clean_layers_cost_no_sync(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    checkpoint(rig)
    disk.write(b"x", 0)
    disk.flush()
    start = len(files.events)
    disk.flush()
    assert not names(files, start)


@pytest.mark.parametrize("overlay", [False, True], ids=["base", "overlay"])
def test_d3_overwriting_costs_one_sync_a_flush(rig: disks.Rig, disk: Disk, files: disks.Files, overlay: bool) -> None:
    """The map's pages are written for new bits only."""
    if overlay:
        checkpoint(rig)
    disk.write(b"a" * 8192, 0)
    disk.flush()
    for fua in (False, True):
        start = len(files.events)
        disk.write(b"b" * 8192, 0, fua)
        if not fua:
            disk.flush()
        assert [call for call, *_ in files.events[start:] if call == "sync"] == ["sync"]


def test_d2_a_bit_set_while_the_data_is_synced_waits_for_the_next_flush(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both blocks have their bit in one map page; the second's data came after the sync began."""
    checkpoint(rig)
    disk.flush()
    disk.write(b"1" * 4096, 0)
    release = hold(files, "sync", ".data")
    flushing = Background(disk.flush)
    held(files)
    disk.write(b"2" * 4096, 4096)
    release.set()
    flushing.end()
    disks.other_boot(monkeypatch)
    rig.lose_power(start=False)
    assert disk.read(8192, 0) == b"1" * 4096 + bytes(4096)


def test_d3_a_flush_waits_for_a_sync_under_way_that_may_cover_its_write(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    disk.flush()
    disk.write(b"1" * 4096, 0)
    release = hold(files, "sync", "vda.raw")
    first = Background(disk.flush)
    held(files)
    second = Background(disk.flush)
    second._thread.join(0.05)
    assert second.running, "the second flush was answered while the sync that covers its write was running"
    release.set()
    first.end()
    second.end()


def test_d3_fua_is_durable_with_its_bit(rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(rig)
    disk.write(b"f" * 700, 4096 + 17, fua=True)
    disks.other_boot(monkeypatch)
    rig.lose_power(start=False)
    assert disk.read(700, 4096 + 17) == b"f" * 700


def test_d3_a_flush_during_a_commit_covers_the_base_and_the_cleared_bits(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block moves down, is rewritten in the base and flushed; after power loss its overlay version must be gone."""
    monkeypatch.setattr(commit, "WINDOW_BYTES", 4096)
    checkpoint(rig)
    disk.write(b"a" * 4096, 0)
    disk.write(b"b" * 4096, 4096)
    disk.flush()
    armed = threading.Event()
    release = threading.Event()

    def second_block(call: str, path: Path, offset: int, length: int) -> threading.Event | None:
        if call == "write" and path.name == "vda.raw" and offset == 4096 and not armed.is_set():
            armed.set()
            return release
        return None

    files.hold = second_block
    job = rig.group.abort()
    held(files)  # block 0 is down and its bit is clear; block 1 is being copied
    disk.write(b"A" * 4096, 0)
    disk.flush()
    disks.other_boot(monkeypatch)
    copied = rig.root / "cut"
    _copy_tree(rig, copied)
    release.set()
    disks.finish(job)
    _restore_tree(rig, copied)
    assert disk.read(8192, 0) == b"A" * 4096 + b"b" * 4096


def _copy_tree(rig: disks.Rig, target: Path) -> None:
    target.mkdir()
    for path in (rig.base(), rig.vm.state, *rig.vm.layers.iterdir()):
        (target / path.name).write_bytes(path.read_bytes())


def _restore_tree(rig: disks.Rig, source: Path) -> None:
    """Power was lost when *source* was copied."""
    rig.group.abandon()
    for path in rig.vm.layers.iterdir():
        path.unlink()
    for path in source.iterdir():
        home = {"vda.raw": rig.base(), "state.json": rig.vm.state}.get(path.name, rig.vm.layers / path.name)
        home.write_bytes(path.read_bytes())
        home.chmod(0o600)
    for live in rig.vm.live.iterdir():
        live.unlink()
    rig.open(start=False)


def test_d2_a_map_written_by_a_dead_server_is_synced_before_its_other_slot(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    """kill -9 between writing and syncing a map page: the version before is the only durable one."""
    checkpoint(rig)
    disk.write(b"1" * 4096, 0)
    disk.flush()
    disk.write(b"2" * 4096, 4096)
    release = hold(files, "sync", ".map")
    dying = Background(disk.flush)
    held(files)
    opened = rig.group
    os.close(opened._file._descriptor)
    opened._file._descriptor = -1
    rig.open(start=False)
    start = len(files.events)
    disk.flush()
    assert names(files, start)[-2:] == [("sync", "data"), ("sync", "map")], "D3: this flush vouches for the page"
    release.set()
    dying.end()
    opened.abandon()
    rig.kill(start=False)
    start = len(files.events)
    rig.group.start()
    disks.finish(rig.group.abort())
    assert [call for call, kind in names(files, start) if kind == "map"] == ["sync", "write", "sync"]


# ---- D8 ----


def test_d8_the_base_is_synced_before_cleared_bits_are_durable(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    disk.flush()
    start = len(files.events)
    disks.finish(rig.group.abort())
    assert names(files, start) == [("write", "raw"), ("sync", "raw"), ("write", "map"), ("sync", "map")]
    assert not rig.layer_files()


def test_d2_a_bit_cleared_while_the_base_is_synced_waits_for_the_next_flush(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync under way may not cover the block that the commit has just put there."""
    monkeypatch.setattr(commit, "WINDOW_BYTES", 4096)
    checkpoint(rig)
    disk.write(b"a" * 4096, 0)
    disk.write(b"b" * 4096, 4096)
    disk.flush()
    second, syncing, flushing = threading.Event(), threading.Event(), threading.Event()

    def decide(call: str, path: Path, offset: int, length: int) -> threading.Event | None:
        if call == "write" and path.name == "vda.raw" and offset == 4096:
            return second
        return syncing if call == "sync" and path.name == "vda.raw" and flushing.is_set() else None

    written: list[int] = []
    write = maps.DurableMap.write

    def seen(self: maps.DurableMap, pages: maps.Pages) -> None:
        written.extend(bits[0] for bits in pages.values())
        write(self, pages)

    monkeypatch.setattr(maps.DurableMap, "write", seen)
    files.hold = decide
    job = rig.group.abort()
    held(files)  # block 0 is down, block 1 about to be
    bits = rig.group._members["vda"].view.layers[0].bits
    assert not bits.test(0) and bits.test(1)
    flushing.set()
    flush = Background(disk.flush)
    held(files)
    flushing.clear()
    second.set()
    while bits.test(1):
        assert job.running
    syncing.set()
    flush.end()
    assert written[0] & 3 == 2, "block 0 was below when the sync began, block 1 was not"
    disks.finish(job)
    assert written[1] & 3 == 0
    assert rig.base().read_bytes()[:8192] == b"a" * 4096 + b"b" * 4096


def test_d8_a_commit_ends_whatever_the_guest_writes(
    rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "WINDOW_BYTES", 4096)
    checkpoint(rig)
    disk.write(os.urandom(SIZE), 0)
    stop = threading.Event()

    def scribble() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            disk.write(turn.to_bytes(8, "little") * 700, turn * 3331 % (SIZE - 5600))

    writer = Background(scribble)
    disks.finish(rig.group.abort())
    stop.set()
    writer.end()
    assert rig.base().read_bytes() == disk.read(SIZE, 0)


def test_d8_nobody_waits_for_a_window_and_what_is_written_meanwhile_stays_above(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 0 has been read for the copy when the guest writes to it: the copy must not count."""
    monkeypatch.setattr(commit, "WINDOW_BYTES", 8192)
    checkpoint(rig)
    disk.write(b"a" * 4096, 0)
    disk.write(b"b" * 4096, 20 * 4096)
    release = hold(files, "write", "vda.raw")
    job = rig.group.abort()
    held(files)  # the window is blocks 0 and 20; block 0 is on its way down
    files.hold = lambda *what: None
    disk.write(b"A" * 100, 50)
    assert disk.read(200, 0) == b"a" * 50 + b"A" * 100 + b"a" * 50
    bits = rig.group._members["vda"].view.layers[0].bits
    second = hold(files, "write", "vda.raw")
    release.set()
    while files.held.acquire(timeout=WAIT) and not (bits.test(0) and not bits.test(20)):
        second.set()
        second = hold(files, "write", "vda.raw")
    files.hold = lambda *what: None
    second.set()  # the second pass, which had block 0 left
    disks.finish(job)
    expected = b"a" * 50 + b"A" * 100 + b"a" * 3946
    assert disk.read(4096, 0) == expected == rig.base().read_bytes()[:4096]


def test_d8_writers_of_a_block_that_is_never_left_alone_wait_in_the_last_pass(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "PASSES", 1)
    checkpoint(rig)
    disk.write(b"a" * 4096, 0)
    disk.write(b"b" * 4096, 20 * 4096)
    release = hold(files, "write", "vda.raw")
    job = rig.group.abort()
    held(files)
    disk.write(b"c" * 4096, 10 * 4096)
    blocked = Background(disk.write, b"A" * 4096, 0)
    gate = rig.group.disks["vda"].gate
    while len(gate._tickets) < 2:
        assert blocked.running
    assert disk.read(4096, 0) == b"a" * 4096, "readers are not held off"
    assert blocked.running
    release.set()
    disks.finish(job)
    blocked.end()
    assert disk.read(4096, 0) == b"A" * 4096


def test_d8_the_overlay_is_removed_only_after_the_state_forgot_it(
    rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    seen: list[bool] = []
    write_file = durable.write_file

    def watch(path: Path, data: bytes, mode: int = 0o600) -> None:
        here = bool(rig.layer_files())
        write_file(path, data, mode)
        if not formats.decode_state(data, path).disks[0].overlays:
            seen.append(here and bool(rig.layer_files()))

    monkeypatch.setattr(durable, "write_file", watch)
    disks.finish(rig.group.abort())
    assert seen[0] is True and not rig.layer_files()


def test_d8_windows_are_bounded_in_bytes_and_runs_and_cover_every_block(rig: disks.Rig, disk: Disk) -> None:
    checkpoint(rig)
    for block in range(0, 40, 2):
        disk.write(b"x" * 4096, block * 4096)
    disk.write(b"y" * 9 * 4096, 41 * 4096)
    rig.group.disks["vda"].zero(14 * 4096 + 512, 50 * 4096)
    overlay = rig.group._members["vda"].view.layers[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "WINDOW_BYTES", 3 * 4096)
        patch.setattr(commit, "WINDOW_RUNS", 2)
        found = list(commit.windows(overlay, SIZE))
    flat = [run for window in found for run in window]
    assert [block for first, end in flat for block in range(first, end)] == [*range(0, 40, 2), *range(41, 65)]
    assert all(len(window) <= 2 for window in found)
    assert all(end - first <= 3 for first, end in flat[:-1]) and flat[-1] == (50, 65), "holes cost little"


# ---- D9 ----


def test_d9_a_failed_sync_is_final(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    disk.write(b"x" * 4096, 0)
    files.fail["sync", "vda.raw"] = errno.EIO
    with pytest.raises(errors.PoisonedError) as caught:
        disk.flush()
    assert caught.value.errno == errno.EIO
    files.fail.clear()
    with pytest.raises(errors.PoisonedError):
        disk.flush()
    with pytest.raises(errors.PoisonedError):
        disk.write(b"y", 0)
    with pytest.raises(errors.PoisonedError):
        rig.group.disks["vda"].trim(4096, 0)
    assert disk.read(4096, 0) == b"x" * 4096, "reads go on"
    with pytest.raises(errors.PoisonedError):
        rig.group.prepare("c1")
    assert rig.group.status().disks[0].error
    with pytest.raises(errors.PoisonedError):
        rig.group.close()
    rig.open()
    disk.write(b"y", 0)
    disk.flush()


def test_d9_no_bit_is_cleared_after_a_failed_sync(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    overlay = rig.group._members["vda"].view.layers[0]
    files.fail["sync", "vda.raw"] = errno.EIO
    with pytest.raises(errors.PoisonedError):
        disks.finish(rig.group.abort())
    assert overlay.bits.test(0)
    assert rig.group.status().state is api.State.COMMITTING
    files.fail.clear()
    rig.kill()
    disks.finish(rig.group.abort())
    assert rig.base().read_bytes()[:4096] == b"x" * 4096


@pytest.mark.parametrize("killed", [False, True], ids=["served on", "killed before"])
def test_d9_what_was_handed_down_is_taken_back_when_the_base_fails(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Of two blocks below, one had been flushed there: that one stays, the other is read from the overlay again."""
    monkeypatch.setattr(commit, "WINDOW_BYTES", 4096)
    checkpoint(rig)
    for block in range(3):
        disk.write(b"%d" % block * 4096, block * 4096)
    disk.flush()
    steps = {offset: threading.Event() for offset in (4096, 8192)}
    files.hold = lambda call, path, at, _: steps.get(at) if (call, path.name) == ("write", "vda.raw") else None
    job = rig.group.abort()
    held(files)
    disk.write(b"N" * 4096, 0)
    disk.flush()
    steps[4096].set()
    held(files)
    bits = rig.group._members["vda"].view.layers[0].bits
    assert not bits.test(0) and not bits.test(1) and bits.test(2)
    files.fail["sync", "vda.raw"] = errno.EIO
    if killed:
        rig.group._stop.set()  # of the old server nothing goes on
    else:
        with pytest.raises(errors.PoisonedError):
            disk.flush()
    steps[8192].set()
    files.hold = lambda *what: None
    if killed:
        with pytest.raises(errors.BlkckptError):
            disks.finish(job)
        rig.kill()
        with pytest.raises(errors.PoisonedError):
            disk.flush()
    else:
        with pytest.raises(errors.PoisonedError):
            disks.finish(job)
    bits = rig.group._members["vda"].view.layers[0].bits
    assert not bits.test(0) and bits.test(1) and bits.test(2), "what is durable below is not taken back"
    assert disk.read(3 * 4096, 0) == b"N" * 4096 + b"1" * 4096 + b"2" * 4096
    files.fail.clear()
    rig.kill()
    disks.finish(rig.group.abort())
    assert rig.base().read_bytes()[: 3 * 4096] == b"N" * 4096 + b"1" * 4096 + b"2" * 4096


def test_d9_a_map_that_cannot_be_synced_stops_writes(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    files.fail["sync", ".map"] = errno.EIO
    with pytest.raises(errors.PoisonedError):
        disk.flush()
    with pytest.raises(errors.PoisonedError):
        disk.write(b"y" * 4096, 0)


def test_d9_no_checkpoint_is_acknowledged_over_a_failed_sync(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks.stub_copies(monkeypatch)
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    disks.finish(rig.group.start_copy("/store", {}))
    files.fail["sync", ".data"] = errno.EIO
    with pytest.raises(errors.PoisonedError):
        disk.flush()
    with pytest.raises(errors.PoisonedError):
        rig.group.commit()


# ---- D10 ----


def test_d10_enospc_in_the_overlay_is_the_guests_and_damages_nothing(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    disk.write(b"b" * 16384, 0)
    checkpoint(rig)
    disk.write(b"o" * 4096, 0)
    files.fail["write", ".data"] = errno.ENOSPC
    for data, offset in ((b"n" * 4096, 4096), (b"n" * 100, 8192 + 5), (b"n" * 8192, 0)):
        with pytest.raises(OSError, match="No space") as caught:
            disk.write(data, offset)
        assert caught.value.errno == errno.ENOSPC
    assert disk.read(16384, 0) == b"o" * 4096 + b"b" * 12288
    files.fail.clear()
    disk.write(b"n" * 4096, 4096)
    disk.flush()
    assert disk.read(16384, 0) == b"o" * 4096 + b"n" * 4096 + b"b" * 8192


def test_d10_space_for_the_map_is_taken_at_the_write_not_at_the_flush(
    rig: disks.Rig, disk: Disk, files: disks.Files
) -> None:
    checkpoint(rig)
    files.fail["allocate", ".map"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        disk.write(b"x" * 4096, 0)
    files.fail.clear()
    disk.flush()
    assert disk.read(4096, 0) == bytes(4096)


def test_d10_a_full_tmpfs_is_an_error_not_a_signal(rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(rig)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            disk.write(b"x" * 4096, 0)
    assert disk.read(4096, 0) == bytes(4096)


def test_d10_enospc_in_prepare_leaves_nothing(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    files.fail["write", ".map"] = errno.ENOSPC
    with pytest.raises(errors.NoSpaceError):
        rig.group.prepare("c1")
    assert rig.group.status().state is api.State.REST and not rig.layer_files()
    assert len(list(rig.vm.live.iterdir())) == 1, "only the map of changes"
    files.fail.clear()
    rig.group.prepare("c1")


def test_d10_a_commit_waits_for_space_in_the_base_and_says_so(
    rig: disks.Rig, disk: Disk, files: disks.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = threading.Event(), threading.Event()
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    stop = rig.group._emptier._stop

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            assert go_on.wait(WAIT)
            return stop.is_set()

    monkeypatch.setattr(rig.group._emptier, "_stop", Stop())
    files.fail["write", "vda.raw"] = errno.ENOSPC
    job = rig.group.abort()
    assert waiting.wait(WAIT)
    assert "No space" in str(rig.group.status().warning)
    assert disk.read(4096, 0) == b"x" * 4096
    files.fail.clear()
    go_on.set()
    disks.finish(job)
    assert rig.group.status().warning is None
    assert rig.base().read_bytes()[:4096] == b"x" * 4096


# ---- D11 ----


@pytest.mark.parametrize("trim", [False, True], ids=["zero", "trim"])
def test_d11_zeros_mask_the_parent_and_survive(
    rig: disks.Rig, disk: Disk, trim: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(b"b" * SIZE, 0)
    checkpoint(rig)
    target = rig.group.disks["vda"]
    (target.trim if trim else target.zero)(9000, 4000)
    expected = b"b" * 4000 + bytes(9000) + b"b" * (SIZE - 13000)
    assert disk.read(SIZE, 0) == expected
    disk.flush()
    disks.other_boot(monkeypatch)
    rig.lose_power()
    disks.finish(rig.group.abort())
    assert disk.read(SIZE, 0) == expected and rig.base().read_bytes() == expected


def test_d11_the_last_block_is_short(rig: disks.Rig, disk: Disk) -> None:
    checkpoint(rig)
    disk.write(b"e" * 512, SIZE - 512)
    assert rig.group._members["vda"].view.layers[0].copy_ups == 0, "up to the end of the disk is whole"
    disk.write(b"f", SIZE - 1)
    rig.group.disks["vda"].zero(100, SIZE - 512)
    expected = bytes(100) + b"e" * 411 + b"f"
    assert disk.read(512, SIZE - 512) == expected
    disks.finish(rig.group.abort())
    assert rig.base().stat().st_size == SIZE and rig.base().read_bytes()[-512:] == expected


def test_requests_outside_the_disk_are_refused(rig: disks.Rig, disk: Disk) -> None:
    for offset in (SIZE, SIZE - 1, -1):
        with pytest.raises(OSError, match="outside"):
            disk.write(b"xx", offset)
        with pytest.raises(OSError, match="outside"):
            disk.read(2, offset)
    disk.write(b"", SIZE)
    assert disk.read(0, 0) == b""


def test_fast_zero_says_no_instead_of_writing(rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    disk.write(b"x" * 8192, 0)
    monkeypatch.setattr(fileio, "_fallocate", refuse)
    target = rig.group.disks["vda"]
    with pytest.raises(OSError, match="fast") as caught:
        target.zero(8192, 0, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert disk.read(8192, 0) == b"x" * 8192
    target.zero(8192, 0)
    assert disk.read(8192, 0) == bytes(8192)


@pytest.mark.parametrize("share", [1, 3, 7, 256])
def test_d8_windows_cut_at_block_borders_whatever_holes_cost(rig: disks.Rig, disk: Disk, share: int) -> None:
    checkpoint(rig)
    for turn in range(4):
        rig.group.disks["vda"].zero(5 * 4096, turn * 13 * 4096)
        disk.write(b"x" * (7 + turn) * 4096, (turn * 13 + 5) * 4096)
    overlay = rig.group._members["vda"].view.layers[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "WINDOW_BYTES", 6 * 4096)
        patch.setattr(commit, "HOLE_SHARE", share)
        flat = [run for window in commit.windows(overlay, SIZE) for run in window]
    assert [block for first, end in flat for block in range(first, end)] == [
        block for first, end in overlay.bits.set_runs(0, 65) for block in range(first, end)
    ]


def test_a_block_device_is_a_base(tmp_path: Path) -> None:
    file = tmp_path / "device.img"
    file.write_bytes(b"")
    os.truncate(file, 8 << 20)
    found = subprocess.run(["losetup", "-f", "--show", str(file)], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"no loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        vm = paths.home(tmp_path / "home").vm("vm")
        with pytest.raises(errors.InputError, match="8388608 bytes"):
            group.DiskGroup.create(vm, "id", [api.DiskSpec("vda", device, (8 << 20) + 1)])
        group.DiskGroup.create(vm, "id", [api.DiskSpec("vda", device, 8 << 20)])
        opened = group.DiskGroup.open(vm, open_image=lambda ref: disks.MemoryImage(b""))
        target = opened.disks["vda"]
        target.pwrite(b"x" * 100_000, 77)
        target.trim(50_001, 1000)
        opened.prepare("c1")
        opened.switch()
        target.pwrite(b"y" * 5000, 2000)
        target.zero(4096, 65_536)
        target.flush()
        disks.finish(opened.abort())
        expected = bytearray(8 << 20)
        expected[77:100_077] = b"x" * 100_000
        expected[1000:51_001] = bytes(50_001)
        expected[2000:7000] = b"y" * 5000
        expected[65_536:69_632] = bytes(4096)
        buf = bytearray(8 << 20)
        target.pread(buf, 0)
        assert buf == expected and sum(count for _, count, _ in target.extents(8 << 20, 0)) == 8 << 20
        opened.close()
        assert Path(device).read_bytes() == expected
        vm.live.rmdir()
        vm.live.parent.rmdir()
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


# ---- D12 ----


def test_d12_one_server_per_vm(rig: disks.Rig) -> None:
    with pytest.raises(errors.StateError, match="served already"):
        group.DiskGroup.open(rig.vm, open_image=lambda ref: disks.MemoryImage(b""))


@pytest.mark.parametrize("kind", ["live", "map", "data", "state"])
def test_d12_a_damaged_file_is_an_error_with_its_name(rig: disks.Rig, disk: Disk, kind: str) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    disk.flush()
    rig.group.abandon()
    overlay = next(path for path in rig.vm.layers.iterdir() if path.suffix == ".data")
    layer_id = overlay.name.split(".")[1]
    path = {
        "live": rig.vm.live / f"vda.{layer_id}.live",
        "map": overlay.with_suffix(".map"),
        "data": overlay,
        "state": rig.vm.state,
    }[kind]
    if kind == "data":
        os.truncate(path, SIZE - 1)
    else:
        with path.open("r+b") as file:
            file.seek(20)
            file.write(b"\xff")
    with pytest.raises(errors.CorruptError, match=path.name):
        rig.open(start=False)


def test_d12_a_missing_map_is_an_error(rig: disks.Rig, disk: Disk) -> None:
    checkpoint(rig)
    disk.write(b"x" * 4096, 0)
    rig.group.abandon()
    next(path for path in rig.vm.layers.iterdir() if path.suffix == ".map").unlink()
    with pytest.raises(errors.NotFoundError, match="map"):
        rig.open(start=False)


def test_d12_a_torn_page_is_excused_only_after_an_unclean_stop(
    rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(rig)
    disk.write(b"1" * 4096, 0)
    disk.flush()
    disk.write(b"2" * 4096, 4096)
    disk.flush()
    lasting = next(path for path in rig.vm.layers.iterdir() if path.suffix == ".map")
    second = formats.slot_offset(0, 2)
    rig.group.close()
    whole = lasting.read_bytes()
    lasting.write_bytes(whole[: second + 2000] + b"\xee" + whole[second + 2001 :])
    with pytest.raises(errors.CorruptError, match=r"page 0 .*\.map"):
        rig.open(start=False)
    lasting.write_bytes(whole)
    rig.open(start=False)
    rig.group.abandon()
    lasting.write_bytes(whole[: second + 2000] + b"\xee" + whole[second + 2001 :])
    disks.other_boot(monkeypatch)
    for live in rig.vm.live.iterdir():
        live.unlink()
    rig.open(start=False)
    assert disk.read(8192, 0) == b"1" * 4096 + bytes(4096), "the version before the torn one"


# ---- D13 ----


def take(rig: disks.Rig, parent: str | None) -> str:
    checkpoint(rig)
    result = disks.finish(rig.group.start_copy("/store", {"vda": parent}))
    disks.finish(rig.group.commit())
    return str(result["disks"]["vda"]["image"])


def test_d13_changed_bits_are_trusted_after_a_clean_stop_or_on_the_same_boot_only(
    rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, int]] | None] = []

    def look(frozen: object, parent: str | None) -> str:
        changed = frozen.changed  # type: ignore[attr-defined]
        seen.append(None if changed is None else list(changed.set_runs(0, changed.blocks)))
        return f"image-{len(seen)}"

    disks.stub_copies(monkeypatch, look)
    disk.write(b"x" * 4096, 0)
    take(rig, None)
    assert seen == [None], "never checkpointed: everything is read"

    disk.write(b"x" * 4096, 4096)
    rig.stop()
    disk.write(b"x" * 4096, 3 * 4096)
    rig.kill()
    disk.write(b"x", 5 * 4096)
    take(rig, "image-1")
    assert seen[-1] == [(1, 2), (3, 4), (5, 6)]

    disk.write(b"x", 7 * 4096)
    take(rig, "another image")
    assert seen[-1] is None, "changes are relative to one image only"

    disk.write(b"x", 9 * 4096)
    disk.flush()
    disks.other_boot(monkeypatch)
    rig.lose_power()
    assert rig.group.status().disks[0].changed_since is None
    take(rig, "image-3")
    assert seen[-1] is None


def test_d13_an_aborted_checkpoint_gives_the_changed_bits_back(
    rig: disks.Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, int]] | None] = []

    def look(frozen: object, parent: str | None) -> str:
        changed = frozen.changed  # type: ignore[attr-defined]
        seen.append(None if changed is None else list(changed.set_runs(0, changed.blocks)))
        return "image-1"

    disks.stub_copies(monkeypatch, look)
    take(rig, None)
    disk.write(b"x", 1 * 4096)
    rig.group.prepare("c2")
    disk.write(b"x", 3 * 4096)
    disks.finish(rig.group.abort())
    checkpoint(rig)
    disk.write(b"x", 5 * 4096)
    disks.finish(rig.group.abort())
    checkpoint(rig)
    disk.write(b"x", 7 * 4096)
    rig.kill()
    disks.finish(rig.group.abort())
    take(rig, "image-1")
    assert seen[-1] == [(1, 2), (3, 4), (5, 6), (7, 8)]


def test_d13_changed_bits_are_set_before_the_data(rig: disks.Rig, disk: Disk, files: disks.Files) -> None:
    """Killed in between, the next incremental checkpoint reads the block once too often, not once too few."""
    release = hold(files, "write", "vda.raw")
    writing = Background(disk.write, b"x" * 4096, 0)
    held(files)
    assert rig.group._members["vda"].view.changed.test(0)
    release.set()
    writing.end()


# ---- maps ----


def test_a_live_map_is_sparse_and_reading_it_allocates_nothing(tmp_path: Path) -> None:
    size = 4 << 40
    live = maps.LiveMap.create(Path("/dev/shm") / f"test-{os.getpid()}.live", "0a" * 16, size, "0b" * 16)
    try:
        assert live.none_set(0, live.blocks) and live.next_set(0, live.blocks) is None
        live.mark(12345, 12350)
        assert os.fstat(live.fd).st_blocks * 512 <= 64 << 10
        again = maps.LiveMap.load(live.path, "0a" * 16, size, "0b" * 16)
        assert again is not None and list(again.set_runs(0, again.blocks)) == [(12345, 12350)]
        again.close()
    finally:
        live.remove()


def test_chain_failure_names_the_file(rig: disks.Rig) -> None:
    view = rig.group._members["vda"].view
    assert chain.failure(view) is None
    view.floor.fail("because")  # type: ignore[attr-defined]
    assert chain.failure(view) == "because"

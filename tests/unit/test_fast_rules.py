"""The rules F1 to F9 between the fast path and the interpreter, and F11, each with defects that its scenario finds.

A scenario runs the core and the interpreter's data plane together in this process; a system call of the core is held
for as long as the scenario needs a request in flight there.  It runs once as it should be, and once for each defect:
a change of ``core.c`` (compiled in), or of the interpreter's side (patched).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.disk import api, barrier, epoch, fastpath, fileio, maps
from blkckpt.disk import format as formats
from tests.support import disks, fastcore, fastwire
from tests.support.fastbench import MIB, SIZES, A, B, Bench

# ---- F1, F2 ----


def f1_drain(bench: Bench) -> None:
    """A write in flight in the core keeps its epoch from being drained."""
    with bench.core.held(fastcore.WRITE, 5) as held:
        done, _ = fastcore.later(lambda: bench.vda.write(B, 5 * 4096))
        held.wait()
        bench.prepare()
        assert bench.rig.group.switch().switched
        gate, ended = bench.member().gate, bench.rig.group._find("c", "test").parts["vda"].ended
        with pytest.raises(errors.DeadlineError):
            gate.wait_drained(ended, time.monotonic() + 0.05)
        held.released.set()
        gate.wait_drained(ended, time.monotonic() + fastcore.WAIT)
        assert done.wait(fastcore.WAIT)


def f1_new_view(bench: Bench) -> None:
    """Right after a switch a write is in the new layer, and the frozen one keeps still (D1)."""
    bench.switched()
    assert bench.vda.write(B, 7 * 4096)
    assert bench.top().bits.test(7)
    with bench.rig.base().open("rb") as file:
        file.seek(7 * 4096)
        assert file.read(4096) == A
    assert bench.read(7) == B


def f2_files(bench: Bench) -> None:
    """A layer's file is not closed, and a view not freed, under a read that is in it."""
    bench.switched()
    assert bench.vda.write(B, 9 * 4096)
    overlay = bench.top()
    buf = bytearray(4096)
    with bench.core.held(fastcore.READ, 9) as held:
        done, result = fastcore.later(lambda: bench.vda.read(buf, 9 * 4096))
        held.wait()
        job = bench.rig.group.abort()
        assert not job.wait(0.7), "the overlay was let go of under a read"
        assert overlay.file.fd >= 0
        held.released.set()
        assert done.wait(fastcore.WAIT)
        disks.finish(job)
    assert result == [True] and buf == B
    assert overlay.file.fd < 0 and bench.read(9) == B


# ---- F3, F4 ----


def f3_one_instant(bench: Bench) -> None:
    """Once a disk is in its new epoch, no other one answers from C in the old."""
    bench.prepare()
    served: list[bool] = []
    publish = fastpath.Disk.publish

    def seen(self: fastpath.Disk, view: fastpath.View | None) -> None:
        publish(self, view)
        if view is not None and not served:  # the first disk has advanced: what does the other one do?
            other = bench.vdb if self.pointer == bench.vda.pointer else bench.vda
            served.append(other.write(B, 0))

    fastpath.Disk.publish = seen  # type: ignore[method-assign]
    try:
        assert bench.rig.group.switch().switched
    finally:
        fastpath.Disk.publish = publish  # type: ignore[method-assign]
    assert served == [False]


def f4_armed(bench: Bench) -> None:
    """While armed the core reads and changes nothing."""
    bench.prepare()
    switch = disks.Switch()
    bench.rig.group.arm(switch, time.monotonic() + 60)
    assert bench.vda.read(bytearray(4096), 0)
    assert not bench.vda.write(B, 0) and not bench.vda.zero(4096, 0)
    bench.vda.pwrite(B, 0)
    assert switch.polls
    switch.state = barrier.BarrierState.PASSED
    bench.vda.pwrite(B, 4096)
    assert bench.rig.group.status().state is api.State.SWITCHED
    assert bench.vda.write(B, 8192)


# ---- F5 ----


def f5_turned_away(bench: Bench) -> None:
    gate = bench.member().gate
    ticket = gate.exclude([(8, 9), (100, 200)])
    away = [bench.vda.write(A, block * 4096) for block in (8, 100, 199)]
    away += [bench.vda.write(A * 20, 190 * 4096), bench.vda.zero(MIB, 0)]
    elsewhere = [bench.vda.write(A, block * 4096) for block in (50, 300, 2000)]
    assert bench.vda.read(bytearray(4096), 8 * 4096), "readers go on"
    gate.finish(ticket)
    assert away == [False] * 5 and elsewhere == [True] * 3
    assert bench.vda.write(A, 8 * 4096) and bench.vda.zero(MIB, 0)


def f5_settles(bench: Bench) -> None:
    """An exclusive ticket waits for a write that was in flight on its blocks (D4: also from before a switch)."""
    with bench.core.held(fastcore.WRITE, 3) as held:
        written, _ = fastcore.later(lambda: bench.vda.write(B, 3 * 4096))
        held.wait()
        bench.switched()
        copied, result = fastcore.later(lambda: bench.vda.pwrite(b"part", 3 * 4096 + 10))
        assert not copied.wait(0.2), "copied up beside an older write in flight"
        held.released.set()
        assert written.wait(fastcore.WAIT) and copied.wait(fastcore.WAIT)
    assert result == [None]
    assert bench.read(3) == B[:10] + b"part" + B[14:]


def f5_noted(bench: Bench) -> None:
    """A watch misses no write to its blocks: in flight when it began, served beside it, or too many to be noted."""
    gate, window = bench.member().gate, [(8, 24), (100, 200)]

    def untouched(before: Callable[[], object]) -> list[tuple[int, int]]:
        with gate.watch(window) as watch:
            before()
            ticket = gate.exclude(window)
            try:
                return list(watch.untouched())
            finally:
                gate.finish(ticket)

    def writes() -> None:
        assert bench.vda.write(A, 8 * 4096) and bench.vda.write(A * 20, 190 * 4096) and bench.vda.write(A, 500 * 4096)

    assert untouched(writes) == [(9, 24), (100, 190)]
    assert untouched(lambda: None) == window, "of the watch before"

    def many() -> None:
        for _ in range(fastpath.NOTES):
            assert bench.vda.write(A, 8 * 4096)
        bench.vda.pwrite(A, 150 * 4096)

    assert untouched(many) == [(9, 24), (100, 150), (151, 200)]
    with bench.core.held(fastcore.WRITE, 10) as held:
        written, _ = fastcore.later(lambda: bench.vda.write(B, 10 * 4096))
        held.wait()
        watched, _ = fastcore.later(lambda: untouched(lambda: None))
        assert not watched.wait(0.2), "copied beside a write in flight that was not noted"
        held.released.set()
        assert written.wait(fastcore.WAIT) and watched.wait(fastcore.WAIT)


# ---- F6, F7 ----


def f6_order(bench: Bench) -> None:
    """Data of a first write: the changed bit is set before it, the present bit after it; then the marks."""
    bench.switched()
    overlay, seen = bench.top(), []
    overlay.flush()
    overlay.file.dirty = False
    overlay.file.fast.take_dirty()
    view = bench.member().view

    def judge(kind: int, fd: int, offset: int, length: int) -> int:
        seen.append((overlay.bits.test(11), overlay.file.fast.take_dirty()))
        return 0

    with bench.core.asked(judge):
        assert bench.vda.write(B, 11 * 4096)
    assert seen == [(False, False)]
    assert overlay.bits.test(11)
    assert overlay.bits._dirty[0] == 1, "the page's mark"
    assert overlay.file.fast.take_dirty(), "the file's mark"
    bench.rig.group.abort().wait(fastcore.WAIT)

    view = bench.member().view
    changed: list[bool] = []
    saved = view.changed
    saved.unmark(12, 13)
    with bench.core.asked(lambda *call: changed.append(saved.test(12)) or 0):  # type: ignore[func-returns-value]
        assert bench.vda.write(B, 12 * 4096)
    assert changed == [True], "a change without its bit is missed by the next checkpoint (D13)"


def f6_durable(bench: Bench) -> None:
    """What was answered before a flush is there after a loss of power: data, bit, everything."""
    bench.switched()
    bench.rig.group.disks["vda"].flush()
    assert bench.vda.write(B * 3, 20 * 4096) and bench.vda.zero(4096, 30 * 4096)
    synced: list[Path] = []
    sync = fileio.File.sync_now

    def seen(self: fileio.File) -> None:
        synced.append(self.path)
        sync(self)

    fileio.File.sync_now = seen  # type: ignore[method-assign]
    try:
        bench.rig.group.disks["vda"].flush()
        first = len(synced)
        assert bench.vda.write(A, 20 * 4096)
        bench.rig.group.disks["vda"].flush()
    finally:
        fileio.File.sync_now = sync  # type: ignore[method-assign]
    assert synced[first:] == [bench.top().file.path], "an overwrite costs one sync, of the file that took it"
    assert bench.vda.write(B, 20 * 4096)
    bench.rig.group.disks["vda"].flush()
    bench.rig.lose_power(start=False)
    bench.reopened()
    assert bench.read(20) == B and bench.read(21) == B and bench.read(30) == bytes(4096)


def f7_flush(bench: Bench) -> None:
    """A flush takes no page while a request that may have set a bit in it has not left."""
    bench.switched()
    with bench.core.held(fastcore.WRITE, 40) as held:
        written, _ = fastcore.later(lambda: bench.vda.write(B, 40 * 4096))
        held.wait()
        flushed, _ = fastcore.later(bench.rig.group.disks["vda"].flush)
        assert not flushed.wait(0.2)
        held.released.set()
        assert written.wait(fastcore.WAIT) and flushed.wait(fastcore.WAIT)


# ---- F8, F9 ----


def f8_atomic(bench: Bench) -> None:
    """Neighbouring bits changed from both sides at full speed: neither side undoes the other's."""
    bits: maps.LiveMap = bench.member().view.changed
    assert bits.fast is not None
    stop, words = ctypes.c_int(0), (ctypes.c_char * len(bits.bits)).from_buffer(bits.bits)
    hammer = functools.partial(bench.core.c.hammer, bits.fast.pointer, words, 1, ctypes.byref(stop))
    done, wrong = fastcore.later(hammer)
    undone = 0
    end = time.monotonic() + bench.hammering
    while time.monotonic() < end and not done.is_set():
        bits.unmark(0, 1)
        undone += bits.test(0)
        bits.mark(0, 1)
        undone += not bits.test(0)
    stop.value = 1
    assert done.wait(fastcore.WAIT)
    assert wrong == [0] and undone == 0


def f8_space(bench: Bench) -> None:
    """The first touch of a map page, of the live map or the durable one, is the interpreter's."""
    bench.prepare()
    assert bench.rig.group.switch().switched
    other = bench.member("vdb").view
    for bits in (bench.member().view.changed, other.changed, other.layers[0].bits):
        bits.back(0, 1)
    assert not bench.vdb.write(B, 0), "no space in the durable map"
    bench.top().durable.reserve(0, 1)
    assert not bench.vda.write(B, 0), "no page in the live map"
    assert not bench.top().bits.test(0)
    bench.vda.pwrite(B, 0)
    assert bench.vda.write(B, 4096)


def f9_errors(bench: Bench) -> None:
    """A failed call is passed on, sets no bit, and the interpreter does it all again."""
    bench.switched()
    block = 50
    with bench.core.asked(lambda *call: errno.ENOSPC):
        assert not bench.vda.write(B, block * 4096) and not bench.vda.zero(4096, block * 4096)
        assert not bench.vda.read(bytearray(4096), block * 4096)
        assert not bench.top().bits.test(block)
        bench.vda.pwrite(B, block * 4096)
        assert bench.read(block) == B
    before = bench.member().port.counters()
    assert not bench.vda.write(B, SIZES["vda"]) and not bench.vda.read(bytearray(8192), SIZES["vda"] - 4096)
    assert not bench.vda.write(b"part", 60 * 4096), "a copy-up"
    assert bench.vda.write(b"part", block * 4096 + 7), "nothing to copy up"
    assert bench.member().port.counters()[:2] == (before[0], before[1] + 1)
    bench.top().file.fail("a sync failed")
    assert not bench.vda.write(B, block * 4096) and bench.vda.read(bytearray(4096), 0)
    with pytest.raises(errors.PoisonedError):
        bench.vda.pwrite(B, block * 4096)


# ---- F11 ----


def f11_waits(bench: Bench) -> None:
    """No reply is held back while a request is at what may wait for a disk, or take long."""
    bench.switched()
    assert bench.vda.write(B * 16, 0)
    cold, seen = False, list[tuple[int, bool]]()
    with fastwire.paired(fastwire.Wire(bench.core.path)) as pair:

        def judge(kind: int, fd: int, offset: int, length: int) -> int:
            seen.append((kind, pair.wire.c.fp_wire_holds()))
            return errno.EAGAIN if cold and kind == fastcore.CACHED else 0

        def found(request: Callable[[], bool]) -> list[tuple[int, bool]]:
            seen.clear()
            pair.hold()
            with bench.core.asked(judge):
                assert request()
            assert pair.read(1) == b"b"
            pair.wire.c.fp_wire_release()
            assert pair.arrived() in (b"", b"r")
            return seen

        one, many = bytearray(4096), bytearray(65536)
        assert found(lambda: bench.vda.read(one, 0)) == [(fastcore.CACHED, True)] and one == B
        cold, one = True, bytearray(4096)
        assert found(lambda: bench.vda.read(one, 0)) == [(fastcore.CACHED, True), (fastcore.READ, False)] and one == B
        assert found(lambda: bench.vda.read(many, 0)) == [(fastcore.READ, False)] and many == B * 16
        assert found(lambda: bench.vda.write(A, 0)) == [(fastcore.WRITE, True)]
        assert found(lambda: bench.vda.write(A * 16, 0)) == [(fastcore.WRITE, False)]
        assert found(lambda: bench.vda.zero(4096, 0)) == [(fastcore.ZERO, False)]


Scenario = Callable[[Bench], None]
Patch = tuple[Any, str, Any]

SCENARIOS: tuple[Scenario, ...] = (
    f1_drain, f1_new_view, f2_files, f3_one_instant, f4_armed, f5_turned_away, f5_settles, f5_noted, f6_order,
    f6_durable, f7_flush, f8_atomic, f8_space, f9_errors, f11_waits,
)  # fmt: skip

SETTLED = ("            if (spent >= usec)\n                return 0;", "            return 1;")
MARK = "atomic_store(&file->dirty, 1);"
FRESH = "    if (fresh)\n        change_bits(map, first, end, true);\n"
PUT = "    if (!put(file, what, offset, until - offset))\n        return false;\n"

C_DEFECTS: tuple[tuple[Scenario, tuple[str, str]], ...] = (
    (f1_drain, SETTLED),
    (f1_drain, ("    atomic_fetch_add(&slot->turn, 1);\n", "    atomic_fetch_add(&slot->turn, 2);\n")),
    (f1_new_view, ("{ atomic_store(&disk->view, view); }", "{ if (!disk->view) atomic_store(&disk->view, view); }")),
    (f4_armed, ("!view->armed && ", "")),
    (f5_turned_away, ("        if (atomic_load(&table[low % STRIPES]))\n", "        if (0)\n")),
    (f5_turned_away, ("    *high = (end - 1) >> STRIPE_SHIFT;", "    *high = *low;")),
    (f5_settles, SETTLED),
    (f5_noted, SETTLED),
    (f5_noted, ("    disk->notes[at].end = end;\n", "    disk->notes[at].end = first + 1;\n")),
    (f5_noted, ("    if (at >= NOTES)\n        return false;\n", "    if (at >= NOTES)\n        return true;\n")),
    (f5_noted, ("    atomic_store(&disk->noted, 0);\n", "")),
    (f6_order, (PUT, FRESH + PUT)),
    (f6_order, ("        change_bits(view->changed, first, end, true);\n", "")),
    (f6_durable, (MARK, "")),
    (f6_durable, ("            atomic_store(&map->dirty[slot], 1);", "            ;")),
    (f8_space, ("    if (map->reserved)\n", "    if (0)\n")),
    (f8_space, ("        if (!is_backed(map, page << PAGE_SHIFT))\n", "        if (0)\n")),
    (f9_errors, (PUT, "    put(file, what, offset, until - offset);\n")),
    (f9_errors, ("    if (!file || atomic_load(&file->failed))", "    if (!file)")),
    (f9_errors, ("needs_copy_up(view, map, offset, until) || ", "")),
    (f11_waits, ("        fp_wire_release();\n    }\n    return pread", "    }\n    return pread")),
    (f11_waits, ("        if (length <= FP_WIRE_BRIEF) {\n", "        if (1) {\n")),
    (f11_waits, ("    if (!what->data || length > FP_WIRE_BRIEF)\n", "    if (!what->data)\n")),
    (f11_waits, ("    if (!what->data || length > FP_WIRE_BRIEF)\n", "    if (length > FP_WIRE_BRIEF)\n")),
)  # fmt: skip


FOUND = (AssertionError, pytest.fail.Exception)


def _always(*arguments: Any) -> bool:
    return True


def _nothing(*arguments: Any) -> None: ...


PYTHON_DEFECTS: tuple[tuple[Scenario, Patch], ...] = (
    (f2_files, (fastpath.Library, "settle", _always)),
    (f3_one_instant, (epoch.Gate, "close_fast_locked", _nothing)),
    (f5_turned_away, (fastpath.Disk, "exclude", lambda self, runs: (ctypes.c_uint64 * 0)())),
    (f5_settles, (fastpath.Disk, "settle", _always)),
    (f5_noted, (fastpath.Disk, "settle", _always)),
    (f5_noted, (fastpath.Disk, "noted", lambda self: [])),
    (f6_durable, (fastpath.File, "take_dirty", lambda self: False)),
    (f7_flush, (fastpath, "settle", _nothing)),
)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastcore.Core]:
    with fastcore.loaded(fastcore.build(tmp_path_factory.mktemp("core"))) as loaded:
        yield loaded


def _run(scenario: Scenario, root: Path, core: fastcore.Core) -> None:
    with fastpath.used(core.path):
        bench = Bench(root, core)
        try:
            scenario(bench)
        finally:
            bench.rig.clean_up()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_rule(scenario: Scenario, tmp_path: Path, core: fastcore.Core) -> None:
    _run(scenario, tmp_path, core)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("scenario", "defect"), C_DEFECTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_defect_in_c_is_found(scenario: Scenario, defect: tuple[str, str], tmp_path: Path) -> None:
    """One that keeps a disk from being drained may hang it: a find as well, by the limit of time."""
    with (
        fastcore.loaded(fastcore.build(tmp_path, defect)) as broken,
        pytest.raises(FOUND),
    ):
        _run(scenario, tmp_path, broken)


@pytest.mark.parametrize(("scenario", "patch"), PYTHON_DEFECTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_defect_in_python_is_found(
    scenario: Scenario, patch: Patch, tmp_path: Path, core: fastcore.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*patch)
    with pytest.raises(FOUND):
        _run(scenario, tmp_path, core)


def test_f8_a_plain_change_would_be_found(tmp_path: Path, core: fastcore.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the hammer: the interpreter changes bytes by itself."""
    monkeypatch.setattr(Bench, "hammering", 20.0)
    monkeypatch.setattr(maps.LiveMap, "_fill", maps.LiveMap.__mro__[1]._fill)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        _run(f8_atomic, tmp_path, core)


def test_many_threads_and_their_ends(tmp_path: Path, core: fastcore.Core) -> None:
    """Slots are given back by threads that end: more threads than there are slots, one after the other."""
    with fastpath.used(core.path):
        bench = Bench(tmp_path, core)
        served: list[bool] = []
        for _ in range(80):
            threads = [threading.Thread(target=lambda: served.append(bench.vda.write(A, 0))) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(fastcore.WAIT)
        assert served == [True] * (80 * 16)
        bench.rig.clean_up()


def test_slots_are_as_the_format_says() -> None:
    assert formats.HEADER % 8 == 0, "bits are changed as words"

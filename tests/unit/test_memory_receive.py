"""The receiver as a process, fed with synthetic streams: what is in the store and in the raw image is the memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from blkckpt import errors
from blkckpt.memory import apart, assemble, feed, generate, image, intake, receive, skeleton, stream
from blkckpt.store import store
from tests.support import ramstream as rs

PAGE = rs.PAGE
RAM_PAGES = (17 << 20) // PAGE + 3  # above the small blocks' limit, and no multiple of a chunk
BLOCKS = [("pc.ram", RAM_PAGES * PAGE), ("pc.bios", 2 * PAGE)]
DEADLINE = 60


class Child:
    """A receiver with its pipes."""

    def __init__(self, tmp_path: Path, **job: Any) -> None:
        self.raw = tmp_path / "raw"
        store.Store.open_or_init(tmp_path / "store").close()
        reader, self.stream = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blkckpt.memory.receive"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[reader],
        )  # fmt: skip
        os.close(reader)
        full = {
            "version": 1, "stream_fd": reader, "store": str(tmp_path / "store"), "label": "vm@c", "parents": {},
            "raw_dir": str(self.raw), "keep_raw": True,
        }  # fmt: skip
        self.say(json.dumps(full | job).encode() + b"\n")

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(self.stream, view) :]

    def end(self) -> list[dict[str, Any]]:
        """Close the stream and wait; every line it said."""
        if self.stream >= 0:
            os.close(self.stream)
            self.stream = -1
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        lines = [json.loads(line) for line in self.process.stdout]
        self.process.wait()
        watchdog.cancel()
        self.process.stdin.close()
        self.process.stdout.close()
        return lines


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(**job: Any) -> Child:
        children.append(Child(tmp_path, **job))
        return children[-1]

    yield start
    for one in children:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


def take(child: Callable[..., Child], records: Sequence[rs.Record], **job: Any) -> dict[str, Any]:
    one = child(**job)
    one.send(rs.whole(BLOCKS, records, rs.tail(description={"devices": []})))
    lines = one.end()
    assert one.process.returncode == 0, lines
    assert all(set(line) == {"progress"} for line in lines[:-1])
    result: dict[str, Any] = lines[-1]["result"]
    return result


def check(tmp_path: Path, result: dict[str, Any], records: Sequence[rs.Record]) -> None:
    """Store, raw image and skeleton hold what the model holds."""
    want = rs.memory(BLOCKS, records)
    (block,) = result["blocks"]
    assert (block["name"], block["size"], block["page_size"]) == ("pc.ram", RAM_PAGES * PAGE, PAGE)
    with store.Store.open(tmp_path / "store") as opened:
        reader = opened.image(block["image"])
        assert reader.read(0, reader.size) == want[0]
        data = opened.image(result["skeleton"])
        assert data.size == result["skeleton_size"]
        skel = skeleton.decode(data.read(0, data.size))
        assert bytes(skel.small["pc.bios"]) == want[1]
        again, _ = rs.parse(b"".join(generate.full(skel, {"pc.ram": reader})))
        assert again.blocks == want
    if block["raw"]:
        assert Path(block["raw"]).read_bytes() == want[0]
        assert image.usable(Path(block["raw"]), block["size"], block["image"])


def pages(seed: int, numbers: Sequence[int], density: float = 0.5) -> list[rs.Record]:
    rng = random.Random(seed)
    return [(0, n, rng.randbytes(PAGE) if rng.random() < density else b"\0") for n in numbers]


def test_background_snapshot_order(tmp_path: Path, child: Callable[..., Child]) -> None:
    """Every page once: in order, with pages the guest faulted on in between."""
    rng = random.Random(1)
    faulted = rng.sample(range(RAM_PAGES), 200)
    order = [n for n in range(RAM_PAGES) if n not in set(faulted)]
    for n in faulted:
        order.insert(rng.randrange(len(order)), n)
    records = [*pages(2, order), (1, 0, b"\0"), (1, 1, rng.randbytes(PAGE))]
    result = take(child, records, once=True)
    check(tmp_path, result, records)
    assert result["pages"] + result["zero_pages"] == RAM_PAGES + 2
    assert result["stream_bytes"] == len(rs.whole(BLOCKS, records, rs.tail(description={"devices": []})))
    assert result["blocks"][0]["raw"] == str(tmp_path / "raw/pc.ram.raw")


def test_pages_sent_again(tmp_path: Path, child: Callable[..., Child]) -> None:
    """As a plain migration does: data over data, zeros over data, data over zeros, after chunks were handed on."""
    records = pages(3, range(RAM_PAGES)) + pages(4, range(0, RAM_PAGES, 7)) + pages(5, range(5, 900), 0.1)
    result = take(child, records, keep_raw=True)
    check(tmp_path, result, records)


@pytest.mark.parametrize("content", [b"x" * PAGE, b"\0"], ids=["data", "zeros"])
def test_once_is_kept(tmp_path: Path, content: bytes) -> None:
    """A chunk that was given out is not written to: its readers have hashed it already."""
    sink = assemble.Assembler(tmp_path, once=True)
    parser = stream.Parser(sink)
    parser.feed(memoryview(rs.whole(BLOCKS, pages(3, range(16), 1.0)))[: 17 * (PAGE + 8)])
    [block] = sink.main
    assert list(block.complete()) == [(0, 1)]
    before = bytes(block.raw.view(0, 16 * PAGE))
    with pytest.raises(errors.ProtocolError, match="came twice"):
        sink.zeros(0, 3, 1, 0) if len(content) == 1 else sink.pages(0, 3, 1, memoryview(content), 0, PAGE)
    assert block.raw.read(0, 16 * PAGE) == before
    sink.close()


def test_pages_that_never_come_are_zero(tmp_path: Path, child: Callable[..., Child]) -> None:
    records = pages(6, [5, 6, 4000, RAM_PAGES - 1], 1.0)
    check(tmp_path, take(child, records), records)


def test_fill_bytes_that_are_not_zero(tmp_path: Path, child: Callable[..., Child]) -> None:
    records: list[rs.Record] = [(0, n, bytes([n % 5])) for n in range(400)] + [(1, 0, b"\x07")]
    check(tmp_path, take(child, records), records)


def test_parent(tmp_path: Path, child: Callable[..., Child]) -> None:
    """Only what changed is added; what became zero, or did not come, is zero and not the parent's."""
    first = pages(7, range(RAM_PAGES), 1.0)
    before = take(child, first, keep_raw=False)
    assert before["blocks"][0]["raw"] is None
    assert list((tmp_path / "raw").iterdir()) == []
    second = [
        (0, n, b"\0" if n in range(16, 48) or n == 100 else content)
        for _, n, content in first
        if n not in range(320, 340)
    ]
    second[600] = (0, second[600][1], b"x" * PAGE)
    after = take(child, second, parents={"pc.ram": before["blocks"][0]["image"], "gone": None})
    check(tmp_path, after, second)
    assert after["new"] < 0.05 * before["new"]


def test_a_parent_that_does_not_fit_is_left_out(tmp_path: Path, child: Callable[..., Child]) -> None:
    first = take(child, [(0, 0, b"\0")])
    for parent in (first["skeleton"], "f" * 32, "no id"):
        records = pages(8, range(40))
        check(tmp_path, take(child, records, parents={"pc.ram": parent}), records)


def fails(one: Child, kind: str, match: str) -> None:
    lines = one.end()
    assert one.process.returncode == 1
    assert lines[-1]["error"]["type"] == kind, lines
    assert match in lines[-1]["error"]["message"]
    assert "\n" not in lines[-1]["error"]["message"]
    assert not one.raw.exists() or list(one.raw.iterdir()) == []


def test_truncated_stream(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, pages(9, range(2000)))[:-2000])
    fails(one, "ProtocolError", "it ends in the middle of the RAM")


def test_empty_stream(child: Callable[..., Child]) -> None:
    fails(child(), "ProtocolError", "its header")


def test_stream_without_ram_pages(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, [(1, 0, b"\0")]))
    fails(one, "ProtocolError", "no page of RAM block 'pc.ram'")


def test_foreign_stream_ends_at_once(child: Callable[..., Child]) -> None:
    """The pipe breaks, so that QEMU's migration fails and the guest runs on."""
    one = child()
    with pytest.raises(BrokenPipeError):
        for _ in range(1000):
            os.write(one.stream, b"x" * 65536)
    fails(one, "ProtocolError", "not a QEMU migration stream")


def wait_for_progress(one: Child) -> None:
    assert one.process.stdout is not None
    assert "progress" in json.loads(one.process.stdout.readline())


def test_driver_gone(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, pages(10, range(1000)))[:2_000_000])
    wait_for_progress(one)
    assert one.process.stdin is not None
    one.process.stdin.close()
    one.process.wait(DEADLINE)
    fails(one, "StateError", "driver is gone")


def test_terminated(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, pages(11, range(1000)))[:2_000_000])
    wait_for_progress(one)
    one.process.send_signal(signal.SIGTERM)
    one.process.wait(DEADLINE)
    fails(one, "StateError", "stopped by a signal")


def test_killed_leaves_no_raw_image(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, pages(12, range(1000)))[:2_000_000])
    wait_for_progress(one)
    one.process.kill()
    one.end()
    assert list(one.raw.iterdir()) == []


def intake_of(one: Child) -> int:
    """The process that the receiver has forked."""
    [child] = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
    return int(child)


def test_killed_ends_the_intake_too(child: Callable[..., Child]) -> None:
    """Nobody reads the stream for a receiver that has gone: QEMU must see that, or the drain must get it."""
    one = child()
    one.send(rs.whole(BLOCKS, pages(12, range(1000)))[:2_000_000])
    wait_for_progress(one)
    descriptor = os.pidfd_open(intake_of(one))
    one.process.kill()
    try:
        assert select.select([descriptor], [], [], DEADLINE)[0]
    finally:
        os.close(descriptor)
    with pytest.raises(BrokenPipeError):
        os.write(one.stream, b"x")


def test_a_killed_intake_is_an_error(child: Callable[..., Child]) -> None:
    one = child()
    one.send(rs.whole(BLOCKS, pages(12, range(1000)))[:2_000_000])
    wait_for_progress(one)
    os.kill(intake_of(one), signal.SIGKILL)
    fails(one, "BlkckptError", "has ended too early")


def test_m1_telling_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stream is taken while nobody listens to the intake, whose socket is full; then all of it is told."""
    pair = socket.socketpair

    def small(*kind: int) -> tuple[socket.socket, socket.socket]:
        made = pair(*kind)
        for one in made:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)  # room for some 40 messages
        return made

    monkeypatch.setattr(socket, "socketpair", small)
    monkeypatch.setattr(intake, "BUFFER", 16 << 10)  # a message for almost each of 272 chunks
    records: list[rs.Record] = [(0, n, bytes([1 + n % 250]) * PAGE) for n in range(RAM_PAGES)]
    reader, writer = os.pipe()
    taking = apart.Intake(reader, tmp_path, once=True, closed=(writer,))
    os.close(reader)
    watchdog = threading.Timer(DEADLINE, os.kill, (taking.pid, signal.SIGKILL))
    watchdog.start()
    with open(writer, "wb") as file:  # waits for the intake, and the intake for nobody
        file.write(rs.whole(BLOCKS, records))
    watchdog.cancel()
    told: list[tuple[int, int]] = []
    taken = taking.listen(lambda _, low, high: told.append((low, high)))
    [block] = taking.main
    assert taken.pages == len(records)
    assert sum(high - low for low, high in told) == block.chunks
    assert list(block.rest()) == []
    assert block.raw.read(0, RAM_PAGES * PAGE) == rs.memory(BLOCKS, records)[0]
    taking.stop(DEADLINE)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"version": 2}\n',
        b'{"version": 1, "stream_fd": "x"}\n',
        b"\xff\n",
    ],
)
def test_bad_jobs(line: bytes) -> None:
    with pytest.raises(errors.InputError) as caught:
        receive.parse_job(line)
    assert "\n" not in str(caught.value)


def test_no_store(tmp_path: Path, child: Callable[..., Child]) -> None:
    fails(child(store=str(tmp_path / "nowhere")), "NotFoundError", "no checkpoint store")


def test_full_disk_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing the raw image comes out of the receiver as NoSpaceError."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    data = rs.whole(BLOCKS, pages(13, range(100), 1.0))
    reader, writer = os.pipe()
    assert os.write(writer, data[:60_000]) == 60_000
    os.close(writer)
    sink = assemble.Assembler(tmp_path)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(errors.NoSpaceError, match="free some space"):
        intake.Receiver(reader, sink, intake.Cancel()).run(lambda *_: None)
    sink.close()
    os.close(reader)


@pytest.mark.parametrize("allowed", [True, False], ids=["large-pipe", "no-larger-pipe"])
def test_a_pipe_that_may_not_be_enlarged_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, allowed: bool
) -> None:
    """It is full before a wait is over: each would hold QEMU up (a checkpoint of 640 MiB: 28 s instead of 5)."""
    control = fcntl.fcntl

    def refusing(descriptor: int, command: int, *rest: int) -> int:
        if command == fcntl.F_SETPIPE_SZ and not allowed:
            raise PermissionError(1, "Operation not permitted")
        return control(descriptor, command, *rest)

    waits: list[float] = []
    monkeypatch.setattr(fcntl, "fcntl", refusing)
    monkeypatch.setattr(time, "sleep", waits.append)
    reader, writer = os.pipe()
    assert os.write(writer, rs.whole(BLOCKS, pages(13, range(10), 1.0))) > 0
    os.close(writer)
    sink = assemble.Assembler(tmp_path)
    assert intake.Receiver(reader, sink, intake.Cancel()).run(lambda *_: None).pages == 10
    assert bool(waits) == allowed
    sink.close()
    os.close(reader)


class StuckStore:
    """A store whose writers take nothing until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.written: dict[int, bytes] = {}

    def image_writer(self, *_: object, **__: object) -> StuckStore:
        return self

    def write(self, offset: int, data: bytes, *, stable: bool = False) -> None:
        assert stable
        assert self.go.wait(DEADLINE)
        self.written[offset] = data


def test_m1_a_stuck_store_does_not_stop_the_stream(tmp_path: Path) -> None:
    records = [(0, n, bytes([1 + n % 250]) * PAGE) for n in range(4000)]
    data = rs.whole(BLOCKS, records)
    reader, writer = os.pipe()
    stuck, cancel, sink = StuckStore(), intake.Cancel(), assemble.Assembler(tmp_path)
    feeder = feed.Feeder(cast(store.Store, stuck), "vm@c", {}, cancel)
    feeding = threading.Thread(target=feeder.run)
    feeding.start()

    def send() -> None:
        with open(writer, "wb") as file:
            file.write(data)

    sending = threading.Thread(target=send)
    sending.start()
    parts = intake.Receiver(reader, sink, cancel).run(feeder.add)
    assert (parts.pages, stuck.written) == (4000, {})  # everything is here, nothing has been stored
    stuck.go.set()
    feeder.close()
    feeding.join(DEADLINE)
    sending.join(DEADLINE)
    assert b"".join(stuck.written[at] for at in sorted(stuck.written)) == bytes(
        rs.memory(BLOCKS, records)[0][: 4000 * PAGE]
    )
    sink.close()
    os.close(reader)


def test_m5_an_unplugged_block_may_have_no_page(tmp_path: Path) -> None:
    blocks = [("pc.ram", RAM_PAGES * PAGE), ("vmem0", RAM_PAGES * PAGE)]
    sink = assemble.Assembler(tmp_path)
    parser = stream.Parser(sink)
    data = rs.whole(blocks, [(0, 5, b"x" * PAGE)])
    assert parser.feed(memoryview(data)) == len(data)
    parser.finish()
    sink.check()
    sink.close()


def test_progress_is_rare_and_ends_with_all(child: Callable[..., Child]) -> None:
    one = child()
    data = rs.whole(BLOCKS, [*pages(14, range(RAM_PAGES), 0.0), (1, 0, b"\0"), (1, 1, b"\0")])
    begun = time.monotonic()
    for at in range(0, len(data), 1000):
        one.send(data[at : at + 1000])
        time.sleep(0.03)
    lines = one.end()
    seconds = time.monotonic() - begun
    total = (RAM_PAGES + 2) * PAGE
    told = [line["progress"]["done"] for line in lines[:-1]]
    assert told == sorted(told)
    assert len(told) <= 5 * seconds + 2
    assert lines[-2]["progress"] == {"done": total, "total": total}

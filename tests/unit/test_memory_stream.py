"""The stream parser against a model: random streams, cut anywhere; every malformed one is a typed error."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.memory import records, stream
from tests.support import ramstream as rs

BLOCKS = [("pc.ram", 64 * rs.PAGE), ("0000:00:01.0/vga.vram", 8 * rs.PAGE), ("/rom@etc/acpi/tables", rs.PAGE)]


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(rs.PAGE)


@st.composite
def record_lists(draw: st.DrawFn) -> list[rs.Record]:
    """Runs of pages or zeros, ascending mostly, with repeats, gaps and other blocks in between."""
    result: list[rs.Record] = []
    for _ in range(draw(st.integers(0, 8))):
        block = draw(st.integers(0, len(BLOCKS) - 1))
        limit = BLOCKS[block][1] // rs.PAGE
        first = draw(st.integers(0, limit - 1))
        step = draw(st.sampled_from([1, 1, 1, 2, -1]))
        kind = draw(st.sampled_from(["page", "zero", "fill"]))
        for index in range(draw(st.integers(1, 20))):
            number = first + index * step
            if 0 <= number < limit:
                content = {"page": page(number + index), "zero": b"\0", "fill": bytes([index])}[kind]
                result.append((block, number, content))
    return result


bitmap = st.binary(max_size=40).map(lambda data: data.replace(b"\x7e", b"\x7d"))


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(record_lists(), max_size=4),
    bitmaps=st.lists(bitmap, min_size=5, max_size=5),
    before=st.booleans(),
    sizes=st.lists(st.integers(1, 9000), max_size=60),
)
def test_random_streams_cut_anywhere(
    parts: list[list[rs.Record]], bitmaps: list[bytes], before: bool, sizes: list[int]
) -> None:
    other = rs.begin(3, "dirty-bitmap", 1) + bitmaps[0] + rs.foot(3)
    head = b"QEVM\0\0\0\x03" + rs.configuration() + (other if before else b"") + rs.ram_start(BLOCKS)
    live = b"" if before else other
    writer = rs.Writer(BLOCKS)
    data = head + live
    for number, part in enumerate(parts):
        data += rs.ram_part(writer.records(part), kind=3 if number == len(parts) - 1 else 2)
        more = b"\x02" + struct.pack(">I", 3) + bitmaps[1 + number] + rs.foot(3)
        data, live = data + more, live + more
    end = rs.tail(b"\x7e\0\0\0\x02\x02\0\0", {"devices": []})
    sink, result = rs.parse(data + end, sizes)
    flat = [record for part in parts for record in part]
    assert sink.blocks == rs.memory(BLOCKS, flat)
    assert (result.head, result.live, result.tail) == (head, live, end)
    assert result.pages == sum(len(content) > 1 for _, _, content in flat)
    assert result.zeros == sum(len(content) == 1 for _, _, content in flat)


@pytest.mark.parametrize("sizes", [(), (1,) * 20_000])
def test_the_beginning_of_the_switchover_is_left_out(sizes: tuple[int, ...]) -> None:
    """As QEMU 10 sends it: after parts of RAM and of sections that have no length."""
    start, opaque = b"\x08\0\x0b\0\0", rs.begin(3, "dirty-bitmap", 1) + b"bits" + rs.foot(3)
    head = b"QEVM\0\0\0\x03" + rs.configuration() + opaque + rs.ram_start(BLOCKS)
    writer = rs.Writer(BLOCKS)
    first, last = (rs.ram_part(writer.records([(0, n, page(n))]), kind=2 + n) for n in (0, 1))
    more = b"\x02" + struct.pack(">I", 3) + b"more" + rs.foot(3)
    sink, result = rs.parse(head + first + more + start + last + rs.tail(), sizes)
    assert sink.blocks == rs.memory(BLOCKS, [(0, 0, page(0)), (0, 1, page(1))])
    assert (result.live, result.tail) == (more, rs.tail())


def test_long_runs_come_out_as_few_events() -> None:
    blocks = [("pc.ram", 4000 * rs.PAGE)]
    content = page(1)
    recs = [(0, n, content) for n in range(2000)] + [(0, n, b"\0") for n in range(2000, 4000)]
    sink, result = rs.parse(rs.whole(blocks, recs))
    assert sink.blocks == rs.memory(blocks, recs)
    assert (result.pages, result.zeros) == (2000, 2000)
    assert sink.events < 20


def test_truncated_anywhere_is_an_error() -> None:
    data = rs.whole(BLOCKS, [(0, 0, page(0)), (1, 0, b"\0"), (2, 0, b"\0")], rs.tail(description={"devices": []}))
    end_of_sections = data.rindex(b"\0\x06") + 1  # the description may be missing
    for length in set(range(len(data))) - {end_of_sections}:
        with pytest.raises(errors.ProtocolError):
            rs.parse(data[:length])


@pytest.mark.parametrize("extra", [b"\0", b"x", b"\0\0\0", b"garbage" * 100, rs.tail()[-3:]])
@pytest.mark.parametrize("description", [None, {"devices": []}])
def test_trailing_garbage(extra: bytes, description: object) -> None:
    with pytest.raises(errors.ProtocolError, match="something behind it"):
        rs.parse(rs.whole(BLOCKS, [], rs.tail(description=description)) + extra)


HEAD = b"QEVM\0\0\0\x03" + rs.configuration()
WORD = struct.Struct(">Q").pack


def after_list(recs: bytes) -> bytes:
    return HEAD + rs.ram_start(BLOCKS) + rs.ram_part(recs) + rs.tail()


MALFORMED = {
    "magic": (b"QFI\xfb" + bytes(100), "does not begin with 'QEVM'"),
    "version": (b"QEVM\0\0\0\x02" + bytes(100), "format version 2"),
    "section type": (HEAD + b"\x55" + bytes(100), "section type 0x55"),
    "machine length": (b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff" + bytes(400), "machine type of 4294967295 bytes"),
    "machine name": (b"QEVM\0\0\0\x03" + rs.configuration("\x01\x02") + bytes(9), "machine type is not a name"),
    "unknown subsection": (
        b"QEVM\0\0\0\x03" + rs.configuration(subsections=rs.subsection("configuration/new", b"")) + bytes(9),
        "unknown configuration subsection",
    ),
    "mapped-ram": (
        b"QEVM\0\0\0\x03"
        + rs.configuration(
            subsections=rs.subsection("configuration/capabilities", b"\0\0\0\x01" + rs.name("mapped-ram"))
        )
        + bytes(9),
        "'mapped-ram' must be off",
    ),
    "page bits": (
        b"QEVM\0\0\0\x03"
        + rs.configuration(subsections=rs.subsection("configuration/target-page-bits", b"\0\0\0\x30"))
        + bytes(9),
        r"pages of 2\*\*48 bytes",
    ),
    "no devices": (HEAD + rs.ram_start(BLOCKS) + b"\0", "without any device state"),
    "no ram": (HEAD + rs.tail(), "without any RAM"),
    "ram version": (HEAD + rs.begin(2, "ram", 3) + rs.block_list(BLOCKS), "version 3"),
    "no list": (HEAD + rs.begin(2, "ram", 4) + WORD(0x10) + bytes(9), "does not begin with its block list"),
    "empty list": (HEAD + rs.begin(2, "ram", 4) + WORD(4) + bytes(9), "block list is empty"),
    "two rams": (HEAD + rs.ram_start(BLOCKS) + rs.begin(9, "ram", 4) + rs.block_list(BLOCKS), "two RAM sections"),
    "same id": (HEAD + rs.ram_start(BLOCKS) + rs.begin(2, "x", 4) + bytes(9), "begins twice"),
    "duplicate block": (HEAD + rs.ram_start([("a", rs.PAGE), ("a", rs.PAGE)]), "listed twice"),
    "block too long": (
        HEAD + rs.begin(2, "ram", 4) + WORD(4096 | 4) + rs.name("a") + WORD(1 << 62) + bytes(9),
        "does not add up",
    ),
    "block of odd length": (
        HEAD + rs.begin(2, "ram", 4) + WORD(8192 | 4) + rs.name("a") + WORD(100),
        "does not add up",
    ),
    "nameless block": (HEAD + rs.begin(2, "ram", 4) + WORD(4096 | 4) + b"\0" + WORD(4096), "not a name"),
    "unknown block": (after_list(WORD(8) + rs.name("pc.rom") + page(0)), "not in the block list"),
    "beyond, named": (after_list(WORD(64 * rs.PAGE | 8) + rs.name("pc.ram") + page(0)), "beyond the end"),
    "beyond, run": (
        after_list(WORD(8) + rs.name("pc.ram") + page(0) + (WORD(1 << 40 | 0x28) + page(1)) * 3),
        "beyond the end",
    ),
    "beyond, zeros": (
        after_list(WORD(8) + rs.name("pc.ram") + page(0) + (WORD((1 << 64) - 4096 | 0x22) + b"\0") * 3),
        "beyond the end",
    ),
    "beyond, the last words there are": (
        after_list(
            WORD(8)
            + rs.name("pc.ram")
            + page(0)
            + b"".join(WORD((1 << 64) - n * 4096 | 0x22) + b"\0" for n in range(20, 0, -1))
        ),
        "beyond the end",
    ),
    "beyond, from inside": (
        after_list(
            WORD(8) + rs.name("pc.ram") + page(0) + b"".join(WORD(n * 4096 | 0x22) + b"\0" for n in range(1, 500))
        ),
        "page 0x40000 is beyond the end",
    ),
    "no block yet": (after_list(WORD(0x28) + page(0)), "does not name its block"),
    "xbzrle": (after_list(WORD(0x60) + bytes(30)), "'xbzrle' must be off"),
    "compress": (after_list(WORD(0x100) + bytes(30)), "'compress' must be off"),
    "multifd": (after_list(WORD(0x200) + bytes(30)), "'multifd' must be off"),
    "rdma": (after_list(WORD(0x80) + bytes(30)), "RDMA"),
    "unknown flag": (after_list(WORD(0x400) + bytes(30)), "flags 0x400"),
    "return path": (HEAD + b"\x08\0\x01\0\0" + bytes(9), "'return-path' must be off"),
    "postcopy": (HEAD + b"\x08\0\x03\0\x10" + bytes(30), "'postcopy-ram'"),
    "switchover with contents": (HEAD + b"\x08\0\x0b\0\x01" + bytes(30), "newer than this program"),
    "no footer": (HEAD + rs.ram_start(BLOCKS)[:-5] + rs.tail(), "no footer"),
    "wrong footer": (HEAD + rs.ram_start(BLOCKS)[:-1] + b"\x09" + rs.tail(), "no footer"),
    "part of nothing": (HEAD + rs.ram_start(BLOCKS) + b"\x02\0\0\0\x05" + bytes(9), "never began"),
    "empty": (b"", "its header"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    data, message = MALFORMED[case]
    with pytest.raises(errors.ProtocolError, match=message) as caught:
        rs.parse(data)
    assert "\n" not in str(caught.value)


MUTABLE = [
    HEAD,
    rs.ram_start(BLOCKS),
    rs.begin(3, "dirty-bitmap", 1) + b"bits" + rs.foot(3),
    b"\x02\0\0\0\x02",
    *(WORD(flags) + rs.name("pc.ram") + page(flags) for flags in (8, 0x2008)),
    *(WORD(flags) + b"\0" for flags in (0x3022, 0x4022, 0x5022)),
    *(WORD(flags) + page(flags) for flags in (0x6028, 0x7028)),
    WORD(0x10) + rs.foot(2),
    rs.tail(description={}),
]


@settings(max_examples=400, deadline=None)
@given(
    where=st.lists(
        st.tuples(st.integers(0, len(MUTABLE) - 1), st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=4
    ),
    sizes=st.lists(st.integers(1, 9000), max_size=20),
)
def test_mutations_are_an_error_or_a_stream(where: list[tuple[int, int, int]], sizes: list[int]) -> None:
    """Never another exception, never a page outside its block (the sink asserts that)."""
    pieces = [bytearray(piece) for piece in MUTABLE]
    for piece, position, value in where:
        pieces[piece][position % len(pieces[piece])] = value
    data = b"".join(pieces)
    try:
        sink, parts = rs.parse(data, sizes)
    except errors.ProtocolError:
        return
    assert [len(block) for block in sink.blocks] == [block.size for block in parts.layout.blocks]


def test_cut_at_every_byte_of_the_small_parts() -> None:
    """The same result, and no record told twice, wherever the first piece ends."""
    data = b"".join(MUTABLE)
    want, parts = rs.parse(data)
    assert (parts.pages, parts.zeros) == (4, 3)
    start = 0
    for piece in MUTABLE:
        for cut in {*range(min(len(piece), 300)), *range(max(len(piece) - 12, 0), len(piece))}:
            sink, again = rs.parse(data, [start + cut])
            assert again == parts
            assert sink.blocks == want.blocks
        start += len(piece)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=2000), sizes=st.lists(st.integers(1, 300), max_size=10))
def test_noise_is_an_error(data: bytes, sizes: list[int]) -> None:
    for start in (b"", HEAD, HEAD + rs.ram_start(BLOCKS)):
        with pytest.raises(errors.ProtocolError):
            rs.parse(start + data, sizes)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_OPAQUE", 10_000)
    monkeypatch.setattr(stream, "MAX_TAIL", 10_000)
    with pytest.raises(errors.ProtocolError, match="10000 bytes of live sections"):
        rs.parse(HEAD + rs.begin(1, "block", 1) + b"disk" * 5000, [100] * 300)
    with pytest.raises(errors.ProtocolError, match="10000 bytes of device state"):
        rs.parse(rs.whole(BLOCKS, [], rs.device(9, "gpu", bytes(20_000))), [100] * 300)


def test_an_unfinished_list_is_not_waited_for_forever() -> None:
    many = b"".join(rs.name("x" * 200 + str(n)) + WORD(4096) for n in range(9000))
    with pytest.raises(errors.ProtocolError):
        rs.parse(HEAD + rs.begin(2, "ram", 4) + WORD(1 << 40 | 4) + many)


def test_a_footer_inside_another_section_does_not_end_it() -> None:
    """The rule for live sections of unknown length: footer *and* a believable next section."""
    inside = b"data" + rs.foot(3) + b"\x02\0\0\0\x63" + b"more" + rs.foot(3) + b"\x04\0\0\0\x09\0" + b"end"
    other = rs.begin(3, "dirty-bitmap", 1) + inside + rs.foot(3)
    _, parts = rs.parse(HEAD + rs.ram_start(BLOCKS) + other + rs.ram_part(b"") + rs.tail())
    assert parts.live == other


def test_configuration() -> None:
    subs = rs.subsection("configuration/target-page-bits", struct.pack(">I", 14))
    subs += rs.subsection("configuration/capabilities", struct.pack(">I", 1) + rs.name("x-ignore-shared"))
    subs += rs.subsection("configuration/uuid", bytes(range(16)))
    cursor = records.Cursor(rs.configuration("virt-7.2", subs) + b"\x01", 1)
    assert records.read_configuration(cursor) == records.Configuration(
        "virt-7.2", 14, ("x-ignore-shared",), bytes(range(16))
    )


def test_ignore_shared_block_list_has_addresses() -> None:
    subs = rs.subsection("configuration/capabilities", struct.pack(">I", 1) + rs.name("x-ignore-shared"))
    blocks = struct.pack(">Q", rs.PAGE | 4) + rs.name("mem0") + WORD(rs.PAGE) + WORD(0x100000000)
    data = b"QEVM\0\0\0\x03" + rs.configuration(subsections=subs)
    data += rs.begin(2, "ram", 4) + blocks + WORD(0x10) + rs.foot(2) + rs.tail()
    _, parts = rs.parse(data)
    assert parts.layout.blocks == (records.Block("mem0", rs.PAGE, rs.PAGE, 0x100000000),)


def test_no_configuration_section() -> None:
    _, parts = rs.parse(b"QEVM\0\0\0\x03" + rs.ram_start(BLOCKS) + rs.tail())
    assert parts.layout.configuration == records.Configuration()

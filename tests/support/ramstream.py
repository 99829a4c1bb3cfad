"""Synthetic migration streams and a model of the memory in them.

Written from the format's description, not from the product's writer, so that both can be compared.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from blkckpt.memory import stream

PAGE = 4096
RAM = 2
"""The RAM section's id, as in QEMU 7.2."""

Record = tuple[int, int, bytes]
"""(block number, page number, contents: a page, or one byte for a page of it)."""


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def begin(section: int, text: str, version: int, kind: int = 1) -> bytes:
    return struct.pack(">BI", kind, section) + name(text) + struct.pack(">II", 0, version)


def foot(section: int) -> bytes:
    return struct.pack(">BI", 0x7E, section)


def configuration(machine: str = "pc-q35-7.2", subsections: bytes = b"") -> bytes:
    return b"\x07" + struct.pack(">I", len(machine)) + machine.encode() + subsections


def subsection(text: str, data: bytes) -> bytes:
    return b"\x05" + name(text) + struct.pack(">I", 1) + data


def block_list(blocks: Sequence[tuple[str, int]]) -> bytes:
    total = sum(size for _, size in blocks)
    return struct.pack(">Q", total | 4) + b"".join(name(text) + struct.pack(">Q", size) for text, size in blocks)


def ram_start(blocks: Sequence[tuple[str, int]]) -> bytes:
    return begin(RAM, "ram", 4) + block_list(blocks) + struct.pack(">Q", 0x10) + foot(RAM)


def ram_part(records: bytes, kind: int = 2) -> bytes:
    return struct.pack(">BI", kind, RAM) + records + struct.pack(">Q", 0x10) + foot(RAM)


def device(section: int, text: str, data: bytes) -> bytes:
    return begin(section, text, 1, kind=4) + data + foot(section)


def tail(data: bytes = b"ticks", description: object | None = None) -> bytes:
    end = b"\0"
    if description is not None:
        raw = json.dumps(description).encode()
        end += b"\x06" + struct.pack(">I", len(raw)) + raw
    return device(7, "timer", data) + end


@dataclass
class Writer:
    """Writes records as QEMU does: the block's name only when it changes."""

    blocks: Sequence[tuple[str, int]]
    last: int | None = None

    def record(self, block: int, page: int, content: bytes) -> bytes:
        flags = (2 if len(content) == 1 else 8) | (0x20 if block == self.last else 0)
        named = b"" if block == self.last else name(self.blocks[block][0])
        self.last = block
        return struct.pack(">Q", page * PAGE | flags) + named + content

    def records(self, records: Iterable[Record]) -> bytes:
        return b"".join(self.record(*record) for record in records)


def memory(blocks: Sequence[tuple[str, int]], records: Iterable[Record]) -> list[bytearray]:
    """What the blocks hold after *records*."""
    contents = [bytearray(size) for _, size in blocks]
    for block, page, content in records:
        contents[block][page * PAGE : (page + 1) * PAGE] = content if len(content) == PAGE else content * PAGE
    return contents


def whole(blocks: Sequence[tuple[str, int]], records: Iterable[Record], end: bytes | None = None) -> bytes:
    """A complete stream with all records in one part."""
    return (
        b"QEVM\0\0\0\x03"
        + configuration()
        + ram_start(blocks)
        + ram_part(Writer(blocks).records(records))
        + (tail() if end is None else end)
    )


@dataclass
class Memory:
    """A sink that is the memory, page by page."""

    blocks: list[bytearray] = field(default_factory=list)
    ram: stream.Layout | None = None
    events: int = 0

    def layout(self, layout: stream.Layout) -> None:
        assert self.ram is None
        self.ram = layout
        self.blocks = [bytearray(block.size) for block in layout.blocks]

    def pages(self, block: int, first: int, count: int, data: memoryview, offset: int, stride: int) -> None:
        self.events += 1
        for number in range(count):
            start = offset + number * stride
            assert len(data) >= start + PAGE
            self.blocks[block][(first + number) * PAGE : (first + number + 1) * PAGE] = data[start : start + PAGE]
        assert len(self.blocks[block]) >= (first + count) * PAGE

    def zeros(self, block: int, first: int, count: int, fill: int) -> None:
        self.events += 1
        self.blocks[block][first * PAGE : (first + count) * PAGE] = bytes([fill]) * (count * PAGE)


def parse(data: bytes, sizes: Iterable[int] = ()) -> tuple[Memory, stream.Parts]:
    """Feed *data* in pieces of *sizes* (the rest at once), as a reader of a pipe would."""
    sink = Memory()
    parser = stream.Parser(sink)
    pending = bytearray()
    pos = 0
    for size in [*sizes, len(data)]:
        pending += data[pos : pos + size]
        pos += size
        done = parser.feed(memoryview(bytes(pending)))
        del pending[:done]
    return sink, parser.finish(len(pending))

"""Parsing QEMU's migration stream in bulk (the words are in :mod:`blkckpt.memory.records`).

The parser is fed views of whatever has arrived and says how much it has consumed; it never reads, and keeps nothing
but the bytes that are not RAM records.  Runs of like records are recognised with a few strided numpy views each, and
come out as *(block, first page, count)*: a record of a page is a page and 8 bytes, one of a zero page 9 bytes, so that
within a run the headers lie at a fixed stride.  The pages themselves are never touched here.

States, and what ends them::

    header ─ magic, version ─> sections
    sections ─ 0x07 configuration ─> sections
             ─ 0x01 ram ─> records       ─ 0x01 other ─> opaque
             ─ 0x02, 0x03 ─> records or opaque, by section id
             ─ 0x08 the switchover begins ─> sections      (left out)
             ─ 0x04 ─> tail              (device state: nothing after it is looked into)
    records ─ end word, footer ─> sections
    opaque ─ footer and a believable next section ─> sections
    tail ─ end of the stream

A live section that is not ``ram`` has no length.  Rule: it ends at the first ``0x7e`` and its own section id that are
followed by what can only be a next section — a part or end of a section already begun, a start or full with an id
not used so far and a printable name, or the one command that is allowed.  Its bytes are kept verbatim; no more than
:data:`MAX_OPAQUE` of them.

Where the device state begins is known (the first full section), where it ends is the end of the stream; it is whole
if it ends with the description's JSON of exactly the length stated, or with a section's footer and 0x00.

Every byte that cannot be what it should be raises :class:`errors.ProtocolError`; a parser that raised is dead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blkckpt import errors
from blkckpt.memory import records

MAX_OPAQUE = 64 << 20
"""Bytes kept of live sections other than ``ram``; dirty bitmaps are kilobytes, block migration would be the disk."""

MAX_TAIL = 512 << 20
"""Bytes of device state kept.  Usually 0.1-0.5 MB; a virtio-gpu saves its resources' pixels, tens of MB."""

MAX_PENDING = (1 << 16) + 512
"""What :meth:`Parser.feed` may leave unconsumed at most: one record of the largest page with a block's name."""

_MAX_LIST = records.MAX_BLOCKS * (1 + 255 + 8 + 8) + 8
_SAME_PAGE = records.PAGE | records.SAME
_SAME_ZERO = records.ZERO | records.SAME
_SHORT = 8
"""Records of a run that are looked at one by one."""

_FIRST_WINDOW = 128
_WINDOW = 1 << 14
"""Records looked at in bulk, first and at most: what does not belong to the run has been looked at in vain."""


class Sink(Protocol):
    """What receives the RAM records, in the order of the stream."""

    def layout(self, layout: Layout) -> None:
        """The block list was read; called once, before any page."""

    def pages(self, block: int, first: int, count: int, data: memoryview, offset: int, stride: int) -> None:
        """Pages *first* … of block number *block*; page i is at ``data[offset + i * stride:]``.

        *data* is the caller's buffer, valid until this returns.
        """

    def zeros(self, block: int, first: int, count: int, fill: int) -> None:
        """Pages *first* … consist of the byte *fill* (0 in every QEMU since 1.5)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The RAM section: its id, the blocks in the stream's order, the configuration they came with."""

    section: int
    blocks: tuple[records.Block, ...]
    configuration: records.Configuration
    page_size: int


@dataclass(frozen=True, slots=True)
class Parts:
    """All of a stream that is not a RAM record.

    ``head`` ends with the footer of the RAM section's start; ``live`` are the other live sections after it;
    ``tail`` is from the first device section to the end.
    """

    layout: Layout
    head: bytes
    live: bytes
    tail: bytes
    pages: int
    zeros: int


class Parser:
    """Incremental parser; see the module.  Not thread-safe; raises what the sink raises."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._step: Callable[[memoryview, int], int] = self._header
        self._configuration = records.Configuration()
        self._layout: Layout | None = None
        self._live_sections: dict[int, str] = {}
        self._ram: int | None = None
        self._skipping = -1
        self._last = -1
        self._numbers: dict[str, int] = {}
        self._limits: list[int] = []
        self._set_page_size(1 << records.DEFAULT_PAGE_BITS)
        self._head, self._live, self._tail = bytearray(), bytearray(), bytearray()
        self.pages = 0
        self.zeros = 0

    def _set_page_size(self, size: int) -> None:
        self._page_size = size
        self._bits = size.bit_length() - 1
        self._mask = size - 1
        self._steps = np.arange(_WINDOW, dtype=np.uint64) * np.uint64(size)

    def feed(self, data: memoryview) -> int:
        """Parse *data* as far as it goes and return how many bytes are done with.

        The rest, never more than :data:`MAX_PENDING` once the block list is read, must come again at the front of
        the next call.  Ends in an error or consumes, so a caller that adds bytes makes progress.
        """
        pos = 0
        while pos < len(data):
            step = self._step
            try:
                done = step(data, pos)
            except records.ShortError:
                break
            if done == pos and self._step == step:
                break
            pos = done
        if len(data) - pos > (MAX_PENDING if self._layout else _MAX_LIST):
            raise errors.ProtocolError("memory stream: an item is longer than any item may be")
        return pos

    def finish(self, rest: int = 0) -> Parts:
        """The stream has ended, with *rest* bytes unconsumed.  Raises if it was not whole."""
        if rest or self._step != self._in_tail or self._layout is None:
            raise errors.ProtocolError(
                f"memory stream: it ends in the middle of {self._where()}; "
                "QEMU or the migration stopped early, and the checkpoint is not usable"
            )
        records.check_tail(self._tail)
        return Parts(self._layout, bytes(self._head), bytes(self._live), bytes(self._tail), self.pages, self.zeros)

    def _where(self) -> str:
        names = {"_header": "its header", "_in_records": "the RAM", "_in_opaque": "a live section"}
        return names.get(self._step.__name__, "its sections")

    # Small items.  Each step takes the data and a position and returns the position after what it consumed.

    def _keep(self, data: memoryview, start: int, stop: int) -> None:
        """Keep the bytes verbatim: before the RAM's list in the head, after it with the live sections."""
        target = self._head if self._layout is None else self._live
        if len(target) + stop - start > MAX_OPAQUE:
            raise errors.ProtocolError(
                f"memory stream: more than {MAX_OPAQUE} bytes of live sections that are not RAM; "
                "migration of block devices ('block') and of vfio devices is not supported"
            )
        target += data[start:stop]

    def _header(self, data: memoryview, pos: int) -> int:
        cursor = records.Cursor(data, pos)
        records.check_header(cursor)
        if cursor.peek() == records.CONFIGURATION:
            cursor.u8()
            self._configuration = records.read_configuration(cursor)
            self._set_page_size(1 << self._configuration.page_bits)
        self._keep(data, pos, cursor.pos)
        self._step = self._sections
        return cursor.pos

    def _sections(self, data: memoryview, pos: int) -> int:
        cursor = records.Cursor(data, pos)
        kind = cursor.u8()
        if kind == records.EOF:
            raise errors.ProtocolError("memory stream: it ends without any device state")
        if kind == records.FULL:
            if self._layout is None:
                raise errors.ProtocolError("memory stream: device state without any RAM before it")
            self._step = self._in_tail
            return pos
        if kind == records.START:
            return self._start(data, pos, cursor)
        if kind in (records.PART, records.END):
            return self._part(data, pos, cursor)
        if kind == records.COMMAND:
            records.read_command(cursor)
            return cursor.pos
        raise errors.ProtocolError(f"memory stream: section type {kind:#x} is not one of format 3")

    def _start(self, data: memoryview, pos: int, cursor: records.Cursor) -> int:
        section = cursor.u32()
        name = cursor.name("a section")
        cursor.u32()
        version = cursor.u32()
        if section in self._live_sections:
            raise errors.ProtocolError(f"memory stream: section {section} begins twice")
        if name != "ram":
            self._begin_opaque(section, data, pos, cursor.pos)
        else:
            self._begin_ram(section, version, data, pos, cursor)
        self._live_sections[section] = name
        return cursor.pos

    def _begin_opaque(self, section: int, data: memoryview, pos: int, stop: int) -> None:
        self._keep(data, pos, stop)
        self._skipping = section
        self._step = self._in_opaque

    def _begin_ram(self, section: int, version: int, data: memoryview, pos: int, cursor: records.Cursor) -> None:
        """Read the section's start as far as the block list; its own end word and footer follow as records."""
        if self._layout is not None:
            raise errors.ProtocolError("memory stream: there are two RAM sections")
        if version != records.RAM_VERSION:
            raise errors.ProtocolError(f"memory stream: RAM section version {version}, only 4 is understood")
        word = cursor.u64()
        if word & self._mask != records.LIST:
            raise errors.ProtocolError("memory stream: the RAM section does not begin with its block list")
        blocks = records.read_blocks(cursor, word & ~self._mask, self._configuration)
        self._keep(data, pos, cursor.pos)
        self._head += records.word(0, records.EOS) + records.footer(section)
        self._ram = section
        self._numbers = {block.name: number for number, block in enumerate(blocks)}
        self._limits = [block.size >> self._bits for block in blocks]
        self._layout = Layout(section, blocks, self._configuration, self._page_size)
        self._sink.layout(self._layout)
        self._step = self._in_records

    def _part(self, data: memoryview, pos: int, cursor: records.Cursor) -> int:
        section = cursor.u32()
        if section not in self._live_sections:
            raise errors.ProtocolError(f"memory stream: a part of section {section}, which never began")
        if section == self._ram:
            self._step = self._in_records
        else:
            self._begin_opaque(section, data, pos, cursor.pos)
        return cursor.pos

    # Live sections that are not RAM.

    def _in_opaque(self, data: memoryview, pos: int) -> int:
        mark = records.footer(self._skipping)
        raw = bytes(data[pos:])
        found = raw.find(mark)
        while found >= 0:
            try:
                if self._is_section(records.Cursor(raw, found + len(mark))):
                    self._keep(data, pos, pos + found + len(mark))
                    self._step = self._sections
                    return pos + found + len(mark)
            except records.ShortError:
                break
            found = raw.find(mark, found + 1)
        stop = pos + (found if found >= 0 else max(0, len(raw) - len(mark) + 1))
        self._keep(data, pos, stop)
        return stop

    def _is_section(self, cursor: records.Cursor) -> bool:
        """Whether what is at the cursor can only be the opening of a section (see the module's rule)."""
        kind = cursor.u8()
        if kind in (records.PART, records.END):
            return cursor.u32() in self._live_sections
        if kind == records.COMMAND:
            return cursor.take(len(records.SWITCHOVER_START)) == records.SWITCHOVER_START
        if kind not in (records.START, records.FULL):
            return False
        if cursor.u32() in self._live_sections:
            return False
        try:
            cursor.name("a section")
        except errors.ProtocolError:
            return False
        return True

    # RAM records: the bulk of the stream.

    def _in_records(self, data: memoryview, pos: int) -> int:
        """All the runs there are, or else one record of another kind.

        (Never both: a step that raises ``ShortError`` must not have told the sink anything.)
        """
        done = self._runs(data, pos)
        if done != pos or len(data) - pos < 9:
            return done
        flags = records.WORD.unpack_from(data, pos)[0] & self._mask
        if flags == _SAME_PAGE:
            return pos  # not all of it is here
        if flags == records.EOS:
            return self._end_of_records(data, pos)
        return self._named(data, pos, flags)

    def _runs(self, data: memoryview, pos: int) -> int:
        """Tell the sink every whole record of the same block from *pos* on, until one of another kind."""
        size, mask, end = self._page_size, self._mask, len(data)
        unpack = records.WORD.unpack_from
        while end - pos >= 9:
            word = unpack(data, pos)[0]
            flags = word & mask
            if flags == _SAME_PAGE:
                stride = size + 8
            elif flags == _SAME_ZERO:
                stride = 9
            else:
                break
            room = (end - pos) // stride
            if not room:
                break
            first = word >> self._bits
            self._check(first, 1)
            count = self._consecutive(data, pos, word, stride, room)
            self._check(first, count)
            if stride == 9:
                self._sink.zeros(self._last, first, count, data[pos + 8])
                self.zeros += count
            else:
                self._sink.pages(self._last, first, count, data, pos + 8, stride)
                self.pages += count
            pos += count * stride
        return pos

    def _consecutive(self, data: memoryview, pos: int, word: int, stride: int, room: int) -> int:
        """How many records from *pos* on have the same flags (and fill) and addresses that go up page by page.

        All of that is one comparison with ``word + i * page size``: in Python for the first few (most runs of a busy
        guest are short, and a numpy call costs as much as ten of these), then in bulk.
        """
        unpack = records.WORD.unpack_from
        step = self._page_size
        count, at, want = 1, pos + stride, word + step
        while count < min(room, _SHORT):
            if unpack(data, at)[0] != want or (stride == 9 and data[at + 8] != data[pos + 8]):
                return count
            count, at, want = count + 1, at + stride, want + step
        window = _FIRST_WINDOW
        while count < room:
            number = min(room - count, window)
            at = pos + count * stride
            same = np.ndarray((number,), ">u8", data, at, (stride,)) == self._steps[:number] + np.uint64(want)
            if stride == 9:
                same &= np.ndarray((number,), np.uint8, data, at + 8, (stride,)) == data[pos + 8]
            if not same.all():
                return count + int(same.argmin())
            count, want = count + number, want + number * step
            window = min(window * 8, _WINDOW)
        return count

    def _check(self, first: int, count: int) -> None:
        """Raise unless a block has been named and *count* pages from *first* on are inside of it."""
        if self._last < 0:
            raise errors.ProtocolError("memory stream: the first RAM record does not name its block")
        if first + count > self._limits[self._last]:
            self._beyond(max(first, self._limits[self._last]))

    def _beyond(self, number: int) -> None:
        assert self._layout is not None
        block = self._layout.blocks[self._last]
        raise errors.ProtocolError(
            f"memory stream: page {number << self._bits:#x} is beyond the end of RAM block {block.name!r}, "
            f"which is {block.size:#x} bytes"
        )

    def _named(self, data: memoryview, pos: int, flags: int) -> int:
        """One record that names its block, as the first of each block does."""
        if flags not in (records.PAGE, records.ZERO):
            raise records.foreign_flags(flags)
        cursor = records.Cursor(data, pos)
        number = cursor.u64() >> self._bits
        name = cursor.name("a RAM record's block")
        if name not in self._numbers:
            raise errors.ProtocolError(f"memory stream: a page of RAM block {name!r}, which is not in the block list")
        start = cursor.pos
        content = cursor.take(1) if flags == records.ZERO else cursor.take(self._page_size)
        self._last = self._numbers[name]
        self._check(number, 1)
        if flags == records.ZERO:
            self._sink.zeros(self._last, number, 1, content[0])
            self.zeros += 1
        else:
            self._sink.pages(self._last, number, 1, data, start, self._page_size)
            self.pages += 1
        return cursor.pos

    def _end_of_records(self, data: memoryview, pos: int) -> int:
        cursor = records.Cursor(data, pos + 8)
        if cursor.u8() != records.FOOTER or cursor.u32() != self._ram:
            raise errors.ProtocolError(
                "memory stream: no footer after a part of the RAM section; machine types up to 2.3 write none "
                "(use a newer machine type)"
            )
        self._step = self._sections
        return cursor.pos

    def _in_tail(self, data: memoryview, pos: int) -> int:
        if len(self._tail) + len(data) - pos > MAX_TAIL:
            raise errors.ProtocolError(f"memory stream: more than {MAX_TAIL} bytes of device state")
        self._tail += data[pos:]
        return len(data)

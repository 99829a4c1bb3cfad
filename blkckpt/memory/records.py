"""The words of QEMU's migration stream, format 3: constants, small parsers, no state.

All integers are big-endian.  A stream is::

    u32  "QEVM"
    u32  3
    u8 0x07, u32 length, machine type, subsections     the configuration (absent on very old machine types)
    sections until u8 0x00
    u8 0x06, u32 length, JSON                          the description of the device sections (may be absent)

    section:     u8 1 (start) or 4 (full), u32 id, u8 length, name, u32 instance, u32 version, data, footer
                 u8 2 (part) or 3 (end), u32 id, data, footer
    footer:      u8 0x7e, u32 id
    command:     u8 8, u16 command, u16 length, data
    subsection:  u8 5, u8 length, name, u32 version, data

The data of section ``ram`` (version 4) are words ``address | flags``, a page's size apart in address so that the low
bits hold the flags:

=====  ================================================================================================
0x002  a page of one repeated byte (in practice zero): [name], u8 fill
0x004  the block list: the word's address is the total; until it is reached: u8 length, name, u64 used
       length [, u64 address, when the configuration lists ``x-ignore-shared``]
0x008  a page: [name], the page
0x010  the end of this section's data
0x020  added to the two kinds of page: the block of the record before; else ``name`` is u8 length, name
=====  ================================================================================================

Every other flag belongs to a capability that must be off for a checkpoint (:data:`FOREIGN_FLAGS`).
Sources: QEMU ``migration/savevm.c``, ``migration/ram.c`` (read for the format only); streams of QEMU 7.2.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from blkckpt import errors

MAGIC = b"QEVM"
VERSION = 3

EOF = 0x00
START = 0x01
PART = 0x02
END = 0x03
FULL = 0x04
SUBSECTION = 0x05
DESCRIPTION = 0x06
CONFIGURATION = 0x07
COMMAND = 0x08
FOOTER = 0x7E

ZERO = 0x02
LIST = 0x04
PAGE = 0x08
EOS = 0x10
SAME = 0x20

FOREIGN_FLAGS = {
    0x001: "pages of an obsolete kind (a QEMU before 1.0)",
    0x040: "XBZRLE pages: capability 'xbzrle' must be off",
    0x080: "RDMA hooks: migrate to a file descriptor, not over RDMA",
    0x100: "compressed pages: capability 'compress' must be off",
    0x200: "a multifd synchronisation point: capability 'multifd' must be off",
}

FOREIGN_COMMANDS = {
    1: "capability 'return-path' must be off",
    2: "capability 'return-path' must be off",
    10: "capability 'x-colo' must be off",
    11: "its contents are of a QEMU newer than this program",
}
"""Commands speak to a live destination; a checkpoint has none.  Those not listed belong to postcopy."""

SWITCHOVER_START = bytes((0, 11, 0, 0))
"""The one command that asks for no answer, ``MIG_CMD_SWITCHOVER_START`` (QEMU 10.0 and later) and its length: the
machine has stopped.  Plain migrations have it, background snapshots do not, and QEMU loads a stream without it."""

FOREIGN_CAPABILITIES = {"mapped-ram": "capability 'mapped-ram' must be off"}

RAM_VERSION = 4
DEFAULT_PAGE_BITS = 12
MAX_MACHINE = 256
MAX_CAPABILITIES = 64
MAX_BLOCKS = 4096
MAX_RAM = 1 << 48
"""Longest RAM block believed, 256 TiB: x86-64 addresses no more."""

WORD = struct.Struct(">Q")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class ShortError(Exception):
    """More bytes are needed (never leaves the package)."""


@dataclass(frozen=True, slots=True)
class Block:
    """One RAM block: QEMU's name for it, its used length, the guest address if the stream has it."""

    name: str
    size: int
    page_size: int
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the configuration section says."""

    machine: str = ""
    page_bits: int = DEFAULT_PAGE_BITS
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None


class Cursor:
    """Reads the small items of a stream at ``pos``; raises :class:`ShortError` where the bytes end."""

    def __init__(self, data: memoryview | bytes, pos: int = 0, end: int | None = None) -> None:
        self.data = data
        self.pos = pos
        self.end = len(data) if end is None else end

    def take(self, count: int) -> bytes:
        stop = self.pos + count
        if stop > self.end:
            raise ShortError
        start, self.pos = self.pos, stop
        return bytes(self.data[start:stop])

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(WORD.unpack(self.take(8))[0])

    def peek(self) -> int:
        if self.pos >= self.end:
            raise ShortError
        return self.data[self.pos]

    def text(self, length: int, what: str) -> str:
        raw = self.take(length)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            raise errors.ProtocolError(f"memory stream: the name of {what} is not a name: {raw[:40]!r}")
        return text

    def name(self, what: str) -> str:
        """A length byte and that many bytes of printable text, not empty."""
        return self.text(self.u8(), what)


def word(address: int, flags: int) -> bytes:
    return WORD.pack(address | flags)


def packed_name(name: str) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw


def part(section: int) -> bytes:
    """The opening of one more part of live section *section*."""
    return bytes([PART]) + _U32.pack(section)


def footer(section: int) -> bytes:
    return bytes([FOOTER]) + _U32.pack(section)


def check_header(cursor: Cursor) -> None:
    """Read the file header; raises :class:`errors.ProtocolError` for anything but format 3."""
    if cursor.take(4) != MAGIC:
        raise errors.ProtocolError("memory stream: it does not begin with 'QEVM'; this is not a QEMU migration stream")
    version = cursor.u32()
    if version != VERSION:
        raise errors.ProtocolError(f"memory stream: format version {version}, only {VERSION} is understood")


def read_configuration(cursor: Cursor) -> Configuration:
    """Read a configuration section whose type byte has been read, to the end of its subsections.

    The section has no length: a subsection of a kind not known here cannot be skipped and is an error.
    """
    length = cursor.u32()
    if not 0 < length <= MAX_MACHINE:
        raise errors.ProtocolError(f"memory stream: a machine type of {length} bytes")
    machine = cursor.text(length, "the machine type")
    page_bits = DEFAULT_PAGE_BITS
    capabilities: tuple[str, ...] = ()
    uuid = None
    while cursor.peek() == SUBSECTION:
        cursor.u8()
        name = cursor.name("a configuration subsection")
        cursor.u32()
        if name == "configuration/target-page-bits":
            page_bits = cursor.u32()
        elif name == "configuration/capabilities":
            capabilities = _read_capabilities(cursor)
        elif name == "configuration/uuid":
            uuid = cursor.take(16)
        else:
            raise errors.ProtocolError(f"memory stream: unknown configuration subsection {name!r}")
    if not 12 <= page_bits <= 16:
        raise errors.ProtocolError(f"memory stream: pages of 2**{page_bits} bytes; 4 KiB to 64 KiB are understood")
    return Configuration(machine, page_bits, capabilities, uuid)


def _read_capabilities(cursor: Cursor) -> tuple[str, ...]:
    count = cursor.u32()
    if count > MAX_CAPABILITIES:
        raise errors.ProtocolError(f"memory stream: {count} capabilities in the configuration")
    names = tuple(cursor.name("a capability") for _ in range(count))
    for name in names:
        if name in FOREIGN_CAPABILITIES:
            raise errors.ProtocolError(f"memory stream: {FOREIGN_CAPABILITIES[name]}")
    return names


def read_blocks(cursor: Cursor, total: int, configuration: Configuration) -> tuple[Block, ...]:
    """Read the block list that follows a ``LIST`` word of *total* bytes."""
    page_size = 1 << configuration.page_bits
    with_address = "x-ignore-shared" in configuration.capabilities
    blocks: dict[str, Block] = {}
    while total > 0:
        name = cursor.name("a RAM block")
        size = cursor.u64()
        if name in blocks:
            raise errors.ProtocolError(f"memory stream: RAM block {name!r} is listed twice")
        if not 0 < size <= min(total, MAX_RAM) or size % page_size or len(blocks) == MAX_BLOCKS:
            raise errors.ProtocolError(
                f"memory stream: the RAM block list does not add up at {name!r} ({size} of {total} bytes left); "
                "if huge pages back the RAM, capability 'postcopy-ram' must be off"
            )
        blocks[name] = Block(name, size, page_size, cursor.u64() if with_address else None)
        total -= size
    if not blocks:
        raise errors.ProtocolError("memory stream: the RAM block list is empty")
    return tuple(blocks.values())


def read_command(cursor: Cursor) -> None:
    """Pass over a command that says nothing to a checkpoint; ProtocolError for any other."""
    word = cursor.take(len(SWITCHOVER_START))
    if word != SWITCHOVER_START:
        raise foreign_command(int.from_bytes(word[:2], "big"))


def foreign_command(command: int) -> errors.ProtocolError:
    reason = FOREIGN_COMMANDS.get(command, "capabilities 'postcopy-ram' and 'postcopy-preempt' must be off")
    return errors.ProtocolError(f"memory stream: command {command} for a live destination: {reason}")


def foreign_flags(flags: int) -> errors.ProtocolError:
    for bit, reason in FOREIGN_FLAGS.items():
        if flags & bit:
            return errors.ProtocolError(f"memory stream: {reason}")
    return errors.ProtocolError(f"memory stream: a RAM record with flags {flags:#x}, which mean nothing")


def check_tail(tail: bytes | bytearray) -> None:
    """Raise :class:`errors.ProtocolError` unless the device state in *tail* is whole.

    It is if it ends with the description's JSON of exactly the length stated, or (machines with
    ``suppress-vmdesc``) with the footer of a section that is in it and the end byte.
    """
    if find_description(tail) is not None:
        return
    if tail[-1:] == b"\0" and _ends_with_footer(tail):
        return
    raise errors.ProtocolError(
        "memory stream: the device state is cut off or has something behind it; the checkpoint is not usable"
    )


def _ends_with_footer(tail: bytes | bytearray) -> bool:
    if len(tail) < 6 or tail[-6] != FOOTER:
        return False
    return tail.find(bytes([FULL]) + tail[-5:-1], 0, len(tail) - 6) >= 0


def find_description(tail: bytes | bytearray) -> bytes | None:
    """The JSON at the end of the device state, if it is there and has exactly the length stated."""
    last = tail.rfind(b"\0")  # the JSON has no NUL, so the last one is the mark's or in the length
    for found in range(last, last - 6, -1):
        start = found + 6
        if found < 0 or tail[found : found + 2] != bytes([EOF, DESCRIPTION]):
            continue
        if start <= len(tail) and int.from_bytes(tail[found + 2 : start]) == len(tail) - start:
            text = bytes(tail[start:])
            return text if _is_object(text) else None
    return None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False

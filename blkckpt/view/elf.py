"""An ELF core file of a machine, as QEMU's ``dump-guest-memory`` writes it.  Pure.

::

    0          ELF header, program headers: one PT_NOTE, one PT_LOAD a range (p_paddr its physical address, p_vaddr 0)
    …          notes, for each processor: "CORE" NT_PRSTATUS (336 bytes), then all "QEMU" type 0 (440 bytes)
    1 MiB      the ranges, one after the other

The head always takes :data:`HEAD` bytes, zeros at its end, so that the file's size and the place of every byte of
memory are known without decoding the device state.  A core of processors whose registers cannot be had, or are too
many for the head, has no notes.

Layouts (little-endian)::

    NT_PRSTATUS  112 zeros but u32 pid at 32 · 27 u64: r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi
                 orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs · 8 zeros
    QEMU         u32 version (1) · u32 size (440) · 16 u64: rax rbx rcx rdx rsi rdi rsp rbp r8 … r15 · u64 rip, rflags ·
                 10 segments (u32 selector, limit, flags, 0 · u64 base): cs ds es fs gs ss ldt tr gdt idt ·
                 5 u64: cr0 … cr4 · u64 kernel_gs_base

Sources: ELF-64 object file format; QEMU ``target/i386/arch_dump.c`` (read for the layout only).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from blkckpt.view import physical

HEAD = 1 << 20
"""Room for the notes of about 1,200 processors."""

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SEGMENT = struct.Struct("<IIIIQ")
_EM_X86_64 = 62
_ET_CORE = 4
_PT_LOAD, _PT_NOTE = 1, 4
_NT_PRSTATUS = 1

_ORDER = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
"""QEMU's order in ``env.regs``."""

_PRSTATUS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
)  # fmt: skip
_QEMU = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""QEMU's order in ``env.segs``."""

Processor = Mapping[str, Any]
"""The decoded fields of one ``cpu`` section (:mod:`blkckpt.view.devices`)."""


def size(ranges: Sequence[physical.Range]) -> int:
    """The length of the whole file."""
    return HEAD + sum(one.size for one in ranges)


def head(ranges: Sequence[physical.Range], processors: Sequence[Processor]) -> bytes:
    """The first :data:`HEAD` bytes."""
    count = len(ranges) + 1
    start = _EHDR.size + count * _PHDR.size
    text = notes(processors)
    if start + len(text) > HEAD:
        text = b""
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    data = bytearray(_EHDR.pack(
        identity, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, count, 0, 0, 0
    ))  # fmt: skip
    data += _PHDR.pack(_PT_NOTE, 0, start, 0, 0, len(text), len(text), 0)
    offset = HEAD
    for one in ranges:
        data += _PHDR.pack(_PT_LOAD, 0, offset, 0, one.address, one.size, one.size, 0)
        offset += one.size
    data += text
    return bytes(data) + bytes(HEAD - len(data))


def notes(processors: Sequence[Processor]) -> bytes:
    """The notes of all *processors*; none at all if the registers of one of them are not there."""
    try:
        status = [_note(b"CORE", _NT_PRSTATUS, _status(one, number)) for number, one in enumerate(processors, 1)]
        return b"".join(status + [_note(b"QEMU", 0, _state(one)) for one in processors])
    except (KeyError, IndexError, TypeError, struct.error):  # a QEMU that describes its processors otherwise
        return b""


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    named = name + b"\0"
    return struct.pack("<III", len(named), len(data), kind) + named + bytes(-len(named) % 4) + data


def registers(one: Processor) -> dict[str, int]:
    """The general registers by name."""
    return dict(zip(_ORDER, one["env.regs"], strict=True))


def _segments(one: Processor) -> dict[str, Mapping[str, int]]:
    return dict(zip(_SEGMENTS, one["env.segs"], strict=True))


def _status(one: Processor, number: int) -> bytes:
    general, segments = registers(one), _segments(one)
    words = [general[name] for name in _PRSTATUS]
    words += [0, one["env.eip"], segments["cs"]["selector"], one["env.eflags"], general["rsp"]]
    words += [segments["ss"]["selector"], segments["fs"]["base"], segments["gs"]["base"]]
    words += [segments[name]["selector"] for name in ("ds", "es", "fs", "gs")]
    return struct.pack("<32xI76x27Q8x", number, *words)


def _state(one: Processor) -> bytes:
    general, segments = registers(one), _segments(one)
    data = struct.pack("<II18Q", 1, 440, *(general[name] for name in _QEMU), one["env.eip"], one["env.eflags"])
    ordered = [segments[name] for name in ("cs", "ds", "es", "fs", "gs", "ss")]
    ordered += [one[f"env.{name}"] for name in ("ldt", "tr", "gdt", "idt")]
    for each in ordered:
        data += _SEGMENT.pack(each["selector"], each["limit"], each["flags"], 0, each["base"])
    control = [one["env.cr[0]"], 0, one["env.cr[2]"], one["env.cr[3]"], one["env.cr[4]"]]
    return data + struct.pack("<6Q", *control, one["env.kernelgsbase"])

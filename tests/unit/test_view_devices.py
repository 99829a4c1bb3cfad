"""Device state decoded by its own description: values, what does not fit, and what a stream may not do to us."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from blkckpt import errors
from blkckpt.store import manifest
from blkckpt.view import devices, elf, physical
from tests.support import ramstream

SEGMENT = {
    "vmsd_name": "segment",
    "version": 1,
    "fields": [{"name": "selector", "type": "uint32", "size": 4}, {"name": "base", "type": "uint64", "size": 8}],
}


def tail(sections: list[tuple[dict[str, Any], bytes]]) -> bytes:
    """Device sections with these descriptions and bytes, and the description of all."""
    out = b""
    for number, (description, data) in enumerate(sections):
        out += ramstream.device(number, description["name"], data)
    text = json.dumps({"page_size": 4096, "devices": [description for description, _ in sections]}).encode()
    return out + b"\0\x06" + struct.pack(">I", len(text)) + text


def section(name: str, *fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "instance_id": 0, "version": 1, "fields": list(fields), **more}


EVERYTHING = section(
    "all",
    {"name": "a", "type": "uint16", "size": 2},
    {"name": "b", "type": "int8", "size": 1},
    {"name": "flag", "type": "bool", "size": 1},
    {"name": "pad", "type": "unused_buffer", "size": 2},
    {"name": "few", "type": "uint8", "size": 1, "array_len": 3},
    {"name": "many", "type": "uint8", "size": 1, "array_len": 40},
    {"name": "some", "type": "uint32", "size": 4, "index": 0},
    {"name": "some", "type": "uint32", "size": 4, "index": 1},
    {"name": "le", "type": "int32 le", "size": 4},
    {"name": "segs", "type": "struct", "size": 12, "array_len": 2, "struct": SEGMENT},
    {"name": "raw", "type": "buffer", "size": 3},
    {"name": "t", "type": "timer", "size": 8},
    subsections=[{"vmsd_name": "all/more", "version": 3, "fields": [{"name": "x", "type": "uint8", "size": 1}]}],
)
DATA = (
    b"\x01\x02\xff\x01\0\0" + bytes([7, 8, 9]) + bytes(range(40)) + struct.pack(">IIi", 5, 6, 2)
    + struct.pack(">IQIQ", 1, 2, 3, 4) + b"\xaa\xbb\xcc" + struct.pack(">q", -1)
    + b"\x05" + ramstream.name("all/more") + struct.pack(">I", 3) + b"\x2a"
)  # fmt: skip


def test_values() -> None:
    decoded = devices.decode(tail([(EVERYTHING, DATA)]))
    assert decoded["devices"] == [
        {
            "name": "all", "instance": 0, "version": 1,
            "fields": {
                "a": 0x102, "b": -1, "flag": True, "few": [7, 8, 9], "many": bytes(range(40)).hex(), "some": [5, 6],
                "le": 2, "segs": [{"selector": 1, "base": 2}, {"selector": 3, "base": 4}], "raw": "aabbcc", "t": -1,
                "subsections": {"all/more": {"x": 42}},
            },
        }
    ]  # fmt: skip


def test_a_section_that_does_not_fit_is_passed_over() -> None:
    """Its bytes are given as they are, and the next one is found by what the description names."""
    wrong = section("wrong", {"name": "a", "type": "uint32", "size": 4})
    decoded = devices.decode(tail([(wrong, b"longer than four"), (EVERYTHING, DATA), (wrong, b"x")]))
    first, second, last = decoded["devices"]
    assert bytes.fromhex(first["undecoded"]) == b"longer than four"
    assert second["fields"]["a"] == 0x102
    assert bytes.fromhex(last["undecoded"]) == b"x"


@pytest.mark.parametrize(
    "field",
    [
        {"name": "a", "type": "uint8", "size": 1, "array_len": 1 << 29},
        {"name": "a", "type": "uint8", "size": -1},
        {"name": "a", "type": "buffer", "size": 1 << 40},
        {"name": "a", "type": "struct", "size": 4, "struct": {"fields": "no list"}},
        {"name": "a", "type": "struct", "size": 0, "array_len": 1 << 30, "struct": {"fields": []}},
        "no object",
    ],
)
def test_a_hostile_description(field: Any) -> None:
    decoded = devices.decode(tail([(section("bad", field), b"1234")]))
    assert "undecoded" in decoded["devices"][0]


def test_a_description_without_end() -> None:
    deep: dict[str, Any] = {"name": "a", "type": "struct", "size": 0, "struct": {"fields": []}}
    for _ in range(200):
        deep = {"name": "a", "type": "struct", "size": 0, "struct": {"fields": [deep]}}
    assert "undecoded" in devices.decode(tail([(section("deep", deep), b"")]))["devices"][0]


def test_no_description() -> None:
    with pytest.raises(errors.CorruptError, match="suppress-vmdesc"):
        devices.decode(ramstream.tail())


def test_rendered_to_a_length() -> None:
    decoded = devices.decode(tail([(EVERYTHING, DATA)]))
    data = devices.render(decoded, devices.room(len(tail([(EVERYTHING, DATA)]))))
    assert json.loads(data) == decoded and len(data) % 4096 == 0 and data.endswith(b" \n")
    compact = len(json.dumps(decoded, separators=(",", ":"))) + 1
    assert json.loads(devices.render(decoded, compact)) == decoded
    with pytest.raises(errors.CorruptError):
        devices.render(decoded, compact - 1)


def test_a_core_without_registers() -> None:
    """A QEMU that describes its processors otherwise: no notes, the rest as ever."""
    ranges = (physical.Range(0, 1 << 20, "pc.ram", 0),)
    assert elf.notes([{"env.regs": [1] * 16}]) == b""
    assert len(elf.head(ranges, [{}])) == elf.HEAD
    assert elf.size(ranges) == elf.HEAD + (1 << 20)


def checkpoint(ram: int, machine: str, blocks: list[tuple[str, int]], *words: str) -> manifest.Manifest:
    found = tuple(manifest.RamBlock(name, size, 4096, "0" * 32) for name, size in blocks)
    info = manifest.MachineInfo(("qemu-system-x86_64", *words), machine, "tcg", "7.2", ram)
    memory = manifest.MemoryImage(found, "0" * 32, 1)
    return manifest.Manifest("v", "c", "0" * 32, 1, (), memory=memory, machine=info)


def test_ranges() -> None:
    gib = 1 << 30
    one = checkpoint(4 * gib, "pc-q35-7.2", [("pc.ram", 4 * gib), ("vga", 16 << 20)])
    assert physical.ranges(one) == (
        physical.Range(0, 2 * gib, "pc.ram", 0), physical.Range(4 * gib, 2 * gib, "pc.ram", 2 * gib)
    )  # fmt: skip
    words = (
        "-machine",
        "q35,max-ram-below-4g=1G",
        "-numa",
        "node,nodeid=1,memdev=a",
        "-numa",
        "node,nodeid=0,memdev=b",
    )
    two = checkpoint(4 * gib, "pc-q35-7.2", [("/objects/a", gib), ("/objects/b", 3 * gib)], *words)
    assert physical.ranges(two) == (
        physical.Range(0, gib, "/objects/b", 0),
        physical.Range(4 * gib, 2 * gib, "/objects/b", gib),
        physical.Range(6 * gib, gib, "/objects/a", 0),
    )
    assert physical.ranges(checkpoint(gib, "virt-7.2", [("mach-virt.ram", gib)])) == ()
    assert physical.ranges(checkpoint(4 * gib, "pc-q35-7.2", [("a", gib), ("b", 3 * gib)])) == ()
    assert physical.ranges(checkpoint(2 << 40, "pc-q35-7.2", [("pc.ram", 2 << 40)])) == ()

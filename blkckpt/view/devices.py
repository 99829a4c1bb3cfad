"""Device state decoded with the description that QEMU puts at the end of its own stream.  Pure.

The description (JSON, ``savevm.c``'s *vmdesc*) lists the device sections in their order, and of each the fields with
name, type and size, so that the bytes can be given names without knowing a single device::

    {"page_size": 4096, "devices": [{"name": "cpu", "instance_id": 0, "version": 12, "vmsd_name": "cpu",
        "fields": [{"name": "env.regs", "array_len": 16, "type": "uint64", "size": 8},
                   {"name": "env.segs", "array_len": 6, "type": "struct", "size": 20,
                    "struct": {"vmsd_name": "segment", "version": 1, "fields": [...]}}, ...],
        "subsections": [{"vmsd_name": "cpu/xss", "version": 1, "fields": [...]}]}]}

A struct's own subsections follow its fields in the stream.  Integers become numbers, structs objects, repeated fields
lists, everything else (buffers, timers, PCI configuration, bitmaps) hexadecimal text.  A section that the description
does not fit ends with ``undecoded``: its remaining bytes in hexadecimal; the sections after it are found by their own
footers' place, or left out if that cannot be told.

Source: QEMU ``migration/vmstate.c`` and ``scripts/analyze-migration.py`` (read for the format only).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blkckpt import errors
from blkckpt.memory import records

MAX_DEPTH = 64
MAX_ITEMS = 1 << 20
"""Bounds of the nesting and of the number of values of one section."""

_UNSIGNED = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}
_SIGNED = {"int8": 1, "int16": 2, "int32": 4, "int64": 8}
_HIDDEN = frozenset({"unused_buffer"})
_LONG = 32
"""Arrays of so many bytes or more are a buffer, whatever they are called."""

_FACTOR = 4

Fields = dict[str, Any]


class _MisfitError(Exception):
    """The description does not fit the bytes."""


def decode(tail: bytes) -> dict[str, Any]:
    """``{"page_size", "devices": [{"name", "instance", "version", "fields"}]}`` of the device state *tail*.

    Raises :class:`errors.CorruptError` when there is no description (``suppress-vmdesc``).
    """
    text = records.find_description(tail)
    if text is None:
        raise errors.CorruptError("this device state has no description of itself (machine option suppress-vmdesc)")
    description = json.loads(text)
    end = len(tail) - len(text) - 6
    cursor = records.Cursor(tail, 0, end)
    devices = []
    known = [one for one in _list(description.get("devices")) if isinstance(one, dict)]
    for index, one in enumerate(known):
        section, complete = _section(cursor, one, known[index + 1 :])
        devices.append(section)
        if not complete:
            break
    return {"page_size": description.get("page_size"), "devices": devices}


def processors(decoded: Mapping[str, Any]) -> list[Fields]:
    """The fields of the ``cpu`` sections, by processor."""
    found = [one for one in decoded["devices"] if one["name"] == "cpu" and "undecoded" not in one]
    return [one["fields"] for one in sorted(found, key=lambda one: int(one["instance"]))]


def render(decoded: Mapping[str, Any], length: int) -> bytes:
    """*decoded* as JSON of exactly *length* bytes, spaces before the last newline; indented if that fits."""
    for indent, separators in ((1, None), (None, (",", ":"))):
        data = json.dumps(decoded, indent=indent, separators=separators).encode()
        if len(data) < length:
            return data + b" " * (length - len(data) - 1) + b"\n"
    raise errors.CorruptError(f"the decoded device state takes {len(data)} bytes, more than {length}")


def room(tail_length: int) -> int:
    """A length that is enough for :func:`render`, told from the length of the device state alone.

    The description, which is part of it, has each field's name; a byte of state becomes two characters of a buffer or
    at most four of a list (``255,``).  A real machine's took 2.4 times the length with indentation, 1.7 without.
    """
    return -(-(4096 + _FACTOR * tail_length) // 4096) * 4096


def _section(
    cursor: records.Cursor, description: Mapping[str, Any], later: Sequence[Mapping[str, Any]]
) -> tuple[Fields, bool]:
    """One section; False if what follows it cannot be found."""
    try:
        kind, number = cursor.u8(), cursor.u32()
        name, instance, version = cursor.name("a section"), cursor.u32(), cursor.u32()
    except (records.ShortError, errors.ProtocolError):
        return {"name": description.get("name"), "instance": description.get("instance_id"), "undecoded": ""}, False
    head: Fields = {"name": name, "instance": instance, "version": version}
    start = cursor.pos
    mark = records.footer(number)
    try:
        if kind != records.FULL or name != description.get("name"):
            raise _MisfitError
        fields = _struct(cursor, description, _Budget())
        if cursor.take(len(mark)) != mark:
            raise _MisfitError
        return {**head, "fields": fields}, True
    except (_MisfitError, records.ShortError, errors.ProtocolError):
        return _skip(cursor, head, start, mark, later)


def _skip(
    cursor: records.Cursor, head: Fields, start: int, mark: bytes, later: Sequence[Mapping[str, Any]]
) -> tuple[Fields, bool]:
    """Go on at the section that the description names next."""
    data = bytes(cursor.data[start : cursor.end])
    found = data.find(mark)
    while found >= 0:
        after = records.Cursor(data, found + len(mark))
        if not later and after.pos == len(data):
            break
        try:
            if later and after.u8() == records.FULL:
                after.u32()
                if after.name("a section") == later[0].get("name") and after.u32() == later[0].get("instance_id"):
                    break
        except (records.ShortError, errors.ProtocolError):
            pass
        found = data.find(mark, found + 1)
    cursor.pos = cursor.end if found < 0 else start + found + len(mark)
    return {**head, "undecoded": data[: found if found >= 0 else len(data)].hex()}, found >= 0


class _Budget:
    """Counts down what one section may hold (nothing in a stream is trusted)."""

    def __init__(self) -> None:
        self.left = MAX_ITEMS

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _MisfitError


def _struct(cursor: records.Cursor, description: Mapping[str, Any], budget: _Budget, depth: int = 0) -> Fields:
    """The fields of a section or struct, then its subsections."""
    if depth > MAX_DEPTH:
        raise _MisfitError
    found: Fields = {}
    for one in _list(description.get("fields")):
        if not isinstance(one, dict):
            raise _MisfitError
        _add(cursor, one, found, budget, depth)
    for one in _list(description.get("subsections")):
        if not isinstance(one, dict) or cursor.u8() != records.SUBSECTION:
            raise _MisfitError
        name = cursor.name("a subsection")
        cursor.u32()
        if name != one.get("vmsd_name"):
            raise _MisfitError
        found.setdefault("subsections", {})[name] = _struct(cursor, one, budget, depth + 1)
    return found


def _add(cursor: records.Cursor, one: Mapping[str, Any], found: Fields, budget: _Budget, depth: int) -> None:
    name, size, count = str(one.get("name")), _number(one.get("size")), _number(one.get("array_len", 1))
    budget.take(max(count, 1))
    if one.get("type") == "uint8" and size == 1 and count >= _LONG:
        found[name] = cursor.take(count).hex()
        return
    read = _reader(one, size, budget, depth)
    values = [read(cursor) for _ in range(count)]
    if one.get("type") in _HIDDEN:
        return
    if "array_len" in one:
        found[name] = values
    elif "index" in one:
        found.setdefault(name, []).append(values[0])
    else:
        found[name if name not in found else f"{name}#{len(found)}"] = values[0]


def _reader(one: Mapping[str, Any], size: int, budget: _Budget, depth: int) -> Callable[[records.Cursor], Any]:
    kind = str(one.get("type"))
    inner = one.get("struct", one if "fields" in one else None)
    if isinstance(inner, dict):

        def struct(cursor: records.Cursor) -> Any:
            start = cursor.pos
            value = _struct(cursor, inner, budget, depth + 1)
            if cursor.pos - start != size:
                raise _MisfitError
            return value

        return struct
    base = kind.split(" ", maxsplit=1)[
        0
    ]  # "int32 le" is one that must be less or equal to something; all are big-endian
    if base in _UNSIGNED and size == _UNSIGNED[base]:
        return lambda cursor: int.from_bytes(cursor.take(size))
    if base in _SIGNED and size == _SIGNED[base]:
        return lambda cursor: int.from_bytes(cursor.take(size), signed=True)
    if kind == "bool" and size == 1:
        return lambda cursor: cursor.u8() != 0
    if kind == "timer" and size == 8:
        return lambda cursor: int.from_bytes(cursor.take(size), signed=True)
    return lambda cursor: cursor.take(size).hex()


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 30:
        raise _MisfitError
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

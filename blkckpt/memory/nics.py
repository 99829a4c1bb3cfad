"""Network cards in a device state: their MAC addresses, and the same state with other ones.  Pure.

A card gets its address from QEMU's command line when it is *made* and when it is *reset*; loading a state then puts the
saved one over it.  Which bytes decide what a guest sees differs from card to card:

===================  ===============================================================================================
virtio-net           the running device's ``mac``, which the configuration space shows and frames are filtered by; a
                     reset takes the command line's.  Linux reads it when its driver is bound, after a reset
e1000, e1000e, igb   the EEPROM, which drivers read when they are bound and no reset changes; of e1000e and igb
                     also ``permanent_mac``, which a reset puts into the filter, and the PCI serial number, which is
                     made of the address: QEMU refuses a state whose number is not that of its command line
rtl8139              the EEPROM likewise
===================  ===============================================================================================

So a running guest goes on with the address that it has, and gets the new one when its driver is bound anew (a reboot,
``unbind`` and ``bind``).  Until then it must go on to receive: the filter registers of the Intel and Realtek cards are
left as they are, and a virtio-net is told to let every unicast frame pass (``alluni``, which Linux neither sets nor
clears; a reset clears it); the guest's own stack drops those that are not for it.

A virtio device is opaque in QEMU's description (one field ``virtio``).  Its bytes, big-endian, for PCI::

    u32 2, PCI configuration space (256 or 4096 bytes), 16 bytes of interrupt state
    with MSI-X: 16 bytes a vector, a bit a vector rounded up to bytes, u16 vector of the configuration
    u8 status, u8 isr, u16 queue, u32 features, u32 length n, n bytes of configuration (of a virtio-net: MAC first)
    u32 queues, each: u32 size, u64 address, u16 index, with MSI-X: u16 vector
    virtio-net: 6 bytes MAC, u32 tx_waiting, u32 mergeable, u16 status, u8 promisc, u8 allmulti, u32 entries,
                6 bytes an entry, 512 bytes of VLANs, u32 has_vnet_hdr, u8 multi_overflow, uni_overflow, alluni,
                nomulti, nouni, nobcast, has_ufo …

What does not look like that is left alone and said.  No length changes.

Source: QEMU ``hw/net/virtio-net.c``, ``hw/virtio/virtio.c``, ``hw/pci/pci.c``, ``hw/pci/msix.c``, ``hw/net/e1000*.c``,
``hw/net/rtl8139.c`` (read for the format only).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blkckpt import errors
from blkckpt.memory import records

LENGTH = 6
_VLANS = 512
_MAX_TABLE = 1024
_MAX_QUEUES = 1024
_MSIX = 0x11
_PCI_VERSION = 2
_SUM = 0xBABA
"""What the first 64 words of an Intel card's EEPROM add up to."""

_EEPROMS: Mapping[str, tuple[str, int, bool]] = {
    "e1000": ("eeprom_data", 0, True),
    "e1000e": ("core.eeprom", 0, True),
    "igb": ("core.eeprom", 0, True),
    "rtl8139": ("eeprom.contents", 7, False),
}
"""Card: the field with its EEPROM (16-bit words), the word where the MAC begins, whether its sum is checked."""
_PERMANENT = "core.permanent_mac"
_PCI_SIZE = 4 + 4096
"""Of a section, where an Express card's PCI configuration space is."""

Change = Callable[[bytes], bytes | None]
"""The new address for an old one, or None to leave the card as it is."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card found in a state: QEMU's name of its section, and its addresses; *new* is None when it was left alone."""

    name: str
    old: bytes
    new: bytes | None


@dataclass(frozen=True, slots=True)
class _Section:
    """A device section: where its payload lies, and its description."""

    name: str
    start: int
    end: int
    description: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.name.rpartition("/")[2]


class _OtherError(Exception):
    """Not the layout that is known here."""


def rewrite(tail: bytes, change: Change) -> tuple[bytes, tuple[Card, ...]]:
    """The device state *tail* with its cards' addresses changed, and the cards that were found."""
    result = bytearray(tail)
    cards = []
    for section in _sections(tail):
        if section.kind not in _EEPROMS and section.kind != "virtio-net":
            continue
        try:
            act = _virtio_net if section.kind == "virtio-net" else _eeprom
            cards.append(act(result, section, change))
        except (_OtherError, records.ShortError):
            continue
    return bytes(result), tuple(cards)


# --- where the sections are ---


def _sections(tail: bytes) -> Iterator[_Section]:
    """The described sections, as far as the lengths in the description lead to the next footer."""
    text = records.find_description(tail)
    if text is None:
        return
    cursor = records.Cursor(tail, 0, len(tail) - len(text) - 6)
    for one in json.loads(text).get("devices", ()):
        try:
            if cursor.u8() != records.FULL:
                return
            number, name = cursor.u32(), cursor.name("a section")
            cursor.take(8)
            start, end = cursor.pos, cursor.pos + _length(one)
            cursor.pos = end
            if cursor.take(5) != records.footer(number) or name != one["name"]:
                return
        except (records.ShortError, errors.ProtocolError, KeyError, TypeError, AttributeError):
            return
        yield _Section(name, start, end, one)


def _length(description: Mapping[str, Any]) -> int:
    """Bytes of a section or subsection: its fields, then its subsections with their headers."""
    own = sum(_field_length(one) for one in description.get("fields", ()))
    more = (6 + len(one["vmsd_name"].encode()) + _length(one) for one in description.get("subsections", ()))
    return own + sum(more)


def _field_length(one: Mapping[str, Any]) -> int:
    size, count = one["size"], one.get("array_len", 1)
    if not isinstance(size, int) or not isinstance(count, int) or not (0 <= size < 1 << 30 and 0 <= count < 1 << 30):
        raise TypeError
    return size * count


def _field(section: _Section, name: str) -> tuple[int, int]:
    """Where field *name* of a section lies: (offset, length)."""
    at = section.start
    for one in section.description.get("fields", ()):
        if one.get("name") == name:
            return at, _field_length(one)
        at += _field_length(one)
    raise _OtherError


# --- cards with an EEPROM ---


def _eeprom(data: bytearray, section: _Section, change: Change) -> Card:
    field, first, summed = _EEPROMS[section.kind]
    start, length = _field(section, field)
    if length < 128:
        raise _OtherError
    at = start + 2 * first
    old = _swapped(data[at : at + LENGTH])
    new = change(old) if _usable(old) else None
    if new is None:
        return Card(section.name, old, None)
    if section.kind in ("e1000e", "igb"):
        _set_identity(data, section, old, new)
    data[at : at + LENGTH] = _swapped(new)
    if summed:
        words = (int.from_bytes(data[place : place + 2]) for place in range(start, start + 126, 2))
        data[start + 126 : start + 128] = ((_SUM - sum(words)) & 0xFFFF).to_bytes(2)
    return Card(section.name, old, new)


def _set_identity(data: bytearray, section: _Section, old: bytes, new: bytes) -> None:
    """The serial number and the address that a reset takes; nothing is changed unless both are known."""
    permanent, size = _field(section, _PERMANENT)
    place = data.find(_serial(old), section.start, section.start + _PCI_SIZE)
    if place < 0 or size != LENGTH or data[permanent : permanent + LENGTH] != old:
        raise _OtherError
    data[place : place + 8] = _serial(new)
    data[permanent : permanent + LENGTH] = new


def _serial(mac: bytes) -> bytes:
    """The PCI Express serial number that QEMU makes of *mac*, as it lies in the configuration space."""
    return mac[:2:-1] + b"\xff\xff" + mac[2::-1]


def _swapped(words: bytes | bytearray) -> bytes:
    """Each two bytes exchanged: a little-endian word in a big-endian stream."""
    return bytes(words[place ^ 1] for place in range(len(words)))


def _usable(mac: bytes) -> bool:
    return any(mac) and not mac[0] & 1


# --- virtio-net ---


def _virtio_net(data: bytearray, section: _Section, change: Change) -> Card:
    start, length = _field(section, "virtio")
    for size in (256, 4096):
        try:
            configuration, at = _to_device(records.Cursor(memoryview(data), start, start + length), size)
            alluni = _check_device(records.Cursor(memoryview(data), at, start + length))
            break
        except (_OtherError, records.ShortError):
            continue
    else:
        raise _OtherError
    old = bytes(data[at : at + LENGTH])
    new = change(old)
    if new is not None:
        data[at : at + LENGTH] = new
        if data[configuration : configuration + LENGTH] == old:
            data[configuration : configuration + LENGTH] = new
        data[alluni] = 1
    return Card(section.name, old, new)


def _to_device(cursor: records.Cursor, pci_size: int) -> tuple[int, int]:
    """Where the virtio configuration is, and where what is a virtio-net's own begins."""
    if cursor.u32() != _PCI_VERSION:
        raise _OtherError
    vectors = _vectors(cursor.take(pci_size))
    cursor.take(16)
    if vectors:
        cursor.take(vectors * 16 + (vectors + 7) // 8 + 2)
    cursor.take(8)
    size = cursor.u32()
    configuration = cursor.pos
    if not LENGTH <= size <= 4096:
        raise _OtherError
    cursor.take(size)
    queues = cursor.u32()
    if not 2 <= queues <= _MAX_QUEUES:
        raise _OtherError
    for _ in range(queues):
        if not 0 < cursor.u32() <= 32768:
            raise _OtherError
        cursor.take(10 + (2 if vectors else 0))
    return configuration, cursor.pos


def _vectors(space: bytes) -> int:
    """MSI-X vectors of a PCI configuration space; 0 without MSI-X."""
    at, seen = space[0x34] & ~3, 0
    while 0x40 <= at < 0x100 and seen < 48:
        if space[at] == _MSIX:
            return (int.from_bytes(space[at + 2 : at + 4], "little") & 0x7FF) + 1
        at, seen = space[at + 1] & ~3, seen + 1
    return 0


def _check_device(cursor: records.Cursor) -> int:
    """Whether what follows is a virtio-net's own state; where ``alluni`` is in it."""
    mac = cursor.take(LENGTH)
    waiting, mergeable, status, promisc, allmulti = cursor.u32(), cursor.u32(), cursor.u16(), cursor.u8(), cursor.u8()
    entries = cursor.u32()
    if not _usable(mac) or max(waiting, mergeable, promisc, allmulti) > 1 or status > 3 or entries > _MAX_TABLE:
        raise _OtherError
    cursor.take(entries * LENGTH + _VLANS)
    header = cursor.u32()
    flags = cursor.take(7)
    if max(header, *flags) > 1:
        raise _OtherError
    return cursor.pos - 5

"""Where main memory lies in the guest's physical address space.  Pure.

QEMU's PC machines put main memory at 0 up to a limit below 4 GiB, and the rest from 4 GiB on; between the two are
PCI devices, firmware and the interrupt controllers (the *PCI hole*).  The limit:

===========  ====================================================================================================
q35          2 GiB if there are 2.75 GiB or more, else 2.75 GiB (so everything is below)
i440fx       3.5 GiB; if there is that much or more, 3 GiB (machine types up to ``pc-i440fx-1.7``: 3.5 GiB)
===========  ====================================================================================================

``-machine max-ram-below-4g=`` lowers it (for i440fx it replaces the 3.5 GiB).  Sources: QEMU 7.2 ``hw/i386/pc_q35.c``
``pc_q35_init``, ``hw/i386/pc_piix.c`` ``pc_init1``; a test compares with what QEMU itself says (``info mtree``).

Not known here, and then there is no physical view: other machines; more than :data:`LIMIT` of memory, which QEMU may
place above 1 TiB; several memory back-ends whose NUMA nodes do not say which comes first.  Memory that was plugged in
(``pc-dimm``, ``virtio-mem``) has no place in it, only its block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from blkckpt import errors
from blkckpt.store import manifest
from blkckpt.vm import qemuopts

FOUR_GIB = 4 << 30
LIMIT = 900 << 30
"""From about 1010 GiB on the memory above 4 GiB begins at 1 TiB on AMD hosts (``enforce-amd-1tb-hole``)."""


@dataclass(frozen=True, slots=True)
class Range:
    """*size* bytes at guest-physical *address* are those at *offset* of RAM block *block*."""

    address: int
    size: int
    block: str
    offset: int


def main_blocks(checkpoint: manifest.Manifest) -> tuple[manifest.RamBlock, ...]:
    """The blocks that make up main memory, in the guest's order; empty when that cannot be told."""
    if checkpoint.memory is None or checkpoint.machine is None:
        return ()
    blocks, size = checkpoint.memory.blocks, checkpoint.machine.ram_size
    whole = [block for block in blocks if block.size == size]
    if len(whole) == 1:
        return (whole[0],)
    named = {block.name.removeprefix("/objects/"): block for block in blocks}
    nodes = [named[name] for name in _numa(checkpoint.machine.argv) if name in named]
    return tuple(nodes) if nodes and sum(block.size for block in nodes) == size else ()


def ranges(checkpoint: manifest.Manifest) -> tuple[Range, ...]:
    """The ranges of main memory by address; empty when they are not known."""
    blocks = main_blocks(checkpoint)
    machine = checkpoint.machine
    if not blocks or machine is None or machine.ram_size > LIMIT:
        return ()
    low = below_4g(machine.machine_type, machine.ram_size, _max_below(machine.argv))
    if low is None:
        return ()
    found, at = [], 0
    for block in blocks:
        for start, stop, base in ((0, low, 0), (low, machine.ram_size, FOUR_GIB - low)):
            first, last = max(at, start), min(at + block.size, stop)
            if first < last:
                found.append(Range(first + base, last - first, block.name, first - at))
        at += block.size
    return tuple(sorted(found, key=lambda one: one.address))


def below_4g(machine_type: str, ram: int, limit: int | None = None) -> int | None:
    """How much of *ram* lies below 4 GiB; *limit* is ``max-ram-below-4g``.  None for a machine not known here."""
    if re.fullmatch(r"(pc-)?q35(-.*)?", machine_type):
        low = min(0x8000_0000 if ram >= 0xB000_0000 else 0xB000_0000, limit or FOUR_GIB)
    elif version := re.fullmatch(r"pc(?:-i440fx-(\d+)\.(\d+).*)?", machine_type):
        low = limit or 0xE000_0000
        aligned = version[1] is None or (int(version[1]), int(version[2])) >= (2, 0)
        if ram >= low and aligned:
            low = min(low, 0xC000_0000)
    else:
        return None
    return min(low, ram)


def _max_below(argv: Sequence[str]) -> int | None:
    found = None
    for option in _options(argv):
        if option.name in ("machine", "M") and option.value:
            text = qemuopts.member(option.value, "max-ram-below-4g", "type")
            found = qemuopts.parse_size(text) if text else found
    return found


def _numa(argv: Sequence[str]) -> list[str]:
    """The memory back-ends of the NUMA nodes, by node."""
    found: dict[int, str] = {}
    for option in _options(argv):
        if option.name == "numa" and option.value:
            items = qemuopts.Items.parse(option.value, "type")
            backend, node = items.get("memdev"), items.get("nodeid") or str(len(found))
            if backend and node.isdigit():
                found[int(node)] = backend
    return [found[node] for node in sorted(found)]


def _options(argv: Sequence[str]) -> list[qemuopts.Option]:
    try:
        return qemuopts.parse(argv)[1]
    except errors.InputError:
        return []

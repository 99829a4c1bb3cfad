"""A checkpoint as JSON and as text.  Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from blkckpt import units
from blkckpt.cli import output
from blkckpt.store import evidence, labels, manifest

KEYS = (
    "vm, name, id, created, parent, consistency: machine|crash|filesystem, retained, "
    "group: null or {id, members: [VM@NAME], spread_ms}, notes, tags, pinned, size, "
    "boot: null or {alive, sign: agent|console|processors, seconds, when, message}, screenshot: null or {when, source, "
    "size}, "
    "disks: [{name, size, image}], memory: null or {size, state_size, blocks: [{name, size, page_size, image}]}, "
    "machine: null or {type, accelerator, qemu_version, memory, command}, "
    "timings: {name: seconds}"
)
"""The keys of one checkpoint, as its help lists them."""


def keys(
    one: manifest.Manifest, marked: labels.Labels = labels.NONE, seen: evidence.Evidence = evidence.NONE
) -> dict[str, Any]:
    """The JSON of *one* (rule C1) with its labels; its notes are those it was taken with, then those made since."""
    return {
        "vm": one.vm,
        "name": one.name,
        "id": one.id,
        "created": output.timestamp(one.created_ns),
        "parent": one.parent,
        "consistency": one.consistency,
        "retained": one.retained,
        "group": one.group and _group(one.group),
        "notes": [*one.notes, *marked.notes],
        "tags": list(marked.tags),
        "pinned": marked.pinned,
        "size": size(one),
        **sights(seen),
        "disks": [{"name": disk.name, "size": disk.size, "image": disk.image} for disk in one.disks],
        "memory": None if one.memory is None else _memory(one.memory),
        "machine": None if one.machine is None else _machine(one.machine),
        "timings": dict(one.timings),
    }


def sights(seen: evidence.Evidence) -> dict[str, Any]:
    """The JSON of what was seen of its guest."""
    boot, screen = seen.boot, seen.screen
    return {
        "boot": boot and {
            "alive": boot.alive, "sign": boot.sign or None, "seconds": boot.seconds,
            "when": output.timestamp(boot.when_ns), "message": boot.message or None,
        },
        "screenshot": screen and {
            "when": output.timestamp(screen.when_ns), "source": screen.source, "size": screen.size,
        },
    }  # fmt: skip


def lives(boot: evidence.Boot) -> str:
    """One sentence."""
    if not boot.alive:
        return f"no: {boot.message}"
    return f"yes ({boot.sign}), {units.format_duration(boot.seconds)} after the start"


def text(one: manifest.Manifest, marked: labels.Labels = labels.NONE, seen: evidence.Evidence = evidence.NONE) -> str:
    """The same for people."""
    head = {
        "checkpoint": f"{one.vm}@{one.name}",
        "id": one.id,
        "taken": output.local_time(one.created_ns),
        "after": one.parent or "nothing (the first)",
        "consistency": one.consistency,
    }
    if one.machine:
        head["machine"] = f"{one.machine.machine_type}, {one.machine.accel}, QEMU {one.machine.qemu_version}"
        head["command"] = shlex.join(one.machine.argv)
    if one.retained:
        head["retained"] = f"its disks are layers of VM {one.vm}; `blkckpt flatten {one.vm}@{one.name}` copies them"
    if one.group:
        apart = units.format_duration(one.group.spread)
        head["group"] = f"{', '.join(one.group.members)}; stopped within {apart}"
    if marked.tags:
        head["tags"] = ", ".join(marked.tags)
    if marked.pinned:
        head["pinned"] = "rm and prune leave it"
    if seen.boot:
        head["lives"] = f"{lives(seen.boot)}; tried {output.local_time(seen.boot.when_ns)}"
    if seen.screen:
        head["screenshot"] = f"of the {seen.screen.source}, {output.local_time(seen.screen.when_ns)}"
    notes = (*one.notes, *marked.notes)
    head |= {"note" if number == 0 else f"note {number + 1}": note for number, note in enumerate(notes)}
    rows = [("disk", disk.name, units.format_size(disk.size), disk.image) for disk in one.disks]
    if one.memory:
        rows += [("memory", block.name, units.format_size(block.size), block.image) for block in one.memory.blocks]
        rows.append(("devices", "", units.format_size(one.memory.skeleton_size), one.memory.skeleton))
    parts = [output.fields(head), output.table(("WHAT", "NAME", "SIZE", "IMAGE"), rows, right=("SIZE",))]
    if one.timings:
        parts.append(timings(one))
    return "\n\n".join(parts)


def timings(one: manifest.Manifest) -> str:
    """One line a phase, in the order in which the manifest has them."""
    return output.fields({name.replace("_", " "): units.format_duration(value) for name, value in one.timings.items()})


def overview(
    found: Sequence[tuple[manifest.Manifest, labels.Labels, evidence.Evidence]],
    leads: Sequence[str] | None = None,
    heirs: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """One row a checkpoint; *leads* is what to draw before each name, *heirs* the VMs that go on from it."""
    rows = []
    for lead, (one, marked, seen) in zip(leads or [""] * len(found), found, strict=True):
        rows.append(_row(lead, one, marked, seen))
        aside = "".join("│" if letter in "│├" else " " for letter in lead[:-2])
        rows += [(f"{aside}│   VM {name}", *[""] * 9) for name in (heirs or {}).get(f"{one.vm}@{one.name}", ())]
    headers = ("CHECKPOINT", "TAKEN", "KIND", "DISKS", "MEMORY", "AFTER", "PINNED", "LIVES", "TAGS", "NOTE")
    return output.table(headers, rows, ("DISKS", "MEMORY"))


def _row(lead: str, one: manifest.Manifest, marked: labels.Labels, seen: evidence.Evidence) -> tuple[str, ...]:
    return (
        f"{lead}{one.vm}@{one.name}",
        output.local_time(one.created_ns),
        f"{one.consistency}, retained" if one.retained else one.consistency,
        units.format_size(sum(disk.size for disk in one.disks)),
        units.format_size(_ram(one.memory)) if one.memory else "-",
        one.parent or "-",
        "yes" if marked.pinned else "-",
        "-" if seen.boot is None else "yes" if seen.boot.alive else "no",
        ",".join(marked.tags) or "-",
        next(iter((*one.notes, *marked.notes)), ""),
    )


def size(one: manifest.Manifest) -> int:
    """Bytes it stands for: all disks and all memory (not what it costs: chunks are shared and compressed)."""
    return sum(disk.size for disk in one.disks) + (_ram(one.memory) if one.memory else 0)


def _ram(memory: manifest.MemoryImage) -> int:
    return sum(block.size for block in memory.blocks)


def _memory(memory: manifest.MemoryImage) -> dict[str, Any]:
    blocks = [
        {"name": block.name, "size": block.size, "page_size": block.page_size, "image": block.image}
        for block in memory.blocks
    ]
    return {"size": _ram(memory), "state_size": memory.skeleton_size, "blocks": blocks}


def _group(group: manifest.GroupInfo) -> dict[str, Any]:
    return {"id": group.id, "members": list(group.members), "spread_ms": group.spread * 1000}


def _machine(machine: manifest.MachineInfo) -> dict[str, Any]:
    return {
        "type": machine.machine_type,
        "accelerator": machine.accel,
        "qemu_version": machine.qemu_version,
        "memory": machine.ram_size,
        "command": list(machine.argv),
    }

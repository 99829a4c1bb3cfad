"""A guest's file as it is typed, ``VM@CKPT:[DISK[:VOLUME]:]/PATH``, and where it is found.

The shortest form that is unambiguous will do: ``web@before:/etc/passwd`` when only one volume has it.  A volume is a
partition's number, an LVM volume's ``vg-lv``, or nothing (``vda::/x``) for a disk without a table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import click

from blkckpt import errors, units
from blkckpt.cli import names, session
from blkckpt.view import volumes

SYNTAX = "VM@CKPT:[DISK[:VOLUME]:]/PATH"

KEYS = "name, path, type: file|directory|link|other, mode, size, modified, uid, gid, inode, links, target"

_C = TypeVar("_C", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Address:
    """One file; what was left open is None."""

    target: names.Target
    disk: str | None
    volume: str | None
    path: str

    def __str__(self) -> str:
        place = "" if self.disk is None else f"{self.disk}:" if self.volume is None else f"{self.disk}:{self.volume}:"
        return f"{self.target}:{place}{self.path}"


@dataclass(frozen=True, slots=True)
class Place:
    """A volume and the disk it is on."""

    disk: str
    volume: volumes.Volume

    def __str__(self) -> str:
        return f"{self.disk}:{self.volume.name}"


@dataclass(frozen=True, slots=True)
class Located:
    """A file that is there: *path* has no links in it."""

    place: Place
    path: str


def parse(text: str) -> Address:
    """Parse :data:`SYNTAX`; InputError for anything else."""
    name, colon, rest = text.partition(":")
    if not colon:
        raise errors.InputError(f"{text!r} names no file: write {SYNTAX}, for example {name}:/etc/passwd")
    target = names.parse_target(name)
    at = rest.find("/")
    place, path = (rest[:at], rest[at:]) if at >= 0 else (rest, "")
    if not path or (place and not place.endswith(":")):
        raise errors.InputError(f"{text!r} has no path that begins with '/': write {SYNTAX}")
    if not place:
        return Address(target, None, None, path)
    disk, colon, volume = place[:-1].partition(":")
    return Address(target, units.check_name(disk, "disk name"), volume if colon else None, path)


def narrowed(address: Address, disk: str | None, volume: str | None) -> Address:
    """*address* with the options ``--disk`` and ``--volume``."""
    for name, given, option in (("disk", address.disk, disk), ("volume", address.volume, volume)):
        if given is not None and option is not None and given != option:
            raise errors.InputError(f"--{name} {option} contradicts {address}")
    return replace(
        address,
        disk=address.disk if disk is None else units.check_name(disk, "disk name"),
        volume=address.volume if volume is None else volume,
    )


@contextlib.contextmanager
def opened(ours: session.Session, target: names.Target, disk: str | None, volume: str | None) -> Iterator[list[Place]]:
    """The volumes of a checkpoint that are meant; their parsers end with the block.  NotFoundError if there is none."""
    found = ours.checkpoint(target)
    disks = [one for one in found.manifest.disks if disk in (None, one.name)]
    if not disks:
        there = ", ".join(one.name for one in found.manifest.disks) or "no disk"
        raise errors.NotFoundError(f"{target} has no disk {disk}; it has {there}")
    places = [Place(one.name, each) for one in disks for each in volumes.filesystems(found.store.image(one.image))]
    try:
        chosen = [place for place in places if volume in (None, place.volume.name)]
        if not chosen:
            there = ", ".join(map(str, places)) or "none that is known"
            raise errors.NotFoundError(f"{target} has no such volume; there is: {there}")
        yield chosen
    finally:
        for place in places:
            place.volume.close()


def locate(address: Address, places: list[Place]) -> Located:
    """The one volume among *places* that has the file."""
    found: list[Located] = []
    passed: list[str] = []
    for place in places:
        if place.volume.problem:
            passed.append(f"{place} is not read: {place.volume.problem}")
            continue
        try:
            path = place.volume.resolve(address.path)
            place.volume.stat(path)
            found.append(Located(place, path))
        except errors.NotFoundError:
            continue
        except (errors.CorruptError, errors.StateError) as error:
            if len(places) == 1:
                raise
            passed.append(f"{place} is not read: {error}")
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{address.target}:{one.place}:{address.path}" for one in found)
        raise errors.InputError(f"several volumes have {address.path!r}; say which: {choices}")
    if passed and len(passed) == len(places):
        raise errors.StateError(f"{address}: {'; '.join(passed)}")
    looked = ", ".join(f"{place} ({place.volume.kind})" for place in places if not place.volume.problem)
    more = f"; {'; '.join(passed)}" if passed else ""
    raise errors.NotFoundError(f"there is no {address.path!r} in {address.target}: looked on {looked}{more}")


def narrowing(command: _C) -> _C:
    """The options ``--disk`` and ``--volume``."""
    command = click.option("--volume", metavar="NAME", help="Look on this partition or LVM volume only.")(command)
    return click.option("--disk", metavar="DISK", help="Look on this disk only.")(command)

"""Names and disk arguments as they are typed: ``VM@CKPT``, ``VM@tag:TAG``, ``[ID=]PATH[:SIZE]``.

Pure: looks at no file.  What a name refers to is found by :mod:`blkckpt.cli.session`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blkckpt import errors, units

RESERVED = frozenset({"by-time", "by-tag"})
"""What a mount has beside the checkpoints of a VM."""

LATEST = "latest"
"""Stands for the newest checkpoint of a VM; therefore no checkpoint may be called so."""

TAGGED = "tag:"
"""Before a tag, stands for the newest checkpoint that has it; no checkpoint's name can begin so."""


@dataclass(frozen=True, slots=True)
class Target:
    """``VM@CKPT``, both parts valid names; the checkpoint may be ``latest``, ``tag:TAG``, or absent where allowed."""

    vm: str
    checkpoint: str | None

    @property
    def tag(self) -> str | None:
        """The tag, if the checkpoint is named by one."""
        named = self.checkpoint or ""
        return named.removeprefix(TAGGED) if named.startswith(TAGGED) else None

    @property
    def is_newest(self) -> bool:
        """Whether the newest of several is meant, not one by its name."""
        return self.checkpoint == LATEST or self.tag is not None

    def __str__(self) -> str:
        return self.vm if self.checkpoint is None else f"{self.vm}@{self.checkpoint}"


@dataclass(frozen=True, slots=True)
class DiskArgument:
    """``[ID=]PATH[:SIZE]`` with the defaults filled in; *size* None means the size of what is at *path*."""

    name: str
    path: Path
    size: int | None


def parse_target(text: str) -> Target:
    """Parse ``VM@CKPT``; raises :class:`errors.InputError` for anything else."""
    target = parse_vm_or_target(text)
    if target.checkpoint is None:
        raise errors.InputError(
            f"{text!r} names a VM but no checkpoint: write {text}@NAME or {text}@{LATEST} "
            f"(`blkckpt list {text}` shows the names)"
        )
    return target


def parse_vm_or_target(text: str) -> Target:
    """Parse ``VM`` or ``VM@CKPT``."""
    vm, at, checkpoint = text.partition("@")
    units.check_name(vm, "VM name")
    if checkpoint.startswith(TAGGED):
        return Target(vm, TAGGED + units.check_name(checkpoint.removeprefix(TAGGED), "tag"))
    return Target(vm, units.check_name(checkpoint, "checkpoint name") if at else None)


def check_new_checkpoint(name: str) -> str:
    """A name that a new checkpoint may bear."""
    if name == LATEST:
        raise errors.InputError(f"{LATEST!r} stands for the newest checkpoint; choose another name")
    if name in RESERVED:
        raise errors.InputError(f"{name!r} is a directory beside the checkpoints of a mount; choose another name")
    return units.check_name(name, "checkpoint name")


def parse_tags(text: str) -> frozenset[str]:
    """Parse ``TAG[,TAG…]``: tags that are to be there together."""
    return frozenset(units.check_name(tag.strip(), "tag") for tag in text.split(","))


def parse_disks(texts: Iterable[str]) -> tuple[DiskArgument, ...]:
    """Parse the ``--disk`` arguments; disks without an ID become vda, vdb, … in their order."""
    split = [_split_disk(text) for text in texts]
    taken = {name for name, _, _ in split if name}
    free = (name for name in _default_names() if name not in taken)
    disks = tuple(DiskArgument(name or next(free), path, size) for name, path, size in split)
    _refuse_twice((disk.name for disk in disks), "disk name")
    _refuse_twice((str(disk.path) for disk in disks), "disk path")
    return disks


def _split_disk(text: str) -> tuple[str | None, Path, int | None]:
    """An ``=`` or ``:`` that belongs to the path does not split: an ID holds no ``/``, a size is a number."""
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        name, rest = "", text
    path, colon, size = rest.rpartition(":")
    if not colon or not size[:1].isdigit() or "/" in size:
        path, size = rest, ""
    if not path:
        raise errors.InputError(f"--disk {text!r} has no path; write [ID=]PATH[:SIZE], for example vda=/srv/a.raw:20G")
    if equals and rest != text:
        units.check_name(name, "disk name")
    return name or None, Path(path).absolute(), units.parse_size(size) if size else None


def _default_names() -> Iterable[str]:
    yield from (f"vd{letter}" for letter in string.ascii_lowercase)
    yield from (f"vd{first}{second}" for first in string.ascii_lowercase for second in string.ascii_lowercase)


def _refuse_twice(values: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise errors.InputError(f"{what} {value!r} is given twice")
        seen.add(value)

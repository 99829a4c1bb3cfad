"""What a tree consists of: directories, files, links; values without knowledge of checkpoints."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard

from blkckpt import errors, log
from blkckpt.store import store as stores
from blkckpt.view import content

logger = log.get(__name__)


class Attributes(NamedTuple):
    """What ``stat`` says.  *mode* has the type; *used* is bytes on disk; *owner* is (uid, gid) of a guest's file."""

    mode: int
    size: int
    used: int
    changed_ns: int
    owner: tuple[int, int] | None = None


class Node(Protocol):
    """Something in the tree."""

    def attributes(self) -> Attributes: ...


class Directory(Protocol):
    """A directory: ``child`` raises NotFoundError.

    One that can say its entries' attributes for less than a ``child`` each also has ``listing``, which gives the names
    and what finds the attributes (a node of which nothing else is asked), both of one instant.
    """

    def attributes(self) -> Attributes: ...
    def names(self) -> Iterable[str]: ...
    def child(self, name: str) -> Node: ...


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str
    changed_ns: int
    owner: tuple[int, int] | None = None

    def attributes(self) -> Attributes:
        length = len(os.fsencode(self.target))
        return Attributes(stat.S_IFLNK | 0o777, length, 0, self.changed_ns, self.owner)


@dataclass(slots=True)
class File:
    """A file of *size* bytes whose content is opened on demand.

    *identity* tells it from another one that has the same path at another time; *store* is where its images are.  A
    *volatile* file may be another one at the next open.  Its attributes are worked out once.
    """

    identity: str
    size: int
    changed_ns: int
    open: Callable[[], content.Content]
    count: Callable[[], int]
    store: stores.Store | None = None
    known: Attributes | None = None
    volatile: bool = False

    def attributes(self) -> Attributes:
        if self.known is not None:
            return self.known
        try:
            found = Attributes(stat.S_IFREG | 0o400, self.size, self.count(), self.changed_ns)
        except errors.BlkckptError as error:  # a damaged image is still listed; reading it says what is wrong
            logger.warning("size in blocks unknown", extra={"fields": {"file": self.identity, "error": str(error)}})
            return Attributes(stat.S_IFREG | 0o400, self.size, self.size, self.changed_ns)
        self.known = found
        return found


class Folder:
    """A directory with few entries, each made when it is first asked for (and again if that failed).

    *more* gives entries that come and go; they are asked for each time.
    """

    __slots__ = ("_made", "changed_ns", "entries", "more")

    def __init__(
        self,
        changed_ns: int,
        entries: Mapping[str, Callable[[], Node]],
        more: Callable[[], Mapping[str, Callable[[], Node]]] = dict,
    ) -> None:
        self.changed_ns, self.entries, self.more = changed_ns, entries, more
        self._made: dict[str, Node] = {}

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFDIR | 0o500, 0, 0, self.changed_ns)

    def names(self) -> Iterable[str]:
        return [*self.entries, *self.more()]

    def child(self, name: str) -> Node:
        made = self._made.get(name)
        if made is None:
            if name not in self.entries:
                if found := self.more().get(name):
                    return found()
                raise errors.NotFoundError(name)
            made = self._made[name] = self.entries[name]()
        return made


def listing(directory: Directory) -> tuple[list[str], Callable[[str], Node]]:
    """The names in *directory*, and what gives a node of each that has its attributes."""
    quick = getattr(directory, "listing", None)
    names, look = quick() if quick is not None else (directory.names(), directory.child)
    return list(names), look


def is_directory(node: Node) -> TypeGuard[Directory]:
    return hasattr(node, "child")

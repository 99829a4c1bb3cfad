"""What a power cut leaves of a recorded run.

The model is the one that POSIX allows, not what one file system happens to do:

* A file's bytes are durable as of its last sync.  Of every later write, truncation and punch, any subset of
  512-byte sectors may have reached the disk, in any order; the size may have grown without the data (zeros) or not.
* A name (create, rename, link, unlink, mkdir) is durable when its directory was synced after it.  Of later name
  operations any subset may have happened, except that each is atomic and a rename never loses the file: the old
  name goes only if the new one came.
* A file's sync says nothing about its name, a directory's sync nothing about its files.

:class:`Machine` steps through the events; :meth:`Machine.cut` chooses one possible outcome at the present point.
How adversarial a choice is varies from cut to cut (:class:`Mood`): nothing unsynced, everything, a prefix, or a
random subset at some density; different bugs show under different moods.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import recorder

SECTOR = 512


@dataclass(frozen=True, slots=True)
class _Change:
    """One unsynced change of a file's bytes: *data*, or *count* zeros, at *offset*; or a new size."""

    kind: int
    offset: int
    count: int
    data: bytes


class Node:
    """A file or directory; identity is the object, names are entries of the namespace."""

    __slots__ = ("changes", "content", "durable", "is_directory", "unsynced_names")

    def __init__(self, content: bytes = b"", *, is_directory: bool = False) -> None:
        self.is_directory = is_directory
        self.content = bytearray(content)
        """What the running program sees."""
        self.durable = bytearray(content)
        self.changes: list[_Change] = []
        self.unsynced_names: list[_Name] = []

    def apply(self, change: _Change) -> None:
        _apply(self.content, change)
        self.changes.append(self._in_sectors(change))

    def _in_sectors(self, change: _Change) -> _Change:
        """*change* as the disk sees it: whole sectors, with whatever else the page cache has in them by now.

        Without this, two changes of parts of one sector could survive one without the other, which no disk does.
        """
        start, end = change.offset // SECTOR * SECTOR, -(-(change.offset + change.count) // SECTOR) * SECTOR
        end = min(end, len(self.content))
        whole = change.offset == start and change.offset + change.count == end
        if whole or change.kind not in (recorder.WRITE, recorder.ZERO) or end <= start:
            return change
        return _Change(recorder.WRITE, start, end - start, bytes(self.content[start:end]))

    def sync(self) -> None:
        self.durable = bytearray(self.content)
        self.changes = []


@dataclass(eq=False, slots=True)
class _Name:
    """One unsynced operation on one directory: *path* becomes *node* (None: goes away).

    *needs*: an operation without which this one cannot have happened (the new name of a rename).
    """

    path: str
    node: Node | None
    needs: _Name | None = None
    also: _Name | None = None


@dataclass(slots=True)
class Mood:
    """How one cut chooses among what was not synced: the chance that a change, a sector, a name survives."""

    change: float
    sector: float
    name: float
    prefix: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> Mood:
        kind = rng.randrange(8)
        if kind == 0:
            return cls(0, 0, 0)
        if kind == 1:
            return cls(1, 1, 1)
        if kind == 2:
            return cls(1, 1, 1, prefix=True)
        if kind == 3:
            return cls(rng.random(), 1, 1)
        if kind == 4:
            return cls(rng.random(), 1, rng.random())
        return cls(rng.random(), rng.choice((0.5, 0.9, 1)), rng.choice((0, 0.5, 1)))


@dataclass(slots=True)
class State:
    """The files that one power cut left: path → content, None for a directory."""

    files: dict[str, bytes | None]
    cut: int
    marks: int
    """How many of the program's own remarks came before: the ledger's time, whatever else the log was made to say."""
    seed: int

    def write(self, root: Path) -> None:
        """Make *root* hold exactly these files (parents before children; holes stay holes)."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(mode=0o700)
        for name, content in sorted(self.files.items()):
            path = root / name
            if not path.parent.is_dir():
                continue
            if content is None:
                path.mkdir(mode=0o700)
            else:
                _write_sparse(path, content)


def _write_sparse(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for at in range(0, len(content), 4096):
            piece = content[at : at + 4096]
            if piece.count(0) != len(piece):
                os.pwrite(descriptor, piece, at)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


@dataclass
class Machine:
    """The storage of the recorded program, event by event."""

    root: str
    names: dict[str, Node] = field(default_factory=dict)
    durable_names: dict[str, Node] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    position: int = 0
    marks: int = 0

    @classmethod
    def empty(cls, root: Path) -> Machine:
        """A machine whose *root* is an empty directory."""
        top = Node(is_directory=True)
        return cls(str(root), {"": top}, {"": top})

    @classmethod
    def of_directory(cls, root: Path) -> Machine:
        """A machine whose files are those of *root* now, all durable."""
        machine = cls.empty(root)
        for path in sorted(root.rglob("*")):
            info = path.lstat()
            is_directory = stat.S_ISDIR(info.st_mode)
            node = Node(b"" if is_directory else path.read_bytes(), is_directory=is_directory)
            machine.names[str(path.relative_to(root))] = node
            machine.nodes[info.st_ino] = node
        machine.durable_names = dict(machine.names)
        return machine

    def copy(self) -> Machine:
        """Another machine in the same state; only one that has not run yet can be copied."""
        assert self.position == 0
        twins = {id(node): Node(bytes(node.content), is_directory=node.is_directory) for node in self.names.values()}
        names = {path: twins[id(node)] for path, node in self.names.items()}
        nodes = {inode: twins[id(node)] for inode, node in self.nodes.items()}
        return Machine(self.root, names, dict(names), nodes)

    # ---- replay ----

    def run(self, events: Iterable[recorder.Event]) -> None:
        for event in events:
            self.step(event)

    def step(self, event: recorder.Event) -> None:
        self.position += 1
        _STEPS[event.kind](self, event)

    def _relative(self, path: str) -> str:
        return path[len(self.root) :].lstrip("/")

    def _directory(self, path: str) -> Node:
        return self.names[_parent(path)]

    def _enter(self, path: str, node: Node | None, needs: _Name | None = None) -> _Name:
        operation = _Name(path, node, needs)
        self._directory(path).unsynced_names.append(operation)
        if node is None:
            self.names.pop(path, None)
        else:
            self.names[path] = node
        return operation

    def _create(self, event: recorder.Event) -> None:
        node = Node()
        self.nodes[event.inode] = node
        self._enter(self._relative(event.name), node)

    def _mkdir(self, event: recorder.Event) -> None:
        self._enter(self._relative(event.name), Node(is_directory=True))

    def _rename(self, event: recorder.Event) -> None:
        assert event.name and event.target, "renames into or out of the recorded tree are not modelled"
        old, new = self._relative(event.name), self._relative(event.target)
        node = self.names[old]
        assert not node.is_directory, "renaming a directory is not modelled"
        came = self._enter(new, node)
        went = self._enter(old, None, needs=came)
        if _parent(old) == _parent(new):
            came.also = went

    def _link(self, event: recorder.Event) -> None:
        self._enter(self._relative(event.target), self.names[self._relative(event.name)])

    def _unlink(self, event: recorder.Event) -> None:
        self._enter(self._relative(event.name), None)

    def _change(self, event: recorder.Event) -> None:
        node = self.nodes.get(event.inode)
        if node is not None:
            node.apply(_Change(event.kind, event.offset, event.count, event.data))

    def _sync(self, event: recorder.Event) -> None:
        if not event.name:
            if event.inode in self.nodes:
                self.nodes[event.inode].sync()
            return
        directory = self.names[self._relative(event.name)]
        for operation in directory.unsynced_names:
            needs = operation.needs
            if needs is not None and needs in self._directory(needs.path).unsynced_names:
                _enter_durable(self.durable_names, needs)  # the old name's going brings the new one
            _enter_durable(self.durable_names, operation)
        directory.unsynced_names = []

    def _sync_all(self, event: recorder.Event) -> None:
        for node in [*self.nodes.values(), *self.names.values()]:
            node.sync()
            node.unsynced_names = []
        self.durable_names = dict(self.names)

    def _mark(self, _event: recorder.Event) -> None:
        self.marks += 1

    # ---- outcomes ----

    def files(self) -> dict[str, bytes | None]:
        """What the running program sees now."""
        return {path: None if node.is_directory else bytes(node.content) for path, node in self.names.items() if path}

    def cut(self, seed: int) -> State:
        """One of the states in which a power cut now may leave the files."""
        rng = random.Random(seed)
        mood = Mood.draw(rng)
        names = self._surviving_names(rng, mood)
        contents: dict[int, bytes] = {}
        files: dict[str, bytes | None] = {}
        for path, node in sorted(names.items()):
            if not path:
                continue
            if node.is_directory:
                files[path] = None
                continue
            if id(node) not in contents:
                contents[id(node)] = _surviving_content(node, rng, mood)
            files[path] = contents[id(node)]
        return State(files, self.position, self.marks, seed)

    def _surviving_names(self, rng: random.Random, mood: Mood) -> dict[str, Node]:
        names = dict(self.durable_names)
        directories = {id(node): node for node in [*self.names.values(), *names.values()] if node.is_directory}
        happened: set[_Name] = set()
        for directory in directories.values():
            pending = directory.unsynced_names
            stop = rng.randint(0, len(pending)) if mood.prefix else len(pending)
            for operation in pending[:stop]:
                if operation.needs is not None and operation.needs.also is operation:
                    chosen = operation.needs in happened
                else:
                    chosen = rng.random() < mood.name
                if chosen and _came(names, operation.needs, happened):
                    _enter_durable(names, operation)
                    happened.add(operation)
        return names


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _came(names: dict[str, Node], needs: _Name | None, happened: set[_Name]) -> bool:
    """A rename's old name may go only if its new name is there (or was, and was replaced since)."""
    return needs is None or needs in happened or names.get(needs.path) is needs.node


def _enter_durable(names: dict[str, Node], operation: _Name) -> None:
    if operation.node is None:
        names.pop(operation.path, None)
    else:
        names[operation.path] = operation.node


def _surviving_content(node: Node, rng: random.Random, mood: Mood) -> bytes:
    if not node.changes:
        return bytes(node.durable)
    content = bytearray(node.durable)
    stop = rng.randint(0, len(node.changes)) if mood.prefix else len(node.changes)
    for change in node.changes[:stop]:
        whole = rng.random() < mood.change
        if change.kind == recorder.TRUNCATE:
            if whole:
                _apply(content, change)
            continue
        if change.kind != recorder.ZERO and rng.random() < mood.change:
            _grow(content, change.offset + change.count)
        if not whole:
            continue
        if mood.sector >= 1:
            _apply(content, change)
            continue
        for piece in _sectors(change):
            if rng.random() < mood.sector:
                _apply(content, piece)
    return bytes(content)


def _sectors(change: _Change) -> Iterable[_Change]:
    at, end = change.offset, change.offset + change.count
    while at < end:
        stop = min((at // SECTOR + 1) * SECTOR, end)
        yield _Change(change.kind, at, stop - at, change.data[at - change.offset : stop - change.offset])
        at = stop


def _grow(content: bytearray, size: int) -> None:
    if len(content) < size:
        content.extend(bytes(size - len(content)))


def _apply(content: bytearray, change: _Change) -> None:
    if change.kind == recorder.TRUNCATE:
        del content[change.offset :]
        _grow(content, change.offset)
    elif change.kind == recorder.WRITE:
        _grow(content, change.offset + change.count)
        content[change.offset : change.offset + change.count] = change.data
    elif change.kind == recorder.ALLOCATE:
        _grow(content, change.offset + change.count)
    else:
        end = min(change.offset + change.count, len(content))
        if end > change.offset:
            content[change.offset : end] = bytes(end - change.offset)


_STEPS: dict[int, Callable[[Machine, recorder.Event], None]] = {
    recorder.CREATE: Machine._create,
    recorder.MKDIR: Machine._mkdir,
    recorder.RENAME: Machine._rename,
    recorder.LINK: Machine._link,
    recorder.UNLINK: Machine._unlink,
    recorder.RMDIR: Machine._unlink,
    recorder.WRITE: Machine._change,
    recorder.TRUNCATE: Machine._change,
    recorder.ZERO: Machine._change,
    recorder.ALLOCATE: Machine._change,
    recorder.SYNC: Machine._sync,
    recorder.SYNC_ALL: Machine._sync_all,
    recorder.MARK: Machine._mark,
}

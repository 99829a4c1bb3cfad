"""What a VM is to us: a name, an identity, its disks and its store — the file ``vm.json``.

Format (UTF-8 JSON, one object; written by :func:`save`, atomically)::

    key         value
    ----------  -----------------------------------------------------------------------
    magic       "blkckpt-vm"
    version     1.  A larger number is refused: a newer blkckpt wrote it.
    vm          the definition: name, id, created_ns, store, disks: [{name, path, size,
                source: null | {store, image}}].  Unknown keys are refused.
    sha256      hex SHA-256 of ``vm`` in canonical form (sorted keys, no spaces)

Base files.  ``size`` is the size of the disk the guest sees; it is fixed when the VM is created.  A base must be
a regular file or a block device, ours (or root's) and nobody else's to write, exactly as long as stated (a block
device may be longer), not held by another program, and used by one disk only.  :func:`disk` checks that once,
:func:`check` again whenever the disks are about to be served: a base that has changed its size meanwhile is
refused, because the maps and the guest's partition table speak about the old one.

A disk with a *source* was restored: its bytes come from a store image until the background fill is done, and its
file is made by the disk layer, so nothing is checked here before it exists.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blkckpt import durable, errors, paths, units

MAGIC = "blkckpt-vm"
VERSION = 1
MAX_DISKS = 64
"""As many exports as one server is asked to switch at one instant; far beyond what a guest has."""
MAX_FILE = 1 << 20
"""A definition of 64 disks with long paths is below 512 KiB."""
MAX_DISK_SIZE = 1 << 60

GROWTH_LOOK = 0.2
"""Seconds between two looks at a base modified just now: long enough to see a running copy or download grow."""

FOREIGN = {b"QFI\xfb": "qcow2", b"VMDK": "vmdk", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc"}
"""First bytes of image formats that would be served as raw garbage."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The store image a restored disk reads from until it is filled."""

    store: str
    image: str


@dataclass(frozen=True, slots=True)
class DiskDefinition:
    """One disk: its export name, its base (or filling) file, the size the guest sees."""

    name: str
    path: str
    size: int
    source: ImageSource | None = None


@dataclass(frozen=True, slots=True)
class VmDefinition:
    """One VM.  *id* never changes and is never reused; *store* None means the home's own store."""

    name: str
    id: str
    created_ns: int
    disks: tuple[DiskDefinition, ...]
    store: str | None = None

    def disk(self, name: str) -> DiskDefinition:
        """The disk called *name*, else :class:`errors.NotFoundError` naming those there are."""
        for candidate in self.disks:
            if candidate.name == name:
                return candidate
        known = ", ".join(candidate.name for candidate in self.disks)
        raise errors.NotFoundError(f"VM {self.name} has no disk {name[:80]!r}; it has {known}")


def disk(
    name: str, path: str | os.PathLike[str], size: int | None = None, source: ImageSource | None = None
) -> DiskDefinition:
    """Check a base and describe it.  *size* None takes the file's own; with *source* it must be given.

    A path through symbolic links to a file is stored resolved; a block device keeps the name it was given, as
    ``/dev/mapper`` names are the stable ones.
    """
    units.check_name(name, "disk name")
    text = os.path.abspath(os.fspath(path))  # noqa: PTH100  (a block device's symlink must stay)
    if source is not None:
        return _restored_disk(name, text, size, source)
    with _Base(name, text) as base:
        base.check_format()
        base.check_settled()
        wanted = base.size if size is None else size
        base.check_size(wanted, "stated")
        return DiskDefinition(name, text if base.is_block else os.path.realpath(text), wanted)


def _restored_disk(name: str, path: str, size: int | None, source: ImageSource) -> DiskDefinition:
    if size is None or not 0 < size <= MAX_DISK_SIZE:
        raise errors.InputError(f"disk {name}: a restored disk needs its size, not {size}")
    return DiskDefinition(name, path, size, source)


def create(
    vm: paths.VmPaths, disks: Sequence[DiskDefinition], *, store: str | None = None, vm_id: str | None = None
) -> VmDefinition:
    """Define a VM: check that names and files are used once, make its directory, write ``vm.json``.

    Creates no disk state (``DiskGroup.create`` does).  Raises :class:`errors.StateError` if the VM is defined.
    """
    definition = VmDefinition(vm.name, vm_id or secrets.token_hex(16), time.time_ns(), tuple(disks), store)
    validate(definition)
    _check_used_once(definition, _others(vm))
    paths.private_directory(vm.root)
    try:
        durable.create_file(vm.definition, encode(definition))
    except FileExistsError as error:
        raise errors.StateError(f"VM {vm.name} exists already; choose another name or `blkckpt vm rm` it") from error
    except OSError as error:
        raise errors.from_os_error(error, f"writing {vm.definition}") from error
    return definition


def save(vm: paths.VmPaths, definition: VmDefinition) -> None:
    """Replace ``vm.json`` (for example when a restored disk has been filled and lost its source)."""
    validate(definition)
    try:
        durable.write_file(vm.definition, encode(definition))
    except OSError as error:
        raise errors.from_os_error(error, f"writing {vm.definition}") from error


def load(vm: paths.VmPaths) -> VmDefinition:
    """Read and validate ``vm.json``; :class:`errors.NotFoundError` when there is no such VM."""
    if not vm.definition.exists():
        raise errors.NotFoundError(f"there is no VM {vm.name}; `blkckpt vm list` shows those there are")
    definition = decode(durable.read_small(vm.definition, "VM definition", MAX_FILE), str(vm.definition))
    if definition.name != vm.name:
        raise errors.CorruptError(f"{vm.definition} defines VM {definition.name!r}, not {vm.name}; it was moved here")
    return definition


def check(definition: VmDefinition) -> None:
    """Check every base again, as it is now: there, ours, of its size, used once."""
    for one in definition.disks:
        if one.source is None:
            with _Base(one.name, one.path) as base:
                base.check_size(one.size, "recorded")
    _check_used_once(definition, ())


# --- the file ---


def encode(definition: VmDefinition) -> bytes:
    """The bytes of ``vm.json``."""
    body = asdict(definition)
    document = {"magic": MAGIC, "version": VERSION, "vm": body, "sha256": _digest(body)}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def decode(data: bytes, where: str) -> VmDefinition:
    """Parse ``vm.json``; :class:`errors.CorruptError` naming *where* for anything torn, foreign or newer."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document["magic"] != MAGIC:
            raise errors.CorruptError(f"{where} is not a VM definition of blkckpt")
        if document["version"] != VERSION:
            raise errors.CorruptError(f"{where} has version {document['version']!r}, this blkckpt knows {VERSION}")
        body = document["vm"]
        if document["sha256"] != _digest(body):
            raise errors.CorruptError(f"{where}: checksum does not match; restore the file or define the VM again")
        definition = _from_body(body)
        validate(definition)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.CorruptError(f"{where} cannot be read as a VM definition: {error}") from error
    except errors.InputError as error:
        raise errors.CorruptError(f"{where}: {error}") from error
    return definition


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _from_body(body: Mapping[str, Any]) -> VmDefinition:
    disks = tuple(
        DiskDefinition(**{**entry, "source": None if entry["source"] is None else ImageSource(**entry["source"])})
        for entry in body["disks"]
    )
    return VmDefinition(**{**body, "disks": disks})


def validate(definition: VmDefinition) -> None:
    """Check types, names and sizes (no file is looked at); :class:`errors.InputError`."""
    units.check_name(_text(definition.name, "VM name"), "VM name")
    if not _is_hex_id(definition.id) or not _is_count(definition.created_ns):
        raise errors.InputError(f"VM {definition.name}: id or creation time is not one")
    if definition.store is not None:
        _text(definition.store, "store path")
    if not 1 <= len(definition.disks) <= MAX_DISKS:
        raise errors.InputError(f"VM {definition.name} has {len(definition.disks)} disks; 1 to {MAX_DISKS} are served")
    seen: set[str] = set()
    for one in definition.disks:
        _validate_disk(one)
        if one.name in seen:
            raise errors.InputError(f"disk name {one.name} is used twice; every export needs its own")
        seen.add(one.name)


def _validate_disk(one: DiskDefinition) -> None:
    units.check_name(_text(one.name, "disk name"), "disk name")
    if not os.path.isabs(_text(one.path, "disk path")):  # noqa: PTH117
        raise errors.InputError(f"disk {one.name}: {one.path!r} is not an absolute path")
    if not _is_count(one.size) or not 0 < one.size <= MAX_DISK_SIZE:
        raise errors.InputError(f"disk {one.name}: {one.size!r} is not a disk size")
    if one.source is not None:
        _text(one.source.store, "source store")
        _text(one.source.image, "source image")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
        raise errors.InputError(f"{what} {str(value)[:80]!r} is not a usable text")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_hex_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 64 and all(c in "0123456789abcdef" for c in value)


# --- base files ---


def _others(vm: paths.VmPaths) -> Iterable[VmDefinition]:
    """The readable definitions beside *vm*'s in the same home (a damaged one is its own `vm show`'s business)."""
    root = vm.root.parent
    for directory in sorted(root.iterdir()) if root.is_dir() else []:
        file = directory / "vm.json"
        if directory == vm.root or not file.is_file():
            continue
        try:
            yield decode(durable.read_small(file, "VM definition", MAX_FILE), str(file))
        except errors.BlkckptError:
            continue


def _check_used_once(definition: VmDefinition, others: Iterable[VmDefinition]) -> None:
    """No file is the base of two disks, under whatever names (hard links, device aliases)."""
    owners: dict[tuple[object, ...], str] = {}
    for other in others:
        for one in other.disks:
            if known := identity(one.path):
                owners[known] = f"VM {other.name}'s disk {one.name}"
    for one in definition.disks:
        known = identity(one.path) or ("path", one.path)
        if known in owners:
            raise errors.InputError(
                f"disk {one.name}: {one.path} is already {owners[known]}; two disks would overwrite each other"
            )
        owners[known] = f"disk {one.name}"


def identity(path: str | os.PathLike[str]) -> tuple[object, ...] | None:
    """What tells the file or device at *path* from all others, whatever it is called; None if there is none."""
    try:
        info = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    if stat.S_ISBLK(info.st_mode):
        return ("device", info.st_rdev)
    return ("file", info.st_dev, info.st_ino)


def is_locked(descriptor: int, start: int = 0, length: int = 0) -> bool:
    """Whether another program has locked a byte of the range (*length* 0: to the end), as QEMU does with its images.

    ``F_OFD_GETLK`` of fcntl(2).  A file system without locks cannot tell: no.
    """
    ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, ask)
    except OSError:
        return False
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


class _Base:
    """One base file, opened for the time of its checks."""

    def __init__(self, name: str, path: str) -> None:
        self._what = f"disk {name}: {path}"
        self._fd = self._open(path)
        try:
            self._check_kind(os.fstat(self._fd))
            self._check_free()
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> _Base:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _open(self, path: str) -> int:
        # The kind is asked first: opening a FIFO or a tape can block or act.
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116
        except FileNotFoundError as error:
            raise errors.NotFoundError(f"{self._what} is missing; create it or give the right path") from error
        except OSError as error:
            raise errors.from_os_error(error, f"{self._what}: looking at it") from error
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise errors.InputError(f"{self._what} is {_kind(mode)}; a disk is a regular file or a block device")
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.ETXTBSY):
                raise errors.AccessError(f"{self._what} cannot be written: {error.strerror}") from error
            raise errors.from_os_error(error, f"{self._what}: opening it for writing") from error

    def _check_kind(self, info: os.stat_result) -> None:
        self.is_block = stat.S_ISBLK(info.st_mode)
        self._modified = info.st_mtime
        if self.is_block:
            return
        if not stat.S_ISREG(info.st_mode):
            raise errors.InputError(f"{self._what} changed its kind while it was opened")
        if info.st_uid not in (os.geteuid(), 0):
            raise errors.AccessError(f"{self._what} belongs to uid {info.st_uid}; make it yours: chown {os.geteuid()}")
        if info.st_mode & 0o022:
            raise errors.AccessError(f"{self._what} is writable by others; run: chmod go-w")

    def _check_free(self) -> None:
        """QEMU marks the images it has open with OFD locks; a second writer would destroy the disk."""
        if is_locked(self._fd):
            raise errors.StateError(f"{self._what} is in use by another program (a running QEMU?); stop that first")

    def check_format(self) -> None:
        """Refuse image formats that are not raw."""
        head = os.pread(self._fd, 8, 0)
        for magic, kind in FOREIGN.items():
            if head.startswith(magic):
                raise errors.InputError(
                    f"{self._what} is a {kind} image, not a raw disk; convert it: qemu-img convert -O raw"
                )

    def check_settled(self) -> None:
        """Refuse a base that something is still writing."""
        if self.is_block or time.time() - self._modified > 2:
            return
        time.sleep(GROWTH_LOOK)
        if os.fstat(self._fd).st_size != self.size:
            raise errors.InputError(f"{self._what} is growing: something is still writing it; wait until it is done")

    def check_size(self, wanted: int, how: str) -> None:
        """Compare the file's size with the *wanted* one, which was *how* (stated, recorded)."""
        if not 0 < wanted <= MAX_DISK_SIZE:
            raise errors.InputError(f"{self._what}: a disk of {wanted} bytes cannot be served")
        if self.size < wanted:
            raise errors.InputError(f"{self._what} is {self.size} bytes, shorter than the {wanted} {how}")
        if self.size > wanted and not self.is_block:
            raise errors.InputError(
                f"{self._what} is {self.size} bytes, longer than the {wanted} {how}: it has grown or is another file"
            )


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((text for test, text in kinds if test(mode)), "no file")

"""The file systems of guests, as one interface over the dissect libraries.

This runs only in the parser process (:mod:`blkckpt.view.parser`): what it reads was written by a guest, and the
libraries neither bound their loops nor their memory.  Here an exception of any kind means "damaged".  What the
libraries would read *wrongly* is dealt with here: unwritten extents and preallocated tails are zeros, encrypted and
offloaded contents are refused, block chains end, and a name that could not be one path component is not a name.

The libraries (dissect.extfs, .xfs, .btrfs, .ntfs, .fat, .volume) are AGPL-3.0: an optional extra, imported when used.
"""

from __future__ import annotations

import datetime
import importlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from blkckpt.view import jbd2

Runs = list[tuple[int | None, int]]
"""Where a file's bytes lie on the volume: (position or None for zeros, length)."""

Stat = tuple[int, int, int, int, int, int, int, int, int]
"""mode, size, mtime, ctime, atime (ns since 1970), uid, gid, inode, links."""

MAX_DIRECTORY = 1 << 30
"""Bytes of a directory; ext4's own bound is 2 GiB, at ten million names."""

MAX_LINK = 64 << 10


class UnsupportedError(Exception):
    """A feature of the file system that cannot be read: saying so is better than wrong bytes."""


class DamagedError(Exception):
    """What is there cannot be."""


class FileSystem(Protocol):
    """One volume; *node* is a file as the library has it."""

    folds_case: bool
    root: Any

    def children(self, node: Any) -> Iterable[tuple[str, Any]]: ...
    def stat(self, node: Any) -> Stat: ...
    def link(self, node: Any) -> str: ...
    def runs(self, node: Any) -> Runs | None: ...
    def open(self, node: Any) -> Any: ...


def open_filesystem(kind: str, stream: Any) -> FileSystem:
    """The file system of *kind* on *stream*.  ModuleNotFoundError when its library is not installed."""
    if kind.startswith("ext"):
        return Ext(stream)
    makers: dict[str, Callable[[Any], FileSystem]] = {"xfs": Xfs, "btrfs": Btrfs, "ntfs": Ntfs, "vfat": Fat}
    return makers[kind](stream)


def is_name(name: str) -> bool:
    """Whether *name* can be one component of a path."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


def clean(name: str) -> str:
    """A name of 16-bit units as text that can be encoded: a lone surrogate becomes a replacement mark."""
    return name.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Ext:
    """ext2, ext3, ext4, with what a mount would take from the journal (:mod:`blkckpt.view.jbd2`)."""

    folds_case = False
    _ENCRYPTED, _COMPRESSED, _INLINE, _RECOVER = 0x800, 0x4, 0x10000000, 0x4

    def __init__(self, stream: Any) -> None:
        library = importlib.import_module("dissect.extfs.extfs")
        self._fs = library.ExtFS(stream)
        self._journal: jbd2.Overlaid | None = None
        if self._fs.sb.s_feature_incompat & self._RECOVER and self._fs.sb.s_journal_inum:
            self._journal = self._replayed(stream)
        if self._journal is not None:
            self._fs = library.ExtFS(self._journal)
        self.root = self._fs.root

    def _replayed(self, stream: Any) -> jbd2.Overlaid | None:
        """The volume as a mount would make it; None when its journal has nothing to say."""
        journal = self._fs.get_inode(self._fs.sb.s_journal_inum)
        size, blocks = jbd2.replay(journal.open())
        if not blocks:
            return None
        if size != self._fs.block_size:
            raise DamagedError("its journal has other blocks than the file system")
        return jbd2.Overlaid(stream, size, blocks, self.runs(journal) or [])

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        _check_directory(node.size)
        for child in node.iterdir():
            yield child.filename, child

    def stat(self, node: Any) -> Stat:
        one = node.inode
        size = node.size if stat.S_IFMT(one.i_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK) else 0
        return (
            one.i_mode, size, node.mtime_ns, node.ctime_ns, node.atime_ns,
            one.i_uid | one.i_uid_high << 16, one.i_gid | one.i_gid_high << 16, node.inum, one.i_links_count,
        )  # fmt: skip

    def link(self, node: Any) -> str:
        return str(node.link)

    def runs(self, node: Any) -> Runs | None:
        flags = node.inode.i_flags
        if flags & self._ENCRYPTED:
            raise UnsupportedError("the file is encrypted (fscrypt)")
        if flags & self._COMPRESSED:
            raise UnsupportedError("the file is compressed (e2compr)")
        if flags & self._INLINE:
            if node.size > 60:
                raise UnsupportedError("the file lies in its inode's attributes (inline_data)")
            return None
        size = self._fs.block_size
        found = [(None if not block else block * size, count * size) for block, count in node.dataruns()]
        return found if self._journal is None else self._journal.redirected(found)

    def open(self, node: Any) -> Any:
        return node.open()


class Xfs:
    """XFS, versions 4 and 5."""

    folds_case = False

    def __init__(self, stream: Any) -> None:
        self._fs = importlib.import_module("dissect.xfs.xfs").XFS(stream)
        if self._fs.sb.sb_dirblklog:
            raise UnsupportedError("its directories have blocks larger than the file system's")
        self.root = self._fs.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        _check_directory(node.size)
        for child in node.iterdir():
            yield child.filename, child

    def stat(self, node: Any) -> Stat:
        one = node.inode
        return (
            one.di_mode, node.size, node.mtime_ns, node.ctime_ns, node.atime_ns,
            one.di_uid, one.di_gid, node.inum, one.di_nlink,
        )  # fmt: skip

    def link(self, node: Any) -> str:
        return str(node.link)

    def runs(self, node: Any) -> Runs | None:
        formats = importlib.import_module("dissect.xfs.c_xfs").c_xfs.xfs_dinode_fmt
        if node.inode.di_flags & 1:
            raise UnsupportedError("the file lies in XFS's realtime section")
        if node.inode.di_format not in (formats.XFS_DINODE_FMT_EXTENTS, formats.XFS_DINODE_FMT_BTREE):
            return None
        return _gaps(self._extent(*one) for one in node._iter_blocks())

    def _extent(self, offset: int, block: int, count: int, unwritten: int) -> tuple[int, int | None, int]:
        size, bits = self._fs.block_size, self._fs.sb.sb_agblklog
        place = ((block >> bits) * self._fs.sb.sb_agblocks + (block & ((1 << bits) - 1))) * size
        return offset * size, None if unwritten else place, count * size

    def open(self, node: Any) -> Any:
        return node.open()


class Btrfs:
    """Btrfs on one device; the default subvolume, the others where they are linked."""

    folds_case = False

    def __init__(self, stream: Any) -> None:
        self._fs = importlib.import_module("dissect.btrfs.btrfs").Btrfs(stream)
        self._striped = importlib.import_module("dissect.btrfs.c_btrfs").BTRFS_BLOCK_GROUP_STRIPE_MASK
        self._Extents = importlib.import_module("dissect.btrfs.stream").ExtentStream
        self.root = self._fs.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        yield from node.iterdir()

    def stat(self, node: Any) -> Stat:
        one = node.inode
        return (
            one.mode, node.size, node.mtime_ns, node.ctime_ns, node.atime_ns,
            one.uid, one.gid, self._inode(node), one.nlink,
        )  # fmt: skip

    def _inode(self, node: Any) -> int:
        """The inode number; every subvolume counts anew, so that of another one carries its number on top."""
        other = node.subvolume.objectid != self.root.subvolume.objectid
        return int(node.inum | (node.subvolume.objectid & 0xFFFF) << 48 if other else node.inum)

    def link(self, node: Any) -> str:
        return str(node.link)

    def runs(self, node: Any) -> Runs | None:
        opened = node.open()
        if not isinstance(opened, self._Extents):
            return None
        found: Runs = []
        for extent in opened.extents:
            if extent.compression or extent.encryption:
                return None
            if not extent.disk_offset:
                found.append((None, extent.length))
            else:
                place = self._place(extent.disk_offset + extent.offset, extent.length)
                if place is None:
                    return None
                found.append((place, extent.length))
        return found

    def _place(self, logical: int, length: int) -> int | None:
        """Where a logical range is on the device; None if it is striped, or in two chunks."""
        for chunk in self._fs._logical_fh.chunks:
            if chunk.offset <= logical and logical + length <= chunk.offset + chunk.length:
                return None if chunk.type & self._striped else int(chunk.stripes[0].offset + logical - chunk.offset)
        return None

    def open(self, node: Any) -> Any:
        return node.open()


class Ntfs:
    """NTFS.  Permissions are not NTFS's own: files 0644, directories 0755, read-only ones without the w."""

    folds_case = True
    _FIRST_USER = 24
    _ENCRYPTED, _COMPRESSED, _READ_ONLY = 0x4000, 0x00FF, 1

    def __init__(self, stream: Any) -> None:
        self._fs = importlib.import_module("dissect.ntfs.ntfs").NTFS(stream)
        self._types = importlib.import_module("dissect.ntfs.c_ntfs").ATTRIBUTE_TYPE_CODE
        self.root = self._fs.mft.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        if node.has_stream("$I30", self._types.INDEX_ALLOCATION):
            _check_directory(node.size("$I30", self._types.INDEX_ALLOCATION))
        for entry in node.iterdir(ignore_dos=True):
            child = entry.dereference()
            if child.segment >= self._FIRST_USER:  # below are the file system's own ($MFT, …)
                yield clean(entry.attribute.file_name), child

    def stat(self, node: Any) -> Stat:
        times = node.attributes[self._types.STANDARD_INFORMATION]
        if node.is_symlink() or node.is_mount_point():
            mode, size = stat.S_IFLNK | 0o777, len(self.link(node).encode("utf-8", "surrogateescape"))
        elif node.is_dir():
            mode, size = stat.S_IFDIR | 0o755, 0
        else:
            mode, size = stat.S_IFREG | 0o644, node.size() if node.has_stream() else 0
            if times.file_attributes & self._READ_ONLY:
                mode &= ~0o222
        return (
            mode, size, times.last_modification_time_ns, times.last_change_time_ns, times.last_access_time_ns,
            0, 0, node.segment, node.header.ReferenceCount,
        )  # fmt: skip

    def link(self, node: Any) -> str:
        text = node.reparse_point_name or node.reparse_point_substitute_name
        return clean(text.removeprefix("\\??\\").replace("\\", "/"))

    def runs(self, node: Any) -> Runs | None:
        if node.is_reparse_point():
            tag = int(node.attributes[self._types.REPARSE_POINT].tag)
            raise UnsupportedError(
                f"its contents are elsewhere (reparse point {tag:#x}: offloaded or system-compressed)"
            )
        if not node.has_stream():
            return []
        attributes = node.attributes.find("", self._types.DATA)
        if attributes.header.resident:
            return None
        header = attributes._get_stream_attrs()[0].header
        if header.flags & self._ENCRYPTED:
            raise UnsupportedError("the file is encrypted (EFS)")
        if header.flags & self._COMPRESSED:
            return None
        cluster = self._fs.cluster_size
        found = [(None if lcn is None else lcn * cluster, count * cluster) for lcn, count in attributes.dataruns()]
        valid = header.header.Form.Nonresident.ValidDataLength
        if sum(length for _, length in found) < min(valid, header.size):
            raise DamagedError("its run list is shorter than the file")
        return _cut(found, valid)

    def open(self, node: Any) -> Any:
        return node.open()


class Fat:
    """FAT12, FAT16, FAT32 with long names.  Times are the guest's local ones, read as UTC."""

    folds_case = True

    def __init__(self, stream: Any) -> None:
        self._fs = importlib.import_module("dissect.fat.fat").FATFS(stream)
        self._fs.fat.runlist = self._runlist  # its own follows a chain that leads back for ever
        self.root = self._fs.root

    def children(self, node: Any) -> Iterator[tuple[str, Any]]:
        for child in node.iterdir():
            if not child.is_volume_id():
                yield clean(self._name(child)), child

    def _name(self, node: Any) -> str:
        """The name; of a short one the parts that Windows marks as written in small letters."""
        if node.ldirents:
            return str(node.name)
        base, dot, extension = node.name.partition(".")
        flags = node.dirent.DIR_NTRes
        return "".join((base.lower() if flags & 8 else base, dot, extension.lower() if flags & 16 else extension))

    def stat(self, node: Any) -> Stat:
        folder = node.is_directory()
        mode = stat.S_IFDIR | 0o755 if folder else stat.S_IFREG | 0o644
        mtime, ctime, atime = (_nanoseconds(time) for time in (node.mtime, node.ctime, node.atime))
        inode = 1 if node is self.root else node.cluster or 0
        size = 0 if folder else node.size
        return mode & ~0o222 if node.is_readonly() else mode, size, mtime, ctime, atime, 0, 0, inode, 1

    def link(self, node: Any) -> str:
        raise DamagedError("FAT has no symbolic links")

    def runs(self, node: Any) -> Runs | None:
        cluster, start = self._fs.cluster_size, self._fs.first_data_sector * self._fs.sector_size
        found: Runs = [(start + first * cluster, count * cluster) for first, count in node.dataruns()]
        if sum(length for _, length in found) < node.size:
            raise DamagedError("its cluster chain is shorter than the file")
        return found

    def open(self, node: Any) -> Any:
        return node.open()

    def _runlist(self, cluster: int) -> Iterator[tuple[int, int]]:
        """The clusters from *cluster* on, from 0, in runs."""
        table, last, left = self._fs.fat, {12: 0xFF8, 16: 0xFFF8, 32: 0xFFFFFF8}, self._fs.fat.entry_count
        first, count = cluster, 0
        while cluster < last[table.bits_per_entry]:
            if not 2 <= cluster < table.entry_count or left == 0:
                raise DamagedError("its cluster chain leads nowhere")
            if cluster != first + count:
                yield first - 2, count
                first, count = cluster, 0
            count, left = count + 1, left - 1
            cluster = table.get(cluster)
        if count:
            yield first - 2, count


def logical_volumes(stream: Any) -> list[dict[str, Any]]:
    """The visible volumes of an LVM2 physical volume: ``name``, ``size``, and ``runs`` or ``problem``."""
    group = importlib.import_module("dissect.volume.lvm.lvm2").LVM2(stream).volume_group
    if not all(is_name(name) for name in (group.name, *group.logical_volumes)):
        raise DamagedError("its names are impossible")
    found = []
    for volume in group.logical_volumes.values():
        if not volume.is_visible:
            continue
        one: dict[str, Any] = {"name": f"{group.name}-{volume.name}"}
        try:
            one["runs"] = _linear(group, volume)
        except UnsupportedError as error:
            one["problem"] = str(error)
        found.append(one)
    return found


def _linear(group: Any, volume: Any) -> Runs:
    extent = group.extent_size * 512
    pieces = []
    for segment in volume.segments:
        if segment.type not in ("striped", "linear") or segment.stripe_count != 1:
            raise UnsupportedError(f"its layout ({segment.type}) is not read")
        name, first = segment.stripes[0]
        device = group.physical_volumes[name]
        if device.dev is None:
            raise UnsupportedError("part of it is on another disk")
        pieces.append(
            (segment.start_extent * extent, device.pe_start * 512 + first * extent, segment.extent_count * extent)
        )
    return _gaps(sorted(pieces))


def _check_directory(size: int) -> None:
    if size > MAX_DIRECTORY:
        raise DamagedError(f"a directory cannot have {size} bytes")


def _gaps(extents: Iterable[tuple[int, int | None, int]]) -> Runs:
    """``(offset in the file, place, length)`` in order → runs, with zeros for what is left out."""
    found: Runs = []
    end = 0
    for offset, place, length in extents:
        if offset < end or length < 0:
            raise DamagedError("its extents overlap")
        if offset > end:
            found.append((None, offset - end))
        found.append((place, length))
        end = offset + length
    return found


def _cut(runs: Runs, end: int) -> Runs:
    """The first *end* bytes of *runs*: what is beyond was never written."""
    found: Runs = []
    for place, length in runs:
        if end <= 0:
            break
        found.append((place, min(length, end)))
        end -= length
    return found


def _nanoseconds(time: datetime.datetime) -> int:
    return int(time.replace(tzinfo=datetime.UTC).timestamp()) * 10**9

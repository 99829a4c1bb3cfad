"""What a volume holds, told by its magic numbers alone, and its label.  Own code: needs no library."""

from __future__ import annotations

from dataclasses import dataclass

from blkckpt.view import source as sources

READABLE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "ntfs", "vfat")
"""File systems whose files can be read (with the extra ``files``)."""

LVM = "lvm2"

UNREADABLE = {
    "exfat": "exFAT is not read",
    "swap": "it is swap space",
    "luks": "it is encrypted (LUKS)",
    "bitlocker": "it is encrypted (BitLocker)",
    "raid": "it is part of a Linux RAID",
    "iso9660": "ISO 9660 is not read",
    "squashfs": "SquashFS is not read",
    "zfs": "ZFS is not read",
}
"""What is recognised but not read, and why."""

_HEAD = 68 << 10
"""Every magic number below lies in the first 68 KiB (Btrfs has the last, at 64 KiB)."""

_MAGICS = (
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bitlocker", 3, b"-FVE-FS-"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("swap", 4086, b"SWAPSPACE2"),
    ("swap", 65526, b"SWAPSPACE2"),
    ("raid", 4096, b"\xfc\x4e\x2b\xa9"),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 32769, b"CD001"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """*kind* is one of the above; *label* was written by the guest."""

    kind: str
    label: str


def probe(source: sources.Source) -> Found | None:
    """What is on the volume *source*; None when nothing is recognised."""
    head = source.read(0, _HEAD)
    if any(head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 28] == b"LVM2" for at in range(0, 2048, 512)):
        return Found(LVM, "")
    for kind, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return Found(kind, _label(kind, head))
    if head[1080:1082] == b"\x53\xef":
        return Found(_ext(head), _text(head[1144:1160]))
    if head[510:512] == b"\x55\xaa" and head[:1] in (b"\xeb", b"\xe9"):
        for kind_at, label_at in ((54, 43), (82, 71)):
            if head[kind_at : kind_at + 3] == b"FAT":
                label = _text(head[label_at : label_at + 11]).strip()
                return Found("vfat", "" if label == "NO NAME" else label)
    return None


def _ext(head: bytes) -> str:
    compatible, incompatible = (int.from_bytes(head[at : at + 4], "little") for at in (1024 + 92, 1024 + 96))
    if incompatible & 0x2C0:  # extents, 64bit, flex_bg
        return "ext4"
    return "ext3" if compatible & 4 else "ext2"


def _label(kind: str, head: bytes) -> str:
    if kind == "xfs":
        return _text(head[108:120])
    if kind == "btrfs":
        return _text(head[0x1012B:0x1022B])
    if kind == "swap":
        return _text(head[1052:1068])
    return ""


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")

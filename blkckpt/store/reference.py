"""References: what stands for the image of a retained disk.  Pure: values and bytes.

A retained checkpoint's disks are layers in the home of its VM (:mod:`blkckpt.disk.retaining`).  In the place of each
image's table, under the image's id, the store has a *reference* that says where.  When the checkpoint is flattened the
table replaces it, in one rename: the id, and whatever names it, stays.

The file is a sealed JSON object (:func:`blkckpt.store.manifest.seal`), so that its first byte is ``{``, which no
table's is::

    kind        "blkckpt-reference"      version   1        requires   []
    image       its own id, 32 hex digits
    home        the absolute path of the blkckpt home
    vm, vm_id   the VM there
    disk        its disk
    size        bytes
    checkpoint  the name of the checkpoint, for messages

It only says where to look.  What is there must say the same: the VM's state has to name a layer that keeps exactly
this image for a checkpoint, or there is no image (rule S4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from blkckpt import errors, units
from blkckpt.store import layout, manifest

KIND = "blkckpt-reference"
MAX_SIZE = 16 << 10


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the bytes of image *image* are."""

    image: str
    home: str
    vm: str
    vm_id: str
    disk: str
    size: int
    checkpoint: str

    @property
    def owner(self) -> str:
        return f"{self.vm}@{self.checkpoint}"


class RetainedError(errors.StateError):
    """An image without a table: its bytes are in the layers of a VM."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(
            f"{reference.owner} is retained: its disks are layers of VM {reference.vm}, which this cannot read; "
            f"flatten it first: blkckpt flatten {reference.owner}"
        )
        self.reference = reference


def encode(reference: Reference) -> bytes:
    """The file of *reference*."""
    return manifest.seal({"kind": KIND, "version": 1, "requires": [], **asdict(reference)})


def is_one(start: bytes) -> bool:
    """Whether a file that begins so is no table."""
    return start[:1] == b"{"


def decode(data: bytes, image: str) -> Reference:
    """Parse and check the reference of image *image*."""
    what = f"the reference of image {image}"
    fields = manifest.unseal(data, what)
    try:
        if fields["kind"] != KIND or fields["image"] != image:
            raise errors.CorruptError(f"{what} is that of another")
        found = Reference(
            image=image,
            home=_path(fields["home"]),
            vm=units.check_name(fields["vm"], "VM name"),
            vm_id=layout.check_id(fields["vm_id"]),
            disk=units.check_name(fields["disk"], "disk name"),
            size=_size(fields["size"]),
            checkpoint=units.check_name(fields["checkpoint"], "checkpoint name"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, errors.InputError) as error:
        raise errors.CorruptError(f"{what} has fields that it cannot have: {error!r:.120}") from error
    return found


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or len(value) > 4096:
        raise ValueError(f"home {value!r:.80}")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= layout.MAX_IMAGE:
        raise ValueError(f"size {value!r:.40}")
    return value

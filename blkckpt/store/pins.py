"""Pins: images that are in use though no manifest may name them.

A disk that was restored from a checkpoint and is not yet filled reads from the checkpoint's images; if the user
removes the checkpoint meanwhile, the images must stay.  A pin is a root of the collection, as a manifest is.

``pins/OWNER.json`` is sealed as a manifest is (:mod:`blkckpt.store.manifest`): ``version`` (1), ``requires``,
``owner``, ``images`` (list of image ids), ``checksum``.
"""

from __future__ import annotations

from blkckpt import errors, units
from blkckpt.store import backend, layout, manifest


def key(owner: str) -> str:
    return f"pins/{units.check_name(owner, 'pin')}.json"


def encode(owner: str, images: list[str]) -> bytes:
    return manifest.seal({"version": manifest.VERSION, "requires": [], "owner": owner, "images": images})


def decode(data: bytes, owner: str) -> list[str]:
    """The images that *owner* has pinned; CorruptError naming the pin."""
    what = f"pin {owner}"
    fields = manifest.unseal(data, what)
    try:
        if fields["owner"] != owner:
            raise errors.CorruptError(f"{what} is that of {fields['owner']!r:.80}")
        return [layout.check_id(image) for image in fields["images"]]
    except (errors.InputError, TypeError, KeyError) as error:
        raise errors.CorruptError(f"{what} is damaged; remove it if its disk is gone") from error


def load(where: backend.Backend) -> dict[str, list[str]]:
    """Every pin: owner → images."""
    found = {}
    for name, _ in where.list("pins"):
        owner = name.removeprefix("pins/").removesuffix(".json")
        try:
            found[owner] = decode(_read(where, name, owner), owner)
        except errors.NotFoundError:
            continue
    return found


def _read(where: backend.Backend, name: str, owner: str) -> bytes:
    """The whole of a pin, which may be replaced by a longer or shorter one at any time."""
    while True:
        size = where.size(name)
        if size > manifest.MAX_SIZE:
            raise errors.CorruptError(f"pin {owner} is too long")
        try:
            return where.get(name, 0, size)
        except errors.CorruptError:
            if where.size(name) == size:
                raise

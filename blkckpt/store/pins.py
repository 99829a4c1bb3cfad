"""Pins: images that are in use though no manifest may name them.

A disk that was restored from a checkpoint and is not yet filled reads from the checkpoint's images; if the user
removes the checkpoint meanwhile, the images must stay.  ``pins/OWNER.json`` is a JSON object: ``version`` (1),
``owner``, ``images`` (list of image ids).  A pin is a root of the collection, as a manifest is.
"""

from __future__ import annotations

import json
from typing import Any

from blkckpt import errors, units
from blkckpt.store import backend, layout

_LIMIT = 1 << 20


def key(owner: str) -> str:
    return f"pins/{units.check_name(owner, 'pin')}.json"


def encode(owner: str, images: list[str]) -> bytes:
    return json.dumps({"version": layout.VERSION, "owner": owner, "images": images}).encode() + b"\n"


def decode(data: bytes, what: str) -> list[str]:
    """The images of a pin; CorruptError naming *what*."""
    try:
        fields: dict[str, Any] = json.loads(data)
        layout.check_version(what, int(fields["version"]), 0)
        return [layout.check_id(image) for image in fields["images"]]
    except (errors.InputError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise errors.CorruptError(f"{what} is damaged; remove it if its disk is gone") from error


def load(where: backend.Backend) -> dict[str, list[str]]:
    """Every pin: owner → images."""
    found = {}
    for name, size in where.list("pins"):
        what = f"pin {name}"
        if size > _LIMIT:
            raise errors.CorruptError(f"{what} is too long")
        owner = name.removeprefix("pins/").removesuffix(".json")
        try:
            found[owner] = decode(where.get(name, 0, size), what)
        except errors.NotFoundError:
            continue
    return found

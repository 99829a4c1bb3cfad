"""Evidence: what was seen of a checkpoint's guest — its screen, and whether it lives when it is resumed.

It comes after the manifest and may come again, so it is kept as labels are (:mod:`blkckpt.store.labels`): beside the
checkpoint, replaced whole, bound to the manifest's id.  It goes with the checkpoint; what is left of one that is gone
counts for nothing and goes with the next collection.

``evidence/VM/NAME.json`` is sealed as a manifest is: ``version`` (1), ``requires``, ``id``, ``boot`` (null or
``alive``, ``sign``, ``seconds``, ``when_ns``, ``message``), ``screen`` (null or ``when_ns``, ``source``, ``size``,
``sha256``), ``checksum``.  ``evidence/VM/NAME.png`` is the picture.  It is written first, and believed only while it
has the size and the digest stated: a crash in between costs the picture, never the truth.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

from blkckpt import errors, units
from blkckpt.store import backend, layout, manifest

MAX_SCREEN = 32 << 20
"""Bytes of a picture; 4K in full noise is 25 MB."""
PNG = b"\x89PNG\r\n\x1a\n"

AT_CHECKPOINT = "checkpoint"
AT_BOOT = "boot"


@dataclass(frozen=True, slots=True)
class Boot:
    """The outcome of resuming it apart.  *sign*: what showed life, empty if nothing; *message*: why it does not."""

    alive: bool
    sign: str
    seconds: float
    when_ns: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Screen:
    """A picture that was taken: when, on what occasion, and what the file must be."""

    when_ns: int
    source: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is known of one checkpoint."""

    boot: Boot | None = None
    screen: Screen | None = None


NONE = Evidence()


def key(vm: str, name: str, suffix: str = "json") -> str:
    return f"evidence/{units.check_name(vm, 'VM name')}/{units.check_name(name, 'checkpoint name')}.{suffix}"


def encode(found: Evidence, checkpoint_id: str) -> bytes:
    """The object for *found*, of the checkpoint whose manifest has *checkpoint_id*."""
    return manifest.seal({
        "version": manifest.VERSION, "requires": [], "id": layout.check_id(checkpoint_id, "checkpoint id"),
        "boot": asdict(found.boot) if found.boot else None,
        "screen": asdict(found.screen) if found.screen else None,
    })  # fmt: skip


def decode(data: bytes, what: str) -> tuple[Evidence, str]:
    """The evidence in *data* and the id of its checkpoint; CorruptError naming *what*."""
    fields = manifest.unseal(data, what)
    try:
        boot, screen = fields["boot"], fields["screen"]
        found = Evidence(None if boot is None else _boot(boot), None if screen is None else _screen(screen))
        return found, layout.check_id(fields["id"])
    except (errors.InputError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise errors.CorruptError(f"{what} is damaged ({error!r:.120})") from error


def load(where: backend.Backend, vm: str, name: str, checkpoint_id: str) -> Evidence:
    """What is known of a checkpoint; nothing if there is no object, one of another id, or one that cannot be read."""
    place = key(vm, name)
    if not where.exists(place):  # as a rule; to find out by an error takes ten times as long
        return NONE
    try:
        size = where.size(place)
        if size > manifest.MAX_SIZE:
            return NONE
        found, owner = decode(where.get(place, 0, size), f"the evidence of {vm}@{name}")
    except (errors.NotFoundError, errors.CorruptError):
        return NONE
    return found if owner == checkpoint_id else NONE


def picture(where: backend.Backend, vm: str, name: str, screen: Screen) -> bytes:
    """The picture of *screen*; NotFoundError, or CorruptError if it is another one."""
    data = where.get(key(vm, name, "png"), 0, screen.size)
    if not is_of(data, screen):
        raise errors.CorruptError(f"the picture of {vm}@{name} is not the one that was taken")
    return data


def is_of(data: bytes, screen: Screen) -> bool:
    """Whether *data* is the picture that *screen* tells of."""
    return len(data) == screen.size and hashlib.sha256(data).hexdigest() == screen.sha256


def put(where: backend.Backend, m: manifest.Manifest, found: Evidence, png: bytes | None) -> None:
    """Store what was seen of *m* elsewhere, the picture first; the caller holds the lock of labels."""
    if png is not None:
        where.put(key(m.vm, m.name, "png"), png)
    where.put(key(m.vm, m.name), encode(found, m.id))


def add(
    where: backend.Backend, m: manifest.Manifest, boot: Boot | None, png: bytes | None, source: str, when_ns: int
) -> Evidence:
    """Add to what is known of *m* and store it; the caller holds the lock of labels."""
    found = load(where, m.vm, m.name, m.id)
    if png is not None:
        if not png.startswith(PNG) or len(png) > MAX_SCREEN:
            raise errors.InputError(f"a picture of {len(png)} bytes that is no PNG cannot be kept")
        where.put(key(m.vm, m.name, "png"), png)
        screen = Screen(when_ns, source, len(png), hashlib.sha256(png).hexdigest())
        found = replace(found, screen=screen)
    found = replace(found, boot=boot or found.boot)
    where.put(key(m.vm, m.name), encode(found, m.id))
    return found


def remove(where: backend.Backend, vm: str, name: str) -> None:
    """No error if there is none."""
    for suffix in ("json", "png"):
        where.delete(key(vm, name, suffix))


def _is_time(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _boot(body: Any) -> Boot:
    one = Boot(**body)
    if not isinstance(one.alive, bool) or not isinstance(one.seconds, int | float) or not _is_time(one.when_ns):
        raise TypeError("a boot that is none")
    return replace(one, sign=str(one.sign), message=str(one.message))


def _screen(body: Any) -> Screen:
    one = Screen(**body)
    if not isinstance(one.size, int) or not 0 < one.size <= MAX_SCREEN or not _is_time(one.when_ns):
        raise TypeError("a screen that is none")
    return replace(one, source=str(one.source), sha256=str(one.sha256))

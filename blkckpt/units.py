"""Names, sizes and durations as people write them.

Sizes are bytes with binary suffixes (``512M`` is 512 * 2**20), as QEMU and nbdkit read them.
"""

from __future__ import annotations

import re

from blkckpt import errors

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What VMs, disks, checkpoints and layers may be called; safe as one path component and as an NBD export."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:i?B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def check_name(text: str, what: str) -> str:
    """Return *text* if it is a valid name, else raise :class:`errors.InputError` naming *what* it is."""
    if not NAME.fullmatch(text):
        raise errors.InputError(
            f"{what} {text[:80]!r} is not a usable name: 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return text


def parse_size(text: str) -> int:
    """Parse ``4096``, ``64K``, ``1.5G``, ``2GiB`` into bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise errors.InputError(f"{text!r} is not a size; write for example 4096, 64K, 1.5G or 2GiB")
    number, suffix = match.groups()
    return int(float(number) * (1 << (10 * " KMGTPE".index(suffix.upper() or " "))))


def format_size(count: int | float) -> str:
    """``1536`` → ``1.5 KiB``."""
    value = float(count)
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {suffix}" if suffix == "B" else f"{value:.1f} {suffix}"
        value /= 1024
    return f"{value:.1f} PiB"


def parse_duration(text: str) -> float:
    """Parse ``250ms``, ``5s``, ``10m``, ``2h`` or a plain number of seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise errors.InputError(f"{text!r} is not a duration; write for example 250ms, 5s, 10m or 2h")
    number, suffix = match.groups()
    return float(number) * _SECONDS[suffix]


def format_duration(seconds: float) -> str:
    """``0.0042`` → ``4.2 ms``; ``75`` → ``1 min 15 s``."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"

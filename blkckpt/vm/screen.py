"""A picture of a guest's screen, through QMP: PNG from QEMU 7.1 on, else PPM made into PNG here.

``screendump`` is carried out by QEMU's main loop: devices wait some milliseconds, processors go on.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blkckpt import durable, errors

PNG = b"\x89PNG\r\n\x1a\n"
MAX_FILE = 128 << 20
"""A picture in PPM, 8K."""

Execute = Callable[[str, Mapping[str, object]], Any]
"""Runs a QMP command; HypervisorError when QEMU refuses."""

_PPM = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")


def take(execute: Execute, directory: Path) -> bytes | None:
    """The screen as PNG; None if the machine has no screen.  *directory* is ours and QEMU's, for a moment."""
    path = directory / "screen.tmp"
    try:
        for arguments in ({"filename": str(path), "format": "png"}, {"filename": str(path)}):
            path.unlink(missing_ok=True)
            try:
                execute("screendump", arguments)
            except errors.HypervisorError as error:
                if "no console" in str(error):
                    return None
                if "format" in arguments:  # an older QEMU, or one built without libpng
                    continue
                raise
            return _as_png(durable.read_small(path, "picture", MAX_FILE))
        return None
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _as_png(data: bytes) -> bytes:
    if data.startswith(PNG):
        return data
    head = _PPM.match(data)
    if head is None:
        raise errors.ProtocolError("QEMU's picture of the screen is neither PNG nor PPM")
    return png(int(head[1]), int(head[2]), data[head.end() :])


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of 8-bit RGB *pixels*.  Source: the PNG specification, sections 5, 9 and 11."""
    if len(pixels) != 3 * width * height or not pixels:
        raise errors.ProtocolError(f"a picture of {width}x{height} has {len(pixels)} bytes")
    rows = b"".join(b"\0" + pixels[at : at + 3 * width] for at in range(0, len(pixels), 3 * width))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    return PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )

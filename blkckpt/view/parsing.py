"""What the parser process and its client say to each other, as bytes.  Pure.

A message is a frame: 4 bytes length of the JSON, 4 bytes length of the data, little-endian; the JSON (an object);
the data.  The client asks one thing at a time, ``{"do": NAME, …}``.  Before the answer the parser may ask in turn
for bytes of the volume, any number of times: ``{"read": [offset, length]}``, answered by a frame with that data.
The answer is ``{"done": RESULT}`` (bytes as data) or ``{"failed": KIND, "why": TEXT}``.

=============  =====================================  ==================================================
do             with                                   done
=============  =====================================  ==================================================
``open``       kind, size                             null
``lvm``        size                                   list of {name, runs or problem}
``stat``       path                                   [name, *stat]
``list``       path                                   list of [name, *stat], by name
``link``       path                                   text
``map``        path                                   {size, runs: [[place or null, length]] or null}
``read``       path, offset, length                   the bytes, as data
=============  =====================================  ==================================================
"""

from __future__ import annotations

import json
import struct
from typing import Any, Protocol

LIMIT = 256 << 20
"""Bytes of a frame: a directory of a million names, a map of four million runs."""

READ_LIMIT = 8 << 20
"""Bytes that one ``read`` may ask for, in either direction."""

_HEAD = struct.Struct("<II")


class File(Protocol):
    """A binary file of the standard library, unbuffered or not."""

    def read(self, length: int, /) -> bytes | None: ...
    def write(self, data: bytes, /) -> int | None: ...
    def flush(self) -> None: ...


def send(file: File, message: dict[str, Any], data: bytes = b"") -> None:
    """Write one frame."""
    text = json.dumps(message, separators=(",", ":")).encode()
    frame = _HEAD.pack(len(text), len(data)) + text + data
    file.write(frame)
    file.flush()


def receive(file: File) -> tuple[dict[str, Any], bytes]:
    """Read one frame; EOFError when the other side has gone or sent what is no frame."""
    first, second = _HEAD.unpack(_exactly(file, _HEAD.size))
    if first + second > LIMIT:
        raise EOFError(f"a frame of {first + second} bytes")
    text, data = _exactly(file, first), _exactly(file, second)
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EOFError("not a frame") from error
    if not isinstance(message, dict):
        raise EOFError("not a frame")
    return message, data


def _exactly(file: File, length: int) -> bytes:
    parts = []
    while length:
        part = file.read(length)
        if not part:
            raise EOFError("the other side has gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)

"""Hashing and compressing one chunk.

lz4's block decoder bounds its output but does not detect a flipped literal, and a short output is no error to it;
so the length is compared and the hash of the raw bytes is the judge (rules S3 and S4).  The interpreter lock is
released by the hashes, by lz4 and by the zero test.

MB/s a core at 64 KiB: blake3 4,100; SHA-256 380 to 1,400 (with the CPU's instructions); lz4 in 450 (text) to 4,300
(random), out 2,300; zero test by numpy's ``bitwise_or`` 9,800, ``bytes ==`` 2,300 with its copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lz4.block

from blkckpt import errors, lazy
from blkckpt.store import layout

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _library() -> Callable[[bytes, int, int, int], int] | None:
    """``LZ4_decompress_safe`` of the distribution's liblz4, if it is there (systemd and dpkg need it).

    The module can only make new bytes; this writes where the data is wanted, a sixth of the time of reading an image.
    """
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL("liblz4.so.1").LZ4_decompress_safe
        found.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        found.restype = ctypes.c_int
        return found
    return None


_decompress_safe = _library()

_SAMPLED = 32 << 10
"""Smaller chunks are not worth a sample: 6 µs, against 25 for a whole chunk that cannot be compressed."""


@dataclass(frozen=True, slots=True)
class Codec:
    """The hash of a store, with its name."""

    name: str
    digest: layout.Digest

    def decode(self, payload: bytes | memoryview, raw: int, digest: bytes, what: str) -> bytes:
        """The raw bytes of a chunk, checked; raises CorruptError naming *what*, never returns wrong bytes."""
        layout.check_lengths(len(payload), raw, what)
        data = bytes(payload) if len(payload) == raw else _decompress(payload, raw, what)
        self._judge(data, digest, what)
        return data

    def decode_into(self, payload: memoryview, buf: memoryview, digest: bytes, what: str) -> None:
        """:meth:`decode` into *buf*, which has the chunk's length; after an error it holds anything."""
        layout.check_lengths(len(payload), len(buf), what)
        if len(payload) == len(buf):
            buf[:] = payload
        else:
            _decompress_into(payload, buf, what)
        self._judge(buf, digest, what)

    def _judge(self, data: bytes | memoryview, digest: bytes, what: str) -> None:
        if self.digest(data) != digest:
            raise errors.CorruptError(f"{what}: the data does not have its hash {digest.hex()[:16]}…")


def preferred() -> str:
    """The hash a new store gets: blake3 where it is installed, else SHA-256."""
    return "blake3" if importlib.util.find_spec("blake3") else "sha256"


def codec(name: str) -> Codec:
    """The codec of a store whose hash is *name*."""
    if name == "sha256":
        return Codec(name, _sha256)
    if name != "blake3":
        raise errors.CorruptError(
            f"the store uses the hash {name[:40]!r}, which this blkckpt does not know; upgrade it"
        )
    try:
        make = importlib.import_module("blake3").blake3
    except ImportError as error:
        raise errors.MissingError(
            "the store uses blake3, and the module is not installed: pip install blake3"
        ) from error

    def digest(data: bytes | memoryview) -> bytes:
        result: bytes = make(data).digest()
        return result

    return Codec(name, digest)


def compress(data: bytes | memoryview) -> bytes | memoryview:
    """*data* as an lz4 block, or *data* itself when that is not smaller, or by a sample will not be."""
    if len(data) >= _SAMPLED and not _promising(data):
        return data
    payload: bytes = lz4.block.compress(data, store_size=False)
    return payload if len(payload) < len(data) else data


def _promising(data: bytes | memoryview) -> bool:
    """Whether 256 bytes of every 4 KiB, put together, can be compressed."""
    sample = np.frombuffer(data, np.uint8, len(data) & ~4095).reshape(-1, 4096)[:, 1920:2176].tobytes()
    return len(lz4.block.compress(sample, store_size=False)) < len(sample)


def _decompress(payload: bytes | memoryview, raw: int, what: str) -> bytes:
    try:
        data: bytes = lz4.block.decompress(payload, uncompressed_size=raw)
    except (lz4.block.LZ4BlockError, ValueError, OverflowError) as error:
        raise errors.CorruptError(f"{what}: the compressed data is damaged") from error
    if len(data) != raw:
        raise errors.CorruptError(f"{what}: decompressed to {len(data)} bytes instead of {raw}")
    return data


def _decompress_into(payload: memoryview, buf: memoryview, what: str) -> None:
    if _decompress_safe is None:
        buf[:] = _decompress(payload, len(buf), what)
        return
    place = ctypes.addressof(ctypes.c_char.from_buffer(buf))
    length = _decompress_safe(bytes(payload), place, len(payload), len(buf))
    if length < 0:
        raise errors.CorruptError(f"{what}: the compressed data is damaged")
    if length != len(buf):
        raise errors.CorruptError(f"{what}: decompressed to {length} bytes instead of {len(buf)}")


def is_zero(data: bytes | memoryview) -> bool:
    """Whether *data* (a chunk) is all zeros."""
    if data[0] or data[-1]:
        return False
    even = len(data) & ~7
    words = np.frombuffer(data, np.uint64, even >> 3)
    return not (len(words) and np.bitwise_or.reduce(words)) and not any(data[even:])

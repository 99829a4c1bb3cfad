"""A real browser without a screen: what it makes of a page, and what it paints."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 120
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]


def dump(page: Path) -> str:
    """The document after the browser has read it (scripts included, if there were any)."""
    return _run(page, "--dump-dom").stdout.decode()


def complaints(page: Path) -> list[str]:
    """What the page made the browser write on its console."""
    done = _run(page, "--enable-logging=stderr", "--dump-dom")
    return [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


def paint(page: Path, width: int, height: int, *, dark: bool = False) -> Pixels:
    """The page as it is painted: height x width x 3."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        _run(page, f"--window-size={width},{height}", f"--screenshot={picture}", *theme)
        return decode(picture.read_bytes())


def _run(page: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    assert PROGRAM, "no chromium here: tools/setup installs it"
    with tempfile.TemporaryDirectory(prefix="blkckpt-browser-") as profile:
        return subprocess.run(
            [PROGRAM, *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()],
            capture_output=True, timeout=SECONDS, check=True,
        )  # fmt: skip


def decode(data: bytes) -> Pixels:
    """A PNG of eight bits, RGB or RGBA, not interlaced: what a browser writes."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        chunks[kind] = chunks.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += 12 + length
    header = chunks[b"IHDR"]
    width, height, depth, colour = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big"), *header[8:10]
    assert depth == 8 and colour in (2, 6)
    step = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * step)
    result = np.zeros((height + 1, width, step), np.uint8)
    for number, line in enumerate(lines):
        result[number + 1] = _unfilter(int(line[0]), line[1:].reshape(width, step), result[number])
    return result[1:, :, :3]


def _unfilter(kind: int, line: Pixels, above: Pixels) -> Pixels:
    """One line (PNG specification, chapter 9)."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above
    result = np.zeros_like(line)
    left = corner = [0] * line.shape[1]
    for x, (values, up) in enumerate(zip(line.tolist(), above.tolist(), strict=True)):
        paeth = kind == 4
        guess = [_paeth(*one) if paeth else (one[0] + one[1]) // 2 for one in zip(left, up, corner, strict=True)]
        left = [(value + one) & 255 for value, one in zip(values, guess, strict=True)]
        result[x], corner = left, up
    return result


def _paeth(a: int, b: int, c: int) -> int:
    p = a + b - c
    distances = (abs(p - a), abs(p - b), abs(p - c))
    return (a, b, c)[distances.index(min(distances))]

"""Pictures of where something changed: for the terminal, as SVG, as PNG.  Pure.

A map is a row of cells, each the changed part (0 to 1) of an equal stretch of a disk or of memory.  Five shades: a
cell in which anything changed is told from one in which nothing did, however little it was.

PNG (RFC 2083): signature, IHDR (8-bit palette), PLTE, tEXt (what the strips are), IDAT (zlib), IEND.
"""

from __future__ import annotations

import html
import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blkckpt import lazy, units

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Heat = npt.NDArray[np.float64]
else:
    np = lazy.Module("numpy")

COLUMNS = 128
ROWS = 12
CELLS = COLUMNS * ROWS
"""Cells of one map in a picture."""

LIMITS = (0.0, 0.1, 0.35, 0.7)
"""A cell has shade n when more than the nth of these has changed."""

CHARACTERS = "·░▒▓█"
LIGHT = ("#e4e9ee", "#f7cf9b", "#f0984f", "#d9572f", "#9c1f22")
DARK = ("#26313c", "#6d4a2a", "#b8692d", "#f0a050", "#ffe0ad")
LEGEND = ("unchanged", "up to 10 %", "up to 35 %", "up to 70 %", "more")

_CELL = 6
_GAP = 1
_WIDTH = COLUMNS * _CELL
_LABEL = 20
_SCALE = 4
"""Pixels of a cell's side in a PNG."""


@dataclass(frozen=True, slots=True)
class Map:
    """One strip: what it is of, how large that is, how much of it changed, and where."""

    label: str
    size: int
    changed: int
    heat: Heat

    @property
    def caption(self) -> str:
        part = f" ({100 * self.changed / self.size:.1f} %)" if self.size else ""
        return f"{self.label}: {units.format_size(self.changed)} of {units.format_size(self.size)} changed{part}"


def shades(heat: Heat) -> npt.NDArray[np.uint8]:
    """The shade, 0 to 4, of each cell."""
    return np.sum([heat > limit for limit in LIMITS], axis=0, dtype=np.uint8) if len(heat) else np.zeros(0, np.uint8)


def text(heat: Heat) -> str:
    """One line of block characters."""
    return "".join(CHARACTERS[shade] for shade in shades(heat).tolist())


def svg(maps: Sequence[Map], title: str) -> str:
    """A picture of all *maps*, each a grid in reading order; follows the viewer's light or dark theme."""
    parts: list[str] = []
    top = 30
    for one in maps:
        parts.append(f'<text x="10" y="{top + 13}" class="t">{html.escape(one.caption)}</text>')
        parts += grid(one, 10, top + _LABEL)
        top += _LABEL + _lines(one) * _CELL + 12
    legend = "".join(
        f'<rect x="{10 + 110 * shade}" y="{top}" width="10" height="10" class="s{shade}"/>'
        f'<text x="{24 + 110 * shade}" y="{top + 9}" class="t">{words}</text>'
        for shade, words in enumerate(LEGEND)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 20} {top + 20}" '
        f'width="{_WIDTH + 20}" height="{top + 20}" role="img">'
        f"<title>{html.escape(title)}</title><style>{style()}</style>"
        f'<rect width="100%" height="100%" class="bg"/><text x="10" y="18" class="t h">{html.escape(title)}</text>'
        f"{''.join(parts)}{legend}</svg>\n"
    )


def inline(one: Map) -> str:
    """One map as an ``<svg>`` for a page that has :func:`style`."""
    height = _lines(one) * _CELL
    title = f"<title>{html.escape(one.caption)}</title>"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img">{title}{"".join(grid(one, 0, 0))}</svg>'


def style() -> str:
    """The classes of the cells and of text, for light and dark."""
    light = "".join(f".s{shade}{{fill:{colour}}}" for shade, colour in enumerate(LIGHT))
    dark = "".join(f".s{shade}{{fill:{colour}}}" for shade, colour in enumerate(DARK))
    return (
        f"{light}.bg{{fill:#fff}}.t{{font:12px system-ui,sans-serif;fill:#1d2630}}.h{{font-weight:600;font-size:14px}}"
        f"@media(prefers-color-scheme:dark){{{dark}.bg{{fill:#12181e}}.t{{fill:#dde5ec}}}}"
    )


def grid(one: Map, left: int, top: int) -> Iterator[str]:
    """The cells of *one* as rectangles; neighbours of one shade in a line are one rectangle."""
    found = shades(one.heat)
    for line in range(_lines(one)):
        row = found[line * COLUMNS : (line + 1) * COLUMNS]
        edges = np.concatenate(([0], np.flatnonzero(np.diff(row)) + 1, [len(row)])).tolist()
        for low, high in itertools.pairwise(edges):
            yield (
                f'<rect x="{left + low * _CELL}" y="{top + line * _CELL}" width="{(high - low) * _CELL - _GAP}" '
                f'height="{_CELL - _GAP}" class="s{row[low]}"/>'
            )


def png(maps: Sequence[Map], title: str) -> bytes:
    """The same as a PNG on white: one grid below the other, without words (they are in the file's text fields)."""
    rows: list[npt.NDArray[np.uint8]] = []
    for one in maps:
        cells = np.zeros(_lines(one) * COLUMNS, np.uint8)
        found = shades(one.heat) + 1
        cells[: len(found)] = found
        rows += [cells.reshape(-1, COLUMNS), np.zeros((2, COLUMNS), np.uint8)]
    pixels = np.vstack(rows[:-1]) if rows else np.zeros((1, COLUMNS), np.uint8)
    pixels = pixels.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
    height, width = pixels.shape
    lines = np.concatenate((np.zeros((height, 1), np.uint8), pixels), axis=1).tobytes()
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in ("#ffffff", *LIGHT))
    words = [("Title", title), *(("Description", one.caption) for one in maps)]
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", palette),
            *(_chunk(b"tEXt", key.encode() + b"\0" + text.encode("latin-1", "replace")) for key, text in words),
            _chunk(b"IDAT", zlib.compress(lines, 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _lines(one: Map) -> int:
    return max(-(-len(one.heat) // COLUMNS), 1)

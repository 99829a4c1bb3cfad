"""Results on standard output: tables and ``key: value`` lines for people, JSON for programs.

One call writes one result and flushes it.  A reader that has gone away (``blkckpt list | head -1``) ends the
command quietly with the status that a shell gives for SIGPIPE.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

PIPE_CLOSED = 128 + 13


def write(text: str) -> None:
    """Write *text* and a newline to standard output."""
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        raise click.exceptions.Exit(PIPE_CLOSED) from None


def write_bytes(data: bytes) -> None:
    """Write *data* as it is to standard output."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _forget_stdout()
        raise click.exceptions.Exit(PIPE_CLOSED) from None


def write_json(value: Any) -> None:
    """Write *value* as one indented JSON document."""
    write(json.dumps(value, indent=2, default=str))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    """Columns as wide as their widest cell, never wrapped or cut; the *right* columns are aligned so."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(headers), *cells]) for column in range(len(headers))]
    flush_right = {headers.index(name) for name in right}
    return "\n".join(_line(row, widths, flush_right) for row in [headers, *cells])


def fields(pairs: Mapping[str, object]) -> str:
    """``key: value`` lines, the values in one column."""
    width = max((len(key) for key in pairs), default=0)
    return "\n".join(f"{key + ':':<{width + 1}}  {value}".rstrip() for key, value in pairs.items())


def printable(text: str) -> str:
    """Text that others chose, for a terminal: what would control it is shown as an escape."""
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    number = ord(one)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return f"\\u{number:04x}" if 0xD800 <= number <= 0xDFFF else one.encode("unicode_escape").decode()


def timestamp(nanoseconds: int) -> str:
    """A point in time as JSON has it: UTC, ISO 8601, milliseconds."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 10**6:03d}Z"


def local_time(nanoseconds: int) -> str:
    """A point in time as tables have it: the local clock, seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds // 10**9))


def _line(row: Sequence[str], widths: Sequence[int], flush_right: set[int]) -> str:
    cells = (
        f"{cell:>{width}}" if column in flush_right else f"{cell:<{width}}"
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _forget_stdout() -> None:
    """Let the interpreter's flush at exit write to nowhere (Python's own advice in the ``signal`` chapter)."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except OSError:
        return

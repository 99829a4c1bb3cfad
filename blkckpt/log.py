"""Logging: one JSON object a line on standard error for services, plain text on a terminal.

Fields are passed with ``extra={"fields": {...}}`` and appear as keys (JSON) or ``key=value`` (text).  Where standard
error is the systemd journal each line begins with its priority, ``<4>``, which the journal takes away and keeps as
such (``sd-daemon(3)``; ``journalctl -p warning`` finds it then).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import IO, Any


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={value}" for key, value in getattr(record, "fields", {}).items())
        text = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}{fields}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _JournalFormatter(logging.Formatter):
    """*inner*, with the priority before every line."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).splitlines())


def is_journal(stream: IO[str]) -> bool:
    """Whether *stream* goes to the journal: ``$JOURNAL_STREAM`` names its device and inode."""
    try:
        info = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"


def setup(level: int = logging.INFO, *, as_json: bool | None = None, stream: IO[str] | None = None) -> None:
    """Configure the root logger.  *as_json* defaults to "not a terminal"."""
    stream = stream or sys.stderr
    if as_json is None:
        as_json = not stream.isatty()
    handler = logging.StreamHandler(stream)
    formatter = _JsonFormatter() if as_json else _TextFormatter()
    handler.setFormatter(_JournalFormatter(formatter) if is_journal(stream) else formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def get(name: str) -> logging.Logger:
    """The logger of module *name*."""
    return logging.getLogger(name)

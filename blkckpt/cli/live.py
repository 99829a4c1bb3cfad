"""A text that is shown again and again: ``top``, ``status --watch``.

On a terminal it has a screen of its own, which is gone at the end; elsewhere each one is printed below the last.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import output

SHORTEST = 0.1
"""Seconds: each look asks every disk server."""

interval_option = click.option(
    "--interval", default="1s", show_default=True, metavar="TIME", help="Time between two looks, for example 500ms."
)


def seconds(text: str) -> float:
    """The interval that was asked for."""
    found = units.parse_duration(text)
    if found < SHORTEST:
        raise errors.InputError(f"--interval {text} is too short; the shortest is {SHORTEST * 1000:.0f}ms")
    return found


def show(text: Callable[[], str], interval: float) -> None:
    """Show *text* every *interval* seconds, until Ctrl-C."""
    never = threading.Event()
    try:
        if not sys.stdout.isatty():
            while True:
                output.write(text())
                never.wait(interval)
        rich: Any = importlib.import_module("rich.live")  # loaded for a terminal only
        plain: Any = importlib.import_module("rich.text").Text
        with rich.Live(plain(text()), screen=True, auto_refresh=False) as shown:
            while not never.wait(interval):
                shown.update(plain(text()), refresh=True)
    except KeyboardInterrupt:
        return

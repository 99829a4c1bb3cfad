"""QEMU's command line as a list of options, and the two syntaxes of their values.  Pure.

*Options* are words that start with ``-`` or ``--``; all but those in :data:`FLAGS` take the next word as their value
(QEMU knows no ``--option=value``).  Any other word is a disk image; it is kept as an option without a name.

*Values* are mostly lists ``first,key=value,flag,key=value``, where a comma inside a value is written twice and the
first item's key may be left out (which key that is depends on the option).  ``-blockdev``, ``-device``, ``-netdev``
and ``-object`` take a JSON object as well.

What is parsed and rendered again is the same, byte for byte, except JSON's white space and key order of what was
changed.

Source: QEMU 7.2 and 10.0, ``qemu-options.def`` (which options have an argument), ``util/keyval.c``,
``util/qemu-option.c``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blkckpt import errors, units

FLAGS = frozenset({
    "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-fips", "enable-kvm",
    "enable-sync-profile", "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi", "no-fd-bootchk",
    "no-frame", "no-hpet", "no-kvm", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults",
    "nographic", "old-param", "only-migratable", "perfmap", "portrait", "preconfig", "s", "sdl", "semihosting",
    "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
})  # fmt: skip
"""Options without an argument, of every target and of every version from 2.x to 10.0."""

DEFAULT_RAM = 128 << 20
"""Without ``-m``."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option; *name* is empty for a disk image given without one."""

    name: str
    value: str | None = None
    dashes: str = "-"

    def words(self) -> list[str]:
        if not self.name:
            return [self.value or ""]
        return [self.dashes + self.name] + ([] if self.value is None else [self.value])


def parse(argv: Sequence[str]) -> tuple[str, list[Option]]:
    """The program and its options.  :class:`errors.InputError` when there is no program or a value is missing."""
    if not argv:
        raise errors.InputError("a QEMU command line without a program")
    options: list[Option] = []
    words = iter(argv[1:])
    for word in words:
        name = word.lstrip("-") if word.startswith("-") and word != "-" else ""
        if not name:
            options.append(Option("", word))
            continue
        value = None if name in FLAGS else next(words, None)
        if value is None and name not in FLAGS:
            raise errors.InputError(f"the QEMU command line ends with {word}, which needs a value")
        options.append(Option(name, value, word[: len(word) - len(name)]))
    return argv[0], options


def render(program: str, options: Iterable[Option]) -> tuple[str, ...]:
    """The words of a command line."""
    return (program, *(word for option in options for word in option.words()))


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a list value: ``key=value``, or a bare word (the first one's implied value, or a flag)."""

    key: str
    value: str | None = None

    def text(self) -> str:
        return quote(self.key) if self.value is None else f"{quote(self.key)}={quote(self.value)}"


@dataclass(frozen=True, slots=True)
class Items:
    """A list value.  *first* is the key that its first item may leave out."""

    items: tuple[Item, ...]
    first: str = ""

    @classmethod
    def parse(cls, text: str, first: str = "") -> Items:
        parts = text.replace(",,", "\0").split(",")
        return cls(tuple(_item(part.replace("\0", ",")) for part in parts if part), first)

    def text(self) -> str:
        return ",".join(item.text() for item in self.items)

    def get(self, key: str) -> str | None:
        """The value of *key*; the last one counts.  A bare flag is ``on``, ``nokey`` is ``off``."""
        found = None
        for number, item in enumerate(self.items):
            if item.value is not None:
                found = item.value if item.key == key else found
            elif number == 0 and self.first:
                found = item.key if key == self.first else found
            elif item.key in (key, f"no{key}"):
                found = "on" if item.key == key else "off"
        return found

    def on(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        return default if value is None else value in ("on", "yes", "true", "y")

    def set(self, key: str, value: str) -> Items:
        """With *key* replaced where it is, else added at the end."""
        items, done = [], False
        for number, item in enumerate(self.items):
            if item.key == key and item.value is not None:
                item, done = Item(key, value), True
            elif number == 0 and key == self.first and item.value is None:
                item, done = Item(value), True
            items.append(item)
        return replace(self, items=tuple(items if done else [*items, Item(key, value)]))

    def without(self, *keys: str) -> Items:
        """Without every ``key=value`` of *keys*, and without such flags."""
        return replace(self, items=tuple(item for item in self.items if item.key not in keys))

    def map(self, change: Callable[[str], str]) -> Items:
        """With *change* applied to every value."""
        return replace(
            self, items=tuple(item if item.value is None else Item(item.key, change(item.value)) for item in self.items)
        )


def _item(text: str) -> Item:
    key, equals, value = text.partition("=")
    return Item(key, value) if equals else Item(text)


def quote(text: str) -> str:
    """*text* inside a list value."""
    return text.replace(",", ",,")


def as_json(text: str | None) -> dict[str, Any] | None:
    """The object of a JSON value; None for the list syntax (or for what QEMU would refuse)."""
    if text is None or not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def map_json(value: Any, change: Callable[[str], str]) -> Any:
    """*value* with *change* applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_json(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_json(item, change) for item in value]
    return value


def member(text: str, key: str, first: str = "") -> str | None:
    """Member *key* (dotted in the list syntax, nested in JSON) of a value in either syntax."""
    body = as_json(text)
    if body is None:
        return Items.parse(text, first).get(key)
    found: Any = body
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, bool):
        return "on" if found else "off"
    return str(found) if isinstance(found, str | int) else None


def map_strings(text: str, change: Callable[[str], str]) -> str:
    """A value in either syntax with *change* applied to every string; unchanged to the byte if nothing changes."""
    body = as_json(text)
    if body is not None:
        changed = map_json(body, change)
        return text if changed == body else json.dumps(changed)
    return Items.parse(text).map(change).text()


def ram_size(options: Iterable[Option]) -> int:
    """What ``-m`` says, in bytes; the last one counts."""
    size = DEFAULT_RAM
    for option in options:
        if option.name == "m" and option.value:
            text = Items.parse(option.value, "size").get("size")
            size = parse_size(text, "M") if text else size
    return size


def parse_size(text: str, default: str = "B") -> int:
    """A size as QEMU writes it: a number with B, K, M, G, T, P or E, else in units of *default*."""
    return units.parse_size(text if text[-1:].isalpha() else text + default)

"""The network cards of a recorded command line: other addresses, or a network of their own.  Pure.

Cards are ``-device DRIVER,netdev=…``, ``-nic …`` and ``-net nic``; one without an address has QEMU's default, counted
from 52:54:00:12:34:56 in the order in which QEMU makes them (``-nic`` and ``-net`` before ``-device``).

:func:`isolated` keeps every card and takes the outside away.  A card's saved state fits only a network that has what
the recorded one had (virtio headers of a tap), so the replacement is of the same kind::

    user                         the same with restrict=on: nothing leaves it, nothing comes in
    tap, bridge                  a new tap interface that is in no bridge (needs the right to make one)
    socket, vde, vhost-user …    a hub of its own

A card with ``netdev=`` of something that is not there is for QEMU to complain about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from blkckpt.vm import qemuopts

_FIRST_DEFAULT = bytes.fromhex("525400123456")
_MAC = re.compile(r"(?:[0-9A-Fa-f]{1,2}[:-]){5}[0-9A-Fa-f]{1,2}")
_KEPT_BY_HUB = frozenset({"id", "mac", "model", "addr", "vectors"})
_OPTIONS_OF_TAP = frozenset({"vhost", "vhostforce", "vnet_hdr", "queues", "sndbuf", "poll-us"})


@dataclass(frozen=True, slots=True)
class _Card:
    """Option *index* makes a card with *address*, set by its member *key*."""

    index: int
    key: str
    driver: str
    address: bytes

    @property
    def is_virtio(self) -> bool:
        return self.driver.startswith("virtio")


def text(address: bytes) -> str:
    """``52:54:00:12:34:56``."""
    return address.hex(":")


def readdress(
    argv: Sequence[str], known: Mapping[bytes, bytes], derive: Callable[[bytes], bytes]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """*argv* with the addresses of *known* replaced; virtio cards, which always bear it, get a derived one otherwise.

    Also returns the addresses that stay: a card of a kind whose state is not understood must keep the one it was
    saved with.
    """
    program, options = qemuopts.parse(argv)
    kept = []
    for card in list(_cards(options)):
        new = known.get(card.address) or (derive(card.address) if card.is_virtio else None)
        if new is None:
            kept.append(text(card.address))
        else:
            option = options[card.index]
            options[card.index] = replace(option, value=_with(option.value or "", card.key, text(new)))
    return qemuopts.render(program, options), tuple(kept)


def isolated(argv: Sequence[str]) -> tuple[str, ...]:
    """*argv* with every network cut off from the outside and from other machines."""
    program, options = qemuopts.parse(argv)
    changed = []
    for number, option in enumerate(options):
        if option.name in ("netdev", "nic", "net") and option.value:
            option = replace(option, value=_isolated(option.name, option.value, number))
        changed.append(option)
    return qemuopts.render(program, changed)


def exclusive(argv: Sequence[str]) -> str | None:
    """The first network that only one machine can be on, as a message; None if copies can run side by side."""
    _, options = qemuopts.parse(argv)
    for option in options:
        value = option.value or ""
        if option.name in ("netdev", "nic", "net") and _is_exclusive(value):
            return f"-{option.name} {value[:80]} names an interface, port or socket that only one machine can have"
    return None


# --- cards ---


def _cards(options: Sequence[qemuopts.Option]) -> Iterator[_Card]:
    """The cards in the order in which QEMU makes them."""
    taken: set[int] = set()
    for names in (("nic", "net"), ("device",)):
        for index, option in enumerate(options):
            if option.name in names and (found := _card(option)) is not None:
                key, driver, written = found
                address = _address(written) if written else _default(taken)
                if address is None:
                    continue  # QEMU will say what is wrong with it
                if address[:5] == _FIRST_DEFAULT[:5]:
                    taken.add(address[5])
                yield _Card(index, key, driver, address)


def _card(option: qemuopts.Option) -> tuple[str, str, str | None] | None:
    """The key of its address, its driver and its address, if the option makes a card."""
    value = option.value or ""
    if option.name == "device":
        if qemuopts.member(value, "netdev", "driver") is None:
            return None
        return "mac", qemuopts.member(value, "driver", "driver") or "", qemuopts.member(value, "mac", "driver")
    kind = qemuopts.member(value, "type", "type")
    if option.name == "net":
        if kind != "nic":
            return None
        return "macaddr", qemuopts.member(value, "model", "type") or "", qemuopts.member(value, "macaddr", "type")
    if kind == "none":
        return None
    return "mac", qemuopts.member(value, "model", "type") or "", qemuopts.member(value, "mac", "type")


def _address(written: str) -> bytes | None:
    if not _MAC.fullmatch(written):
        return None
    return bytes(int(part, 16) for part in re.split("[:-]", written))


def _default(taken: set[int]) -> bytes | None:
    free = next((number for number in range(_FIRST_DEFAULT[5], 0xFF) if number not in taken), None)
    return None if free is None else _FIRST_DEFAULT[:5] + bytes([free])


def _with(value: str, key: str, new: str) -> str:
    body = qemuopts.as_json(value)
    if body is not None:
        return json.dumps({**body, key: new})
    return qemuopts.Items.parse(value, "type").set(key, new).text()


# --- networks ---


def _isolated(option: str, value: str, number: int) -> str:
    kind = qemuopts.member(value, "type", "type")
    if kind in (None, "none", "nic", "hubport"):
        return value
    if kind == "user":
        body = qemuopts.as_json(value)
        if body is not None:
            return json.dumps({**{key: item for key, item in body.items() if key != "hostfwd"}, "restrict": True})
        return qemuopts.Items.parse(value, "type").without("hostfwd", "guestfwd", "smb").set("restrict", "on").text()
    members = _members(value)
    if kind in ("tap", "bridge"):
        kept = {key: item for key, item in members.items() if key in _KEPT_BY_HUB | _OPTIONS_OF_TAP}
        return _list("tap", {**kept, "script": "no", "downscript": "no"})
    if option == "net":
        return "user,restrict=on"
    kept = {key: item for key, item in members.items() if key in _KEPT_BY_HUB}
    return _list("hubport", {**kept, "hubid": str(1000 + number)})


def _members(value: str) -> dict[str, str]:
    """The plain members of a network in either syntax."""
    body = qemuopts.as_json(value)
    if body is not None:
        return {key: found for key in body if (found := qemuopts.member(value, key)) is not None}
    return {item.key: item.value for item in qemuopts.Items.parse(value, "type").items if item.value is not None}


def _list(kind: str, members: Mapping[str, str]) -> str:
    items = (qemuopts.Item(key, item) for key, item in members.items() if key != "type")
    return qemuopts.Items((qemuopts.Item(kind), *items), "type").text()


def _is_exclusive(value: str) -> bool:
    kind = qemuopts.member(value, "type", "type")
    given = _members(value)
    if kind == "tap":
        return any(key in given for key in ("ifname", "fd", "fds"))
    if kind in ("vhost-user", "vhost-vdpa", "l2tpv3", "netmap"):
        return True
    if kind == "socket":
        return any(key in given for key in ("listen", "udp", "fd"))
    if kind in ("stream", "dgram"):
        return given.get("server") in ("on", "true") or kind == "dgram"
    return False

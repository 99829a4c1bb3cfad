"""QEMU's command line with our disks and our QMP socket added.  Pure.

For each disk::

    -blockdev driver=nbd,node-name=vda,server.type=unix,server.path=SOCKET,export=vda,reconnect-delay=300,discard=unmap
    -device virtio-blk-pci,drive=vda

and once ``-qmp unix:SOCKET,server=on,wait=off``.  The ``-device`` is left out when the user's own command line has
one for that node already (another bus, a boot order, an iothread).  In QEMU's option syntax a comma inside a value
is written twice.

``reconnect-delay``: when nbdkit dies, QEMU keeps the guest's requests and sends them again to the next one that
listens on the socket.  The supervisor starts that within a second; five minutes leave a person time to act when it
cannot.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from blkckpt import errors

RECONNECT_SECONDS = 300


def with_disks(argv: Sequence[str], disks: Sequence[str], nbd: Path, qmp: Path) -> list[str]:
    """*argv* (QEMU and its options) with the exports *disks* of the socket *nbd*, and a QMP server at *qmp*."""
    if not argv:
        raise errors.InputError("no QEMU command was given; write it after `--`: -- qemu-system-x86_64 …")
    devices, nodes = list(_values(argv, "device")), list(_values(argv, "blockdev"))
    added: list[str] = []
    for name in disks:
        if any(_member(text, "node-name") == name for text in nodes):
            raise errors.InputError(f"the QEMU command has a -blockdev of node-name {name} already; leave it to us")
        added += ["-blockdev", blockdev(name, nbd)]
        if not any(_member(text, "drive") == name for text in devices):
            added += ["-device", f"virtio-blk-pci,drive={quote(name)}"]
    return [*argv, *added, "-qmp", f"unix:{quote(str(qmp))},server=on,wait=off"]


def blockdev(name: str, nbd: Path) -> str:
    """The ``-blockdev`` of export *name*, whose node has the same name."""
    return (
        f"driver=nbd,node-name={quote(name)},server.type=unix,server.path={quote(str(nbd))},"
        f"export={quote(name)},reconnect-delay={RECONNECT_SECONDS},discard=unmap"
    )


def quote(text: str) -> str:
    """*text* as a value in QEMU's option syntax."""
    return text.replace(",", ",,")


def _values(argv: Sequence[str], option: str) -> Iterator[str]:
    """The values of every ``-option`` or ``--option``."""
    for word, value in itertools.pairwise(argv):
        if word in (f"-{option}", f"--{option}"):
            yield value


def _member(text: str, key: str) -> str | None:
    """Member *key* of an option value, in either of QEMU's syntaxes (``a=b,c=d`` or JSON)."""
    if text.startswith("{"):
        return _json_member(text, key)
    for part in text.replace(",,", "\0").split(","):
        name, _, value = part.partition("=")
        if name == key:
            return value.replace("\0", ",")
    return None


def _json_member(text: str, key: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # QEMU will say what is wrong with it
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None

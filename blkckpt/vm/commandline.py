"""How a guest was started, rewritten so that a copy of it can be started beside the original.  Pure.

:func:`rewrite` takes the recorded command line and changes as little as the copy needs.  What the *guest* sees stays:
every device, its order and address, the machine type pinned to its version, the size of the memory.

===============================================  =====================================================================
``-blockdev``, ``-drive`` on our NBD socket      the new VM's socket
``-qmp`` on our socket                           the new VM's socket; other QMP sockets are dropped
server sockets of ``-serial``, ``-chardev`` …    the same name in the new VM's run directory; TCP listeners: ``null``
``file:`` and log files of those                 likewise (the original is still writing them)
client sockets, ``stdio``, ``pty``               kept
``hostfwd=`` of user networks                    dropped: the port is taken
``-vnc :N``                                      the next free display
``-gdb``, ``-s``                                 dropped
``-pidfile -daemonize -incoming -loadvm -S -D``  dropped; ``-incoming`` and ``-S`` as asked
main memory                                      ``memory-backend-file`` over a raw image, mapped privately
``vmgenid``                                      ``guid=auto``: the guest is told that it is a copy
===============================================  =====================================================================

What cannot be put right is said by :func:`review`: disks that are not part of the checkpoint, inherited descriptors,
host devices, SPICE.

RAM blocks and backends.  Without a backend of the user's, main memory is the block ``pc.ram`` (:data:`DEFAULT_BLOCKS`
for other machines): the copy gets an object of that id with ``x-use-canonical-path-for-ramblock-id=off`` and
``-machine memory-backend=`` it.  A user's object ``ID`` is the block ``/objects/ID`` (or ``ID``, with that property
off): it is replaced in place.  Memory shared with other processes (vhost-user) is left alone, and so are machines
whose memory is given by ``-numa node,mem=``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blkckpt.vm import qemuopts

DEFAULT_BLOCKS = frozenset({"pc.ram", "mach-virt.ram", "microvm.ram", "ppc_spapr.ram", "s390.ram",
                            "riscv_virt_board.ram"})  # fmt: skip
"""``default_ram_id`` of the machines people run guests on."""

NBD_NAME = "nbd.sock"
QMP_NAME = "qmp.sock"
"""The file names of our sockets (:class:`blkckpt.paths.VmPaths`): by them ours are known."""

_NBD_END = re.escape(NBD_NAME) + r"(?![\w.-])"
_NBD = re.compile("/" + _NBD_END)
_NBD_PATH = re.compile(r"(?<![^=:?&])/(?:[^?&:]*/)?" + _NBD_END)
"""Our socket's path within one value: the whole of it, or a part of an NBD URI."""
_DROPPED = frozenset({"pidfile", "daemonize", "incoming", "loadvm", "S", "D", "preconfig"})
_IMAGES = frozenset({"", "drive", "blockdev", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash"})
_CHARACTER = frozenset({"serial", "parallel", "monitor", "debugcon"})
_NETWORK = frozenset({"netdev", "nic", "net"})
_STORAGE = frozenset({"file", "host_device", "nbd", "rbd", "iscsi", "http", "https", "ssh", "nfs", "gluster", "curl"})
_KEPT_OF_BACKEND = frozenset({"dump", "merge", "host-nodes", "policy", "x-use-canonical-path-for-ramblock-id"})
_CANONICAL = "x-use-canonical-path-for-ramblock-id"


def mappable(argv: Sequence[str], blocks: Iterable[str]) -> tuple[str, ...]:
    """Those of the RAM *blocks* that :func:`rewrite` can map from a file."""
    options = _without_our_backends(qemuopts.parse(argv)[1])
    return tuple(block for block in blocks if _backend_index(options, block) is not None or _is_default(options, block))


def rewrite(
    argv: Sequence[str],
    *,
    nbd_socket: Path,
    qmp_socket: Path,
    memory: Mapping[str, Path],
    incoming: str | None,
    paused: bool,
    machine_type: str | None = None,
    name: str | None = None,
) -> tuple[str, ...]:
    """The command line of a copy; *memory* gives the raw image of each block to map, *incoming* what QEMU waits for."""
    program, options = qemuopts.parse(argv)
    options = _without_our_backends(options)
    changed = _Copy(nbd_socket, qmp_socket, name).options(options)
    if machine_type is not None:
        changed = _pin_machine(changed, machine_type)
    for block, path in memory.items():
        changed = _map_memory(changed, block, path)
    changed += [qemuopts.Option("qmp", f"unix:{qemuopts.quote(str(qmp_socket))},server=on,wait=off")]
    changed += [qemuopts.Option("incoming", incoming)] if incoming is not None else []
    changed += [qemuopts.Option("S")] if paused else []
    return qemuopts.render(program, changed)


def review(argv: Sequence[str]) -> tuple[str, ...]:
    """What a user of a copy should know about this command line, a sentence each."""
    _, options = qemuopts.parse(argv)
    found = [note for option in options if (note := _remark(option)) is not None]
    return tuple(dict.fromkeys(found))


def exclusive(argv: Sequence[str]) -> str | None:
    """The first thing but a network that only one machine can have, a sentence; None if copies can run side by side."""
    _, options = qemuopts.parse(argv)
    return next((note for option in options if (note := _exclusive(option)) is not None), None)


def ram_size(argv: Sequence[str]) -> int:
    """The size of main memory in bytes."""
    return qemuopts.ram_size(qemuopts.parse(argv)[1])


def absolute(argv: Sequence[str], directory: str) -> tuple[str, ...]:
    """*argv* with the files that QEMU would look for in its working *directory* as full paths."""
    program, options = qemuopts.parse(argv)

    def full(text: str) -> str:
        return text if text.startswith("/") or not text else os.path.normpath(f"{directory}/{text}")

    changed = []
    for option in options:
        if option.name in ("kernel", "initrd", "dtb", "cdrom", "bios", "pflash", "hda", "hdb", "hdc", "hdd", "sd"):
            text = full(option.value or "")
            keep = option.name == "bios" and not Path(text).exists()  # a name that QEMU looks for in its own places
            option = option if keep else replace(option, value=text)
        elif option.name == "" and option.value and "=" not in option.value:
            option = replace(option, value=full(option.value))
        changed.append(option)
    return qemuopts.render(program, changed)


# --- sockets, files, ports ---


class _Copy:
    """Goes through the options once."""

    def __init__(self, nbd_socket: Path, qmp_socket: Path, name: str | None) -> None:
        self.nbd_socket, self.qmp_socket, self.name = nbd_socket, qmp_socket, name
        self._taken = {NBD_NAME, QMP_NAME, "control.sock", "supervisor.lock", "supervisor.json"}

    def options(self, options: Iterable[qemuopts.Option]) -> list[qemuopts.Option]:
        changed = [new for option in options if (new := self._option(option)) is not None]
        if self.name is not None:
            changed.append(qemuopts.Option("name", qemuopts.quote(self.name)))
        return changed

    def _option(self, option: qemuopts.Option) -> qemuopts.Option | None:
        """The option of the copy; None to drop it."""
        name, value = option.name, option.value or ""
        if name in _DROPPED or name in ("gdb", "s", "qmp", "qmp-pretty") or (name == "name" and self.name is not None):
            return None
        change = self._changes().get(name)
        if change is None and name in _CHARACTER:
            change = self._character
        elif change is None and name in _NETWORK:
            change = _without_forwards
        elif change is None and name in _IMAGES:
            change = self._image
        return option if change is None else replace(option, value=change(value))

    def _changes(self) -> Mapping[str, Callable[[str], str]]:
        return {"chardev": self._chardev, "vnc": self._vnc, "device": _device}

    def _image(self, value: str) -> str:
        def change(text: str) -> str:
            return _NBD_PATH.sub(lambda _: str(self.nbd_socket), text)

        if not _NBD.search(value):
            return value
        if qemuopts.as_json(value) is None and "=" not in value:
            return change(value)
        return qemuopts.map_strings(value, change)

    def _character(self, value: str) -> str:
        """The value of ``-serial`` and its like: ``[mon:]kind:where[,options]``."""
        prefix = "mon:" if value.startswith("mon:") else ""
        items = qemuopts.Items.parse(value.removeprefix("mon:"), "where")
        kind, _, where = (items.get("where") or "").partition(":")
        if kind in ("file", "pipe") or (kind == "unix" and items.on("server")):
            return prefix + items.set("where", f"{kind}:{self._redirect(where)}").text()
        if kind in ("tcp", "telnet", "websocket", "tn3270") and (items.on("server") or kind == "telnet"):
            return f"{prefix}null"
        return value

    def _chardev(self, value: str) -> str:
        items = qemuopts.Items.parse(value, "backend")
        kind, path = items.get("backend"), items.get("path")
        if items.get("logfile"):
            items = items.set("logfile", self._redirect(items.get("logfile") or ""))
        if kind == "socket" and items.on("server"):
            if path is None:
                return f"null,id={qemuopts.quote(items.get('id') or '')}"
            items = items.set("path", self._redirect(path))
        elif kind in ("file", "pipe") and path is not None:
            items = items.set("path", self._redirect(path))
        return items.text()

    def _vnc(self, value: str) -> str:
        items = qemuopts.Items.parse(value, "vnc")
        where = items.get("vnc") or ""
        if where.startswith("unix:"):
            return items.set("vnc", "unix:" + self._redirect(where.removeprefix("unix:"))).text()
        if where == "none" or items.get("to") is not None or items.on("reverse"):
            return value
        return items.set("to", "99").text()

    def _redirect(self, path: str) -> str:
        """A file of the same name beside the new VM's sockets."""
        name = base = os.path.basename(path) or "file"  # noqa: PTH119  (a string, perhaps not a path)
        number = 1
        while name in self._taken:
            number += 1
            name = f"{number}-{base}"
        self._taken.add(name)
        return str(self.qmp_socket.parent / name)


def _without_forwards(value: str) -> str:
    body = qemuopts.as_json(value)
    if body is not None:
        return json.dumps({key: item for key, item in body.items() if key != "hostfwd"}) if "hostfwd" in body else value
    return qemuopts.Items.parse(value, "type").without("hostfwd").text()


def _device(value: str) -> str:
    if qemuopts.member(value, "driver", "driver") != "vmgenid":
        return value
    body = qemuopts.as_json(value)
    if body is not None:
        return json.dumps({**body, "guid": "auto"})
    return qemuopts.Items.parse(value, "driver").set("guid", "auto").text()


# --- machine and memory ---


def _pin_machine(options: list[qemuopts.Option], machine_type: str) -> list[qemuopts.Option]:
    """Every ``-machine`` of this type by its versioned name, so that another QEMU makes the same machine."""
    changed = []
    pinned = False
    for option in options:
        if option.name in ("machine", "M"):
            items = qemuopts.Items.parse(option.value or "", "type")
            if items.get("type") is not None:
                option, pinned = replace(option, value=items.set("type", machine_type).text()), True
        changed.append(option)
    return changed if pinned else [*changed, qemuopts.Option("machine", machine_type)]


def _map_memory(options: list[qemuopts.Option], block: str, path: Path) -> list[qemuopts.Option]:
    index = _backend_index(options, block)
    if index is not None:
        return [*options[:index], _file_backend(options[index], path), *options[index + 1 :]]
    size = qemuopts.ram_size(options)
    properties = [qemuopts.Item("memory-backend-file"), qemuopts.Item("id", block), qemuopts.Item("size", str(size))]
    backend = qemuopts.Items((*properties, *_mapping(path), qemuopts.Item(_CANONICAL, "off")))
    kept = [option for option in options if option.name not in ("mem-path", "mem-prealloc")]
    return [
        *_with_memory_backend(kept, block),
        qemuopts.Option("object", backend.text()),
    ]


def _without_our_backends(options: Sequence[qemuopts.Option]) -> list[qemuopts.Option]:
    """As before an earlier :func:`rewrite`: the image it mapped has gone, and this copy gets its own, or none."""
    ours = {
        qemuopts.member(option.value, "id", "qom-type")
        for option in options
        if option.name == "object" and option.value and _is_our_backend(option.value)
    }
    kept = []
    for option in options:
        if option.name == "object" and option.value and _is_our_backend(option.value):
            continue
        if option.name in ("machine", "M") and option.value:
            items = qemuopts.Items.parse(option.value, "type")
            if items.get("memory-backend") in ours:
                option = replace(option, value=items.without("memory-backend").text())
        if option.name not in ("machine", "M") or option.value:
            kept.append(option)
    return kept


def _is_our_backend(value: str) -> bool:
    return (
        qemuopts.member(value, "qom-type", "qom-type") == "memory-backend-file"
        and qemuopts.member(value, "id", "qom-type") in DEFAULT_BLOCKS
        and qemuopts.member(value, _CANONICAL, "qom-type") == "off"
        and qemuopts.member(value, "share", "qom-type") != "on"
    )


def _mapping(path: Path) -> tuple[qemuopts.Item, ...]:
    return (qemuopts.Item("mem-path", str(path)), qemuopts.Item("share", "off"))


def _with_memory_backend(options: list[qemuopts.Option], block: str) -> list[qemuopts.Option]:
    for index, option in enumerate(options):
        if option.name in ("machine", "M"):
            items = qemuopts.Items.parse(option.value or "", "type").set("memory-backend", block)
            return [*options[:index], replace(option, value=items.text()), *options[index + 1 :]]
    return [*options, qemuopts.Option("machine", f"memory-backend={qemuopts.quote(block)}")]


def _file_backend(option: qemuopts.Option, path: Path) -> qemuopts.Option:
    """The user's backend over *path*; what would touch every page (preallocation) or needs huge pages is left out."""
    value = option.value or ""
    body = qemuopts.as_json(value)
    if body is not None:
        kept = {key: item for key, item in body.items() if key in {*_KEPT_OF_BACKEND, "id", "size"}}
        mapped = {"qom-type": "memory-backend-file", **kept, "mem-path": str(path), "share": False}
        return replace(option, value=json.dumps(mapped))
    items = qemuopts.Items.parse(value, "qom-type")
    kept_items = [item for item in items.items if item.key in {*_KEPT_OF_BACKEND, "id", "size"} and item.value]
    return replace(
        option, value=qemuopts.Items((qemuopts.Item("memory-backend-file"), *kept_items, *_mapping(path))).text()
    )


def _backend_index(options: Sequence[qemuopts.Option], block: str) -> int | None:
    """Which option is the user's private backend of *block*."""
    for index, option in enumerate(options):
        if option.name != "object" or option.value is None:
            continue
        kind = qemuopts.member(option.value, "qom-type", "qom-type") or ""
        if not kind.startswith("memory-backend-") or not qemuopts.member(option.value, "size", "qom-type"):
            continue
        canonical = qemuopts.member(option.value, _CANONICAL, "qom-type") != "off"
        identity = qemuopts.member(option.value, "id", "qom-type")
        shared = qemuopts.member(option.value, "share", "qom-type") or ("on" if kind.endswith("-memfd") else "off")
        if shared == "off" and block == (f"/objects/{identity}" if canonical else identity):
            return index
    return None


def _is_default(options: Iterable[qemuopts.Option], block: str) -> bool:
    """Whether *block* is the main memory that the machine makes by itself."""
    if block not in DEFAULT_BLOCKS:
        return False
    for option in options:
        text = option.value or ""
        if option.name in ("machine", "M") and qemuopts.member(text, "memory-backend", "type") is not None:
            return False
        if option.name == "numa" and not text.startswith(("cpu", "dist", "hmat")):
            return False
    return True


# --- what cannot be put right ---


def _remark(option: qemuopts.Option) -> str | None:
    name, value = option.name, option.value or ""
    if (note := _exclusive(option)) is not None:
        return note
    if name in _NETWORK and "hostfwd" in value:
        return "port forwards (hostfwd) are left out of a copy: the original has the ports"
    if name in _NETWORK and re.search(r"ifname=|listen=|server=on", value):
        return f"-{name} {value[:80]} uses an interface or port that the original has; change it in the copy"
    return None


def _exclusive(option: qemuopts.Option) -> str | None:
    """What but a network only one machine can have."""
    name, value = option.name, option.value or ""
    if name in _IMAGES and value and _is_foreign_disk(name, value):
        return (
            f"the disk {value[:120]!r} is not served by blkckpt: it is not part of the checkpoint, "
            "and the original and the copy would share it"
        )
    if name == "add-fd" or re.search(r"\b(?:vhost)?fds?=\d", value):
        return f"-{name} uses a descriptor that QEMU was started with; a copy needs one of its own"
    if name == "spice" or (name == "display" and value.startswith("vnc=")):
        return f"-{name} listens on the original's port; change it in the copy"
    if name == "device" and re.match(r"vfio-|usb-host", value):
        return f"the host device {value[:80]} can be in one guest only"
    return None


def _is_foreign_disk(name: str, value: str) -> bool:
    """Whether it is a writable disk that we do not serve."""
    if _NBD.search(value):
        return False
    if name == "blockdev":
        return qemuopts.member(value, "driver", "driver") in _STORAGE and qemuopts.member(value, "read-only") != "on"
    if name == "drive":
        items = qemuopts.Items.parse(value)
        unreal = items.on("readonly") or items.on("read-only") or items.on("snapshot") or items.get("media") == "cdrom"
        return not unreal and any(items.get(key) for key in ("file", "file.filename"))
    return True

"""A recorded command line for a machine that is to touch nothing outside: for looking whether it lives.  Pure.

On top of :mod:`blkckpt.vm.network`\\ 's isolation:

=========================================  ===========================================================================
``-serial``, ``-nographic``, consoles      a file in the given directory, whose growth is a sign of life
the guest agent's ``-chardev``             a server socket there
other ``-chardev``, ``-parallel`` …        a file there, ``null``
``-monitor``, ``-vnc``, ``-spice`` …       none; the display is ``none``, graphics cards stay
=========================================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blkckpt.vm import network, qemuopts

AGENT_PORT = "org.qemu.guest_agent.0"
_DROPPED = frozenset({"vnc", "spice", "display", "sdl", "gtk", "curses", "monitor", "nographic"})


@dataclass(frozen=True, slots=True)
class Alone:
    """*argv*, the *consoles* it writes to, and the guest *agent*'s socket if the guest has a port for one."""

    argv: tuple[str, ...]
    consoles: tuple[Path, ...]
    agent: Path | None


def alone(argv: Sequence[str], directory: Path) -> Alone:
    """*argv* with everything that leads outside replaced by something in *directory*."""
    program, options = qemuopts.parse(network.isolated(argv))
    agent_chardev = _agent(options)
    consoles: list[Path] = []
    agent: Path | None = None
    changed: list[qemuopts.Option] = []

    def console() -> Path:
        consoles.append(directory / f"console-{len(consoles)}.log")
        return consoles[-1]

    for option in options:
        value = option.value or ""
        if option.name in _DROPPED:
            continue
        if option.name == "serial" and not value.startswith(("chardev:", "none", "null")):
            option = replace(option, value=f"file:{qemuopts.quote(str(console()))}")
        elif option.name in ("parallel", "debugcon") and not value.startswith("chardev:"):
            option = replace(option, value="null")
        elif option.name == "mon":
            continue
        elif option.name == "chardev":
            identity = qemuopts.member(value, "id", "backend") or ""
            if identity == agent_chardev:
                agent = directory / "agent.sock"
                where = f"socket,id={qemuopts.quote(identity)},path={qemuopts.quote(str(agent))},server=on,wait=off"
            else:
                where = f"file,id={qemuopts.quote(identity)},path={qemuopts.quote(str(console()))}"
            option = replace(option, value=where)
        changed.append(option)
    if any(one.name == "nographic" for one in options) and not any(one.name == "serial" for one in options):
        changed.append(qemuopts.Option("serial", f"file:{qemuopts.quote(str(console()))}"))
    changed += [qemuopts.Option("display", "none"), qemuopts.Option("monitor", "none")]
    return Alone(qemuopts.render(program, changed), tuple(consoles), agent)


def _agent(options: Sequence[qemuopts.Option]) -> str | None:
    """The character device of the guest agent's port."""
    for option in options:
        if option.name == "device" and qemuopts.member(option.value or "", "name", "driver") == AGENT_PORT:
            return qemuopts.member(option.value or "", "chardev", "driver")
    return None

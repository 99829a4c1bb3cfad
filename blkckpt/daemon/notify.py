"""Telling the service manager how we are: systemd's notification protocol.

A datagram of ``KEY=value`` lines to the socket named by ``$NOTIFY_SOCKET`` (a first ``@``: an abstract name).  Without
one everything here does nothing.  Source: ``sd_notify(3)``; the protocol is stable.
"""

from __future__ import annotations

import os
import socket
import time

SEND_SECONDS = 2.0


def send(*lines: str) -> bool:
    """Send *lines*; whether somebody was there.  A manager that does not listen is no reason to stop."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name or name[0] not in "/@":
        return False
    address = f"\0{name[1:]}" if name[0] == "@" else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
            peer.settimeout(SEND_SECONDS)
            peer.connect(address)
            peer.sendall("\n".join(lines).encode())
    except OSError:
        return False
    return True


def ready(status: str) -> None:
    send("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")


def reloading() -> None:
    """To be followed by :func:`ready`."""
    send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def status(text: str) -> None:
    send(f"STATUS={text}")


def stopping(seconds: float) -> None:
    """It may take so long: the manager's own patience is extended to that."""
    send("STOPPING=1", "STATUS=ends what is under way", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def watchdog() -> None:
    send("WATCHDOG=1")


def watchdog_seconds() -> float | None:
    """How often :func:`watchdog` has to be called: half of what the manager waits; None: it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isdecimal() and int(text) > 0 else None

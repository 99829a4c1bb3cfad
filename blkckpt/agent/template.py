"""Our end of a disk server that others are forked from (:mod:`blkckpt.control.template` is the other).

For a command that starts many machines: it starts one :class:`Template` first, forks its supervisors, each of which
asks for a server of its own (:meth:`Template.server`).  That is not the supervisor's child, so its end is seen through
a descriptor of it and its exit status is not known; started again it is a child like any other.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Self

from blkckpt import errors, paths
from blkckpt.agent import nbdserver

PLACE = "." * 64
"""For the name in a command line that will be changed: none is longer."""
LOAD_SECONDS = 30.0
"""Until it answers: what is longer than loading takes on a busy machine is as good as never."""


class Template:
    """nbdkit, loading, for VMs of *home*.  Start it from the main thread, with whose end it ends."""

    def __init__(self, home: paths.Home) -> None:
        """Raises :class:`errors.MissingError` saying what to install."""
        command, preload = nbdserver.serving(home.run, nbdserver.plugin_path())
        command += [f"home={home.root}", "template_fd=5", f"vm={PLACE}"]
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, socket.socket(socket.AF_UNIX) as unused, open(os.devnull, "r+b") as null:
            standard = [null.fileno()] * 3
            descriptors = [*standard, unused.fileno(), unused.fileno(), theirs.fileno()]
            self._pid = nbdserver.spawn(command, descriptors, preload=preload)

    def fileno(self) -> int:
        """What a fork that will call :meth:`server` must keep open."""
        return self._orders.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """To be left when the forks have asked, or have ended."""
        self._orders.close()
        os.waitpid(self._pid, 0)

    def server(self, vm: paths.VmPaths) -> nbdserver.NbdServer:
        """An early server for *vm*, which need not exist yet.  In a fork, which lets go of the template with it.

        Raises :class:`errors.BlkckptError` or ``OSError`` when the template cannot.
        """
        with contextlib.ExitStack() as stack, self._orders as orders:
            sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
            gate, theirs = (stack.enter_context(end) for end in socket.socketpair())
            given = [one.fileno() for one in (*sockets, theirs)]
            socket.send_fds(orders, [vm.name.encode()], given)
            orders.close()
            theirs.close()
            gate.settimeout(LOAD_SECONDS)
            text, descriptors, _, _ = socket.recv_fds(gate, 16, 1)
            if not text or len(descriptors) != 1:
                raise errors.BlkckptError("the disk server that others are forked from has ended")
            gate.settimeout(None)
            stack.pop_all()
            return nbdserver.NbdServer.adopt(vm, (sockets[0], sockets[1]), gate, int(text), descriptors[0])

"""A disk server that has loaded and serves nothing: those of many VMs are forked from it.

Half of what starting a machine costs is an interpreter that loads (0.15 s of processor time).  Here it loads once.
nbdkit starts as for one VM, with ``template_fd`` in place of ``control_fd`` and ``start_fd``; in
``config_complete``, before nbdkit or we have made a thread, a pipe or a signal handler, :func:`become` takes orders.
Each is a datagram on that socket: a VM's name, with three descriptors (its NBD socket, its control socket, its gate).
A fork with its own session takes them as its 3, 4 and 5, answers through the gate with its pid and a descriptor of
itself, and goes on as an early server does (:mod:`blkckpt.control.host`).  It is nobody's child for long: what binds
it to its launcher is the gate.

The template ends with its launcher, and when nobody holds the orders' other end any more.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import socket
from pathlib import Path

from blkckpt.control import host

NBD, CONTROL, GATE = 3, 4, 5


def become(parameters: dict[str, str]) -> None:
    """Take orders; returns in a fork for each, with *parameters* being those of its VM.  Never in the template."""
    importlib.import_module(host.STORE)
    gc.collect()
    gc.freeze()  # what is shared stays so
    orders = socket.socket(fileno=int(parameters.pop("template_fd")))
    while True:
        name_, descriptors, _, _ = socket.recv_fds(orders, 128, 3)
        if not name_ or len(descriptors) != 3:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    orders.detach()
    os.setsid()
    for descriptor, number in zip(descriptors, (NBD, CONTROL, GATE), strict=True):
        os.dup2(descriptor, number, inheritable=False)
        os.close(descriptor)
    _show(parameters["vm"].encode(), name_)
    parameters.update(vm=name_.decode(), control_fd=str(CONTROL), start_fd=str(GATE))
    _answer()


def _answer() -> None:
    """Say who we are; a launcher that has gone meanwhile shows as the gate's end."""
    itself = os.pidfd_open(os.getpid())
    gate = socket.socket(fileno=os.dup(GATE))
    try:
        socket.send_fds(gate, [str(os.getpid()).encode()], [itself])
    except BrokenPipeError:
        os._exit(0)
    finally:
        gate.close()
        os.close(itself)


def _show(place: bytes, name: bytes) -> None:
    """Put *name* where the command line has the longer *place*: it is by that that people tell servers apart."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[45:47])  # arg_start and arg_end, proc(5)
    at = ctypes.string_at(start, end - start).rfind(place) if start < end else -1
    if at >= 0 and len(name) <= len(place):
        ctypes.memmove(start + at, name.ljust(len(place), b"\0"), len(place))

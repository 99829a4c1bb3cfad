"""What lives in the nbdkit process: the disk group, the control server, and the exports by name.

``plugins/nbdkit_blkckpt.py`` is the adapter that nbdkit sees; each of its callbacks calls one function here or on
a disk.  The order is nbdkit's:

================  ==========================================================================================
``config``        parameters (:data:`PARAMETERS`), each once
``get_ready``     with ``start_fd``: load what reads a store, wait for the word.  Open the group: lock (rule D12),
                  load, recover.  A failure ends nbdkit with its message
``after_fork``    start the group's background work and the control server: threads die in the fork before it
connections       :meth:`Host.disk` gives the handle; the disk does the rest
``cleanup``       close the control server, then the group: clean stop (rule D13)
================  ==========================================================================================

The listening control socket is the launcher's: it comes as a descriptor (``control_fd``) and outlives us.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import blkckpt
from blkckpt import errors, log, paths
from blkckpt.control import quitter, server, service
from blkckpt.disk import api, disk, fastpath, group
from blkckpt.disk import format as formats
from blkckpt.store import lowly
from blkckpt.vm import definition, unfinished

PARAMETERS: Final = {
    "home": "the blkckpt home",
    "vm": "the VM to serve",
    "python": "the interpreter that has blkckpt installed, for copy children",
    "site": "its site directory, put first on sys.path by the adapter",
    "control_fd": "the listening control socket, an inherited descriptor",
    "start_fd": "a socket to wait on before the disks are opened, and that ends with the launcher; may be left out",
    "fast": "the fast path that nbdkit has loaded as a filter, if it has",
}

WIRE_ERRORS: Final = frozenset({
    errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.EOPNOTSUPP,
    errno.ESHUTDOWN,
})  # fmt: skip
"""What the NBD protocol can say.  nbdkit turns EDQUOT and EFBIG into ENOSPC and EROFS into EPERM; any other number
would reach the guest as EINVAL, its own mistake, so it becomes EIO here.  Source: nbdkit ``server/protocol.c``."""
TRANSLATED: Final = frozenset({errno.EDQUOT, errno.EFBIG, errno.EROFS})

logger = log.get(__name__)


def wire_error(error: BaseException) -> int:
    """The errno that a client is told for *error* (rule D10)."""
    number = getattr(error, "errno", None)
    return number if number in WIRE_ERRORS or number in TRANSLATED else errno.EIO


FILL_AFTER = 5.0
"""Seconds from the start until restored disks are filled: the guest, and others that start beside it, go first.  A fill
begins with loading numpy (0.1 s of processor time), which is a fifth of what starting a machine costs."""


STORE: Final = "blkckpt.store.store"
"""Loaded only when there is a store to read: most VMs never need it here."""


def open_image(image: api.ImageRef) -> api.Source:
    """The bottom of a restored disk."""
    store: Any = importlib.import_module(STORE)
    source: api.Source = store.Store.open(image.store).image(image.image, ahead=True)
    return source


class Host:
    """The one of this process.  Made by ``config_complete``; *stop* asks nbdkit to end and returns at once."""

    def __init__(self, parameters: Mapping[str, str], stop: Callable[[], None]) -> None:
        for name in ("home", "vm", "python", "control_fd"):
            if name not in parameters:
                raise errors.InputError(f"parameter {name}= is missing: {PARAMETERS[name]}; use `blkckpt serve`")
        self._vm = paths.home(parameters["home"]).vm(parameters["vm"])
        self._python = parameters["python"]
        self._fast = parameters.get("fast")
        self._listener = _inherited(parameters, "control_fd")
        self._gate = _inherited(parameters, "start_fd") if "start_fd" in parameters else None
        self._quitter = quitter.Quitter(self._vm.nbd_socket, stop, self._gate)
        self._group: group.DiskGroup | None = None
        self._service: service.Service | None = None
        self._server: server.Server | None = None

    def get_ready(self) -> None:
        """Open the group.  Starts no thread.  What it fails with is logged for the launcher, class and all."""
        if self._gate:
            _wait_for_word(self._gate)
        log.setup(as_json=True)
        try:
            unfinished.check(self._vm)
            definition.check(definition.load(self._vm))
            self._use_fast_path()
            self._group = group.DiskGroup.open(self._vm, open_image=open_image, wanted=self._wanted)
        except errors.BlkckptError as error:
            fatal = {"type": type(error).__name__, "message": str(error)}
            logger.error("the disks cannot be served", extra={"fields": {"fatal": fatal}})
            raise

    def _wanted(self, mark: formats.Retained) -> bool:
        """Whether a retained checkpoint is still one.  The store is loaded only when there is one to ask about."""
        keeping: Any = importlib.import_module("blkckpt.store.keeping")
        answer: bool = keeping.wanted(self._vm.name, mark)
        return answer

    def _use_fast_path(self) -> None:
        """Before any file or map is opened.  Without it the filter lets everything through."""
        if self._fast is not None:
            try:
                fastpath.use(Path(self._fast))
            except errors.MissingError as error:
                logger.warning("no fast path", extra={"fields": {"error": str(error)}})

    def after_fork(self) -> None:
        """Start everything that has a thread."""
        disks = self._opened()
        self._quitter.start()
        disks.start(FILL_AFTER)
        identity = service.Identity(self._vm.name, f"blkckpt {blkckpt.__version__}")
        command = lowly.command(self._python, "blkckpt.store.ingest")
        self._service = service.Service(identity, disks, command, self._quitter.quit)
        self._server = server.Server(self._listener, self._service)
        self._server.start()
        logger.info(
            "serving", extra={"fields": {"vm": self._vm.name, "pid": os.getpid(), "disks": sorted(disks.disks)}}
        )

    def cleanup(self) -> None:
        """Stop: first those who command, then the disks.  nbdkit has closed its connections."""
        self._quitter.close()
        if self._service and self._server:
            self._service.close()
            self._server.close()
        if self._group:
            self._group.close()

    def exports(self) -> list[tuple[str, str]]:
        """(name, description) of every disk."""
        return [(name, f"disk {name} of VM {self._vm.name}") for name in self._opened().disks]

    def default(self) -> str:
        """The export meant by an empty name: the only disk, else nothing is meant."""
        names = list(self._opened().disks)
        if len(names) != 1:
            raise errors.NotFoundError(f"VM {self._vm.name} has {len(names)} disks; name one of {', '.join(names)}")
        return names[0]

    def disk(self, export: str) -> disk.Disk:
        """The disk of that name: looked up, never made part of a path."""
        found = self._opened().disks.get(export or self.default())
        if found is None:
            raise errors.NotFoundError(f"VM {self._vm.name} has no disk {export[:80]!r}")
        return found

    def _opened(self) -> group.DiskGroup:
        if self._group is None:
            raise errors.StateError("the disks are not open yet")
        return self._group


def _wait_for_word(gate: socket.socket) -> None:
    """Until the launcher sends the log that we are to write to.  When it lets go instead, nobody needs us.

    It does not let go of *gate* afterwards either, for as long as it lives.
    """
    try:
        gate.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:  # there is time: a VM that is being restored will need it
        importlib.import_module(STORE)
    word, descriptors, _, _ = socket.recv_fds(gate, 1, 1)
    if not word or not descriptors:
        os._exit(0)  # there is nobody to tell
    for standard in (1, 2):
        os.dup2(descriptors[0], standard)
    os.close(descriptors[0])


def _inherited(parameters: Mapping[str, str], name: str) -> socket.socket:
    """The inherited socket that parameter *name* gives; not handed on to copy children."""
    try:
        inherited = socket.socket(fileno=int(parameters[name]))
    except (ValueError, OSError) as error:
        raise errors.InputError(f"{name}={parameters[name]} is no inherited socket; use `blkckpt serve`") from error
    inherited.set_inheritable(False)
    return inherited

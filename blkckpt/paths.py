"""Where things are kept: the home, the run directory, the live directory.

======================  ==========================================================================
``$BLKCKPT_HOME``       durable state; else ``/var/lib/blkckpt`` for root, else
                        ``$XDG_STATE_HOME/blkckpt`` (``~/.local/state/blkckpt``)
run directory           sockets and pid files, ``/run/blkckpt/ID`` for root, else
                        ``$XDG_RUNTIME_DIR/blkckpt/ID``, else ``/tmp/blkckpt-UID/ID``
live directory          live block maps, on tmpfs: ``/dev/shm/blkckpt-UID/ID``
======================  ==========================================================================

``ID`` is eight hex digits of a digest of the home's real path, so that several homes never meet and a socket's
path stays below the kernel's 108 bytes however long the home's path is.

Inside the home::

    store/                    the default checkpoint store
    vms/NAME/vm.json          the VM's definition (blkckpt.vm.definition)
    vms/NAME/state.json       the disks' layers (blkckpt.disk.format)
    vms/NAME/reserve          space for the state file when the file system is full
    vms/NAME/lock             one writer per VM (rule D12)
    vms/NAME/layers/          overlay data and durable maps
    vms/NAME/memory/CKPT/     raw memory images kept for lazy restore
    vms/NAME/log/             nbdkit.log, qemu.log

Every directory is 0700 and must belong to the caller.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from blkckpt import durable, errors, units

LIVE_ROOT = Path("/dev/shm")  # noqa: S108  (the point is a tmpfs)


@dataclass(frozen=True, slots=True)
class Home:
    """One blkckpt home and the volatile directories that belong to it."""

    root: Path
    run: Path
    live: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    def vm(self, name: str) -> VmPaths:
        """The paths of VM *name* (which need not exist)."""
        units.check_name(name, "VM name")
        return VmPaths(name, self.root / "vms" / name, self.run / name, self.live / name)

    def vm_names(self) -> list[str]:
        """The VMs that are defined here, sorted."""
        base = self.root / "vms"
        if not base.is_dir():
            return []
        return sorted(path.name for path in base.iterdir() if (path / "vm.json").is_file())


@dataclass(frozen=True, slots=True)
class VmPaths:
    """Where one VM's files are."""

    name: str
    root: Path
    run: Path
    live: Path

    @property
    def definition(self) -> Path:
        return self.root / "vm.json"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def memory(self) -> Path:
        return self.root / "memory"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def nbd_socket(self) -> Path:
        return self.run / "nbd.sock"

    @property
    def control_socket(self) -> Path:
        return self.run / "control.sock"

    @property
    def qmp_socket(self) -> Path:
        return self.run / "qmp.sock"


def home(root: str | os.PathLike[str] | None = None) -> Home:
    """The home at *root*, else where the environment says; InputError if that is a file.  Creates nothing."""
    chosen = Path(root) if root is not None else _default_root()
    chosen = Path(os.path.realpath(chosen))
    if chosen.exists() and not chosen.is_dir():
        raise errors.InputError(f"{chosen} is no directory; state is kept in one: --home DIR, or $BLKCKPT_HOME")
    tag = hashlib.sha256(os.fsencode(chosen)).hexdigest()[:8]
    return Home(chosen, _run_root() / tag, LIVE_ROOT / f"blkckpt-{os.geteuid()}" / tag)


def _default_root() -> Path:
    if text := os.environ.get("BLKCKPT_HOME"):
        return Path(text)
    if os.geteuid() == 0:
        return Path("/var/lib/blkckpt")
    if text := os.environ.get("XDG_STATE_HOME"):
        return Path(text) / "blkckpt"
    return Path.home() / ".local/state/blkckpt"


def _run_root() -> Path:
    if os.geteuid() == 0:
        return Path("/run/blkckpt")
    if text := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(text) / "blkckpt"
    return Path(f"/tmp/blkckpt-{os.geteuid()}")  # noqa: S108  (0700 and owner-checked by private_directory)


def private_directory(path: Path) -> Path:
    """Create *path* 0700 if needed and check that it is ours alone; returns it.

    Raises :class:`errors.AccessError` when it is a symlink, belongs to somebody else, or others may write to
    it.  Its missing parents are created 0700 as well.
    """
    try:
        durable.make_directory(path)
        info = os.lstat(path)
    except OSError as error:
        raise errors.from_os_error(error, f"creating directory {path}") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise errors.AccessError(f"directory {path} is not yours alone (want 0700, owned by you); refusing to use it")
    return path

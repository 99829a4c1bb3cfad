"""What this machine has of what blkckpt needs, and what to do about the rest.

Pure of printing: :func:`examine` yields one :class:`Finding` a check, in a fixed order, never raising.  Checks try
the thing itself (open the device, make the system call, run nbdkit with a probe script) instead of guessing from
versions and group names.

A finding is **ok**; **warn**: something is slower or unavailable, checkpoints of running machines still work;
**fail**: they do not.  The command line exits with 10 when there is a fail.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import blkckpt
from blkckpt import errors, paths, units
from blkckpt.agent import fastfilter, nbdserver, rundir
from blkckpt.view import mounts, records

PROBE_TIMEOUT = 20.0
"""Seconds for a program to tell its version; a cold disk under load takes one or two."""

LOW_SPACE = 5 << 30
"""Below this much free space the home warns: one checkpoint of a small guest with memory can need it."""

MODULES = ("lz4.block", "numpy", "blkckpt.control.host", "blkckpt.store.store")
"""What the plugin and its helpers import in nbdkit's interpreter."""

REINSTALL = (
    "install blkckpt for /usr/bin/python3: tools/setup, or "
    "pipx install --python /usr/bin/python3 --system-site-packages blkckpt"
)
"""Another interpreter of the same version (pyenv, conda) has other packages: nbdkit embeds the distribution's."""


class Status(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and what to do if that is not well."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(home: paths.Home) -> Iterator[Finding]:
    """Run every check, one finding after the other."""
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("python", python),
        ("nbdkit", nbdkit),
        ("nbdkit python plugin", nbdkit_interpreter),
        ("fast path", fast_path),
        ("libnbd", libnbd),
        ("qemu", qemu),
        ("userfaultfd", userfaultfd),
        ("kvm", kvm),
        ("fuse", fuse),
        ("live directory", lambda: live_directory(home)),
        ("home", lambda: home_directory(home)),
        ("reflink", lambda: reflink(home)),
        ("free space", lambda: free_space(home)),
        ("libraries", libraries),
        ("guest files", guest_files),
        ("leftovers", lambda: leftovers(home)),
        ("mounts", lambda: dead_mounts(home)),
    )
    for name, check in checks:
        try:
            yield check()
        except (OSError, ValueError, subprocess.SubprocessError, errors.BlkckptError) as error:
            yield Finding(name, Status.WARN, f"could not be checked: {error}", "run with --debug and report this")


# Programs


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"blkckpt {blkckpt.__version__} in Python {version} ({sys.executable})"
    return Finding("python", Status.OK, found)


def nbdkit() -> Finding:
    text = _output(["nbdkit", "--version"])
    if text is None:
        return Finding("nbdkit", Status.FAIL, "not installed", "apt install nbdkit nbdkit-plugin-python")
    return Finding("nbdkit", Status.OK, f"{text.strip()} ({shutil.which('nbdkit', path=nbdserver.CLEAN_PATH)})")


def nbdkit_interpreter() -> Finding:
    """The embedded interpreter: same major.minor as ours, and everything importable there."""
    name = "nbdkit python plugin"
    if shutil.which("nbdkit", path=nbdserver.CLEAN_PATH) is None:
        return Finding(name, Status.FAIL, "no nbdkit", "apt install nbdkit nbdkit-plugin-python")
    probe = probe_plugin(sysconfig.get_path("purelib"))
    if probe is None:
        return Finding(name, Status.FAIL, "nbdkit cannot load it", "apt install nbdkit-plugin-python")
    version = f"Python {probe.major}.{probe.minor}"
    if (probe.major, probe.minor) != sys.version_info[:2]:
        own = f"{sys.version_info[0]}.{sys.version_info[1]}"
        advice = f"what is installed for {own} cannot be imported in {probe.major}.{probe.minor}: {REINSTALL}"
        return Finding(name, Status.FAIL, f"{version}, which is not ours", advice)
    if probe.missing:
        found = f"{version} cannot import {', '.join(probe.missing)}"
        return Finding(name, Status.FAIL, found, REINSTALL)
    try:
        plugin = nbdserver.plugin_path()
    except errors.MissingError as error:
        return Finding(name, Status.FAIL, str(error), "install blkckpt again")
    return Finding(name, Status.OK, f"{version} imports all of {plugin}")


def fast_path() -> Finding:
    """The C filter that serves plain reads and writes: several times as many as the interpreter."""
    name = "fast path"
    try:
        program = nbdserver.probe()
        found = fastfilter.find(program.version)
    except errors.MissingError as error:
        return Finding(name, Status.WARN, f"no nbdkit for it: {error}", fastfilter.ADVICE)
    if found is None:
        version = ".".join(map(str, program.version))
        return Finding(name, Status.WARN, f"not built for nbdkit {version}: guest I/O is slower", fastfilter.ADVICE)
    if not fastfilter.wanted():
        return Finding(name, Status.WARN, f"{fastfilter.VARIABLE} switches it off", f"unset {fastfilter.VARIABLE}")
    return Finding(name, Status.OK, str(found))


@dataclass(frozen=True, slots=True)
class Probe:
    """What the embedded interpreter said of itself."""

    major: int
    minor: int
    missing: tuple[str, ...]


_PROBE = """\
import importlib, json, os, site, sys
before = list(sys.path)
sys.path[:] = []
site.addsitedir({directory!r})
sys.path += before
missing = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        missing.append("%s (%s)" % (name, type(error).__name__))
os.write(1, json.dumps({{"version": sys.version_info[:2], "missing": missing}}).encode())
os._exit(0)
"""


def probe_plugin(directory: str, modules: tuple[str, ...] = MODULES) -> Probe | None:
    """Let nbdkit's interpreter import *modules* as our plugin does, *directory* first; None if it does not run.

    The script ends the process while nbdkit reads its configuration: no socket has been made by then.
    """
    with tempfile.TemporaryDirectory(prefix="blkckpt-doctor-") as temporary:
        script = Path(temporary) / "probe.py"
        script.write_text(_PROBE.format(directory=directory, modules=list(modules)))
        text = _output(["nbdkit", "-f", "python", str(script)])
    try:
        answer = json.loads(text or "")
        return Probe(int(answer["version"][0]), int(answer["version"][1]), tuple(answer["missing"]))
    except (ValueError, KeyError, TypeError):
        return None


def libnbd() -> Finding:
    probe = _import("nbd")
    if probe is None or not hasattr(probe, "NBD"):
        found = "not importable here" if probe is None else "another package called nbd is in the way"
        advice = "apt install python3-libnbd, and use an environment made with --system-site-packages"
        return Finding("libnbd", Status.WARN, found, advice)
    return Finding("libnbd", Status.OK, f"libnbd {probe.NBD().get_version()}")


def qemu() -> Finding:
    text = _output(["qemu-system-x86_64", "--version"])
    if text is None:
        advice = "apt install qemu-system-x86 (disk-only checkpoints of other NBD clients work without)"
        return Finding("qemu", Status.FAIL, "qemu-system-x86_64 is not installed", advice)
    first = text.splitlines()[0]
    match = re.search(r"version (\d+)\.(\d+)", first)
    if match and (int(match[1]), int(match[2])) < (6, 0):
        return Finding("qemu", Status.FAIL, first, "background-snapshot came with QEMU 6.0: install a newer one")
    return Finding("qemu", Status.OK, first)


def libraries() -> Finding:
    missing = [name for name in ("lz4.block", "blake3", "numpy", "qemu.qmp") if _import(name) is None]
    if "blake3" in missing and len(missing) == 1:
        return Finding("libraries", Status.WARN, "no blake3: new stores use SHA-256 (slower)", "pip install blake3")
    if missing:
        return Finding("libraries", Status.FAIL, f"missing: {', '.join(missing)}", REINSTALL)
    return Finding("libraries", Status.OK, "lz4, blake3, numpy, qemu.qmp")


def guest_files() -> Finding:
    """An extra, therefore never a warning: whoever left it out (its license is AGPL) meant to."""
    names = [f"dissect.{name}" for name in ("extfs", "xfs", "btrfs", "ntfs", "fat", "volume")]
    missing = [name for name in names if not _is_there(name)]
    if missing:
        return Finding(
            "guest files", Status.OK, f"not installed, optional: pip install 'blkckpt[files]' ({', '.join(missing)})"
        )
    return Finding("guest files", Status.OK, "ext2/3/4, XFS, Btrfs, NTFS, FAT, LVM")


# The kernel

_UFFD_SYSCALL = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_USERFAULTFD_IOC_NEW = 0xAA00


def userfaultfd() -> Finding:
    """QEMU's background snapshot write-protects guest memory with userfaultfd, kernel faults included.

    QEMU before 8.0 makes the system call only; newer ones also open ``/dev/userfaultfd``.
    Source: ``userfaultfd(2)``, QEMU ``util/userfaultfd.c``.
    """
    descriptor, way = _open_userfaultfd()
    if descriptor < 0:
        advice = (
            "sysctl -w vm.unprivileged_userfaultfd=1 (or give QEMU CAP_SYS_PTRACE); "
            "without it only --disk-only checkpoints work"
        )
        return Finding("userfaultfd", Status.FAIL, "not permitted", advice)
    try:
        answer = fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
    finally:
        os.close(descriptor)
    if not struct.unpack("QQQ", answer)[1] & _UFFD_FEATURE_PAGEFAULT_FLAG_WP:
        return Finding("userfaultfd", Status.FAIL, "no write protection", "a kernel of 5.7 or newer is needed")
    if way == "device":
        advice = "QEMU before 8.0 does not use the device: sysctl -w vm.unprivileged_userfaultfd=1"
        return Finding("userfaultfd", Status.WARN, "through /dev/userfaultfd only", advice)
    return Finding("userfaultfd", Status.OK, "permitted, with write protection")


def _open_userfaultfd() -> tuple[int, str]:
    number = _UFFD_SYSCALL.get(os.uname().machine)
    if number is not None:
        descriptor = ctypes.CDLL(None, use_errno=True).syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
        if descriptor >= 0:
            return descriptor, "call"
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1, ""
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK), "device"
    finally:
        os.close(device)


_KVM_CREATE_VM = 0xAE01
_KVM_CREATE_VCPU = 0xAE41


def kvm(device: Path = Path("/dev/kvm")) -> Finding:
    """Open it and make a machine with a processor; nested hosts open the device and refuse the rest."""
    slow = "guests run under emulation: add -accel tcg to the QEMU command line"
    opened: list[int] = []
    try:
        opened.append(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[-1], _KVM_CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[-1], _KVM_CREATE_VCPU, 0))
    except PermissionError:
        return Finding("kvm", Status.WARN, f"{device} is not permitted", f"join the group kvm; otherwise {slow}")
    except OSError as error:
        return Finding("kvm", Status.WARN, f"not usable ({error.strerror})", slow)
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)
    return Finding("kvm", Status.OK, "usable", "a guest that hangs at boot on a nested host: try -accel tcg")


def fuse(device: Path = Path("/dev/fuse")) -> Finding:
    if not device.exists():
        return Finding("fuse", Status.WARN, f"no {device}", "modprobe fuse; browsing checkpoints as files needs it")
    if shutil.which("fusermount3") is None:
        return Finding("fuse", Status.WARN, "no fusermount3", "apt install fuse3; browsing checkpoints needs it")
    if not os.access(device, os.R_OK | os.W_OK):
        hint = f"chmod 666 {device} as root (as udev has it); browsing checkpoints as files needs it"
        return Finding("fuse", Status.WARN, f"{device} is not permitted", hint)
    return Finding("fuse", Status.OK, f"{device}, fusermount3")


# Files


def live_directory(home: paths.Home) -> Finding:
    """The live maps of a killed server survive in shared memory: that must be a tmpfs."""
    kind = filesystem(_existing(home.live))
    if kind != "tmpfs":
        found = f"{home.live} is on {kind}"
        return Finding("live directory", Status.WARN, found, "mount a tmpfs at /dev/shm, or every write marks a disk")
    free = shutil.disk_usage(_existing(home.live)).free
    if free < 64 << 20:
        return Finding("live directory", Status.WARN, f"{units.format_size(free)} left on /dev/shm", "make room there")
    return Finding("live directory", Status.OK, f"{home.live} on tmpfs, {units.format_size(free)} free")


def home_directory(home: paths.Home) -> Finding:
    place = _existing(home.root)
    if not os.access(place, os.W_OK):
        advice = "choose another with --home or BLKCKPT_HOME"
        return Finding("home", Status.FAIL, f"{place} is not writable", advice)
    if place == home.root and place.stat().st_mode & 0o022:
        return Finding("home", Status.FAIL, f"{place} is writable by others", f"chmod go-w {place}")
    made = "" if place == home.root else " (will be made)"
    return Finding("home", Status.OK, f"{home.root}{made} on {filesystem(place)}")


_FICLONE = 0x40049409


def reflink(home: paths.Home) -> Finding:
    """Whether a file can be cloned there: nothing needs it, raw copies outside blkckpt gain from it."""
    place = _existing(home.root)
    with tempfile.TemporaryFile(dir=place) as source, tempfile.TemporaryFile(dir=place) as target:
        source.write(b"x" * 4096)
        source.flush()
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError:
            return Finding("reflink", Status.OK, f"no ({filesystem(place)}); nothing depends on it")
    return Finding("reflink", Status.OK, f"yes ({filesystem(place)})")


def free_space(home: paths.Home) -> Finding:
    usage = shutil.disk_usage(_existing(home.root))
    found = f"{units.format_size(usage.free)} of {units.format_size(usage.total)} at {home.root}"
    if usage.free < LOW_SPACE:
        return Finding("free space", Status.WARN, found, "remove checkpoints (blkckpt rm) or choose another --home")
    return Finding("free space", Status.OK, found)


def leftovers(home: paths.Home) -> Finding:
    """What a killed supervisor left behind: sockets that nobody answers on, processes that nobody looks after."""
    runs = [home.vm(path.name) for path in sorted(home.run.glob("*")) if units.NAME.fullmatch(path.name)]
    dead = [vm for vm in runs if rundir.find(vm) is None]
    children = [f"{vm.name}: pid {process.pid}" for vm in dead for process in _orphans(vm)]
    sockets = [str(path) for vm in dead for path in sorted(vm.run.glob("*.sock"))]
    if children:
        advice = "`blkckpt stop VM` ends them; a running QEMU loses its disks until `blkckpt run` or 'serve' is back"
        return Finding("leftovers", Status.WARN, f"without a supervisor: {', '.join(children)}", advice)
    if sockets:
        found = f"{len(sockets)} dead socket{'s' if len(sockets) > 1 else ''}: {', '.join(sockets[:4])}"
        return Finding("leftovers", Status.WARN, found, "harmless: the next `blkckpt run` or 'serve' replaces them")
    return Finding("leftovers", Status.OK, "none")


def dead_mounts(home: paths.Home) -> Finding:
    """Mounts whose process was killed; they are taken away here, since nothing else can be done with them."""
    cleared = mounts.clear(home)
    if cleared:
        found = f"{len(cleared)} left by killed processes: {', '.join(record.directory for record in cleared[:4])}"
        return Finding("mounts", Status.WARN, found, "they have been taken away; mount again: blkckpt mount")
    active = records.active(home)
    return Finding("mounts", Status.OK, ", ".join(record.directory for record in active) or "none")


def _orphans(vm: paths.VmPaths) -> list[rundir.Process]:
    try:
        known = rundir.read(vm)
    except errors.BlkckptError:
        return []
    return [process for process in (known.server, known.machine) if process and process.alive] if known else []


def filesystem(path: Path) -> str:
    """The type of the file system that *path* is on, from ``/proc/self/mountinfo``."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def _existing(path: Path) -> Path:
    """*path* or its nearest parent that is there."""
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _output(command: list[str]) -> str | None:
    """What *command* prints in the environment that the launcher gives nbdkit; None if it fails or is not there."""
    program = shutil.which(command[0], path=nbdserver.CLEAN_PATH)
    if program is None:
        return None
    result = subprocess.run(
        [program, *command[1:]],
        env=nbdserver.clean_environment({"LC_ALL": "C.UTF-8"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT,
        check=False,
    )
    return result.stdout if result.returncode == 0 else None


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _is_there(name: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # its parent is not there
        return False

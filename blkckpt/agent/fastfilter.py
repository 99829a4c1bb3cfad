"""The fast path's filter as a file: where its source is, building it, finding what was built.

An nbdkit filter fits exactly the nbdkit whose headers it was built with, and nbdkit refuses to start with another.
So a built filter's name has nbdkit's version, the machine and a digest of the source in it, and only the name that
fits now is looked for: after an upgrade of either side there is simply none, until it is built again.  It is built
into ``PREFIX/lib/blkckpt`` of the Python environment that blkckpt is installed in, and appears under its name only
after nbdkit has loaded it.

Everything works without it.  ``BLKCKPT_FAST_PATH=off`` leaves it out.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import blkckpt
from blkckpt import durable, errors

VARIABLE = "BLKCKPT_FAST_PATH"
OFF = frozenset({"off", "0", "no", "false"})
SOURCES = ("core.h", "core.c", "filter.c", "wire.h", "wire.c", "interpose.c")
FLAGS = ("-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread")
BUILD_SECONDS = 120.0
ADVICE = "apt install gcc libc6-dev nbdkit-plugin-dev, then blkckpt doctor --fix"


def wanted() -> bool:
    """Whether the environment leaves the fast path on."""
    return os.environ.get(VARIABLE, "on").lower() not in OFF


def source() -> Path:
    """The directory of the source: inside an installed package, else beside the package in a checkout."""
    package = Path(blkckpt.__file__).parent
    for candidate in (package / "_plugins/fastpath", package.parent / "plugins/fastpath"):
        if candidate.is_dir():
            return candidate
    raise errors.MissingError(f"the source of the fast path is missing beside {package}; install blkckpt again")


def built(version: tuple[int, ...]) -> Path:
    """Where the filter for nbdkit *version* is, if it has been built."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((source() / name).read_bytes())
    numbers = ".".join(map(str, version))
    return Path(sys.prefix) / f"lib/blkckpt/fastpath-{numbers}-{os.uname().machine}-{digest.hexdigest()[:12]}.so"


def find(version: tuple[int, ...]) -> Path | None:
    """The filter for nbdkit *version*, or ``None``.  Raises :class:`errors.AccessError` if others could change it."""
    path = built(version)
    try:
        info = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
        raise errors.AccessError(f"the fast path {path} could be changed by others; remove it and build it again")
    return path


def build(nbdkit: str, version: tuple[int, ...], environment: Mapping[str, str]) -> Path:
    """Build the filter for *nbdkit* unless it is there.

    Raises :class:`errors.MissingError` without a compiler or headers, or when nbdkit does not load the result.
    """
    path = built(version)
    if find(version) is not None:
        return path
    compiler = shutil.which("cc", path=environment.get("PATH"))
    if compiler is None:
        raise errors.MissingError(f"no C compiler; {ADVICE}")
    made = path.with_name(f".build-{secrets.token_hex(8)}.so")
    sources = [str(source() / name) for name in SOURCES if name.endswith(".c")]
    loading = [nbdkit, f"--filter={made}", "--dump-plugin", "python"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _run([compiler, *FLAGS, "-o", str(made), *sources], environment, f"it does not compile; {ADVICE}")
        made.chmod(0o755)
        _run(loading, environment, f"nbdkit does not load it; {ADVICE}")
        durable.publish(made, path)
    except OSError as error:
        raise errors.from_os_error(error, f"building the fast path in {path.parent}") from error
    finally:
        made.unlink(missing_ok=True)
    return path


def _run(command: list[str], environment: Mapping[str, str], problem: str) -> None:
    """Run *command*; its first line about an error is part of the one raised."""
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
    )
    if result.returncode:
        lines = result.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no reason given")
        raise errors.MissingError(f"the fast path: {problem} ({first.strip()[:200]})")

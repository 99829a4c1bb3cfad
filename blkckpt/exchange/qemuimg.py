"""qemu-img: what an image file is, and conversions with progress.

The format is never left to qemu-img's guess: it is given, or told by the first bytes (:func:`sniff`).  A guest can
write the header of another format into its raw disk; whoever then opens that as "whatever it is" follows the header
to a backing file of the guest's choice.  So an image whose format was told by its bytes may not name a backing file.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blkckpt import errors

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
SUFFIXES = {".qcow2": "qcow2", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx", ".vhd": "vpc"}
"""Everything else is raw."""

_MAGIC = ((0, b"QFI\xfb", "qcow2"), (0, b"KDMV", "vmdk"), (0, b"# Disk DescriptorFile", "vmdk"),
          (64, b"\x7f\x10\xda\xbe", "vdi"), (0, b"vhdxfile", "vhdx"), (0, b"conectix", "vpc"))  # fmt: skip
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")
_MAX_INFO = 16 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Info:
    """What a file is."""

    format: str
    size: int
    backing: str | None


def sniff(path: Path) -> str:
    """The format by its first bytes; ``raw`` when they say nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise errors.from_os_error(error, f"reading {path}") from error
    return next((kind for offset, magic, kind in _MAGIC if head[offset:].startswith(magic)), "raw")


def info(path: Path, kind: str) -> Info:
    """Ask qemu-img about *path*, which is of format *kind*."""
    result = subprocess.run(
        [_program(), "info", "--output=json", "-U", "-f", kind, _file(path)], capture_output=True, timeout=60
    )
    if result.returncode:
        raise errors.InputError(f"{path} cannot be read as {kind}: {_last_words(result.stderr)}")
    try:
        fields: dict[str, Any] = json.loads(result.stdout[:_MAX_INFO])
        return Info(str(fields["format"]), int(fields["virtual-size"]), fields.get("backing-filename"))
    except (ValueError, KeyError, TypeError) as error:
        raise errors.CorruptError(f"qemu-img says nothing of use about {path}") from error


def convert(
    source: str, kind: str, target: str, wanted: str, size: int, progress: Progress, options: Sequence[str] = ()
) -> None:
    """Convert *source* (of format *kind*) to *target* (of format *wanted*); *size* is for the *progress* alone."""
    command = [_program(), "convert", "-p", "-m", "16", "-W", *options, "-f", kind, "-O", wanted, source, target]
    if "-c" in options:
        command.remove("-W")
    # in a process group of its own: Ctrl-C is for us, who end it and clean up
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    assert process.stdout is not None and process.stderr is not None
    try:
        while piece := process.stdout.read1(4096):  # type: ignore[attr-defined]
            if found := _PERCENT.findall(piece):
                progress(int(float(found[-1]) * size / 100), size)
        said = process.stderr.read()
        if process.wait():
            raise errors.BlkckptError(f"qemu-img could not convert {source}: {_last_words(said)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _program() -> str:
    found = shutil.which("qemu-img")
    if found is None:
        raise errors.MissingError("qemu-img is needed for every format but raw: apt install qemu-utils")
    return found


def _file(path: Path) -> str:
    """A path that qemu-img takes for a path, whatever it looks like (``nbd:…``, ``json:…``)."""
    return str(path.absolute())


def _last_words(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("qemu-img: ")[:300] if lines else "it said nothing"

"""Where a bench was run: what one must know to compare two results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def describe(directory: Path) -> dict[str, Any]:
    """The machine, its programs' versions, and the file system that the benches used."""
    return {
        "host_cpu": _field("/proc/cpuinfo", r"model name\s*:\s*(.*)"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(_field("/proc/meminfo", r"MemTotal:\s*(\d+)")) // 1024,
        "kernel": platform.release(),
        "filesystem": _output("stat", "-f", "-c", "%T", str(directory)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "qemu": _output("qemu-system-x86_64", "--version"),
        "nbdkit": _output("nbdkit", "--version"),
        "fio": _output("fio", "--version"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def _field(path: str, pattern: str) -> str:
    match = re.search(pattern, Path(path).read_text())
    return match.group(1) if match else "0"


def _output(*command: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except OSError:
        return "not installed"
    return text.splitlines()[0].strip() if text.strip() else "unknown"

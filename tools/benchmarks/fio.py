"""fio over NBD: one job of 4 KiB at queue depth 32, and how many operations a second it did."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import context


def _run(uri: str, mode: str, size: int, directory: Path, *options: str) -> float:
    command = ["fio", "--output-format=json", "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}",
               "--bs=4k", "--iodepth=32", f"--size={size}", *options]  # fmt: skip
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode != 0:
        raise context.BenchError(f"fio failed: {(result.stderr or result.stdout).strip()[-400:]}")
    # The nbd engine greets on standard output before the JSON.
    job: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise context.BenchError(f"fio reports error {job['error']}; see the server's log")
    return float(job["read" if mode.endswith("read") else "write"]["iops"])


def timed(uri: str, mode: str, size: int, directory: Path, *, seconds: float, seed: int) -> float:
    """Operations per second of *mode* over *seconds*, after half a second of warming up."""
    return _run(
        uri, mode, size, directory,
        "--time_based=1", f"--runtime={seconds}", "--ramp_time=0.5", "--norandommap", f"--randseed={seed}",
    )  # fmt: skip


def counted(uri: str, mode: str, size: int, directory: Path, *, operations: int, seed: int) -> float:
    """Operations per second of exactly *operations*, none twice at one place: the same work for every server."""
    return _run(uri, mode, size, directory, f"--number_ios={operations}", f"--randseed={seed}")


def allocate(uri: str, size: int, directory: Path) -> None:
    """Write the first *size* bytes once, in order."""
    _run(uri, "write", size, directory, "--bs=256k")

"""``top``: what happened between two looks, and a screen that ends with Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click import testing

from blkckpt.cli import live, main, top
from blkckpt.errors import InputError


def vm(server: int | None = 7, **disk: Any) -> dict[str, Any]:
    counters = {"reads": 10, "writes": 20, "flushes": 1, "read_bytes": 4096, "written_bytes": 8192}
    state = {"name": "vda", "size": 1 << 20, "depth": 2, "epoch": 3, "in_flight": 1, "overlay_bytes": 4096}
    one = {**counters, **state, "changed_bytes": 0, "filled": None, "error": None, **disk}
    job = {"kind": "copy", "state": "running", "done": 1 << 19, "total": 1 << 20}
    checkpoints = [{"name": "c", "stage": "switched", "copied": False}]
    return {
        "vm": "web", "state": "running", "phase": "switched", "checkpoints": checkpoints, "job": job, "warning": None,
        "server": server, "disks": [one] if server else [],
    }  # fmt: skip


def test_rates_are_growth_by_time() -> None:
    found = top.compare([vm()], [vm(reads=30, writes=20, written_bytes=8192 + 1024)], 2.0)
    (disk,) = found["vms"][0]["disks"]
    assert (disk["reads_per_second"], disk["writes_per_second"], disk["written_bytes_per_second"]) == (10, 0, 512)
    assert (disk["depth"], disk["epoch"], disk["in_flight"]) == (2, 3, 1)
    text = top._text(found)
    assert "web@c: copy 512.0 KiB (50 %)" in text and "512 B" in text


@pytest.mark.parametrize("before", [[], [vm(server=6)], [vm(server=None)]], ids=["new", "restarted", "was stopped"])
def test_a_server_that_was_started_meanwhile_has_no_rates(before: list[dict[str, Any]]) -> None:
    """Its counters began anew: a difference would be nonsense."""
    (disk,) = top.compare(before, [vm(reads=1)], 1.0)["vms"][0]["disks"]
    assert disk["reads_per_second"] is None and disk["depth"] == 2


def test_stopped_vms_and_bad_intervals(tmp_path: Path) -> None:
    assert "stopped" in top._text(top.compare([], [{**vm(server=None), "state": "stopped", "job": None}], 1.0))
    assert live.seconds("500ms") == 0.5
    with pytest.raises(InputError):
        live.seconds("1ms")
    runner = testing.CliRunner()
    home = {"BLKCKPT_HOME": str(tmp_path)}
    assert runner.invoke(main.command, ["top", "--once", "--interval", "1ms"], env=home).exit_code == 3
    assert runner.invoke(main.command, ["top", "nosuch"], env=home).exit_code == 4
    assert runner.invoke(main.command, ["status", "--watch", "--json"], env=home).exit_code == 3
    assert '"vms": []' in runner.invoke(main.command, ["top", "--json", "--interval", "100ms"], env=home).stdout


@pytest.mark.parametrize("words", [["top"], ["status", "--watch"]], ids=["top", "status"])
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_it_is_shown_until_ctrl_c(tmp_path: Path, words: list[str], terminal: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "blkckpt.cli.main", *words, "--interval", "100ms"],
        env={**os.environ, "BLKCKPT_HOME": str(tmp_path), "TERM": "xterm"}, stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while seen.count(b"DISKS ARE") < 3:
        seen += os.read(ours, 1 << 16)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    os.close(ours)
    assert child.returncode == 0 and said == b""
    assert (b"\x1b[?1049h" in seen) is terminal, "a screen of its own on a terminal alone"

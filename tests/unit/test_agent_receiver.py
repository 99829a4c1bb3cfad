"""The agent's end of the memory receiver, while that has no job yet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blkckpt.agent import early, receiver


def open_files() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_one_that_was_not_needed_leaves_nothing() -> None:
    before, others = open_files(), children()
    started = receiver.Receiver()
    (child,) = children() - others
    started.discard()
    started.discard()
    assert not Path(f"/proc/{child}").exists()
    assert open_files() == before


def test_children_that_were_not_needed_leave_nothing(tmp_path: Path) -> None:
    """Nor does the guard, which was never in charge, look for a guest."""
    before, others = open_files(), children()
    started = early.Children(str(tmp_path / "qmp.sock"))
    started.discard()
    assert started.guard._process.wait(20) == 0
    del started
    assert open_files() == before
    assert children() == others


def test_one_with_a_job_is_not_discarded(tmp_path: Path) -> None:
    started = receiver.Receiver()
    started.begin(receiver.Job(tmp_path / "nowhere", "vm@c", {}, tmp_path / "raw", keep_raw=False))
    started.discard()
    os.close(started.sink)
    try:
        with pytest.raises(Exception, match="no checkpoint store"):
            started.wait(60)
    finally:
        started.stop()
        os.close(started.stream)

"""What a user or a guest waits for loads nothing heavy: guarded by names, not by time.

numpy, SQLite, asyncio and rich each cost 30 to 100 ms of processor time in every process that loads them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkckpt.store import store
from tests.support import guest

HEAVY = frozenset({"numpy", "sqlite3", "asyncio", "rich", "ssl", "qemu", "tempfile", "multiprocessing", "unittest"})


def loaded(code: str, *, home: Path) -> set[str]:
    """The top-level modules that a new interpreter has loaded after *code*."""
    program = f"import sys\ntry:\n    {code}\nfinally:\n    import json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=guest.ROOT, env={**os.environ, "BLKCKPT_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("module", [
    "agent.supervisor", "cli.fork", "cli.main", "cli.restore", "control.host", "restore.fork", "restore.fused",
    "restore.machine", "store.store",
    "view.records", "view.starting",
])  # fmt: skip
def test_modules_on_the_way_to_a_guest(module: str, tmp_path: Path) -> None:
    found = loaded(f"import blkckpt.{module}", home=tmp_path)
    assert "blkckpt" in found
    assert not found & HEAVY


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["vm", "list"], ["restore", "--help"], ["status"], ["diff", "--help"]], ids=" ".join
)
def test_commands(words: list[str], tmp_path: Path) -> None:
    code = f"from blkckpt.cli import main; main.command({words!r}, prog_name='blkckpt')"
    found = loaded(code, home=tmp_path)
    assert {"blkckpt", "click"} <= found
    assert not found & HEAVY


def test_a_checkpoint_is_published(tmp_path: Path) -> None:
    """By the agent, which leaves the chunks to its children."""
    with store.Store.init(tmp_path / "store") as place:
        with place.image_writer(1 << 20, kind="disk") as writer:
            writer.write(0, os.urandom(1 << 20))
            image = writer.finish().image
        code = f"from blkckpt.store import manifest as m, store as s; p = s.Store.open({str(tmp_path / 'store')!r}); "
        code += f"p.put_manifest(m.Manifest('v', 'c', '0' * 32, 1, (m.DiskImage('vda', {image!r}, 1 << 20),)))"
        found = loaded(code, home=tmp_path)
        assert place.names() == [("v", "c")]
    assert "blkckpt" in found
    assert not found & HEAVY


def test_the_guard_sees(tmp_path: Path) -> None:
    """The negative control: writing chunks does load numpy, and is seen to."""
    assert "numpy" in loaded("from blkckpt.store import codec; codec.is_zero(bytes(64))", home=tmp_path)

"""Style is a test: ruff (lint and format) and mypy --strict pass; no file syncs or renames behind our back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

DURABLE_CALLS = {"replace": "os", "rename": "os", "fsync": "os", "fdatasync": "os"}
ALLOWED = {"blkckpt/durable.py", "blkckpt/disk/fileio.py", "blkckpt/store/backend.py"}
"""The helper, the data plane's own file layer, and the store's local backend, whose packs are appended to."""


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=lambda words: words[0],
)
def test_linters(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_the_durable_layer_syncs_and_renames() -> None:
    for path in (ROOT / "blkckpt").rglob("*.py"):
        if str(path.relative_to(ROOT)) in ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert DURABLE_CALLS.get(node.attr) != node.value.id, f"{path}:{node.lineno} calls os.{node.attr}"


def test_children_import_nothing_from_the_users_directory() -> None:
    """``python -m blkckpt…`` without ``-P`` would import a ``blkckpt`` that lies where the user happens to be."""
    for path in (ROOT / "blkckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.List | ast.Tuple):
                continue
            words = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
            for before, flag, module in zip(words, words[1:], words[2:], strict=False):
                if flag == "-m" and str(module).startswith("blkckpt"):
                    assert before == "-P", f"{path}:{node.lineno}"


def test_modules_are_small() -> None:
    """A module past 500 lines needs a reason; today none has one."""
    for path in [*(ROOT / "blkckpt").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path

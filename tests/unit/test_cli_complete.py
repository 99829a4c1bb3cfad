"""Completion: names by the argument's metavar, in the shells' own words, without loading the store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click import testing

from blkckpt.cli import complete, main, manual
from tests.unit import test_cli_main


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """VMs web (defined, with a store of its own) and old (checkpoints only)."""
    base, home, own = tmp_path / "d.raw", tmp_path / "home", tmp_path / "own"
    base.write_bytes(bytes(1 << 20))
    base.chmod(0o600)
    os.utime(base, (1, 1))
    words = ["--home", str(home), "vm", "create", "web", "--disk", str(base), "--store", str(own)]
    assert testing.CliRunner().invoke(main.command, words).exit_code == 0
    for path in (
        own / "manifests/web/before.json",
        own / "manifests/web/after.json",
        home / "store/manifests/old/x.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return home


def offered(home: Path, *words: str) -> list[str]:
    """What fish is told for the last of *words*."""
    result = testing.CliRunner().invoke(
        main.command,
        env={
            "BLKCKPT_HOME": str(home),
            "_BLKCKPT_COMPLETE": "fish_complete",
            "COMP_WORDS": " ".join(["blkckpt", *words]),
            "COMP_CWORD": words[-1],
        },
        prog_name="blkckpt",
    )
    return [line.partition(",")[2].partition("\t")[0] for line in result.stdout.splitlines() if line]


def test_names(home: Path) -> None:
    assert offered(home, "show", "web@") == ["web@after", "web@before", "web@latest"]
    assert offered(home, "restore", "web@b") == ["web@before"]
    assert offered(home, "rm", "web@after", "o") == ["old@x", "old@latest"]
    assert offered(home, "list", "w") == ["web"]
    assert offered(home, "list", "o") == ["old"]
    assert offered(home, "verify", "we") == ["web"]
    assert offered(home, "verify", "web@l") == ["web@latest"]
    assert offered(home, "bundle", "web@after", "--since", "web@b") == ["web@before"]
    assert offered(home, "che") == ["checkpoint"]
    assert "--detach" in offered(home, "nbd", "--d")


def test_another_home_and_no_home(home: Path, tmp_path: Path) -> None:
    assert offered(tmp_path / "none", "--home", str(home), "list", "w") == ["web"]
    assert offered(tmp_path / "none", "show", "w") == []
    assert not (tmp_path / "none").exists(), "a completion makes nothing"


@pytest.mark.parametrize("words", test_cli_main.leaves(), ids=" ".join)
def test_every_argument_that_names_one_completes(words: tuple[str, ...]) -> None:
    for param in manual.find(main.command, words).command.params:
        if "VM" in (param.metavar or "") and isinstance(param, click.Argument):
            assert complete.for_metavar(param.metavar), f"{words}: {param.metavar}"
            assert "shell_complete" in vars(param)


def test_bash_completes_a_checkpoint_as_one_word(home: Path) -> None:
    """The real script in a real bash; '@' must not break the word."""
    script = testing.CliRunner().invoke(main.command, ["completion", "bash"]).stdout
    program = home / "bin/blkckpt"
    program.parent.mkdir()
    start = "import sys; sys.argv[0] = 'blkckpt'; from blkckpt.cli import main; main.main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    code = (
        f"{script}\nCOMP_WORDS=(blkckpt show web@b); COMP_CWORD=2; _blkckpt_completion blkckpt\n"
        'echo "${COMPREPLY[*]}"; echo "[$COMP_WORDBREAKS]"; complete -p blkckpt\n'
    )
    environment = {**os.environ, "BLKCKPT_HOME": str(home), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "--norc", "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    first, rest = result.stdout.split("\n", 1)
    assert first == "web@before", result
    assert "@" not in rest.split("]")[0] and "complete -o nosort -F _blkckpt_completion blkckpt" in rest


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, tmp_path: Path) -> None:
    result = testing.CliRunner().invoke(main.command, ["completion", shell])
    assert result.exit_code == 0 and f"_BLKCKPT_COMPLETE={shell}_complete" in result.stdout
    if program := shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(result.stdout)
        assert subprocess.run([program, "-n", path]).returncode == 0, "the shell can read it"
    assert testing.CliRunner().invoke(main.command, ["completion", "tcsh"]).exit_code == 2


def test_it_is_lean(home: Path) -> None:
    """Neither numpy nor SQLite nor rich for a list of names."""
    code = (
        "import os, sys\nos.environ.update(_BLKCKPT_COMPLETE='fish_complete', COMP_WORDS='blkckpt show web@',"
        " COMP_CWORD='web@')\nfrom blkckpt.cli import main\ntry:\n    main.command(prog_name='blkckpt')\n"
        "except SystemExit:\n    pass\nprint(sorted({'numpy', 'sqlite3', 'rich', 'asyncio'} & set(sys.modules)))"
    )
    environment = {**os.environ, "BLKCKPT_HOME": str(home)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]" and "plain,web@before" in result.stdout

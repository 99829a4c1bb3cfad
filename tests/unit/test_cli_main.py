"""Errors become one line and an exit code; every verb has a help with examples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click import testing

from blkckpt import errors
from blkckpt.cli import main, verb


def run(*words: str, **options: str) -> testing.Result:
    return testing.CliRunner().invoke(main.command, words, **options)  # type: ignore[arg-type]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The verb ``boom`` raises what the test puts here."""
    pending: list[BaseException] = []

    @click.command()
    def boom() -> None:
        raise pending[0]

    monkeypatch.setattr(main.Verbs, "get_command", lambda _self, _ctx, name: boom if name == "boom" else None)
    return pending


def subclasses(kind: type[errors.BlkckptError]) -> list[type[errors.BlkckptError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(errors.BlkckptError), ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code(kind: type[errors.BlkckptError], failing: list[BaseException]) -> None:
    error = kind.__new__(kind, "disk vda: it\nbroke")  # whatever else its constructor wants
    failing.append(error)
    result = run("boom")
    assert (result.exit_code, result.stdout, result.stderr) == (kind.exit_code, "", "blkckpt: disk vda: it broke\n")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 9, "/x/y: Permission denied"),
        (OSError(28, "No space left on device", "/x"), 8, "/x: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (main.Terminated(), 143, "terminated"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; rerun with --debug"),
    ],
)
def test_other_errors(error: BaseException, code: int, words: str, failing: list[BaseException]) -> None:
    failing.append(error)
    result = run("boom")
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("by zero"))
    assert "Traceback" in run("--debug", "boom").stderr


def test_wrong_usage_is_two() -> None:
    assert run("nonsense").exit_code == 2
    assert run("list", "--nonsense").exit_code == 2


def test_version_and_overview() -> None:
    assert run("--version").stdout.startswith("blkckpt, version ")
    text = run("--help").stdout
    for name, line in main.VERBS.items():
        assert f"  {name} " in text and line in text


def leaves() -> list[tuple[str, ...]]:
    """Every verb, and every verb of a verb."""
    found: list[tuple[str, ...]] = []
    context = click.Context(main.command)
    for name in main.VERBS:
        command = main.command.get_command(context, name)
        inner = command.commands if isinstance(command, click.Group) else {}
        found += [(name, below) for below in inner] or [(name,)]
    return found


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_help_has_examples(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    _, _, examples = result.stdout.partition("Examples:\n")
    assert f"blkckpt {' '.join(words)}" in examples


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_json_keys_are_documented(words: tuple[str, ...]) -> None:
    text = run(*words, "--help").stdout
    assert ("--json" in text) == ("JSON keys:" in text)


def test_json_everywhere_a_result_is_printed() -> None:
    without = {words for words in leaves() if "--json" not in run(*words, "--help").stdout}
    assert without <= {("run",), ("serve",), ("agent", "run"), ("cat",), ("completion",), ("man",)}


def test_confirmation_needs_a_terminal_or_yes() -> None:
    verb.confirm("Lose it?", yes=True)
    with pytest.raises(errors.InputError, match="--yes"):
        verb.confirm("Lose it?", yes=False)


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for words, said in (["list"], 3), (["vm", "list"], 3), (["--home", str(tmp_path / "none"), "list"], 0):
        home = [] if words[0] == "--home" else ["--home", str(tmp_path / "file")]
        result = testing.CliRunner().invoke(main.command, [*home, *words])
        assert result.exit_code == said, result.output
        assert not said or ("no directory" in result.stderr and result.stderr.count("\n") == 1)


def test_sigterm_unwinds(tmp_path: Path) -> None:
    """A terminated command runs its cleanup and says so in one line."""
    script = (
        "import time, click\nfrom blkckpt.cli import main\n"
        "@click.command()\ndef boom() -> None:\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n        open('cleaned', 'w').close()\n"
        "main.Verbs.get_command = lambda *_: boom\nmain.main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "boom"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(20) == 143
    assert child.stderr.read() == b"blkckpt: terminated\n"
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("words", [["--help"], ["list", "--help"], ["man", "list"]], ids=" ".join)
def test_an_output_that_takes_nothing_is_said_in_a_line(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        child = subprocess.run(
            [sys.executable, "-m", "blkckpt.cli.main", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert child.returncode == errors.NoSpaceError.exit_code
    assert child.stderr.startswith("blkckpt: ") and child.stderr.count("\n") == 1


def test_a_verb_is_imported_when_it_is_used() -> None:
    """Listing must not pay for QMP (asyncio) and what else it does not use."""
    code = "import sys; from blkckpt.cli import main; print(*{'qemu.qmp', 'asyncio'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"

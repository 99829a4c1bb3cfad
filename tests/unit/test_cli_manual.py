"""Man pages: one a verb, whatever is in ``--help``, and nothing that groff complains about."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click
import pytest
from click import testing

from blkckpt.cli import main, manual, verb
from tests.unit import test_cli_main


def run(*words: str) -> testing.Result:
    return testing.CliRunner().invoke(main.command, ["man", *words])


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(manual.pages(main.command))


def test_every_verb_has_a_page(pages: dict[str, str]) -> None:
    wanted = {f"blkckpt-{'-'.join(words)}.1" for words in test_cli_main.leaves()}
    groups = {f"blkckpt-{words[0]}.1" for words in test_cli_main.leaves() if len(words) > 1}
    assert set(pages) == {"blkckpt.1"} | wanted | groups


def test_groff_has_no_complaint(pages: dict[str, str]) -> None:
    """All in one run: a page resets everything with .TH."""
    text = "".join(pages.values())
    assert text.isascii()
    result = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-z"], input=text, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("words", [(), *test_cli_main.leaves()], ids=" ".join)
def test_a_page_says_what_help_says(words: tuple[str, ...], pages: dict[str, str]) -> None:
    """Every option, every example, the JSON keys: as groff prints them."""
    page = pages["-".join(["blkckpt", *words]) + ".1"]
    shown = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=2000n"], input=page, capture_output=True, text=True
    )
    text = shown.stdout
    context = manual.find(main.command, words)
    for param in context.command.params:
        for option in param.opts if isinstance(param, click.Option) else ():
            assert option in text
    if isinstance(context.command, verb.Verb):
        for example in context.command.examples:
            assert example.encode("ascii", "ignore").decode() in text
    assert "EXIT STATUS" in text and "130" in text


def test_no_text_can_become_a_request() -> None:
    assert manual._text(".so /etc/passwd") == "\\&.so /etc/passwd"
    assert manual._text("a\\b 'c' …") == "a\\eb \\(aqc\\(aq \\[u2026]"


def test_the_verb(tmp_path: Path) -> None:
    assert run("vm", "create").stdout.startswith('.TH "BLKCKPT\\-VM\\-CREATE" 1 ')
    assert run("nonsense").exit_code == 4
    assert run("--directory", str(tmp_path)).exit_code == 0
    assert (tmp_path / "blkckpt-vm-create.1").read_text() == run("vm", "create").stdout
    assert run("vm", "--directory", str(tmp_path)).exit_code == 3

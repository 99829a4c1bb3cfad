"""What every verb's command has in common: examples and JSON keys in its help, its arguments, ``--yes``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from blkckpt import errors
from blkckpt.cli import complete, names

DECLINED = 1
"""Exit code when the answer to a confirmation was no."""


class Verb(click.Command):
    """A command whose help ends with real examples and, where it prints a result, the keys of its JSON."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), keys: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.keys = keys
        for param in self.params:
            if completer := complete.for_metavar(param.metavar):
                setattr(param, "shell_complete", completer)  # noqa: B010  (a method by its instance)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.keys:
            with formatter.section("JSON keys"):
                formatter.write_text(self.keys)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def _target(_ctx: click.Context, _param: click.Parameter, value: str) -> names.Target:
    return names.parse_target(value)


def targets(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[names.Target, ...]:
    """Callback of an argument that takes several ``VM@CKPT``, each once."""
    return tuple(dict.fromkeys(names.parse_target(value) for value in values))


def _vm_or_target(_ctx: click.Context, _param: click.Parameter, value: str | None) -> names.Target | None:
    return None if value is None else names.parse_vm_or_target(value)


vm_argument = click.argument("name", metavar="VM")
target_argument = click.argument("target", metavar="VM@CKPT", callback=_target)
optional_target_argument = click.argument("target", metavar="[VM[@CKPT]]", required=False, callback=_vm_or_target)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask; needed when there is no terminal.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost.  Without a terminal only ``--yes`` answers."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise errors.InputError(f"{question} There is no terminal to ask on: add --yes if that is meant")
    if not click.confirm(question, err=True):
        raise click.exceptions.Exit(DECLINED)

"""Man pages from the same source as ``--help``: the commands themselves.  Pure: commands to text.

A page is ``man(7)`` macros; everything else is escaped, so that no text can become a request, and is ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

import blkckpt
from blkckpt import errors
from blkckpt.cli import verb

SECTION = 1
_ESCAPES = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", '"': "\\(dq", "~": "\\(ti", "^": "\\(ha"}
_EXIT = re.compile(r"^ ?(\d+) +(\S.*)$", re.MULTILINE)


def pages(root: click.Group) -> Iterator[tuple[str, str]]:
    """``(file name, text)`` of the page of *root* and of everything below it."""
    for context in _contexts(click.Context(root, info_name="blkckpt")):
        yield f"{_name(context)}.{SECTION}", page(context)


def page(context: click.Context) -> str:
    """The page of one command."""
    command = context.command
    lines = [f'.TH {_macro(_name(context).upper())} {SECTION} "" "blkckpt {blkckpt.__version__}" "blkckpt manual"']
    lines += [".SH NAME", f"{_text(_name(context))} \\- {_text(_summary(context))}"]
    usage = " ".join(command.collect_usage_pieces(context))
    lines += [".SH SYNOPSIS", f".B {_text(context.command_path)}", _text(usage)]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help or "")]
    lines += _below(context)
    lines += _options(context)
    if isinstance(command, verb.Verb) and command.keys:
        lines += [".SH JSON KEYS", _text(f"With --json: {command.keys}.")]
    if isinstance(command, verb.Verb) and command.examples:
        lines += [".SH EXAMPLES", ".nf", *map(_text, command.examples), ".fi"]
    lines += _exit_status()
    lines += _see_also(context)
    return "\n".join(lines) + "\n"


def find(root: click.Group, words: Sequence[str]) -> click.Context:
    """The command that *words* name; NotFoundError if there is none."""
    context = click.Context(root, info_name="blkckpt")
    for word in words:
        command = context.command
        found = command.get_command(context, word) if isinstance(command, click.Group) else None
        if found is None:
            raise errors.NotFoundError(f"there is no verb {' '.join(words)}; `blkckpt --help` lists them")
        context = click.Context(found, parent=context, info_name=word)
    return context


def _contexts(context: click.Context) -> Iterator[click.Context]:
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _contexts(click.Context(below, parent=context, info_name=name))


def _name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _summary(context: click.Context) -> str:
    return context.command.get_short_help_str(200).rstrip(".")


def _paragraphs(text: str) -> Iterator[str]:
    """click's paragraphs; one that begins with ``\\b`` keeps its lines."""
    for number, part in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        lines = [line.strip() for line in part.splitlines()]
        if lines[0] == "\b":
            yield from (".nf", *map(_text, lines[1:]), ".fi")
        else:
            yield _text(" ".join(lines))


def _below(context: click.Context) -> Iterator[str]:
    command = context.command
    if not isinstance(command, click.Group):
        return
    yield ".SH VERBS"
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        yield from (".TP", f".B {_text(name)}", _text(below.get_short_help_str(200)))


def _options(context: click.Context) -> Iterator[str]:
    options = [param for param in context.command.get_params(context) if isinstance(param, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        yield ".SH OPTIONS"
    for term, text in records:
        yield from (".TP", f".B {_text(term)}", _text(text) or "\\&")


def _exit_status() -> Iterator[str]:
    """The table in the docstring of :mod:`blkckpt.errors`."""
    yield ".SH EXIT STATUS"
    for code, text in _EXIT.findall(errors.__doc__ or ""):
        yield from (".TP", f".B {code}", _text(text))


def _see_also(context: click.Context) -> Iterator[str]:
    parent, command = context.parent, context.command
    others = [_name(parent)] if parent is not None else []
    if isinstance(command, click.Group):
        others += [f"{_name(context)}-{name}" for name in command.list_commands(context)]
    yield ".SH SEE ALSO"
    yield ",\n".join(f"\\fB{_text(name)}\\fR({SECTION})" for name in others)


def _macro(text: str) -> str:
    return f'"{_text(text)}"'


def _text(text: str) -> str:
    """*text* as troff input that prints it."""
    plain = "".join(_ESCAPES.get(char, char if ord(char) < 128 else f"\\[u{ord(char):04X}]") for char in text)
    return f"\\&{plain}" if plain[:1] == "." else plain

"""What the shell offers for an argument: VMs, checkpoints, files.

Chosen by the argument's metavar, so that a verb need not ask for it.  Looks at directory names alone, and opens no
store: a completion must be there before the next key.  What cannot be read offers nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blkckpt import errors, paths
from blkckpt.cli import names
from blkckpt.vm import definition

if TYPE_CHECKING:
    from click import shell_completion

Completer = Callable[[click.Context, str], "list[shell_completion.CompletionItem]"]


def for_metavar(metavar: str | None) -> Completer | None:
    """What completes an argument that is shown as *metavar*; None: nothing special."""
    words = (metavar or "").strip("[]….")
    if words in ("FILE", "ID=]IMAGE", "LIST", "SOCKET"):
        return _files
    if "VM[@" in words:
        return _either
    if "VM@" in words:
        return _checkpoints
    return _vms if words.startswith("VM") else None


def _vms(ctx: click.Context, incomplete: str) -> list[shell_completion.CompletionItem]:
    home = _home(ctx)
    found = set(home.vm_names()) | {vm for vm, _ in _stored(home)}
    return _matching(sorted(found), incomplete)


def _checkpoints(ctx: click.Context, incomplete: str) -> list[shell_completion.CompletionItem]:
    found = sorted(f"{vm}@{name}" for vm, name in _stored(_home(ctx)))
    latest = sorted({f"{text.partition('@')[0]}@{names.LATEST}" for text in found})
    return _matching(found + latest, incomplete)


def _either(ctx: click.Context, incomplete: str) -> list[shell_completion.CompletionItem]:
    return _checkpoints(ctx, incomplete) if "@" in incomplete else _vms(ctx, incomplete)


def _files(ctx: click.Context, incomplete: str) -> list[shell_completion.CompletionItem]:
    return [_item(incomplete, type="file")]


def _matching(found: list[str], incomplete: str) -> list[shell_completion.CompletionItem]:
    return [_item(text) for text in found if text.startswith(incomplete)]


def _item(text: str, **more: Any) -> shell_completion.CompletionItem:
    """Loaded with the first use: every other call of a verb does without."""
    item: shell_completion.CompletionItem = importlib.import_module("click.shell_completion").CompletionItem(
        text, **more
    )
    return item


def _home(ctx: click.Context) -> paths.Home:
    return paths.home(ctx.find_root().params.get("home"))


def _stored(home: paths.Home) -> Iterator[tuple[str, str]]:
    """``(vm, checkpoint)`` of every manifest, by its file's name."""
    for place in dict.fromkeys([home.store, *_chosen(home)]):
        for path in place.glob("manifests/*/*.json"):
            yield path.parent.name, path.stem


def _chosen(home: paths.Home) -> Iterator[Path]:
    """The stores that VMs were given."""
    for name in home.vm_names():
        try:
            chosen = definition.load(home.vm(name)).store
        except errors.BlkckptError:
            continue
        if chosen:
            yield Path(chosen)

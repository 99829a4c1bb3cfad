"""What the verbs that change labels have in common."""

from __future__ import annotations

from collections.abc import Callable

from blkckpt.cli import names, output, session
from blkckpt.store import labels

KEYS = "vm, name, tags, pinned, notes (those made since it was taken)"


def change(
    ours: session.Session,
    targets: tuple[names.Target, ...],
    how: Callable[[labels.Labels], labels.Labels],
    *,
    as_json: bool,
    anew: bool = False,
) -> None:
    """Change the labels of each of *targets* and print them."""
    found = [(target.vm, *ours.locate(target)) for target in targets]
    changed = [(vm, name, place.relabel(vm, name, how, anew=anew)) for vm, place, name in found]
    if as_json:
        output.write_json({"checkpoints": [_keys(*one) for one in changed]})
    else:
        output.write("\n".join(_text(*one) for one in changed))


def _keys(vm: str, name: str, marked: labels.Labels) -> dict[str, object]:
    return {
        "vm": vm, "name": name, "tags": list(marked.tags), "pinned": marked.pinned, "notes": list(marked.notes),
    }  # fmt: skip


def _text(vm: str, name: str, marked: labels.Labels) -> str:
    tags = ", ".join(marked.tags) or "no tags"
    notes = f"; {marked.notes[-1]}" if marked.notes else ""
    return f"{vm}@{name}: {tags}; {'pinned' if marked.pinned else 'not pinned'}{notes}"

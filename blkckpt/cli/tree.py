"""Checkpoints as a tree of what came after what.  Pure.

A line of checkpoints is drawn straight down; where several came after one, all but the last are drawn aside, before the
line goes on::

    o web@base
    ├─o web@tried
    │ o web@tried-again
    o web@kept
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from blkckpt.store import manifest

_MAX_DEPTH = 64
"""Deeper asides are drawn at this depth: nobody can follow them on a terminal, and Python's stack is not endless."""


def order(found: Sequence[manifest.Manifest]) -> Iterator[tuple[str, manifest.Manifest]]:
    """*found* with what to draw before each: roots by time, each followed by what came after it.

    A parent that is not there, or is not older (its name was used anew), is none.
    """
    known = {f"{one.vm}@{one.name}": one for one in found}
    after: dict[str, list[manifest.Manifest]] = {}
    roots = []
    for one in sorted(found, key=lambda one: one.created_ns):
        parent = known.get(parent_of(one))
        if parent is None or parent.created_ns >= one.created_ns:
            roots.append(one)
        else:
            after.setdefault(f"{parent.vm}@{parent.name}", []).append(one)
    for root in roots:
        yield from _line(root, after, "", 0)


def parent_of(one: manifest.Manifest) -> str:
    """The full name of the parent of *one*, empty if it has none."""
    if one.parent is None:
        return ""
    return one.parent if "@" in one.parent else f"{one.vm}@{one.parent}"


def _line(
    first: manifest.Manifest, after: Mapping[str, list[manifest.Manifest]], indent: str, depth: int
) -> Iterator[tuple[str, manifest.Manifest]]:
    following: manifest.Manifest | None = first
    lead = indent[:-2] + "├─" if indent else ""
    while following is not None:
        yield f"{lead}o ", following
        lead = indent
        children = after.get(f"{following.vm}@{following.name}", [])
        following = children[-1] if children else None
        for one in children[:-1]:
            deeper = indent + "│ " if depth < _MAX_DEPTH else indent
            yield from _line(one, after, deeper, depth + 1)

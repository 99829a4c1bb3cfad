"""Checkpoints as a tree, and what a VM's checkpoints descend from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors, paths
from blkckpt.cli import tree
from blkckpt.store import manifest
from blkckpt.vm import lineage


def one(name: str, when: int, parent: str | None = None, vm: str = "web") -> manifest.Manifest:
    return manifest.Manifest(vm, name, "0" * 32, when, (), parent)


def drawn(*found: manifest.Manifest) -> list[str]:
    return [f"{lead}{each.name}" for lead, each in tree.order(found)]


def test_a_line_is_drawn_straight_and_branches_aside() -> None:
    found = [
        one("base", 1), one("tried", 2, "base"), one("again", 3, "tried"), one("kept", 4, "base"),
        one("later", 6, "kept"), one("fork", 5, "web@base", "copy"), one("other", 7),
    ]  # fmt: skip
    assert drawn(*reversed(found)) == [
        "o base", "├─o tried", "│ o again", "├─o kept", "│ o later", "o fork", "o other",
    ]  # fmt: skip


def test_a_parent_that_is_gone_or_not_older_is_none() -> None:
    assert drawn(one("b", 2, "gone"), one("a", 1)) == ["o a", "o b"]
    assert drawn(one("a", 1, "b"), one("b", 2, "a")) == ["o a", "o b"]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=200))
def test_each_is_drawn_once_and_below_its_parent(parents: list[int]) -> None:
    found = [one(f"c{number}", number, f"c{parent}") for number, parent in enumerate(parents)]
    names = [each.name for _, each in tree.order(found)]
    assert sorted(names) == sorted(each.name for each in found)
    for number, parent in enumerate(parents):
        if parent < number:
            assert names.index(f"c{parent}") < names.index(f"c{number}")


def test_the_parent_of_a_checkpoint(tmp_path: Path) -> None:
    """After a revert the line goes on from there; what it left is a branch."""
    vm = paths.home(tmp_path).vm("web")
    vm.root.mkdir(parents=True)
    never = lineage.read(vm)
    line = [(10, "a"), (20, "b"), (30, "c")]
    assert lineage.parent("web", never, [], 5) is None
    assert lineage.parent("web", never, line, 25) == "b"
    reverted = lineage.Lineage("web@a", 35)
    assert lineage.parent("web", reverted, line, 40) == "a"
    assert lineage.parent("web", reverted, [*line, (37, "d")], 40) == "d"
    assert lineage.parent("copy", lineage.Lineage("web@a", 35), [], 40) == "web@a"
    lineage.write(vm, "web@b")
    assert lineage.read(vm).checkpoint == "web@b" and lineage.read(vm).since_ns > 10**18
    (vm.root / "lineage.json").write_text("[]")
    assert lineage.read(vm) == never


@pytest.mark.parametrize("parent", ["web@a@b", "../a", "@a", "web@", ""])
def test_s4_a_parent_is_a_name(parent: str) -> None:
    with pytest.raises(errors.InputError):
        manifest.encode(one("b", 2, parent))


def test_a_parent_of_another_vm_comes_back() -> None:
    data = manifest.encode(one("b", 2, "other@a"))
    assert manifest.decode(data, "it").parent == "other@a"

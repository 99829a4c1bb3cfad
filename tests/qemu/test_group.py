"""A consistency group of two real guests: stopped at one time, and each restores without a wrong byte."""

from __future__ import annotations

from tests.support import guest


def test_two_guests_are_stopped_at_the_same_time(box: guest.Sandbox, writer: guest.Console) -> None:
    box.create("w", {"vda": 32 << 20})
    second = box.boot("w", "writer", memory=128, rate=500)
    taken = box.json("checkpoint", "v", "w", "--name", "both")
    assert [one["vm"] for one in taken["checkpoints"]] == ["v", "w"]
    assert all(one["stopped_ms"] > taken["spread_ms"] >= 0 for one in taken["checkpoints"])
    for console in (writer, second):
        console.beat()
        console.check()
    for name in ("v", "w"):
        copy = box.restore(f"{name}@both", f"{name}-copy")
        copy.beat()
        assert copy.sweep() == 0
        box.stop(f"{name}-copy")
    box.stop("w")


def test_a_group_is_of_all_or_of_none(box: guest.Sandbox, writer: guest.Console) -> None:
    """A3: a member that cannot be taken leaves no checkpoint of the other."""
    box.create("served", {"vda": 1 << 20})
    said = box.run("checkpoint", "v", "served", "--name", "never", code=5)
    assert "served" in said and said.count("\n") == 1
    box.run("checkpoint", "v", "v", "--name", "once")
    said = box.run("checkpoint", "v", "served", "--disk-only", code=3)
    assert "--disk-only" in said
    names = [one["name"] for one in box.json("list", "v")["checkpoints"]]
    assert "never" not in names and "once" in names
    writer.check()

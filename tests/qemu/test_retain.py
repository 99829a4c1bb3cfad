"""Retained checkpoints of a real guest that writes: restored beside it, flattened under it, reverted to."""

from __future__ import annotations

import time
from typing import Any

from tests.support import guest


def status(box: guest.Sandbox, name: str) -> dict[str, Any]:
    return dict(box.json("status", name)["vms"][0])


def wait_for_depth(box: guest.Sandbox, depth: int) -> None:
    """Until the VM's disk has so many layers."""
    deadline = time.monotonic() + 60
    while (found := status(box, "v")["disks"][0]["depth"]) != depth:
        assert time.monotonic() < deadline, f"{found} layers"


def test_nothing_is_copied_and_no_byte_is_wrong(box: guest.Sandbox, writer: guest.Console) -> None:
    """D1 as the guest sees it: what the copy remembers in its memory is on its disk, which is the original's layers."""
    token = writer.beat().token
    taken = box.json("checkpoint", "v", "--name", "kept", "--retain")
    assert taken["retained"] and taken["timings"]["stopped"] > 0
    writer.beat()
    box.run("checkpoint", "v", "--name", "above", "--retain", "--disk-only")
    copy = box.restore("v@kept", "copy")
    assert copy.beat().token == token, "the guest was booted, not resumed"
    assert copy.sweep() == 0, copy.complaints()
    assert writer.sweep() == 0, writer.complaints()
    box.run("checkpoint", "v", "--name", "copied", "--disk-only")
    writer.beat()
    assert box.json("flatten", "v@kept")["flattened"] == ["v@kept"]
    wait_for_depth(box, 2)  # the copy's disk may still be filling from the layer
    box.run("flatten", "v")
    wait_for_depth(box, 1)
    assert not [path for path in (box.home / "vms/v/layers").iterdir() if path.suffix in (".data", ".map")]
    for console in (writer, copy):
        assert console.sweep() == 0, console.complaints()
        console.check()
    box.stop("copy")
    writer.check()


def test_it_goes_back_to_one_without_copying(box: guest.Sandbox, writer: guest.Console) -> None:
    before = writer.beat()
    box.run("checkpoint", "v", "--name", "back", "--retain")
    writer.beat()
    box.run("revert", "v@back", "--yes", "--detach")
    again = box.serial.accept()
    assert again.beat().token == before.token
    assert again.sweep() == 0, again.complaints()
    assert status(box, "v")["disks"][0]["depth"] == 2
    box.run("commit", "v@back", "--yes")
    assert again.sweep() == 0, again.complaints()
    again.check()
    assert status(box, "v")["disks"][0]["depth"] == 1

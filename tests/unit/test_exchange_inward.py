"""Importing beside a VM's own checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from blkckpt import paths
from blkckpt.exchange import inward
from blkckpt.store import manifest, store
from blkckpt.vm import lineage


@pytest.mark.parametrize("own", [None, "first"])
def test_an_imported_checkpoint_is_not_in_the_line_of_the_vm(tmp_path: Path, own: str | None) -> None:
    """What the VM's next checkpoint comes after is the last one of its own."""
    home = paths.home(tmp_path / "home")
    image = tmp_path / "disk.raw"
    image.write_bytes(b"x" * 4096)
    vm = home.vm("web")
    paths.private_directory(vm.root)
    with store.Store.open_or_init(home.store) as place:
        if own:
            place.put_manifest(manifest.Manifest("web", own, "1" * 32, time.time_ns(), ()))
        source = inward.look("vda", image, None)
        inward.to_checkpoint(home, place, "web", "imported", [source], lambda *_: None)
        known = [(one.created_ns, one.name) for one in place.manifests("web")]
        assert "imported" in [name for _, name in known]
        assert lineage.parent("web", lineage.read(vm), known, time.time_ns()) == own
        place.put_manifest(manifest.Manifest("web", "next", "2" * 32, time.time_ns(), ()))
        known = [(one.created_ns, one.name) for one in place.manifests("web")]
        assert lineage.parent("web", lineage.read(vm), known, time.time_ns()) == "next"
        inward.to_checkpoint(home, place, "elsewhere", "imported", [source], lambda *_: None)
        assert not home.vm("elsewhere").root.exists()

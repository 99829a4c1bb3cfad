"""Another host's blkckpt goes on with what was bundled here: another home, the same kernel and hypervisor."""

from __future__ import annotations

from pathlib import Path

from tests.support import guest


def test_another_home_resumes_a_bundled_checkpoint(box: guest.Sandbox, writer: guest.Console, tmp_path: Path) -> None:
    """Two bundles, the second only what differs; the resumed guest knows every byte it had written."""
    box.run("checkpoint", "v", "--name", "sent")
    token = writer.beat().token
    box.run("checkpoint", "v", "--name", "later")
    first, second = tmp_path / "first", tmp_path / "second"
    box.run("bundle", "v@sent", "-o", first)
    box.run("bundle", "v@later", "--since", "v@sent", "-o", second)
    assert second.stat().st_size < first.stat().st_size / 2
    (tmp_path / "far").mkdir()
    with guest.Sandbox(tmp_path / "far") as far:
        far.run("unbundle", first)
        far.run("unbundle", second)
        assert far.json("verify")["ok"]
        try:
            far.run("restore", "v@later", "--as", "copy", "--detach")
            copy = box.serial.accept()  # the recorded command line names that socket
            beat = copy.beat()
            assert beat.token == token, "the guest was booted, not resumed"
            assert copy.sweep() == 0, copy.complaints()
            assert copy.beat().writes > beat.writes
            copy.check()
        finally:
            far.run("stop", "copy")
    assert writer.sweep() == 0

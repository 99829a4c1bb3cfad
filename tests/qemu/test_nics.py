"""Network cards' addresses in QEMU's own device state: changed, and loaded by QEMU again."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from blkckpt.memory import nics, records
from blkckpt.vm import dialogue

CARDS = ("virtio-net-pci", "e1000", "e1000e", "rtl8139", "vmxnet3")
OLD = {kind: bytes.fromhex(f"525400aabb{number:02x}") for number, kind in enumerate(CARDS)}


def command(directory: Path, known: dict[bytes, bytes]) -> list[str]:
    words = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"]
    for kind, old in OLD.items():
        words += ["-netdev", f"user,id={kind}", "-device", f"{kind},netdev={kind},mac={known.get(old, old).hex(':')}"]
    return [*words, "-qmp", f"unix:{directory}/q,server=on,wait=off"]


def ask(directory: Path, words: list[str], *requests: tuple[str, dict[str, Any]], event: bool) -> list[Any]:
    """Start QEMU, ask, wait for the end of the migration, quit."""
    (directory / "q").unlink(missing_ok=True)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 20
            while not (directory / "q").exists():
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with dialogue.Dialogue(directory / "q") as session:
                on = {"capabilities": [{"capability": "events", "state": True}]}
                session.execute("migrate-set-capabilities", on)
                answers = [session.execute(*requests[0])]
                if event:
                    assert session.wait_event("MIGRATION", "status", ("completed", "failed"), timeout=20) == "completed"
                return [*answers, *(session.execute(*request) for request in requests[1:])]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A stream with one card of each kind, and where its device sections begin."""
    directory = tmp_path_factory.mktemp("nics")
    ask(directory, command(directory, {}), ("migrate", {"uri": f"exec:cat > {directory}/s"}), event=True)
    data = (directory / "s").read_bytes()
    text = records.find_description(data)
    assert text
    first = records.packed_name(json.loads(text)["devices"][0]["name"])
    return data, data.index(first) - 5


def test_qemu_takes_the_changed_state(stream: tuple[bytes, int], tmp_path: Path) -> None:
    """A card's address that were changed on the command line alone, or in one place too few, is refused (e1000e)."""
    data, at = stream
    tail, cards = nics.rewrite(data[at:], lambda old: b"\x02" + old[1:])
    assert {card.name.partition("/")[2]: card.old for card in cards} == {
        "virtio-net": OLD["virtio-net-pci"], **{kind: OLD[kind] for kind in ("e1000", "e1000e", "rtl8139")},
    }  # fmt: skip
    assert len(tail) == len(data) - at
    (tmp_path / "s").write_bytes(data[:at] + tail)
    known = {card.old: card.new for card in cards if card.new}
    words = [*command(tmp_path, known), "-incoming", "defer"]
    load = ("migrate-incoming", {"uri": f"exec:cat {tmp_path}/s"})
    hmp = ("human-monitor-command", {"command-line": "info network"})
    _, filters, network = ask(tmp_path, words, load, ("query-rx-filter", {}), hmp, event=True)
    shown = {one["name"].partition(".")[0]: (one["main-mac"], one["unicast"]) for one in filters}
    assert shown["virtio-net-pci"] == ("02:54:00:aa:bb:00", "all")
    for card in cards:
        assert card.new
        assert card.new.hex(":") in network


def test_a_card_that_is_to_stay_stays(stream: tuple[bytes, int]) -> None:
    data, at = stream
    assert nics.rewrite(data[at:], lambda old: None)[0] == data[at:]


def test_changing_back_gives_the_same_state(stream: tuple[bytes, int]) -> None:
    """But for the filter of the virtio card, which was opened."""
    data, at = stream
    there, _ = nics.rewrite(data[at:], lambda old: b"\x02" + old[1:])
    back, _ = nics.rewrite(there, lambda old: b"\x52" + old[1:])
    assert sum(a != b for a, b in zip(back, data[at:], strict=True)) == 1


def test_damaged_states_are_left_alone(stream: tuple[bytes, int]) -> None:
    """Nothing in a state is trusted: cut and changed ones give no error and keep their length."""
    data, at = stream
    tail = data[at:]
    for cut in range(0, len(tail), len(tail) // 40):
        assert len(nics.rewrite(tail[:cut], lambda old: b"\x02" + old[1:])[0]) == cut
        broken = tail[:cut] + b"\xff\xff\xff\xff" + tail[cut + 4 :]
        assert len(nics.rewrite(broken, lambda old: b"\x02" + old[1:])[0]) == len(broken)

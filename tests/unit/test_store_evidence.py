"""Evidence: what was seen of a checkpoint's guest, beside its manifest (rules S1, S4, S5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.store import evidence, manifest, store
from tests.unit.test_store_labels import take, target

__all__ = ["target"]

LIVES = evidence.Boot(True, "agent", 1.5, 7)
PICTURE = evidence.PNG + b"picture"


def files(target: store.Store) -> list[str]:
    return sorted(path.name for path in (target.path / "evidence").rglob("*") if path.is_file())


def test_a_life_of_evidence(target: store.Store) -> None:
    made = take(target, "one")
    assert target.evidence(made) == evidence.NONE
    target.add_evidence(made, png=PICTURE, source=evidence.AT_CHECKPOINT)
    target.add_evidence(made, boot=LIVES, source=evidence.AT_BOOT)
    with store.Store.open(target.path) as other:
        found = other.evidence(made)
        assert found.boot == LIVES
        assert found.screen
        assert found.screen.source == "checkpoint"
        assert other.picture(made) == PICTURE
    target.remove("web", "one")
    assert files(target) == []
    with pytest.raises(errors.StateError, match="removed meanwhile"):
        target.add_evidence(made, boot=LIVES, source=evidence.AT_BOOT)


def test_that_of_another_checkpoint_counts_for_nothing_and_is_collected(target: store.Store) -> None:
    """As after a removal that was cut off: the name is used anew."""
    old, kept = take(target, "one"), take(target, "two", number=3)
    for one in (old, kept):
        target.add_evidence(one, boot=LIVES, png=PICTURE, source=evidence.AT_BOOT)
    (target.path / "manifests/web/one.json").unlink()
    again = take(target, "one", number=2)
    assert target.evidence(again) == evidence.NONE
    target.collect()
    assert files(target) == ["two.json", "two.png"]
    assert target.evidence(kept).boot == LIVES


def test_a_picture_without_its_description_is_collected(target: store.Store) -> None:
    """The crash between the two writes."""
    made = take(target, "one")
    target.add_evidence(made, png=PICTURE, source=evidence.AT_BOOT)
    (target.path / "evidence/web/one.json").unlink()
    assert target.picture(made) is None
    target.collect()
    assert files(target) == []


@pytest.mark.parametrize("name", ["one.json", "one.png"])
@pytest.mark.parametrize("content", [b"", b"garbage", evidence.PNG + b"another"])
def test_damage_costs_the_evidence_alone(target: store.Store, name: str, content: bytes) -> None:
    made = take(target, "one")
    target.add_evidence(made, boot=LIVES, png=PICTURE, source=evidence.AT_BOOT)
    place: Path = target.path / "evidence/web" / name
    place.chmod(0o600)
    place.write_bytes(content)
    assert target.picture(made) is None
    assert target.evidence(made).boot == (LIVES if name.endswith("png") else None)
    assert target.manifest("web", "one") == made


@pytest.mark.parametrize("change", [
    {"boot": {"alive": 1, "sign": "", "seconds": 0, "when_ns": 0}}, {"boot": []}, {"boot": {"alive": True}},
    {"screen": {"when_ns": 0, "source": "", "size": 1 << 40, "sha256": ""}}, {"screen": "x"}, {"id": "x"},
])  # fmt: skip
def test_nothing_in_it_is_trusted(change: dict[str, object]) -> None:
    """S4."""
    fields = {"version": 1, "requires": [], "id": "0" * 31 + "1", "boot": None, "screen": None}
    evidence.decode(manifest.seal(fields), "evidence")
    with pytest.raises(errors.CorruptError):
        evidence.decode(manifest.seal({**fields, **change}), "evidence")


def test_only_pictures_are_kept(target: store.Store) -> None:
    made = take(target, "one")
    with pytest.raises(errors.InputError):
        target.add_evidence(made, png=b"P6", source=evidence.AT_BOOT)
    assert files(target) == []

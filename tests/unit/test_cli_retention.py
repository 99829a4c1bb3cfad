"""The verbs around keeping: tag, untag, note, pin, unpin, prune, gc, stats, and what list, show and rm make of them."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click import testing

from blkckpt import errors, paths
from blkckpt.cli import main
from blkckpt.exchange import inuse
from blkckpt.store import manifest, store
from tests.unit.test_store_collect import put

CHUNK = 64 << 10


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> paths.Home:
    monkeypatch.setenv("BLKCKPT_HOME", str(tmp_path / "home"))
    return paths.home()


@pytest.fixture
def place(home: paths.Home) -> store.Store:
    """Four checkpoints of web over three days, one of db."""
    target = store.Store.open_or_init(home.store)
    shared = os.urandom(8 * CHUNK)
    for number, (vm, name, when) in enumerate([
        ("web", "mon", "2026-03-02T10:00"), ("web", "tue-am", "2026-03-03T09:00"),
        ("web", "tue-pm", "2026-03-03T15:00"), ("web", "wed", "2026-03-04T10:00"), ("db", "one", "2026-03-01T10:00"),
    ]):  # fmt: skip
        info = put(target, shared + os.urandom(4 * CHUNK))
        disk = manifest.DiskImage("vda", info.image, info.size)
        created = int(datetime.fromisoformat(when).timestamp()) * 10**9
        target.put_manifest(manifest.Manifest(vm, name, f"{number:032x}", created, (disk,), notes=("as taken",)))
    return target


def run(*words: str, code: int = 0) -> str:
    result = testing.CliRunner().invoke(main.command, words)
    assert result.exit_code == code, result.output
    return result.output


def result_of(*words: str) -> Any:
    return json.loads(run(*words, "--json"))


def names(target: store.Store) -> list[str]:
    return [name for _, name in target.names("web")]


def test_tags(place: store.Store) -> None:
    assert result_of("tag", "web@mon", "keep", "x86")["checkpoints"][0]["tags"] == ["keep", "x86"]
    run("tag", "web@wed", "keep")
    listed = result_of("list", "--tag", "keep")["checkpoints"]
    assert [one["name"] for one in listed] == ["mon", "wed"]
    assert [one["name"] for one in result_of("list", "web", "--tag", "keep,x86")["checkpoints"]] == ["mon"]
    assert len(result_of("list", "--tag", "keep,x86", "--tag", "keep")["checkpoints"]) == 2
    assert result_of("show", "web@tag:keep")["name"] == "wed", "the newest that has it"
    assert result_of("show", "web@tag:x86")["tags"] == ["keep", "x86"]
    assert "keep,x86" in run("list", "web")
    run("untag", "web@tag:x86", "x86")
    assert "no checkpoint web@tag:x86" in run("show", "web@tag:x86", code=4)
    assert "has no tag 'x86'" in run("untag", "web@mon", "x86", code=3)
    assert "not a usable name" in run("tag", "web@mon", "a b", code=3)
    assert "not a usable name" in run("list", "--tag", "a,,b", code=3)


def test_notes(place: store.Store) -> None:
    run("note", "web@latest", "kernel 6.1.90 boots", "and stops")
    assert result_of("show", "web@wed")["notes"] == ["as taken", "kernel 6.1.90 boots", "and stops"]
    run("note", "web@wed", "--clear", "anew")
    assert result_of("show", "web@wed")["notes"] == ["as taken", "anew"]
    assert "note 2:" in run("show", "web@wed")
    assert "--clear" in run("note", "web@wed", code=3)


def test_pins(place: store.Store) -> None:
    run("pin", "web@mon", "web@tue-am")
    assert [one["pinned"] for one in result_of("list", "web")["checkpoints"]] == [True, True, False, False]
    assert "pinned" in run("show", "web@mon")
    assert "unpin web@mon" in run("rm", "web@wed", "web@mon", "--yes", code=5)
    assert "wed" in names(place), "none is removed when one is refused"
    assert run("pin", "web@mon").endswith("; pinned\n")
    assert run("unpin", "web@mon").endswith("; not pinned\n")
    run("rm", "web@mon", "--yes")
    assert "mon" not in names(place)


def test_prune_says_why_and_a_dry_run_removes_nothing(place: store.Store) -> None:
    run("pin", "web@mon")
    text = run("prune", "web", "--keep-daily", "1", "--keep-last", "2", "--dry-run")
    assert [line.split()[:2] for line in text.splitlines()[1:5]] == [
        ["keep", "web@wed"], ["keep", "web@tue-pm"], ["remove", "web@tue-am"], ["keep", "web@mon"],
    ]  # fmt: skip
    assert "daily 2026-03-04" in text
    assert "pinned" in text
    assert "no rule keeps it" in text
    assert "would remove 1 of 4" in text
    assert len(names(place)) == 4


def test_prune(place: store.Store) -> None:
    result = result_of("prune", "web", "--keep-daily", "2", "--yes")
    assert result["removed"] == ["web@tue-am", "web@mon"]
    assert {one["name"]: one["keep"] for one in result["checkpoints"]} == {
        "wed": True, "tue-pm": True, "tue-am": False, "mon": False,
    }  # fmt: skip
    assert result["collected"]["images"] == 2
    assert names(place) == ["tue-pm", "wed"]
    assert place.names("db"), "another VM's are not looked at"
    assert "nothing to remove: 2" in run("prune", "web", "--keep-daily", "2", "--yes")


def test_prune_of_every_vm_by_itself(place: store.Store) -> None:
    result = result_of("prune", "--keep-last", "1", "--yes", "--no-collect")
    assert result["removed"] == ["web@tue-pm", "web@tue-am", "web@mon"]
    assert result["collected"] is None
    assert len(place.names()) == 2


def test_prune_keeps_what_somebody_uses(place: store.Store) -> None:
    """A restored disk that still reads from a checkpoint, and whatever else has pinned its images."""
    place.pin("some-export", place.manifest("web", "mon").images())
    text = run("prune", "web", "--keep-last", "1", "--dry-run")
    assert "used by some-export" in text
    assert result_of("prune", "web", "--keep-last", "1", "--yes")["removed"] == ["web@tue-pm", "web@tue-am"]


def test_prune_by_tag_and_span(place: store.Store) -> None:
    run("tag", "web@mon", "release")
    assert result_of("prune", "web", "--keep-within", "1d", "--keep-tag", "release", "--dry-run")["removed"] == [
        "web@tue-am"
    ]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 3, "at least one --keep-"),
        (("--keep-tag", "nosuch"), 3, "would remove every checkpoint of web"),
        (("--keep-last", "0"), 3, "number of checkpoints"),
        (("--keep-within", "soon"), 3, "span of time"),
        (("--keep-last", "1"), 3, "--yes"),
    ],
)
def test_what_prune_refuses(place: store.Store, words: tuple[str, ...], code: int, says: str) -> None:
    assert says in run("prune", "web", *words, code=code)
    assert len(names(place)) == 4


def test_prune_of_unknown_vms(place: store.Store) -> None:
    assert "no VM nosuch" in run("prune", "nosuch", "--keep-last", "1", code=4)


def test_damaged_labels_keep_their_checkpoint(place: store.Store) -> None:
    run("tag", "web@mon", "x")
    (place.path / "labels/web/mon.json").write_bytes(b"torn")
    assert "web@mon" in run("list", "web", code=6)
    assert result_of("prune", "web", "--keep-last", "1", "--yes")["removed"] == ["web@tue-pm", "web@tue-am"]
    run("unpin", "web@mon")
    assert "web@mon" in run("list", "web")


def test_gc(place: store.Store) -> None:
    place.close()
    run("rm", "web@mon", "web@tue-am", "--yes", "--no-collect")
    before = result_of("stats")["stores"][0]
    dry = result_of("gc", "--repack", "--threshold", "1", "--dry-run")
    assert dry["repacked_packs"] == 1, "the pack with the shared chunks"
    assert dry["freed_bytes"] > 7 * CHUNK
    assert "would free" in run("gc", "--dry-run")
    plain = result_of("gc")
    assert (plain["packs"], plain["repacked_packs"]) == (1, 0)
    assert "gc --repack" in run("gc")
    done = result_of("gc", "--repack", "--threshold", "1")
    assert abs(plain["freed_bytes"] + done["freed_bytes"] - dry["freed_bytes"]) < 4096
    after = result_of("stats")["stores"][0]
    assert before["packs"] - after["packs"] == plain["freed_bytes"] + done["freed_bytes"] - tables(plain)
    assert after["dead"] < 4096 < before["dead"]
    assert "whole" in run("verify")


def tables(collected: dict[str, Any]) -> int:
    """What the tables of the removed images took: a header, one entry, a checksum each."""
    return int(collected["images"]) * (128 + 56 + 32)


@pytest.mark.parametrize("words", [("gc",), ("prune", "web", "--keep-last", "1", "--yes")], ids=lambda words: words[0])
def test_what_a_killed_reader_kept_is_freed(place: store.Store, words: tuple[str, ...]) -> None:
    """S5: the pin of a process that is gone keeps nothing; that of a living one does."""
    images = place.manifest("web", "mon").images()
    place.pin("use.nbd.00000000.4194303.1.0", images)
    run("rm", "web@tue-am", "--yes", "--no-collect")
    place.remove("web", "mon")
    with inuse.using(place, images, "test"):
        run(*words)
        assert [one.split(".")[1] for one in place.pins()] == ["test"]
        assert place.image(next(iter(images)))
    run("gc")
    with pytest.raises(errors.NotFoundError):
        place.image(next(iter(images)))


def test_gc_tells_of_damage(place: store.Store) -> None:
    run("rm", "web@mon", "--yes")
    victim = max((place.path / "packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[200:300] = bytes(100)
    victim.write_bytes(data)
    assert "blkckpt verify" in run("gc", "--repack", "--threshold", "1", code=6)


def test_stats(place: store.Store) -> None:
    found = result_of("stats")
    (total,) = found["stores"]
    assert total["logical"] == 5 * 12 * CHUNK
    assert total["distinct"] == 28 * CHUNK
    assert total["dedup_ratio"] == pytest.approx(60 / 28)
    assert 0.9 < total["compression_ratio"] < 1
    assert [one["name"] for one in found["checkpoints"] if one["vm"] == "web"] == ["mon", "tue-am", "tue-pm", "wed"]
    assert all(4 * CHUNK <= one["unique"] < 5 * CHUNK for one in found["checkpoints"])
    text = run("stats", "web")
    assert "db@one" not in text
    assert "2.14x" in text
    assert "no VM nosuch" in run("stats", "nosuch", code=4)


def test_without_any_store(home: paths.Home) -> None:
    assert run("gc")
    assert result_of("stats")["stores"] == []
    assert "nothing to remove: 0" in run("prune", "--keep-last", "1")

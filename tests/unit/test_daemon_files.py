"""The files of a schedule: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click import testing

from blkckpt import errors, paths
from blkckpt.cli import main
from blkckpt.daemon import record, schedule, service
from blkckpt.vm import definition

S = schedule.SECOND
FULL = schedule.Schedule(
    every_ns=900 * S, anchor_ns=12345, window_ns=60 * S, disk_only=True, guest_agent="/run/qga.sock", rate=50 << 20,
    keep_memory=0, tags=("a", "b"), keep=(("last", "5"), ("daily", "unlimited"), ("within", "2d"), ("tag", "x,y")),
)  # fmt: skip


@pytest.fixture
def vm(tmp_path: Path) -> paths.VmPaths:
    base = tmp_path / "a.raw"
    base.write_bytes(bytes(4096))
    made = paths.home(tmp_path / "home").vm("web")
    definition.create(made, [definition.DiskDefinition("vda", str(base), 4096)])
    return made


def test_a_schedule_is_kept(vm: paths.VmPaths) -> None:
    assert schedule.load(vm) is None
    schedule.save(vm, FULL)
    assert schedule.load(vm) == FULL
    assert schedule.path(vm).stat().st_mode & 0o777 == 0o600
    assert schedule.remove(vm) and not schedule.remove(vm)
    assert schedule.load(vm) is None


def test_its_command_lines() -> None:
    assert FULL.checkpoint_words("web") == [
        "checkpoint", "web", "--json", "--wait", "60", "--keep-memory", "0", "--disk-only",
        "--guest-agent", "/run/qga.sock",
        "--rate", str(50 << 20), "--tag", "a", "--tag", "b",
    ]  # fmt: skip
    assert FULL.prune_words("web") == [
        "prune", "web", "--json", "--yes", "--tag", "a", "--tag", "b", "--keep-last", "5", "--keep-daily",
        "unlimited", "--keep-within", "2d", "--keep-tag", "x,y",
    ]  # fmt: skip
    assert schedule.Schedule(S, 0).prune_words("web") is None, "no rule removes nothing"


WRONG: list[dict[str, Any]] = [
    {"every_ns": 1}, {"every_ns": 10**20}, {"every_ns": True}, {"every_ns": 5.0}, {"every_ns": "9"}, {"anchor_ns": -1},
    {"window_ns": 900 * S}, {"timeout_ns": 0}, {"guest_agent": "relative"}, {"qmp": "x\0"}, {"rate": 0},
    {"keep_memory": -1}, {"tags": ["a b"]}, {"keep": [["last", "0"]]}, {"keep": [["within", "soon"]]},
    {"keep": [["sometimes", "3"]]}, {"keep": [["tag", "a,,b"]]}, {"disk_only": False}, {"disk_only": 1},
    {"surprise": 1}, {"keep": [["last"]]}, {"tags": 5},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_what_makes_no_sense_is_not_believed(change: dict[str, Any]) -> None:
    document = json.loads(schedule.encode(FULL))
    document["schedule"].update(change)
    with pytest.raises(errors.CorruptError, match=r"here.*set the schedule again"):
        schedule.decode(json.dumps(document).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"[" * 5000, b'{"magic": "blkckpt-schedule", "version": 2}'])
def test_foreign_files(data: bytes, vm: paths.VmPaths) -> None:
    with pytest.raises(errors.CorruptError):
        schedule.decode(data, "here")
    record.path(vm).write_bytes(data)
    record.path(vm).chmod(0o600)
    assert record.load(vm) == record.Record(), "it only says when to work next"


def test_a_record_is_kept(vm: paths.VmPaths) -> None:
    known = record.Record(
        5, 3, 7, record.Problem(1, "busy", "said"), record.Success(2, "one", 0.5, 4.2, 77), record.Child(9, 8, "b", 6)
    )
    for one in (known, record.Record()):
        record.save(vm, one)
        assert record.load(vm) == one
    body = json.loads(record.path(vm).read_bytes())
    body["record"]["settled_ns"] = "soon"
    record.path(vm).write_text(json.dumps(body))
    assert record.load(vm) == record.Record()


def test_a_removed_vm_stays_removed(vm: paths.VmPaths) -> None:
    for path in sorted(vm.root.rglob("*"), reverse=True):
        path.unlink()
    vm.root.rmdir()
    with pytest.raises(errors.NotFoundError):
        record.save(vm, record.Record())
    assert not vm.root.exists()


# The verb.


def run(vm: paths.VmPaths, *words: str) -> testing.Result:
    root = str(vm.root.parent.parent)
    return testing.CliRunner().invoke(main.command, ["--home", root, *words])


def test_the_verb_sets_shows_and_ends_it(vm: paths.VmPaths) -> None:
    made = run(vm, "schedule", "web", "--every", "15m", "--window", "2m", "--keep-last", "3", "--keep-tag", "a,b")
    assert made.exit_code == 0 and "every 15 min 0 s" in made.stdout and "no agent runs yet" in made.stderr
    kept = schedule.load(vm)
    assert kept is not None and kept.keep == (("last", "3"), ("tag", "a,b")) and kept.tags == ("scheduled",)
    body = json.loads(run(vm, "schedule", "web", "--json").stdout)
    assert body["schedule"]["every"] == 900 and body["schedule"]["keep"] == {"last": ["3"], "tag": ["a,b"]}
    run(vm, "schedule", "web", "--every", "15m")
    again = schedule.load(vm)
    assert again == dataclasses.replace(kept, window_ns=0, keep=()), "its times stay where they were"
    assert [one["vm"] for one in json.loads(run(vm, "schedule", "--json").stdout)["schedules"]] == ["web"]
    shown = json.loads(run(vm, "agent", "status", "--json").stdout)
    assert shown["running"] is False and shown["schedules"][0]["every"] == 900
    assert "no schedule" in run(vm, "schedule", "web", "--off").stdout
    assert schedule.load(vm) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--every", "soon"), "not a duration"),
        (("--every", "10ms"), "every 1s to"),
        (("--every", "1m", "--window", "1m"), "window must be shorter"),
        (("--every", "1m", "--keep-last", "0"), "no number of checkpoints"),
        (("--every", "1m", "--guest-agent", "/x"), "goes with --disk-only"),
        (("--every", "1m", "--off"), "exclude each other"),
        (("--every", "1m", "--tag", "a b"), "not a usable name"),
    ],
)
def test_bad_input_changes_nothing(vm: paths.VmPaths, words: tuple[str, ...], said: str) -> None:
    result = run(vm, "schedule", "web", *words)
    assert result.exit_code == 3 and said in result.stderr and result.stderr.count("\n") == 1
    assert schedule.load(vm) is None


def test_without_an_agent(vm: paths.VmPaths) -> None:
    assert "blkckpt agent run" in run(vm, "agent", "now", "web").stderr
    assert run(vm, "agent", "reload").exit_code == 5
    assert json.loads(run(vm, "agent", "stop", "--json").stdout) == {"stopped": False}
    assert not service.runs(paths.home(vm.root.parent.parent))


def test_a_damaged_schedule_is_named(vm: paths.VmPaths) -> None:
    schedule.path(vm).write_text("{}")
    schedule.path(vm).chmod(0o600)
    result = run(vm, "schedule")
    assert result.exit_code == 6 and "schedule.json" in result.stderr
    assert "schedule.json" in json.loads(run(vm, "agent", "status", "--json").stdout)["damaged"]["web"]
    assert run(vm, "schedule", "web", "--every", "1h").exit_code == 0, "setting it again mends it"

"""Bad input: one line that names the thing and what to do, and the documented exit code (rule C2).

What needs a running server or guest is in tests/nbd/test_cli.py and tests/qemu/test_cli.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click import testing

from blkckpt import paths
from blkckpt.agent import rundir
from blkckpt.cli import main
from blkckpt.store import manifest, store
from blkckpt.vm import definition, unfinished

MIB = 1 << 20


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> paths.Home:
    monkeypatch.setenv("BLKCKPT_HOME", str(tmp_path / "home"))
    return paths.home()


def run(*words: str) -> testing.Result:
    return testing.CliRunner().invoke(main.command, words)


def refused(code: int, *words: str, says: tuple[str, ...] = ()) -> str:
    """Run, expect the code and one line on standard error that holds every word of *says*."""
    result = run(*words)
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.output
    assert len(lines) == 1 and lines[0].startswith("blkckpt: "), result.stderr
    assert result.stdout == ""
    for text in says:
        assert text in lines[0]
    return lines[0]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(MIB)
    old = time.time() - 60
    os.utime(path, (old, old))
    return path


@pytest.fixture
def web(home: paths.Home, disk: Path) -> paths.VmPaths:
    """A VM that is defined (its disks' state is not looked at here)."""
    vm = home.vm("web")
    definition.create(vm, [definition.disk("vda", disk)])
    return vm


@pytest.fixture
def checkpointed(home: paths.Home, web: paths.VmPaths) -> store.Store:
    """A store with the checkpoints web@one and web@two, of a disk."""
    place = store.Store.init(home.store)
    for number, name in enumerate(("one", "two")):
        with place.image_writer(MIB) as writer:
            writer.write(0, bytes([number + 1]) * 65536)
            image = writer.finish().image
        place.put_manifest(
            manifest.Manifest(
                vm="web",
                name=name,
                id=f"{number + 1:032x}",
                created_ns=(number + 1) * 10**18,
                parent="one" if number else None,
                disks=(manifest.DiskImage("vda", image, MIB),),
                timings={"switch": 0.0005},
                notes=(f"note {number}",),
            )
        )
    return place


# --- names ---

VERBS_OF_A_VM = [
    ("vm", "show"),
    ("vm", "rm"),
    ("list",),
    ("status",),
    ("serve",),
    ("stop",),
    ("checkpoint",),
    ("verify",),
]


@pytest.mark.parametrize("verb", VERBS_OF_A_VM, ids=" ".join)
def test_unknown_vm(home: paths.Home, verb: tuple[str, ...]) -> None:
    refused(4, *verb, "nosuch", says=("no VM nosuch", "blkckpt vm list"))


@pytest.mark.parametrize("verb", VERBS_OF_A_VM, ids=" ".join)
@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "x" * 65, "a\nb", "@"])
def test_bad_vm_name(home: paths.Home, verb: tuple[str, ...], name: str) -> None:
    refused(3, *verb, "--", name, says=("name",))


@pytest.mark.parametrize("verb", ["show", "restore", "revert", "rm"])
@pytest.mark.parametrize("name", ["web@../x", "web@a/b", "../web@x", "web", "web@", "@x"])
def test_bad_checkpoint_name(home: paths.Home, verb: str, name: str) -> None:
    refused(3, verb, "--", name)


@pytest.mark.parametrize("verb", ["show", "restore", "revert", "rm", "verify"])
def test_unknown_checkpoint(checkpointed: store.Store, verb: str) -> None:
    refused(4, verb, "web@three", says=("web@three", "blkckpt list web"))


@pytest.mark.parametrize("verb", ["show", "restore", "revert", "rm", "verify"])
def test_no_checkpoint_yet(web: paths.VmPaths, verb: str) -> None:
    refused(4, verb, "web@latest", says=("web", "blkckpt checkpoint web"))


def test_a_checkpoint_cannot_be_called_latest(web: paths.VmPaths) -> None:
    refused(3, "checkpoint", "web", "--name", "latest", says=("latest",))


# --- bases ---


def test_missing_base(home: paths.Home, tmp_path: Path) -> None:
    refused(4, "vm", "create", "web", "--disk", str(tmp_path / "none.raw"), says=("none.raw", "missing"))
    assert home.vm_names() == []


def test_base_shorter_than_stated(home: paths.Home, disk: Path) -> None:
    refused(3, "vm", "create", "web", "--disk", f"{disk}:2M", says=("disk.raw", "shorter"))
    assert home.vm_names() == []


def test_base_growing(home: paths.Home, tmp_path: Path) -> None:
    script = (
        "import sys, time\nwith open(sys.argv[1], 'ab', 0) as f:\n while True: f.write(bytes(4096)); time.sleep(.01)"
    )
    path = tmp_path / "growing.raw"
    path.write_bytes(bytes(MIB))
    child = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        while path.stat().st_size == MIB:
            time.sleep(0.01)
        refused(3, "vm", "create", "web", "--disk", str(path), says=("growing.raw is growing",))
    finally:
        child.kill()
        child.wait()


def test_not_a_regular_file(home: paths.Home, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(3, "vm", "create", "web", "--disk", str(tmp_path / "fifo"), says=("fifo", "block device"))
    refused(3, "vm", "create", "web", "--disk", str(tmp_path), says=(str(tmp_path), "directory"))
    refused(3, "vm", "create", "web", "--disk", "/dev/null", says=("/dev/null", "character device"))


def test_not_raw(home: paths.Home, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(MIB))
    refused(3, "vm", "create", "web", "--disk", str(path), says=("a.qcow2", "qemu-img convert"))


def test_base_used_twice(web: paths.VmPaths, disk: Path) -> None:
    refused(3, "vm", "create", "other", "--disk", str(disk), says=("disk.raw", "VM web"))


def test_vm_exists(web: paths.VmPaths, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(4096))
    refused(5, "vm", "create", "web", "--disk", str(other), says=("VM web exists",))


def test_bad_size(home: paths.Home, disk: Path) -> None:
    refused(3, "vm", "create", "web", "--disk", f"{disk}:12Q", says=("12Q",))


# --- stores ---


def test_store_of_a_newer_version(home: paths.Home, web: paths.VmPaths) -> None:
    store.Store.init(home.store).close()
    path = home.store / "store.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "version": 99}))
    refused(6, "list", says=(str(home.store), "99"))


def test_store_that_is_something_else(home: paths.Home, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    refused(3, "store", "init", str(tmp_path / "photos"), says=("photos", "not empty"))


def test_store_twice(home: paths.Home) -> None:
    assert run("store", "init").exit_code == 0
    refused(5, "store", "init", says=(str(home.store),))


def test_damaged_manifest_is_named_and_the_rest_is_listed(checkpointed: store.Store) -> None:
    path = checkpointed.path / "manifests/web/one.json"
    path.write_bytes(path.read_bytes()[:-20])
    result = run("list", "web")
    assert result.exit_code == 6
    assert "web@two" in result.stdout and "web@one" not in result.stdout
    assert result.stderr.count("\n") == 1 and "web@one" in result.stderr
    refused(6, "show", "web@one", says=("web@one",))
    assert run("rm", "web@one", "--yes").exit_code == 0, "what is damaged can be removed by its name"


def test_damaged_vm_is_named_and_the_rest_is_listed(
    home: paths.Home, checkpointed: store.Store, tmp_path: Path
) -> None:
    broken = home.vm("broken")
    paths.private_directory(broken.root)
    broken.definition.write_text("{")
    broken.definition.chmod(0o600)
    result = run("vm", "list")
    assert result.exit_code == 6
    assert "web" in result.stdout and "broken" not in result.stdout
    assert result.stderr.count("\n") == 1 and str(broken.definition) in result.stderr
    refused(6, "vm", "show", "broken", says=(str(broken.definition),))
    assert "web@two" in run("list").stdout, "a damaged VM hides no checkpoint of another"
    assert run("status").exit_code == 0


def test_removing_while_a_checkpoint_is_written(checkpointed: store.Store) -> None:
    """The checkpoint is gone, its space is freed later; that is said and is no failure."""
    with checkpointed.hold():
        result = run("rm", "web@one", "--yes", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"removed": ["web@one"], "collected": None}
    assert "not freed yet" in result.stderr and result.stderr.count("\n") == 1
    assert parsed("rm", "web@two", "--yes", "--json")["collected"]["images"] == 2


# --- states ---


def test_checkpoint_of_a_vm_that_does_not_run(web: paths.VmPaths) -> None:
    refused(5, "checkpoint", "web", says=("web", "blkckpt run web"))


def test_socket_path_too_long(home: paths.Home, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = paths.VmPaths("web", home.root / "vms/web", tmp_path / ("x" * 60) / ("y" * 60), home.live / "web")
    monkeypatch.setattr(paths.Home, "vm", lambda _home, _name: vm)
    definition.create(vm, [definition.disk("vda", disk)])
    refused(3, "serve", "web", says=("nbd.sock", "107"))


def test_a_running_vm_is_not_forgotten(web: paths.VmPaths) -> None:
    held = rundir.RunDirectory(web)
    held.record(rundir.Running(rundir.Process.of(os.getpid())))
    try:
        refused(5, "vm", "rm", "web", "--yes", says=("VM web is running", "blkckpt stop web"))
        refused(5, "serve", "web", says=("web", "running"))
    finally:
        held.close()
    assert run("vm", "rm", "web", "--yes").exit_code == 0


def test_an_interrupted_restore_can_be_forgotten(home: paths.Home) -> None:
    vm = home.vm("half")
    paths.private_directory(vm.root)
    unfinished.write(vm, unfinished.RESTORE, "web@one")
    refused(5, "vm", "rm", "half", "--yes", says=("half", "under way"))  # this very process is at work on it
    path = unfinished.path(vm)
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    assert run("vm", "rm", "half", "--yes").exit_code == 0
    assert not vm.root.exists()


def test_destructive_verbs_ask(checkpointed: store.Store) -> None:
    """Rule C5: no terminal, no --yes, nothing happens."""
    for words in (("vm", "rm", "web"), ("rm", "web@one"), ("revert", "web@one")):
        refused(3, *words, says=("--yes",))
    assert len(checkpointed.names("web")) == 2


def test_arguments_for_a_checkpoint_without_a_machine(checkpointed: store.Store) -> None:
    refused(3, "restore", "web@one", "--as", "copy", "--", "-nic", "none", says=("web@one", "no machine"))


@pytest.mark.parametrize("name", ["../x", "a/b", "web@x"])
def test_bad_new_name(checkpointed: store.Store, name: str) -> None:
    refused(3, "restore", "web@one", "--as", name, says=("name",))


# --- what works, with the same homes ---


def parsed(*words: str) -> dict[str, Any]:
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    body = json.loads(result.stdout)
    assert isinstance(body, dict)
    return body


def only(found: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(found) == 1
    return found[0]


def documented(*words: str) -> Callable[[str], bool]:
    text = run(*words, "--help").stdout.partition("JSON keys:")[2].partition("Examples:")[0]
    return lambda key: key in text


def test_list_and_show(checkpointed: store.Store) -> None:
    found = parsed("list", "--json")["checkpoints"]
    assert [one["name"] for one in found] == ["one", "two"]
    shown = parsed("show", "web@latest", "--json")
    assert shown == found[1]
    assert shown["size"] == MIB and shown["parent"] == "one" and shown["notes"] == ["note 1"]
    assert shown["created"] == "2033-05-18T03:33:20.000Z"
    assert all(map(documented("show"), shown))
    text = run("show", "web@two").stdout
    assert "web@two" in text and "switch:  0.5 ms" in text and "1.0 MiB" in text


def test_list_knows_checkpoints_of_vms_that_are_gone(checkpointed: store.Store, web: paths.VmPaths) -> None:
    assert run("vm", "rm", "web", "--yes").exit_code == 0
    assert parsed("list", "web", "--json")["checkpoints"]
    assert "web@one" in run("list").stdout


def test_rm_removes_and_collects(checkpointed: store.Store, web: paths.VmPaths) -> None:
    (web.memory / "one").mkdir(parents=True)
    body = parsed("rm", "web@one", "--yes", "--json")
    assert body["removed"] == ["web@one"]
    collected = body["collected"]
    assert collected["images"] == 1 and collected["freed_bytes"] > 0
    assert not (web.memory / "one").exists()
    assert checkpointed.names() == [("web", "two")]
    assert all(map(documented("rm"), [*body, *collected]))


def test_status_of_what_does_not_run(web: paths.VmPaths) -> None:
    one = only(parsed("status", "web", "--json")["vms"])
    assert one["state"] == "stopped" and one["disks"] == [] and one["phase"] is None
    assert all(map(documented("status"), one))
    assert "stopped" in run("status").stdout


def test_vm_list_and_show(web: paths.VmPaths, disk: Path) -> None:
    one = only(parsed("vm", "list", "--json")["vms"])
    assert one == parsed("vm", "show", "web", "--json")
    assert one["running"] is False and one["disks"][0]["path"] == str(disk)
    assert str(disk) in run("vm", "show", "web").stdout


def test_stop_of_what_does_not_run_is_no_error(web: paths.VmPaths) -> None:
    assert parsed("stop", "web", "--json") == {"vm": "web", "stopped": False}


def test_a_dead_socket_is_no_running_vm(web: paths.VmPaths) -> None:
    paths.private_directory(web.run)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(web.control_socket))
    assert parsed("vm", "show", "web", "--json")["running"] is False


def test_store_path(home: paths.Home) -> None:
    assert run("store", "path").stdout == f"{home.store}\n"
    assert parsed("store", "path", "--json") == {"path": str(home.store), "exists": False}
    assert not home.root.exists(), "looking makes nothing"

"""The command line with a real disk server: serving, status, checkpoints of disks, verify, restore, revert."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from blkckpt import paths
from blkckpt.control import client

MIB = 1 << 20


class Cli:
    """``blkckpt`` in processes of its own, on a home of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.environment = {**os.environ, "BLKCKPT_HOME": str(self.home)}
        self.vms: list[str] = []

    def popen(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "blkckpt.cli.main", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, code: int = 0) -> str:
        """Standard output; of another *code* than 0 the one line on standard error."""
        process = self.popen(*words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}{err}"
        if code:
            assert out == "" and err.startswith("blkckpt: ") and err.count("\n") == 1
            return err
        return out

    def json(self, *words: str) -> dict[str, Any]:
        body = json.loads(self.run(*words, "--json"))
        assert isinstance(body, dict)
        return body

    def status(self, vm: str) -> dict[str, Any]:
        (one,) = self.json("status", vm)["vms"]
        assert isinstance(one, dict)
        return one

    def connect(self, vm: str, disk: str = "vda") -> nbd.NBD:
        (uri,) = [one["uri"] for one in self.status(vm)["disks"] if one["name"] == disk]
        handle = nbd.NBD()
        handle.connect_uri(uri)
        return handle

    def serve(self, vm: str) -> dict[str, Any]:
        self.vms.append(vm)
        return self.json("serve", vm, "--detach")

    def close(self) -> None:
        for vm in self.vms:
            with contextlib.suppress(AssertionError):
                self.run("stop", vm)
        place = paths.home(self.home)
        for directory in (place.run, place.live):
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def web(cli: Cli) -> Path:
    """VM "web" with a disk of random bytes; its base file."""
    base = cli.root / "web.raw"
    base.write_bytes(random.Random(1).randbytes(4 * MIB))
    cli.run("vm", "create", "web", "--disk", str(base))
    return base


def test_serve_status_stop(cli: Cli, web: Path) -> None:
    started = cli.serve("web")
    one = cli.status("web")
    assert (one["state"], one["phase"], one["machine"], one["job"]) == ("serving", "rest", None, None)
    assert started["supervisor"] == one["supervisor"]
    handle = cli.connect("web")
    handle.pwrite(b"x" * 4096, 0)
    assert handle.pread(8192, 0) == b"x" * 4096 + web.read_bytes()[4096:8192]
    (disk,) = cli.status("web")["disks"]
    assert disk["writes"] == 1 and disk["written_bytes"] == 4096 and disk["reads"] == 1
    handle.shutdown()
    assert "rest" in cli.run("status", "web")
    assert "is running already" in cli.run("serve", "web", "--detach", code=5)
    assert cli.json("stop", "web") == {"vm": "web", "stopped": True}
    assert web.read_bytes()[:4096] == b"x" * 4096
    assert cli.status("web")["state"] == "stopped"


def test_top_sees_the_disk_work(cli: Cli, web: Path) -> None:
    cli.serve("web")
    process = cli.popen("top", "web", "--json", "--interval", "300ms")
    handle = cli.connect("web")
    while process.poll() is None:
        handle.pwrite(b"y" * 8192, 65536)
    assert process.stdout is not None and process.stderr is not None
    (one,) = json.loads(process.communicate()[0])["vms"]
    (disk,) = one["disks"]
    handle.shutdown()
    assert (one["state"], one["phase"], disk["depth"]) == ("serving", "rest", 1)
    assert disk["writes_per_second"] > 0
    assert disk["written_bytes_per_second"] == pytest.approx(8192 * disk["writes_per_second"])


def test_serve_in_the_foreground_ends_with_ctrl_c(cli: Cli, web: Path) -> None:
    process = cli.popen("serve", "web")
    assert process.stderr is not None
    assert "serving the disks of VM web" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert cli.status("web")["state"] == "stopped"


def test_base_that_changed_since_it_was_defined(cli: Cli, web: Path) -> None:
    with web.open("ab") as file:
        file.write(bytes(4096))
    said = cli.run("serve", "web", "--detach", code=3)
    assert "web.raw" in said and "longer" in said
    os.truncate(web, MIB)
    assert "shorter" in cli.run("serve", "web", "--detach", code=3)
    web.unlink()
    assert "missing" in cli.run("serve", "web", "--detach", code=4)


def test_qemu_that_cannot_start(cli: Cli, web: Path) -> None:
    """Nothing is left running, and the words say what failed."""
    assert "no-such-qemu" in cli.run("run", "web", "--detach", "--", "no-such-qemu", code=4)
    assert "QEMU ended at once" in cli.run(
        "run", "web", "--detach", "--", "qemu-system-x86_64", "-machine", "nonsense", code=7
    )
    assert cli.status("web")["state"] == "stopped"


def test_machine_checkpoint_without_a_machine(cli: Cli, web: Path) -> None:
    cli.serve("web")
    said = cli.run("checkpoint", "web", code=5)
    assert "web" in said and "--disk-only" in said
    assert cli.status("web")["phase"] == "rest"


def test_qmp_socket_of_something_else(cli: Cli, web: Path, tmp_path: Path) -> None:
    """A socket that accepts and talks no QMP: its name, one line, no checkpoint, disks at rest."""
    cli.serve("web")
    path = Path(f"/tmp/blkckpt-test-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        try:
            server.listen()
            server.settimeout(60)
            process = cli.popen("checkpoint", "web", "--qmp", str(path))
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
                connection.shutdown(socket.SHUT_WR)
                out, err = process.communicate(timeout=90)
        finally:
            path.unlink()
    assert process.returncode in (6, 7), err
    assert err.count("\n") == 1 and str(path) in err and out == ""
    assert cli.json("list", "web") == {"checkpoints": []}
    assert cli.status("web")["phase"] == "rest"


def test_disk_checkpoints_restore_revert(cli: Cli, web: Path) -> None:
    cli.serve("web")
    handle = cli.connect("web")
    first = cli.json("checkpoint", "web", "--disk-only", "--name", "one", "--note", "before the write")
    assert first["consistency"] == "crash" and first["memory"] is None
    assert first["notes"][0] == "before the write"
    at_first = web.read_bytes()
    handle.pwrite(b"y" * 8192, 65536)
    second = cli.json("checkpoint", "web", "--disk-only", "--tag", "nightly", "--tag", "a", "--pin")
    assert (second["tags"], second["pinned"]) == (["a", "nightly"], True)
    assert cli.json("show", "web@tag:nightly")["name"] == second["name"]
    assert "unpin" in cli.run("rm", f"web@{second['name']}", "--yes", code=5)
    assert second["parent"] == "one"
    assert second["added_bytes"] < first["added_bytes"] / 4, "only the changed chunk is new"
    handle.shutdown()
    name = second["name"]
    assert [one["name"] for one in cli.json("list", "web")["checkpoints"]] == ["one", name]
    assert "web@one" in cli.run("list") and "before the write" in cli.run("list")
    assert cli.json("verify", "web")["ok"] is True
    assert cli.json("verify")["checkpoints"] == 2

    cli.vms.append("copy")
    restored = cli.json("restore", "web@one", "--as", "copy", "--detach")
    assert restored["vm"] == "copy" and restored["machine"] is None and restored["seconds"] > 0
    reader = cli.connect("copy")
    assert reader.pread(4 * MIB, 0) == at_first
    reader.shutdown()
    assert cli.status("web")["state"] == cli.status("copy")["state"] == "serving"

    assert "--yes" in cli.run("revert", "web@one", code=3)
    reverted = cli.json("revert", "web@one", "--yes")
    assert reverted["disks"] == [{"name": "vda", "compared": 4 * MIB, "written": 65536}]
    assert web.read_bytes() == at_first
    assert cli.status("web")["state"] == "stopped", "it was stopped to be reverted"

    cli.run("stop", "copy")
    cli.run("vm", "rm", "copy", "--yes")
    assert cli.json("rm", "web@one", "--yes")["removed"] == ["web@one"]
    assert cli.json("verify", f"web@{name}")["ok"] is True, "what the second needs has stayed (S5)"


def test_damage_is_found_and_named(cli: Cli, web: Path) -> None:
    cli.serve("web")
    cli.run("checkpoint", "web", "--disk-only", "--name", "one")
    pack = max((cli.home / "store/packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    pack.chmod(0o600)
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    process = cli.popen("verify", "--json")
    out, err = process.communicate(timeout=60)
    body = json.loads(out)
    assert process.returncode == 6 and body["ok"] is False
    assert any("web@one" in one["where"] for one in body["problems"])
    assert "problem" in err


def test_a_second_checkpoint_during_the_first_is_refused(cli: Cli, web: Path) -> None:
    cli.serve("web")
    with client.Client.connect(paths.home(cli.home).vm("web").control_socket) as driver:
        driver.prepare("held")
        one = cli.status("web")
        assert (one["phase"], one["checkpoint"]) == ("prepared", "held")
        assert "held" in cli.run("status")
        cli.run("checkpoint", "web", "--disk-only", code=5)
    end = time.monotonic() + 30
    while cli.status("web")["phase"] != "rest":
        assert time.monotonic() < end, "the lease has ended (D7)"
    assert cli.json("list", "web") == {"checkpoints": []}


def test_a_killed_supervisor(cli: Cli, web: Path) -> None:
    """Its sockets are leftovers that the doctor names and the next start takes over."""
    started = cli.serve("web")
    os.kill(started["supervisor"], signal.SIGKILL)
    end = time.monotonic() + 30
    while Path(f"/proc/{started['server']}").exists():
        assert time.monotonic() < end, "nbdkit ends with its supervisor"
        time.sleep(0.02)
    assert cli.status("web")["state"] == "stopped"
    finding = [one for one in cli.json("doctor")["findings"] if one["name"] == "leftovers"]
    assert finding[0]["status"] == "warn" and "control.sock" in finding[0]["found"]
    cli.serve("web")
    assert cli.status("web")["phase"] == "rest"


def test_a_disk_whose_changes_are_not_known_is_compared_as_a_whole(cli: Cli, web: Path) -> None:
    """D13: said with the checkpoint.  The live map of changed blocks is gone, as after a power cut."""
    started = cli.serve("web")
    handle = cli.connect("web")
    first = cli.json("checkpoint", "web", "--disk-only", "--name", "one")
    handle.pwrite(b"y" * 8192, 65536)
    second = cli.json("checkpoint", "web", "--disk-only", "--name", "two")
    handle.pwrite(b"z" * 8192, 1 << 20)
    for pid in (started["supervisor"], started["server"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while Path(f"/proc/{started['server']}").exists():
        assert time.monotonic() < end, "the server was killed"
        time.sleep(0.02)
    shutil.rmtree(paths.home(cli.home).live)
    cli.serve("web")
    third = cli.json("checkpoint", "web", "--disk-only", "--name", "three")
    fourth = cli.json("checkpoint", "web", "--disk-only", "--name", "four")
    whole = [any("vda was compared as a whole" in note for note in one["notes"]) for one in (first, second, third)]
    assert whole == [False, False, True] and "compared as a whole" in cli.run("show", "web@three")
    assert not any("compared" in note for note in fourth["notes"])
    assert 0 < third["added_bytes"] < first["added_bytes"] / 4, "only the chunk that differs is new"

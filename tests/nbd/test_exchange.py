"""Checkpoints to and from other programs: NBD with libnbd's and QEMU's tools, files, images, bundles."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from click import testing

from blkckpt import paths
from blkckpt.agent import nbdserver
from blkckpt.cli import main
from blkckpt.exchange import pump, server
from blkckpt.store import manifest, store
from tests.nbd import test_cli

MIB = 1 << 20
CHUNK = 64 << 10
SIZES = {"vda": 40 * MIB, "vdb": MIB + 1536}


class Cli(test_cli.Cli):
    """The same, but verbs run in this process: most of a verb's time here would be its interpreter's start."""

    def run(self, *words: str, code: int = 0) -> str:
        result = testing.CliRunner().invoke(main.command, ["--quiet", *words], env={"BLKCKPT_HOME": str(self.home)})
        assert result.exit_code == code, f"{words}: {result.exit_code}\n{result.output}"
        if code:
            assert result.stdout == "" and result.stderr.startswith("blkckpt: ") and result.stderr.count("\n") == 1
        return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A store with web@one: a sparse disk of several data and zero runs, and an odd one; and some memory."""
    made = Cli(tmp_path_factory.mktemp("exchange"))
    with store.Store.init(made.home / "store") as place:
        images = {name: put(place, data) for name, data in DISKS.items()}
        ram = put(place, RAM, "memory")
        block = manifest.RamBlock("pc.ram", len(RAM), 4096, ram)
        small = manifest.RamBlock("vga.vram", CHUNK, 4096, put(place, RAM[:CHUNK], "memory"))
        state = put(place, b"state" * 100, "stream")
        place.put_manifest(
            manifest.Manifest(
                "web", "one", 32 * "1", 10**18,
                tuple(manifest.DiskImage(name, image, SIZES[name]) for name, image in images.items()),
                memory=manifest.MemoryImage((small, block), state, 500),
            )
        )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def put(place: store.Store, data: bytes, kind: str = "disk") -> str:
    with place.image_writer(len(data), kind=kind) as out:
        out.write(0, data)
        return out.finish().image


def content(size: int, seed: int) -> bytes:
    """Runs of data and of zeros, of whole chunks and not."""
    chance = random.Random(seed)
    data = bytearray(size)
    for start in range(0, size, 5 * MIB):
        length = chance.randrange(CHUNK, 2 * MIB)
        data[start : start + length] = chance.randbytes(length)[: size - start]
    return bytes(data)


DISKS = {name: content(size, number) for number, (name, size) in enumerate(SIZES.items())}
RAM = content(3 * MIB, 9)


def tool(*words: str | Path, code: int = 0) -> str:
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=100)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def exported(cli: Cli) -> Iterator[dict[str, Any]]:
    """web@one, detached."""
    yield cli.json("nbd", "web@one", "--detach")
    cli.run("stop", "web@one")


def uri(exported: dict[str, Any], disk: str) -> str:
    (found,) = [one["uri"] for one in exported["disks"] if one["name"] == disk]
    return str(found)


@pytest.mark.parametrize("disk", list(DISKS))
def test_clients_read_what_is_there(exported: dict[str, Any], disk: str, tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "raw", tmp_path / "qcow2"
    tool("nbdcopy", uri(exported, disk), raw)
    assert raw.read_bytes() == DISKS[disk]
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(exported, disk), qcow2)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, uri(exported, disk))


def test_extents_are_those_of_the_table(exported: dict[str, Any]) -> None:
    told = json.loads(tool("nbdinfo", "--json", "--map", uri(exported, "vda")))
    expected: list[list[int]] = []
    for number in range(SIZES["vda"] // CHUNK):
        kind = 0 if any(DISKS["vda"][number * CHUNK : (number + 1) * CHUNK]) else 3
        if expected and expected[-1][1] == kind:
            expected[-1][0] += CHUNK
        else:
            expected.append([CHUNK, kind])
    assert [[one["length"], one["type"]] for one in told] == expected
    (about,) = json.loads(tool("nbdinfo", "--json", uri(exported, "vda")))["exports"]
    assert about["is_read_only"] and about["can_multi_conn"] and about["can_df"]


def test_any_offset_and_nothing_can_be_written(exported: dict[str, Any]) -> None:
    handle, data = nbd.NBD(), DISKS["vdb"]
    handle.set_strict_mode(0)
    handle.connect_uri(uri(exported, "vdb"))
    chance = random.Random(3)
    for length in (1, 511, CHUNK, 3 * CHUNK + 1, 700_001, len(data)):
        offset = chance.randrange(len(data) - length + 1)
        assert handle.pread(length, offset) == data[offset : offset + length]
    with pytest.raises(nbd.Error) as refused:
        handle.pwrite(b"x" * 512, 0)
    assert refused.value.errno == "EPERM"
    handle.shutdown()
    other = nbd.NBD()
    with pytest.raises(nbd.Error):
        other.connect_uri(uri(exported, "vdb").replace("/vdb", "/..%2f..%2fetc%2fpasswd"))


def test_who_may_connect_and_what_is_kept(cli: Cli, exported: dict[str, Any]) -> None:
    path = Path(uri(exported, "vda").partition("socket=")[2])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cli.json("nbd", "--list")["exports"] == [exported]
    assert "exported already" in cli.run("nbd", "web@one", code=5)
    with store.Store.open(cli.home / "store") as place:
        (owner,) = place.pins()
        assert owner.startswith("use.nbd.") and f".{exported['pid']}." in owner
        assert len(place.pins()[owner]) == 2
    assert "web@one" not in [one["name"] for one in cli.json("doctor")["findings"] if one["status"] == "fail"]


def test_foreground_ends_with_ctrl_c_and_a_chosen_place(cli: Cli, exported: dict[str, Any]) -> None:
    cli.run("stop", "web@one")
    short = Path(f"/tmp/blkckpt-test-{os.getpid()}.sock")
    for words, sent in ((("--socket", str(short)), signal.SIGINT), (("--port", "0"), signal.SIGTERM)):
        process = cli.popen("nbd", "web@one", *words)
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        process.stdout.readline()
        if words[0] == "--socket":
            assert stat.S_IMODE(short.stat().st_mode) == 0o600
            assert "exported already" in cli.run("nbd", "web@one", "--socket", str(short), code=5)
        else:
            assert first.startswith("nbd://127.0.0.1:")
        assert tool("nbdinfo", "--size", first).strip() == str(SIZES["vda"])
        process.send_signal(sent)
        process.communicate(timeout=30)
        assert process.returncode == (0 if sent == signal.SIGINT else 143)
        assert not short.exists() and cli.json("nbd", "--list") == {"exports": []}
        with store.Store.open(cli.home / "store") as place:
            assert place.pins() == {}
    short.touch()
    try:
        assert "exists" in cli.run("nbd", "web@one", "--socket", str(short), code=3)
    finally:
        short.unlink()
    exported |= cli.json("nbd", "web@one", "--detach")


def test_a_killed_server_is_replaced(cli: Cli, exported: dict[str, Any]) -> None:
    old = exported["pid"]
    descriptor = os.pidfd_open(old)
    os.kill(old, signal.SIGKILL)
    assert nbdserver.wait_for([descriptor], 30)
    os.close(descriptor)
    assert cli.json("nbd", "--list") == {"exports": []}
    exported |= cli.json("nbd", "web@one", "--detach")
    assert exported["pid"] != old
    assert tool("nbdinfo", "--size", uri(exported, "vdb")).strip() == str(SIZES["vdb"])


def test_it_outlives_the_checkpoint(cli: Cli, tmp_path: Path) -> None:
    """Rule X4: what is exported is pinned, and goes when the export has ended."""
    data = random.Random(44).randbytes(MIB)
    (tmp_path / "x.raw").write_bytes(data)
    cli.run("import", str(tmp_path / "x.raw"), "--as", "gone@x")
    where = cli.json("nbd", "gone@x", "--detach")
    assert cli.json("rm", "gone@x", "--yes")["collected"]["packs"] == 0
    tool("nbdcopy", uri(where, "vda"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert cli.json("stop", "gone@x")["stopped"] is True
    assert cli.json("stop", "gone@x")["stopped"] is False
    with store.Store.open(cli.home / "store") as place:
        assert place.collect().packs == 1


def test_a_damaged_chunk_is_an_error_never_wrong_bytes(cli: Cli, tmp_path: Path) -> None:
    """Rule X1, for each way out; and nothing is left of what failed (rule X2)."""
    home = tmp_path / "home"
    shutil.copytree(cli.home, home)
    pack = max((home / "store/packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    broken = Cli(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.raw", "x.qcow2"):
        said = broken.run("export", "web@one", "--disk", "vda", "-o", str(out / name), code=6)
        assert "chunk" in said and pack.stem in said
    assert "chunk" in broken.run("bundle", "web@one", "-o", str(out / "b"), code=6)
    assert list(out.iterdir()) == []
    where = broken.json("nbd", "web@one", "--detach")
    try:
        tool("nbdcopy", uri(where, "vda"), tmp_path / "copy", code=1)
        log = server.directory(paths.home(home), "web", "one") / "nbdkit.log"
        assert pack.stem in log.read_text()
    finally:
        broken.run("stop", "web@one")
        broken.close()


def test_export_to_files(cli: Cli, tmp_path: Path) -> None:
    raw = tmp_path / "d.raw"
    body = cli.json("export", "web@one", "--disk", "vda", "-o", str(raw))
    assert raw.read_bytes() == DISKS["vda"] and body["size"] == SIZES["vda"] and body["format"] == "raw"
    assert raw.stat().st_blocks * 512 < SIZES["vda"] * 0.6 and stat.S_IMODE(raw.stat().st_mode) == 0o600
    assert "--force" in cli.run("export", "web@one", "--disk", "vda", "-o", str(raw), code=3)
    cli.run("export", "web@one", "--disk", "vdb", "-o", str(raw), "--force")
    assert raw.read_bytes() == DISKS["vdb"]
    for kind, more in (("qcow2", ("--compress",)), ("vmdk", ()), ("vdi", ())):
        path = tmp_path / f"d.{kind}"
        cli.run("export", "web@one", "--disk", "vda", "-o", str(path), *more)
        tool("qemu-img", "compare", "-f", kind, "-F", "raw", path, _reference(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def _reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference"
    if not path.exists():
        path.write_bytes(DISKS["vda"])
    return path


def test_export_to_a_pipe_and_of_memory(cli: Cli, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blkckpt.cli.main", "export", "web@one"]
    done = subprocess.run(
        [*command, "--disk", "vda", "-o", "-"], env=cli.environment, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == DISKS["vda"]
    half = subprocess.Popen([*command, "--disk", "vda", "-o", "-"], env=cli.environment, stdout=-1, stderr=-1)
    assert half.stdout is not None and half.stderr is not None
    assert half.stdout.read(MIB) == DISKS["vda"][:MIB]
    half.stdout.close()
    assert half.wait(60) == 141 and half.stderr.read() == b""
    half.stderr.close()
    cli.run("export", "web@one", "--memory", "-o", str(tmp_path / "ram"))
    assert (tmp_path / "ram").read_bytes() == RAM, "the largest block"
    cli.run("export", "web@one", "--memory", "--block", "vga.vram", "-o", str(tmp_path / "vga"))
    assert (tmp_path / "vga").read_bytes() == RAM[:CHUNK]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_export_lets_go(cli: Cli, sent: signal.Signals) -> None:
    """Rules C3 and X4: it waits for a reader that does not read; one line, its code, and no pin of it is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blkckpt.cli.main", "export", "web@one", "--disk", "vda", "-o", "-"],
        env=cli.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4096) == DISKS["vda"][:4096]
    with store.Store.open(cli.home / "store") as place:
        assert [owner for owner in place.pins() if f"export.{owner.split('.')[2]}.{process.pid}." in owner]
        process.send_signal(sent)
        assert process.wait(30) == 128 + sent
        assert process.stderr.read().count(b"\n") == 1
        assert not [owner for owner in place.pins() if owner.startswith("use.export.")]
    process.stdout.close()
    process.stderr.close()


def test_export_refusals(cli: Cli, tmp_path: Path) -> None:
    assert "vda, vdb" in cli.run("export", "web@one", "-o", str(tmp_path / "x"), code=3)
    assert "vda, vdb" in cli.run("export", "web@one", "--disk", "vdz", "-o", str(tmp_path / "x"), code=4)
    assert "pc.ram" in cli.run("export", "web@one", "--memory", "--block", "x", "-o", str(tmp_path / "x"), code=4)
    assert "directory" in cli.run("export", "web@one", "--disk", "vda", "-o", str(tmp_path / "no/x"), code=4)
    assert "regular" in cli.run("export", "web@one", "--disk", "vda", "-o", "/dev/null", "--force", code=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk"])
def test_import(cli: Cli, tmp_path: Path, kind: str) -> None:
    """As a VM's disk, which then is served and checkpointed; as a checkpoint, which shares the chunks."""
    image = tmp_path / "image"
    _reference(tmp_path)
    tool("qemu-img", "convert", "-f", "raw", "-O", kind, _reference(tmp_path), image)
    before = cli.json("du")["stores"][0]["distinct"]
    body = cli.json("import", f"root={image}", "--as", f"i{kind}@one", "--note", "n")
    assert body["disks"][0]["format"] == kind and body["checkpoint"] == "one"
    assert cli.json("du")["stores"][0]["distinct"] == before
    cli.run("export", f"i{kind}@one", "-o", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == DISKS["vda"]
    assert "already" in cli.run("import", str(image), "--as", f"i{kind}@one", code=5)
    (disk,) = cli.json("import", str(image), "--as", f"vm{kind}")["disks"]
    assert Path(disk["path"]).read_bytes() == DISKS["vda"]
    assert Path(disk["path"]).stat().st_blocks * 512 < SIZES["vda"] * 0.6
    assert "exists already" in cli.run("import", str(image), "--as", f"vm{kind}", code=5)
    if kind == "qcow2":
        cli.serve(f"vm{kind}")
        cli.run("stop", f"vm{kind}")
    cli.run("vm", "rm", f"vm{kind}", "--yes")
    assert not Path(disk["path"]).exists()


def test_a_disk_that_is_written_to_is_not_imported(cli: Cli, tmp_path: Path) -> None:
    """By a VM of ours, under whatever name, or by somebody's QEMU: the copy would be of no one time."""
    image, other = tmp_path / "image.raw", tmp_path / "link"
    shutil.copy(_reference(tmp_path), image)
    os.utime(image, (1, 1))
    image.chmod(0o600)
    other.symlink_to(image)
    cli.run("import", str(image), "--as", "busy", "--in-place")
    cli.serve("busy")
    assert "checkpoint busy" in cli.run("import", str(other), "--as", "torn@one", code=5)
    cli.run("stop", "busy")
    command = ["qemu-nbd", "-f", "raw", "-k", str(tmp_path / "socket"), "--fork", "--pid-file", str(tmp_path / "pid")]
    tool(*command, image)
    assert "QEMU writes" in cli.run("import", str(other), "--as", "torn@one", code=5)
    ended = os.pidfd_open(int((tmp_path / "pid").read_text()))
    signal.pidfd_send_signal(ended, signal.SIGTERM)
    select.select([ended], [], [], 60)
    os.close(ended)
    tool(*command, "--read-only", image)
    cli.run("import", str(other), "--as", "torn@one")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    cli.run("vm", "rm", "busy", "--yes")


def test_import_in_place(cli: Cli, tmp_path: Path) -> None:
    image = _reference(tmp_path)
    os.utime(image, (1, 1))
    image.chmod(0o600)
    (disk,) = cli.json("import", str(image), "--as", "place", "--in-place")["disks"]
    assert disk["path"] == str(image)
    cli.run("vm", "rm", "place", "--yes")
    assert image.read_bytes() == DISKS["vda"]


def test_a_backing_file_is_not_followed_unasked(cli: Cli, tmp_path: Path) -> None:
    """Rule X3: a guest may have written such a header into its raw disk."""
    secret, bait = tmp_path / "secret", tmp_path / "bait"
    secret.write_bytes(b"secret" * 100_000)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", bait)
    assert str(secret) in cli.run("import", str(bait), "--as", "bait@x", code=3)
    (disk,) = cli.json("import", str(bait), "--as", "bait@raw", "--format", "raw")["disks"]
    assert disk["size"] == bait.stat().st_size
    cli.run("import", str(bait), "--as", "bait@trusted", "--format", "qcow2")
    assert "cannot be read" in cli.run("import", str(secret), "--as", "bait@y", "--format", "vmdk", code=3)


def test_bundle_to_another_home(cli: Cli, tmp_path: Path) -> None:
    """By file and by pipe; the other side's list says what it has."""
    far = Cli(tmp_path)
    file = tmp_path / "b"
    cli.run("bundle", "web@one", "-o", str(file))
    assert far.json("unbundle", str(file))["checkpoints"] == ["web@one"]
    have = tmp_path / "have.json"
    have.write_text(json.dumps(far.json("list")))
    again = cli.json("bundle", "web@one", "-o", str(tmp_path / "b2"), "--have", str(have))
    assert again["chunks"] > 0 and again["needs"] == [], "a base that is itself chosen is none"
    assert far.json("unbundle", str(file))["present"] == ["web@one"]
    far.run("unbundle", str(file), "--rename", "web@one=web@two")
    far.run("export", "web@two", "--disk", "vda", "-o", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == DISKS["vda"]
    assert far.json("verify")["ok"]
    assert "not a bundle" in far.run("unbundle", str(tmp_path / "back"), code=6)
    assert "OLD=NEW" in far.run("unbundle", str(file), "--rename", "web", code=3)
    far.close()


def test_reading_ahead_is_bounded_and_ends_with_the_first_error() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 20:
            raise ValueError
        return number

    taken = []
    with pytest.raises(ValueError):
        for number in pump.ahead(work, ((number,) for number in range(10_000))):
            taken.append(number)
            assert max(begun) - number <= 8 * (pump.AHEAD + 1)
    assert taken == list(range(20)) and len(begun) < 100

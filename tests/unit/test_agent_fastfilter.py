"""Building and finding the fast path's filter, with the real compiler and nbdkit, in a prefix of the test's own."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkckpt import doctor, errors
from blkckpt.agent import fastfilter, nbdserver
from blkckpt.disk import fastpath


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return tmp_path


def test_built_found_and_of_this_version(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = nbdserver.probe()
    assert fastfilter.find(program.version) is None and nbdserver.fast_path(program) is None
    assert "doctor --fix" in doctor.fast_path().advice
    path = nbdserver.build_fast_path()
    assert nbdserver.fast_path(program) == path and path.is_relative_to(prefix)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing is left of the build"
    assert doctor.fast_path().status is doctor.Status.OK
    assert fastfilter.find((*program.version[:2], program.version[2] + 1)) is None, "of another nbdkit"
    changed = path.stat().st_mtime_ns
    assert nbdserver.build_fast_path() == path and path.stat().st_mtime_ns == changed

    monkeypatch.setenv(fastfilter.VARIABLE, "off")
    assert nbdserver.fast_path(program) is None
    assert doctor.fast_path().status is doctor.Status.WARN


def test_one_that_others_could_change_is_refused(prefix: Path) -> None:
    path = nbdserver.build_fast_path()
    path.chmod(0o666)
    with pytest.raises(errors.AccessError, match="by others"):
        nbdserver.fast_path(nbdserver.probe())
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(errors.AccessError):
        nbdserver.fast_path(nbdserver.probe())


def test_what_is_missing_is_named(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = nbdserver.probe()
    with pytest.raises(errors.MissingError, match="apt install gcc"):
        fastfilter.build(program.path, program.version, {"PATH": str(tmp_path)})
    monkeypatch.setattr(fastfilter, "FLAGS", (*fastfilter.FLAGS, "-DNBDKIT_FILTER_H"))  # as without the header
    with pytest.raises(errors.MissingError, match="nbdkit-plugin-dev"):
        nbdserver.build_fast_path()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    with pytest.raises(errors.MissingError, match="does not load"):
        fastfilter.build("/bin/false", program.version, dict(os.environ))
    assert fastfilter.find(program.version) is None


def preloaded(library: Path | None, monkeypatch: pytest.MonkeyPatch, others: str = "") -> str:
    """``LD_PRELOAD`` as what :func:`nbdserver.spawn` starts finds it."""
    monkeypatch.setenv("LD_PRELOAD", others)
    out, into = os.pipe()
    with open(out, "rb") as said, open(os.devnull, "r+b") as null:
        pid = nbdserver.spawn(
            ["/usr/bin/printenv", "LD_PRELOAD"], [null.fileno(), into, null.fileno()], preload=library
        )
        os.close(into)
        text = said.read().decode().strip()
    os.waitpid(pid, 0)
    return text


def test_it_is_preloaded_into_nbdkit_alone(prefix: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes its own name out of the variable when it is loaded, and leaves what else is there."""
    path = nbdserver.build_fast_path()
    other = ctypes.util.find_library("m")
    assert other is not None
    assert preloaded(path, monkeypatch) == "", "printenv has loaded it"
    assert preloaded(path, monkeypatch, other) == other
    assert preloaded(None, monkeypatch, other) == other
    copied = tmp_path / "a b.so"
    copied.write_bytes(path.read_bytes())
    assert preloaded(copied, monkeypatch, other) == other, "a name that the variable cannot hold"
    empty = tmp_path / "empty.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", empty, os.devnull], check=True)
    assert preloaded(empty, monkeypatch, other) == f"{other}:{empty}", "the control: it does not take itself out"


def test_a_foreign_library_is_an_error_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingError, match="cannot be loaded"):
        fastpath.use(tmp_path / "none.so")
    assert fastpath.library() is None
    with pytest.raises(errors.MissingError, match=r"libc\.so"):
        fastpath.Library(Path("libc.so.6"))

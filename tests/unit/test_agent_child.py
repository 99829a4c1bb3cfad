"""Children with orders and answers: forks of a process with one thread, else programs of their own; both alike."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

START = """
import json, os, signal, sys, threading, time
from blkckpt.agent import child
if {threads}:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.signal(signal.SIGTERM, lambda *_: None)
other = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(other, True)
kept, sink = os.pipe()
one = child.Child({module!r}, ["qmp", "/nowhere", str(kept)], [kept])
"""

READY = """
assert one.answers.readline() == b"ready\\n"
"""

LOOK = """
place = f"/proc/{one.pid}"
status = dict(line.split(":\\t", 1) for line in open(f"{place}/status").read().splitlines() if ":\\t" in line)
files = {name: os.readlink(f"{place}/fd/{name}") for name in os.listdir(f"{place}/fd")}
print(json.dumps({
    "name": status["Name"], "session": os.getsid(one.pid) == one.pid, "files": files, "kept": str(kept),
    "ours": os.readlink(f"/proc/self/fd/{kept}"), "threads": status["Threads"],
}))
"""


def run(program: str, *, threads: bool, module: str = "blkckpt.agent.guard") -> list[Any]:
    """Run *program* in a process that has started a child; what it printed."""
    text = START.format(threads=threads, module=module) + program
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("threads", [False, True])
def test_it_has_a_session_and_descriptors_of_its_own(threads: bool) -> None:
    seen, status = run(f"{READY}{LOOK}one.close()\nprint(one.wait(30))", threads=threads)
    assert (seen["name"] == "agent.guard") is not threads, "a fork where there is one thread, and only there"
    assert seen["session"] and seen["threads"] == "1"
    assert seen["files"].pop(seen["kept"]) == seen["ours"]
    others = [target for number, target in seen["files"].items() if int(number) > 1]
    pipes = [target for number, target in seen["files"].items() if target.startswith("pipe:")]
    assert "/dev/null" not in others, "nothing else of ours"
    assert len(pipes) <= 2 + 1, "orders, answers, and perhaps standard error"
    assert status == 0, "the end of its orders ends it"


@pytest.mark.parametrize("threads", [False, True])
def test_waiting_has_a_deadline_and_force_an_end(threads: bool) -> None:
    program = """
try:
    one.wait(0.05)
except TimeoutError as error:
    print(json.dumps(str(error)))
one.kill()
one.kill()
print(one.wait())
print(json.dumps(os.path.exists(f"/proc/{one.pid}")))
"""
    said, status, there = run(program, threads=threads)
    assert "has not ended" in said and status == -9 and there is False


@pytest.mark.parametrize("threads", [False, True])
def test_the_end_of_its_parent_ends_it(threads: bool) -> None:
    [pid] = run(f"{READY}print(one.pid, flush=True)\nos._exit(0)", threads=threads)
    with contextlib.suppress(ProcessLookupError):  # it may have gone already
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 30)[0], "it runs without its parent"
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("threads", [False, True])
def test_a_module_that_is_not_there_is_a_status(threads: bool) -> None:
    program = "print(json.dumps(one.answers.readline().decode()))\nprint(one.wait(30))"
    assert run(program, threads=threads, module="blkckpt.agent.nothing") == ["", 1]

"""The recorder itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults import crash, powerloss, recorder

LIVES = 20
LEAVING = """
import os, sys, threading
begun = threading.Event()
def make():
    for number in range(10**9):
        os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY))
        if number == 20:
            begun.set()
threading.Thread(target=make, daemon=True).start()
begun.wait()
os._exit(0)
"""
"""Goes at once, while another thread of it makes files."""


def test_a_process_that_goes_leaves_no_call_without_its_record(shm: Path, library: Path) -> None:
    for number in range(LIVES):
        root, log = shm / f"root{number}", shm / f"log{number}"
        root.mkdir()
        start = crash.Machine.of_directory(root)
        environment = {**os.environ, "LD_PRELOAD": str(library), "RECORD_ROOT": str(root), "RECORD_LOG": str(log)}
        subprocess.run([sys.executable, "-c", LEAVING, root], env=environment, check=True, timeout=60)
        powerloss.assert_complete(start, list(recorder.parse(log.read_bytes())), root)

"""The fast path's core under load, with the sanitizers for threads (F1 to F7), addresses and undefined behaviour.

See ``tests/support/fastpath/stress.c``.  Each seeded defect is one that no single-threaded test can see.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import fastcore

SECONDS = 8


def _run(program: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    # A busy machine makes the threads meet less often, not the run longer.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), str(seconds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(sanitizer: str, tmp_path: Path) -> None:
    result = _run(fastcore.build_stress(tmp_path, sanitizer), SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr


DEFECTS = {
    "settling waits for nobody": (
        "            if (spent >= usec)\n                return 0;",
        "            return 1;",
    ),
    "leaving orders nothing": (
        "static void leave(void) { atomic_fetch_add_explicit(&mine->turn, 1, memory_order_release); }",
        "static void leave(void) { atomic_fetch_add_explicit(&mine->turn, 1, memory_order_relaxed); }",
    ),
    "the view is read before the request is in": (
        "    atomic_fetch_add(&slot->turn, 1);\n    const fp_view *view = atomic_load(&disk->view);\n",
        "    const fp_view *view = atomic_load(&disk->view);\n    sched_yield();\n"
        "    atomic_fetch_add(&slot->turn, 1);\n",
    ),
    "exclusion is looked at before the request is in": (
        "    if (!inside(disk, length, offset) || !(view = enter(disk)))\n        return FP_PASS;\n"
        "    const uint64_t until = offset + length;\n",
        "    const bool out = excluded(disk, offset >> BLOCK_SHIFT, (offset + length + BLOCK_MASK) >> BLOCK_SHIFT);\n"
        "    sched_yield();\n"
        "    if (out || !inside(disk, length, offset) || !(view = enter(disk)))\n        return FP_PASS;\n"
        "    const uint64_t until = offset + length;\n"
        "    atomic_store(&disk->excluded, 0);\n",
    ),
    "a write is noted after its data": (
        "note(disk, first, end) &&\n                      change_view(view, what, offset, until);",
        "change_view(view, what, offset, until) &&\n                      (leave(), note(disk, first, end));",
    ),
    "a bit before its data": (
        "    if (!put(file, what, offset, until - offset))\n        return false;\n",
        "    if (fresh)\n        change_bits(map, first, end, true);\n"
        "    sched_yield();\n"
        "    if (!put(file, what, offset, until - offset))\n        return false;\n",
    ),
    "a page's mark before its bits": (
        "static void change_bits(fp_map *map, uint64_t first, uint64_t end, bool set)\n{\n",
        "static void change_bits(fp_map *map, uint64_t first, uint64_t end, bool set)\n{\n"
        "    static _Atomic uint8_t nobody[8];\n    _Atomic uint8_t *marks = map->dirty;\n"
        "    if (marks)\n        atomic_store(&marks[0], 1);\n    sched_yield();\n"
        "    fp_map copy = *map, *other = &copy;\n    copy.dirty = marks ? nobody : NULL;\n    map = other;\n",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found(defect: tuple[str, str], tmp_path: Path) -> None:
    result = _run(fastcore.build_stress(tmp_path, "thread", defect), SECONDS)
    assert result.returncode != 0

"""Does the size of a disk matter?  Switch time of sparse disks of 1 GiB to 4 TiB, and the memory of server and maps."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import nbd

from benchmarks import context, figures, product
from blkckpt import paths
from blkckpt.control import client
from tests.support import guest

DESCRIPTION = "sparse disks of 1 GiB to 4 TiB: the switch, and the memory of server and maps"

SMALL, MIDDLE, LARGE, HUGE = "1 GiB", "64 GiB", "1 TiB", "4 TiB"
SIZES = {SMALL: 1 << 30, MIDDLE: 1 << 36, LARGE: 1 << 40, HUGE: 1 << 42}
WRITES = 500
"""Random 4 KiB writes all over each disk before and after each switch: maps and layers are in use, not untouched."""


def _write(uri: str, size: int, seed: int) -> None:
    rng = random.Random(seed)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    for _ in range(WRITES):
        handle.pwrite(rng.randbytes(4096), rng.randrange(size >> 12) << 12)
    handle.flush()
    handle.shutdown()


def _resident_mb(pid: int, field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match.group(1)) / 1024


def _maps_mb(vm: paths.VmPaths) -> float:
    """What the live maps take of memory."""
    return sum(path.stat().st_blocks for path in vm.live.iterdir()) * 512 / 2**20


def _switch_ms(connection: client.Client, vm: paths.VmPaths, size: int, seed: int) -> float:
    """A whole checkpoint's way but for the copy; the switch alone is timed, at the control socket."""
    _write(product.uri(vm), size, seed)
    connection.prepare(f"c{seed}")
    began = time.perf_counter()
    connection.switch()
    took = time.perf_counter() - began
    _write(product.uri(vm), size, ~seed)
    connection.finish(connection.abort(), 120)
    return took * 1e3


def run(context_: context.Context) -> list[figures.Figure]:
    with contextlib.ExitStack() as stack:
        box: guest.Sandbox = stack.enter_context(product.sandbox(context_.directory))
        samplers: dict[str, Callable[[], float]] = {}
        pids, vms = {}, {}
        for number, (label, size) in enumerate(SIZES.items()):
            base = context_.directory / f"{number}.raw"
            with base.open("wb") as file:
                file.truncate(size)
            vm = stack.enter_context(product.served(box, f"scale{number}", base))
            connection = stack.enter_context(product.driver(vm))
            pids[label], vms[label] = connection.welcome.pid, vm
            seeds = iter(range(1, 1000))
            samplers[label] = lambda c=connection, v=vm, s=size, n=seeds: _switch_ms(c, v, s, next(n))  # type: ignore[misc]
        context_.say(f"switching the disks in turns, {WRITES} random writes before and after each switch")
        switches = context_.round_robin(context_.pick(9, 31), samplers, "ms")
        resident = {
            f"{label}, {field}": figures.Samples([_resident_mb(pid, field)], "MiB")
            for label, pid in pids.items()
            for field in ("VmRSS", "VmHWM")
        }
        maps = {label: figures.Samples([_maps_mb(vm)], "MiB") for label, vm in vms.items()}
        return [
            figures.ratio("sparse1t_switch_vs_1g", LARGE, SMALL, switches, figures.at_most(2)),
            figures.ratio("sparse4t_switch_vs_1g", HUGE, SMALL, switches, figures.at_most(2)),
            figures.Figure("sparse4t_maps_mb", "MiB", maps[HUGE].median, maps),
            figures.Figure(
                "sparse1t_rss_mb", "MiB", resident[f"{LARGE}, VmHWM"].median, resident, figures.at_most(200)
            ),
        ]

"""Questions to the VMs of the host: whether one can be checkpointed, what its disks do.

Every question has a short deadline: a disk server that hangs must not hold up the agent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blkckpt import errors, paths
from blkckpt.agent import rundir
from blkckpt.control import client
from blkckpt.daemon import quiet, schedule

ASK_SECONDS = 2.0


def obstacle(vm: paths.VmPaths, wanted: schedule.Schedule) -> str | None:
    """Why no checkpoint of *vm* can be taken now; None if one can be tried."""
    try:
        running = rundir.find(vm)
    except errors.BlkckptError as error:
        return str(error)
    if running is None:
        return "the VM does not run"
    if running.machine is None and not wanted.disk_only and wanted.qmp is None:
        return "the VM is served without a QEMU of ours; its schedule is neither --disk-only nor has it --qmp"
    return None


def status(vm: paths.VmPaths, seconds: float = ASK_SECONDS) -> Mapping[str, Any] | None:
    """What the disk server of *vm* says, with its ``pid``; None when it does not answer."""
    end = time.monotonic() + seconds
    try:
        with client.Client.connect(vm.control_socket, name="blkckpt agent", timeout=seconds) as peer:
            answer = peer.call("status", {}, timeout=max(0.01, end - time.monotonic()))
            return {**answer, "pid": peer.welcome.pid} if isinstance(answer, dict) else None
    except errors.BlkckptError:
        return None


def counters(vm: paths.VmPaths) -> quiet.Counters | None:
    """What its disks have done so far."""
    answer = status(vm)
    return None if answer is None else quiet.counters(int(answer["pid"]), answer.get("disks") or ())


def disks(home: paths.Home, deadline: float) -> Iterator[tuple[str, Sequence[Mapping[str, Any]] | None]]:
    """The disks of every VM that runs, for as long as *deadline* (monotonic) allows; None where none are told."""
    for name in home.vm_names():
        vm = home.vm(name)
        try:
            if rundir.find(vm) is None:
                continue
        except errors.BlkckptError:
            continue
        left = deadline - time.monotonic()
        answer = status(vm, min(ASK_SECONDS, left)) if left > 0 else None
        yield name, None if answer is None else answer.get("disks") or ()

"""Does a checkpoint live?  It is resumed apart, watched for a sign of life, pictured, and taken away again.

Apart means: a VM of its own with a name nobody else has, overlays that go with it, networks that lead nowhere, no
console, monitor or display but our own files (:mod:`blkckpt.vm.alone`).  What a guest has outside (a disk that is not
ours, a host device) it cannot be without: such a checkpoint is refused.

Signs, the strongest that there is; the first two end the wait at once::

    agent        the guest agent answered (the guest has a port for one)
    console      the guest wrote to a serial line or console since it was resumed
    processors   its processors' registers changed, and nothing stronger came within :data:`SETTLE_SECONDS`

It does not live when QEMU refuses its state, ends, or reports anything but a running guest, and when no sign came
before the deadline.  In every case the VM and its processes are gone when :func:`boot` returns or raises; killed
(SIGKILL) it leaves a VM called ``verify-…``, to be stopped and removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blkckpt import errors, log, paths
from blkckpt.agent import forget, supervisor
from blkckpt.restore import disks, machine
from blkckpt.store import evidence, manifest
from blkckpt.store import store as stores
from blkckpt.vm import alone, commandline, dialogue, guestagent, screen

AGENT, CONSOLE, PROCESSORS = "agent", "console", "processors"
DEADLINE = 60.0
SETTLE_SECONDS = 4.0
"""How long to wait for a stronger sign when only the processors move."""
LOOK_SECONDS = 0.2
AGENT_SECONDS = 1.0

Progress = Callable[[str, int, int | None], None]

_log = log.get(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen; *png* is None for a machine without a screen, or one that could not be asked."""

    boot: evidence.Boot
    png: bytes | None


def boot(
    home: paths.Home,
    store: stores.Store,
    checkpoint: manifest.Manifest,
    *,
    deadline: float = DEADLINE,
    progress: Progress,
) -> Outcome:
    """Resume *checkpoint* apart and say whether it lives; nothing of that stays.

    Raises what keeps it from being tried: no memory in it, something outside that it needs, a machine that lacks
    QEMU.  What is wrong with the checkpoint itself is an outcome.
    """
    recorded = checkpoint.machine
    if recorded is None or checkpoint.memory is None:
        raise errors.InputError(f"{checkpoint.vm}@{checkpoint.name} holds disks only: there is no guest to resume")
    if reason := commandline.exclusive(recorded.argv):
        raise errors.InputError(f"{checkpoint.vm}@{checkpoint.name} cannot be resumed apart: {reason}")
    vm = home.vm(f"verify-{secrets.token_hex(4)}")
    apart = alone.alone(recorded.argv, vm.run)
    chosen = dataclasses.replace(checkpoint, machine=dataclasses.replace(recorded, argv=apart.argv))
    began, when = time.monotonic(), time.time_ns()

    def outcome(sign: str, message: str, png: bytes | None) -> Outcome:
        return Outcome(evidence.Boot(not message, sign, time.monotonic() - began, when, message), png)

    with supervisor.Detached() as background, _taken_away(vm, background):
        try:
            prepared = machine.restore(home, store, chosen, vm.name, progress=progress)
            machine.start(prepared, progress, background, paused=True)
            return outcome(*_watch(vm, apart, deadline))
        except (errors.HypervisorError, errors.CorruptError, errors.DeadlineError) as error:
            return outcome("", str(error), None)


@contextlib.contextmanager
def _taken_away(vm: paths.VmPaths, background: supervisor.Detached) -> Iterator[None]:
    try:
        yield
    finally:
        background.abandon()  # wherever it is: also when it has not said yet that it runs
        with contextlib.suppress(errors.NotFoundError):
            forget.forget(vm)
        disks.remove(vm)


def _watch(vm: paths.VmPaths, apart: alone.Alone, seconds: float) -> tuple[str, str, bytes | None]:
    """The sign, else why there is none, and the screen."""
    with dialogue.Dialogue(vm.qmp_socket) as session:
        before = {path: _size(path) for path in apart.consoles}
        registers = _registers(session)
        session.execute("cont")
        began = time.monotonic()
        while True:
            spent = time.monotonic() - began
            status = session.execute("query-status")["status"]
            if status != "running":
                reason = f"the guest is not running but {status}, {spent:.1f} s after it was resumed"
                return "", reason, _screen(vm, session)
            sign = _strong(vm, apart, before)
            if not sign and spent > SETTLE_SECONDS and _registers(session) != registers:
                sign = PROCESSORS
            if sign:
                return sign, "", _screen(vm, session)
            if spent > seconds:
                return "", f"the guest showed no sign of life within {seconds:g} s", _screen(vm, session)
            select.select([], [], [], LOOK_SECONDS)  # neither a file nor a register says that it has changed


def _strong(vm: paths.VmPaths, apart: alone.Alone, before: dict[Path, int]) -> str:
    if apart.agent is not None:
        with contextlib.suppress(errors.BlkckptError), guestagent.GuestAgent(apart.agent) as agent:
            agent.ping(AGENT_SECONDS)
            return AGENT
    if any(_size(path) > size for path, size in before.items()):
        return CONSOLE
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _registers(session: dialogue.Dialogue) -> str:
    return str(session.execute("human-monitor-command", {"command-line": "info registers -a"}))


def _screen(vm: paths.VmPaths, session: dialogue.Dialogue) -> bytes | None:
    try:
        return screen.take(session.execute, vm.run)
    except errors.BlkckptError as error:
        _log.warning("no picture of the screen", extra={"fields": {"vm": vm.name, "error": str(error)}})
        return None

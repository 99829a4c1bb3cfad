"""The agent's control socket: what it does, and how it is told.

Framing, greeting and the check of the peer are :mod:`blkckpt.control`'s (JSON-RPC in lines, ``hello`` first).

============  ==========  ===========================================================================
verb          parameters  answer
============  ==========  ===========================================================================
``status``    —           pid, started_ns, metrics (addresses), schedules: [see :class:`Shown`]
``reload``    —           schedules (their number), after the files were read again
``run-now``   vm          {}; StateError when the VM does not run, NotFoundError without a schedule
``shutdown``  —           {}; the agent stops as on SIGTERM
============  ==========  ===========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import blkckpt
from blkckpt import errors, paths, units
from blkckpt.agent import rundir
from blkckpt.control import client, messages, server
from blkckpt.daemon import planner, record, schedule

CALL_SECONDS = 30.0
DIRECTORY = ".agent"
"""In the home's run directory; no VM can be called so."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One schedule as ``status`` tells it.  Times are wall clock, ns."""

    vm: str
    doing: str
    every_ns: int
    next_ns: int
    failures: int
    running: int | None
    problem: Mapping[str, Any] | None
    success: Mapping[str, Any] | None

    @classmethod
    def of(cls, vm: str, wanted: schedule.Schedule, known: record.Record, doing: str) -> Shown:
        return cls(
            vm=vm,
            doing=doing,
            every_ns=wanted.every_ns,
            next_ns=planner.next_ns(wanted, known),
            failures=known.failures,
            running=known.running.pid if known.running else None,
            problem=asdict(known.problem) if known.problem else None,
            success=asdict(known.success) if known.success else None,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Any result."""

    body: Mapping[str, Any]

    def encode(self) -> dict[str, Any]:
        return dict(self.body)


class Agent(Protocol):
    """What the verbs act on; called from connection threads."""

    def status(self) -> Mapping[str, Any]: ...

    def reload(self) -> int: ...

    def run_now(self, vm: str) -> None: ...

    def shutdown(self) -> None: ...


class Service:
    """The handler of :class:`server.Server`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        empty = messages.Empty.decode
        self._verbs = {
            "status": server.Verb(empty, lambda _session, _params, _fds: Answer(agent.status())),
            "reload": server.Verb(empty, lambda _session, _params, _fds: Answer({"schedules": agent.reload()})),
            "run-now": server.Verb(_vm, self._run_now),
            "shutdown": server.Verb(empty, self._shutdown),
        }

    @property
    def verbs(self) -> Mapping[str, server.Verb]:
        return self._verbs

    def welcome(self) -> messages.Welcome:
        return messages.Welcome(messages.VERSION, f"blkckpt agent {blkckpt.__version__}", "", os.getpid(), {})

    def heard(self, session: server.Session) -> None:
        """Nobody holds a lease here."""

    def gone(self, session: server.Session) -> None:
        """Nobody holds a lease here."""

    def _run_now(self, _session: server.Session, vm: str, _descriptors: list[int]) -> Answer:
        self._agent.run_now(vm)
        return Answer({})

    def _shutdown(self, _session: server.Session, _params: object, _descriptors: list[int]) -> Answer:
        self._agent.shutdown()
        return Answer({})


def _vm(params: Mapping[str, Any]) -> str:
    if set(params) != {"vm"} or not isinstance(params["vm"], str):
        raise errors.InputError("run-now takes the name of a VM")
    return units.check_name(params["vm"], "VM name")


# --- the other side ---


def directory(home: paths.Home) -> Path:
    """Where the agent of *home* has its lock, its sockets and the output of its children."""
    return home.run / DIRECTORY


def lock_path(home: paths.Home) -> Path:
    return directory(home) / "lock"


def socket_path(home: paths.Home) -> Path:
    return directory(home) / "control.sock"


def metrics_path(home: paths.Home) -> Path:
    return directory(home) / "metrics.sock"


def runs(home: paths.Home) -> bool:
    """Whether an agent works for *home*."""
    return rundir.is_locked(lock_path(home))


def ask(home: paths.Home, verb: str, params: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Call *verb* of the agent of *home*; StateError when there is none."""
    if not runs(home):
        raise errors.StateError("no agent runs here; start it: blkckpt agent run (or its systemd unit)")
    with client.Client.connect(socket_path(home), name=f"blkckpt agent {verb}") as peer:
        answer = peer.call(verb, params or {}, timeout=CALL_SECONDS)
    if not isinstance(answer, dict):
        raise errors.ProtocolError(f"answer to {verb}: no object")
    return answer


def recorded(home: paths.Home) -> tuple[Sequence[Shown], Mapping[str, str]]:
    """The schedules as the files have them, for when there is no agent to ask; and what could not be read."""
    found, damaged = [], {}
    for name in home.vm_names():
        vm = home.vm(name)
        try:
            wanted = schedule.load(vm)
        except errors.BlkckptError as error:
            damaged[name] = str(error)
            continue
        if wanted is not None:
            found.append(Shown.of(name, wanted, record.load(vm), ""))
    return found, damaged

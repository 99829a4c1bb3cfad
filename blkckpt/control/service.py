"""The verbs: what each control message does to the disk group.

Translation only: parameters to calls, results to messages.  The states are the group's
(:class:`blkckpt.disk.api.State`), and it refuses what does not fit.  What is added here is the *driver*:

* The connection whose ``prepare`` succeeded is the driver.  ``arm``, ``switch``, ``disarm``, ``copy`` and
  ``commit`` are for it alone; ``abort`` is for anybody of the same user (a stuck agent must be removable).
* Every message of the driver renews the lease for ``LEASE_SECONDS``; the group counts the time.  ``arm`` flushes,
  which may take long, and keeps the lease until it has answered.
* When the driver's connection ends, for whatever reason, ``abort`` is called at once (rule D7).  The group
  does not undo a commit that has begun: then it just goes on.
* A server that stops takes nothing back.  What was under way is decided by the next one that opens the group.

The descriptor that comes with ``arm`` is owned here, wrapped in a barrier, and closed as soon as the barrier has
nothing more to say: switched, violated, disarmed, aborted, driver gone.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blkckpt import errors, log
from blkckpt.control import messages, server
from blkckpt.disk import api, group, job
from blkckpt.vm import barrier

LEASE_SECONDS = 60.0
"""How long a driver may be silent.  Twice the longest ``wait``, so that one lost answer is no lost checkpoint."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who serves: for ``hello``."""

    vm: str
    server: str


@dataclass(frozen=True, slots=True)
class Status:
    """The group's status as JSON, with who drives it."""

    status: api.GroupStatus
    driver: server.Session | None

    def encode(self) -> dict[str, Any]:
        driver = self.driver and {"pid": self.driver.peer_pid, "client": self.driver.client}
        return {**_plain(self.status), "driver": driver}


def _plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Service:
    """The handler of :class:`server.Server` for one disk group.

    *copy_command* is how a copy child is started; *stop* asks the process to end, and returns at once.
    """

    def __init__(
        self, identity: Identity, disks: group.DiskGroup, copy_command: Sequence[str], stop: Callable[[], None]
    ) -> None:
        self._identity = identity
        self._group = disks
        self._copy_command = tuple(copy_command)
        self._stop = stop
        self._lock = threading.Lock()
        self._driver: server.Session | None = None
        self._barrier: barrier.ResumeBarrier | None = None
        self._stopping = False
        empty = messages.Empty.decode
        self._verbs = {
            "status": server.Verb(empty, self._status),
            "prepare": server.Verb(messages.Prepare.decode, self._prepare),
            "arm": server.Verb(messages.Arm.decode, self._arm, descriptors=1),
            "switch": server.Verb(messages.Switch.decode, self._switch),
            "disarm": server.Verb(empty, self._disarm),
            "copy": server.Verb(messages.Copy.decode, self._copy),
            "commit": server.Verb(empty, self._commit),
            "abort": server.Verb(empty, self._abort),
            "wait": server.Verb(messages.Wait.decode, self._wait),
            "shutdown": server.Verb(empty, self._shutdown),
        }

    # What the server asks.

    @property
    def verbs(self) -> Mapping[str, server.Verb]:
        return self._verbs

    def welcome(self) -> messages.Welcome:
        sizes = {name: disk.size for name, disk in self._group.disks.items()}
        return messages.Welcome(messages.VERSION, self._identity.server, self._identity.vm, os.getpid(), sizes)

    def heard(self, session: server.Session) -> None:
        """Renew the driver's lease."""
        if session is self._driver:
            self._group.renew(LEASE_SECONDS)

    def gone(self, session: server.Session) -> None:
        """Rule D7: a driver that is gone leaves the disks to themselves."""
        with self._lock:
            if session is not self._driver:
                return
            self._driver = None
            stopping = self._stopping
        if not stopping and self._group.status().state is not api.State.REST:
            fields = {"client": session.client, "pid": session.peer_pid}
            logger.warning("the driver of a checkpoint is gone; back to rest", extra={"fields": fields})
            self._group.abort()
        self._drop_barrier()

    def close(self) -> None:
        """The server is stopping: connections that end from now on take nothing back."""
        with self._lock:
            self._stopping = True

    # The verbs.

    def _status(self, session: server.Session, params: messages.Empty, _: list[int]) -> Status:
        status = self._group.status()
        return Status(status, None if status.state is api.State.REST else self._driver)

    def _prepare(self, session: server.Session, params: messages.Prepare, _: list[int]) -> messages.Empty:
        self._group.prepare(params.checkpoint, LEASE_SECONDS)
        with self._lock:
            self._driver = session
        return messages.Empty()

    def _arm(self, session: server.Session, params: messages.Arm, descriptors: list[int]) -> messages.Empty:
        watch = _barrier_of(descriptors[0])
        try:
            self._check_driver(session)
            self._group.renew(messages.FLUSH_SECONDS)  # it waits for us now: its silence means nothing
            self._group.arm(watch, time.monotonic() + params.deadline)
        except BaseException:
            watch.close()
            raise
        finally:
            self.heard(session)
        self._drop_barrier(watch)
        return messages.Empty()

    def _switch(self, session: server.Session, params: messages.Switch, _: list[int]) -> messages.Switched:
        self._check_driver(session)
        now = params.mode == messages.SWITCH_NOW
        state = self._group.switch() if now else self._group.poll_barrier()
        if not state.waiting:
            self._drop_barrier()
        return messages.Switched(state.switched, state.waiting, state.violation, state.instant)

    def _disarm(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Empty:
        self._check_driver(session)
        self._group.disarm()
        self._drop_barrier()
        return messages.Empty()

    def _copy(self, session: server.Session, params: messages.Copy, _: list[int]) -> messages.Started:
        self._check_driver(session)
        for name in params.parents:
            if name not in self._group.disks:
                raise errors.NotFoundError(f"copy, parents: VM {self._identity.vm} has no disk {name}")
        label = f"{self._identity.vm}@{self._group.status().checkpoint}"
        started = self._group.start_copy(
            params.store, params.parents, rate=params.rate, label=label, command=self._copy_command
        )
        return messages.Started(started.id)

    def _commit(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Started:
        self._check_driver(session)
        return messages.Started(self._group.commit().id)

    def _abort(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Started:
        started = self._group.abort()
        self._drop_barrier()
        return messages.Started(started.id)

    def _wait(self, session: server.Session, params: messages.Wait, _: list[int]) -> messages.JobState:
        found = self._group.job(params.job)
        found.wait(params.timeout)
        return _state_of(found)

    def _shutdown(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Empty:
        logger.info("shutdown asked for", extra={"fields": {"client": session.client, "pid": session.peer_pid}})
        self.close()
        self._stop()
        return messages.Empty()

    # Helpers.

    def _check_driver(self, session: server.Session) -> None:
        driver = self._driver
        if driver is session:
            return
        if driver is None or self._group.status().state is api.State.REST:
            raise errors.StateError("no checkpoint is under way on this connection; prepare first")
        raise errors.StateError(f"a checkpoint is under way, driven by {driver.client} (pid {driver.peer_pid})")

    def _drop_barrier(self, successor: barrier.ResumeBarrier | None = None) -> None:
        with self._lock:
            before, self._barrier = self._barrier, successor
        if before:
            before.close()


def _barrier_of(descriptor: int) -> barrier.ResumeBarrier:
    """Wrap *descriptor*, which is ours from here on whatever happens."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise errors.InputError("arm: the descriptor sent along is no socket; send the QMP connection's")
    try:
        return barrier.ResumeBarrier(descriptor)
    except OSError as error:
        raise errors.InputError(f"arm: the descriptor sent along cannot be watched: {error.strerror}") from error


def _state_of(found: job.Job) -> messages.JobState:
    status = found.status()
    failure = None
    if status.state == messages.FAILED:
        failure = messages.JobFailure(status.error_type or "BlkckptError", status.error or "", _errno_of(found))
    result = _plain(status.result)
    return messages.JobState(status.id, status.state, status.done, status.total, result, failure)


def _errno_of(found: job.Job) -> int | None:
    try:
        found.outcome()
    except Exception as error:
        number = getattr(error, "errno", None)
        return number if isinstance(number, int) else None
    return None

"""The verbs: what each control message does to the disk group.

Translation only: parameters to calls, results to messages.  The states are the group's
(:class:`blkckpt.disk.api.State`), and it refuses what does not fit.  What is added here is the *driver*:

* The connection whose ``prepare`` succeeded is the driver of that checkpoint, and drives no other meanwhile.  ``arm``,
  ``switch``, ``disarm``, ``copy`` and ``commit`` are for it alone.  ``abort`` of a driver is about its own checkpoint;
  anybody else of the same user aborts all there are (a stuck agent must be removable).
* Every message of a driver renews its lease for ``LEASE_SECONDS``; the group counts the time.  ``arm`` flushes,
  which may take long, and keeps the lease until it has answered.
* When a driver's connection ends, for whatever reason, its checkpoint is aborted at once (rule D7).  The group
  does not undo a commit that has begun: then it just goes on.
* A flattening is for the connection that asked for it, and is cancelled when that ends; it takes no lease.
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
from blkckpt.disk import format as formats
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
    """The group's status as JSON, with who drives each checkpoint (*driver*: the newest)."""

    status: api.GroupStatus
    drivers: Mapping[str, server.Session]

    def encode(self) -> dict[str, Any]:
        plain = _plain(self.status)
        for one in plain["rounds"]:
            one["driver"] = _who(self.drivers.get(one["checkpoint"]))
        return {**plain, "driver": plain["rounds"][-1]["driver"] if plain["rounds"] else None}


def _who(driver: server.Session | None) -> dict[str, Any] | None:
    return None if driver is None else {"pid": driver.peer_pid, "client": driver.client}


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
        self._drivers: dict[str, server.Session] = {}  # by checkpoint
        self._flattening: list[tuple[server.Session, job.Job]] = []
        self._barrier: barrier.ResumeBarrier | None = None
        self._arming: server.Session | None = None  # whose barrier that is
        self._stopping = False
        empty = messages.Empty.decode
        self._verbs = {
            "status": server.Verb(empty, self._status),
            "prepare": server.Verb(messages.Prepare.decode, self._prepare),
            "arm": server.Verb(messages.Arm.decode, self._arm, descriptors=1),
            "switch": server.Verb(messages.Switch.decode, self._switch),
            "disarm": server.Verb(empty, self._disarm),
            "copy": server.Verb(messages.Copy.decode, self._copy),
            "retain": server.Verb(messages.Retain.decode, self._retain),
            "flatten": server.Verb(messages.Flatten.decode, self._flatten),
            "review": server.Verb(empty, self._review),
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
        """Renew the lease of the checkpoint that *session* drives."""
        if checkpoint := self._driven(session):
            self._group.renew(LEASE_SECONDS, checkpoint)

    def gone(self, session: server.Session) -> None:
        """Rule D7: a driver that is gone leaves the disks to themselves."""
        with self._lock:
            for owner, running in self._flattening:
                if owner is session:
                    running.cancel()
            self._flattening = [(owner, running) for owner, running in self._flattening if running.running]
            checkpoint = self._driven(session)
            if checkpoint is None:
                return
            del self._drivers[checkpoint]
            stopping = self._stopping
        if not stopping and checkpoint in self._under_way():
            fields = {"client": session.client, "pid": session.peer_pid, "checkpoint": checkpoint}
            logger.warning("the driver of a checkpoint is gone; it is given up", extra={"fields": fields})
            self._group.abort(checkpoint)
        self._drop_barrier(of=session)

    def close(self) -> None:
        """The server is stopping: connections that end from now on take nothing back."""
        with self._lock:
            self._stopping = True

    # The verbs.

    def _status(self, session: server.Session, params: messages.Empty, _: list[int]) -> Status:
        with self._lock:
            drivers = dict(self._drivers)
        return Status(self._group.status(), drivers)

    def _prepare(self, session: server.Session, params: messages.Prepare, _: list[int]) -> messages.Empty:
        driven = self._driven(session)
        if driven in self._under_way():
            raise errors.StateError(f"this connection drives checkpoint {driven}; prepare another on another one")
        self._group.prepare(params.checkpoint, LEASE_SECONDS, retain=params.retain)
        with self._lock:
            if driven is not None:
                del self._drivers[driven]
            self._drivers[params.checkpoint] = session
        return messages.Empty()

    def _arm(self, session: server.Session, params: messages.Arm, descriptors: list[int]) -> messages.Empty:
        watch = _barrier_of(descriptors[0])
        try:
            checkpoint = self._check_driver(session)
            self._group.renew(messages.FLUSH_SECONDS, checkpoint)  # it waits for us now: its silence means nothing
            self._group.arm(watch, time.monotonic() + params.deadline, checkpoint)
        except BaseException:
            watch.close()
            raise
        finally:
            self.heard(session)
        self._drop_barrier(watch, session)
        return messages.Empty()

    def _switch(self, session: server.Session, params: messages.Switch, _: list[int]) -> messages.Switched:
        checkpoint = self._check_driver(session)
        now = params.mode == messages.SWITCH_NOW
        state = self._group.switch(checkpoint) if now else self._group.poll_barrier(checkpoint)
        if not state.waiting:
            self._drop_barrier(of=session)
        return messages.Switched(state.switched, state.waiting, state.violation, state.instant)

    def _disarm(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Empty:
        self._group.disarm(self._check_driver(session))
        self._drop_barrier(of=session)
        return messages.Empty()

    def _copy(self, session: server.Session, params: messages.Copy, _: list[int]) -> messages.Started:
        checkpoint = self._check_driver(session)
        for name in params.parents:
            if name not in self._group.disks:
                raise errors.NotFoundError(f"copy, parents: VM {self._identity.vm} has no disk {name}")
        started = self._group.start_copy(
            params.store,
            params.parents,
            rate=params.rate,
            label=f"{self._identity.vm}@{checkpoint}",
            command=self._copy_command,
            checkpoint=checkpoint,
        )
        return messages.Started(started.id)

    def _retain(self, session: server.Session, params: messages.Retain, _: list[int]) -> messages.Started:
        checkpoint = self._check_driver(session)
        marks = {
            name: formats.Retained(params.store, checkpoint, params.id, image) for name, image in params.images.items()
        }
        return messages.Started(self._group.start_retain(marks, checkpoint).id)

    def _flatten(self, session: server.Session, params: messages.Flatten, _: list[int]) -> messages.Started:
        started = self._group.flatten(params.checkpoint, rate=params.rate, command=self._copy_command)
        with self._lock:
            self._flattening.append((session, started))
        return messages.Started(started.id)

    def _review(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Started:
        return messages.Started(self._group.review().id)

    def _commit(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Started:
        return messages.Started(self._group.commit(self._check_driver(session)).id)

    def _abort(self, session: server.Session, params: messages.Empty, _: list[int]) -> messages.Started:
        checkpoint = self._driven(session)
        started = self._group.abort(checkpoint)
        self._drop_barrier(of=None if checkpoint is None else session)
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

    def _driven(self, session: server.Session) -> str | None:
        """The checkpoint that *session* prepared last."""
        return next((name for name, driver in list(self._drivers.items()) if driver is session), None)

    def _under_way(self) -> frozenset[str]:
        return self._group.checkpoints()

    def _check_driver(self, session: server.Session) -> str:
        """The checkpoint under way that *session* drives; StateError if it drives none."""
        driven, under_way = self._driven(session), self._under_way()
        if driven in under_way:
            assert driven is not None
            return driven
        for name, driver in list(self._drivers.items()):
            if name in under_way:
                raise errors.StateError(f"checkpoint {name} is driven by {driver.client} (pid {driver.peer_pid})")
        raise errors.StateError("no checkpoint is under way on this connection; prepare first")

    def _drop_barrier(self, successor: barrier.ResumeBarrier | None = None, of: server.Session | None = None) -> None:
        """Close the barrier if it is *of* that session's arming (``None``: whoever's) and watch *successor* instead."""
        with self._lock:
            if successor is None and of is not None and of is not self._arming:
                return
            before, self._barrier, self._arming = self._barrier, successor, of if successor else None
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

"""Bringing a guest back after its agent was killed: the work of :mod:`blkckpt.agent.guard`, which says when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from blkckpt import errors
from blkckpt.agent import drain, guard
from blkckpt.vm import guestagent, qmp, writeprotect

RESCUE_SECONDS = 60.0
"""Without success, and without a byte of an abandoned stream."""
INTERVAL = 0.2

PAUSED = ("paused", "postmigrate", "finish-migrate")
"""Run states in which a checkpoint can leave a guest; any other has a cause of its own."""
RUNNING_MIGRATION = ("setup", "active", "cancelling", "wait-unplug", "pre-switchover", "device")


def rescue(kind: str, path: str, stream: int | None = None, patience: float = RESCUE_SECONDS) -> bool:
    """Bring the guest back, until nothing has moved for *patience* seconds; whether it is known to be well."""
    attempt: Callable[[str], bool] = _continue if kind == guard.QMP else _thaw
    thrown = None if stream is None else drain.Drain(stream)
    moved, since = 0, time.monotonic()
    while time.monotonic() - since < patience:
        try:
            if attempt(path):
                return True
        except errors.BlkckptError as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                return False  # nobody listens there any more: the guest has ended
            if isinstance(error, errors.DeadlineError) and thrown is not None:
                _free_if_stuck(path, thrown, moved)
        if thrown is not None and thrown.moved != moved:
            moved, since = thrown.moved, time.monotonic()
        time.sleep(INTERVAL)
    return False


def _free_if_stuck(path: str, thrown: drain.Drain, moved: int) -> None:
    """A silent monitor may be waiting for a page of a snapshot that does not go on: nobody wants that, so it is freed.

    A stream at its end is no such snapshot's: then the monitor may be another agent's, and what is protected too.
    """
    if thrown.moved == moved and not thrown.join(0):
        with contextlib.suppress(errors.BlkckptError):
            writeprotect.release(qmp.listener(path))


def _continue(path: str) -> bool:
    with qmp.QmpSession(path) as session:
        migration = session.execute("query-migrate").get("status")
        if migration in RUNNING_MIGRATION:
            return False  # it may be about to stop the guest, or to resume it
        if migration in ("failed", "cancelled"):
            writeprotect.release(session.peer_pid)
        if session.execute("query-status")["status"] in PAUSED:
            session.execute("cont")
        return True


def _thaw(path: str) -> bool:
    with guestagent.GuestAgent(path) as agent:
        agent.thaw()
    return True

"""The agent of a host: one for each home, from its lock to its end.

Threads::

    main       signals, the service manager, the schedules' files (every :data:`RESCAN_SECONDS`, on SIGHUP, when told)
    schedule-  one a VM (:mod:`task`)
    control    the control socket (:mod:`service`)
    metrics    one a listener (:mod:`exposition`)
    survey     :mod:`survey`

The end, on SIGTERM, SIGINT or ``shutdown``: no checkpoint begins any more; what is under way has ``grace`` seconds to
finish, and is taken back then.  A second signal takes it back at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from blkckpt import errors, log, paths
from blkckpt.agent import rundir
from blkckpt.control import client, server
from blkckpt.daemon import exposition, jobs, metrics, notify, readings, schedule, service, survey, task

RESCAN_SECONDS = 15.0
ANSWER_SECONDS = 1.0
"""For the answer to ``shutdown`` to get out before its connection is closed."""
JOIN_SECONDS = jobs.TAKE_BACK_SECONDS + 15.0
"""From the end of the grace to a thread that has taken its checkpoint back."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """*port*: metrics on 127.0.0.1 too (0: any).  *at_once*: checkpoints on this host.  *grace*: seconds.
    *survey*: seconds between two measurements of the stores."""

    port: int | None = None
    at_once: int = 2
    grace: float = 20.0
    survey: float = 3600.0


class Agent:
    """A context manager: entered, it holds the lock and listens; :meth:`loop` works until it is told to stop."""

    def __init__(self, home: paths.Home, settings: Settings) -> None:
        self._home, self._settings = home, settings
        self._began_ns = time.time_ns()
        self._lock = threading.Lock()
        self._tasks: dict[str, task.Task] = {}
        self._retired: list[task.Task] = []
        self._damaged: dict[str, str] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stops = 0
        self._reload = False
        self._metrics = metrics.Metrics(self._schedule_readings, lambda end: readings.disks(home, end))
        self._expositions: list[exposition.Exposition] = []
        self._addresses: list[str] = []

    def __enter__(self) -> Self:
        for path in (service.socket_path(self._home), service.metrics_path(self._home)):
            client.check_path(path)
        paths.private_directory(self._home.run)
        place = paths.private_directory(service.directory(self._home))
        self._held = rundir.take_lock(service.lock_path(self._home), "an agent runs for this home already")
        try:
            self._host = task.Host(self._home, place, task.Turns(self._settings.at_once), self._metrics, self._nudge)
            self._survey = survey.Survey(self._home, place, self._settings.survey, self._metrics.measured)
            self._listen()
        except BaseException:
            os.close(self._held)
            raise
        return self

    def _listen(self) -> None:
        path = service.metrics_path(self._home)
        listeners = [(rundir.bind(path), str(path))]
        if self._settings.port is not None:
            try:
                opened = exposition.loopback(self._settings.port)
            except errors.BlkckptError:
                listeners[0][0].close()
                raise
            port = opened.getsockname()[1]
            listeners.append((opened, f"http://{exposition.LOOPBACK}:{port}{exposition.PATH}"))
        for listener, address in listeners:
            self._expositions.append(exposition.Exposition(listener, self._metrics.registry))
            self._addresses.append(address)
        self._listener: socket.socket = rundir.bind(service.socket_path(self._home))
        self._server = server.Server(self._listener, service.Service(self), what="agent")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self._survey.close()
        for one in self._expositions:
            one.close()
        self._listener.close()
        for path in (service.socket_path(self._home), service.metrics_path(self._home)):
            path.unlink(missing_ok=True)
        os.close(self._held)

    def loop(self, ready: Callable[[], None] = lambda: None) -> None:
        """Work until told to stop.  Main thread only: signals are handled here.  *ready*: everything answers."""
        before = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        try:
            self.reload()
            self._server.start()
            self._survey.start()
            for one in self._expositions:
                one.start()
            notify.ready(self._summary())
            logger.info("the agent works", extra={"fields": {"home": self._home.root, "metrics": self._addresses}})
            ready()
            self._work()
            self._finish()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stops += 1
        self._nudge()

    def _nudge(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _work(self) -> None:
        pulse = notify.watchdog_seconds()
        scanned = time.monotonic()
        while not self._stops:
            wait = RESCAN_SECONDS if pulse is None else min(RESCAN_SECONDS, pulse)
            self._sleep(wait)
            if self._reload:
                self._reload = False
                notify.reloading()
                self.reload()
                scanned = time.monotonic()
                notify.ready(self._summary())
            elif time.monotonic() - scanned >= RESCAN_SECONDS:
                self.reload()
                scanned = time.monotonic()
                notify.status(self._summary())
            notify.watchdog()

    def _sleep(self, seconds: float) -> None:
        if jobs.ready([self._wake], seconds):
            os.eventfd_read(self._wake)

    def _finish(self) -> None:
        patience = self._settings.grace + JOIN_SECONDS
        notify.stopping(patience)
        with self._lock:  # no task begins any more: see reload
            left = [one for one in (*self._tasks.values(), *self._retired) if not one.ended]
        logger.info("the agent stops", extra={"fields": {"under_way": [one.vm.name for one in left if _busy(one)]}})
        told, end = 0, time.monotonic() + patience
        while left and time.monotonic() < end:
            if told != min(self._stops, 2):
                told = min(self._stops, 2)
                for one in left:
                    one.stop(self._settings.grace if told == 1 else 0.0)
            self._sleep(min(end - time.monotonic(), notify.watchdog_seconds() or RESCAN_SECONDS))
            notify.watchdog()
            left = [one for one in left if not one.ended]
        if left:
            logger.error("a checkpoint is left behind", extra={"fields": {"vms": [one.vm.name for one in left]}})

    def _summary(self) -> str:
        with self._lock:
            failing = sum(1 for one in self._tasks.values() if one.known.failures)
            count = len(self._tasks)
        return f"{count} schedules" + (f", {failing} failing" if failing else "")

    # What the verbs do.

    def reload(self) -> int:
        """Read the schedules' files again: begin, change and end tasks by them.  The number of schedules."""
        found: dict[str, schedule.Schedule] = {}
        damaged: dict[str, str] = {}
        for name in self._home.vm_names():
            try:
                if (wanted := schedule.load(self._home.vm(name))) is not None:
                    found[name] = wanted
            except errors.BlkckptError as error:
                damaged[name] = str(error)
        with self._lock:
            for one in [one for one in self._retired if one.ended]:
                self._retired.remove(one)
                one.close()
            for name in damaged.keys() - self._damaged.keys():
                logger.error("a schedule cannot be read", extra={"fields": {"vm": name, "error": damaged[name]}})
            self._damaged = damaged
            for name in self._tasks.keys() - found.keys():
                self._retire_locked(name)
            for name, wanted in found.items() if not self._stops else ():
                self._begin_locked(name, wanted)
            return len(self._tasks)

    def _retire_locked(self, name: str) -> None:
        gone = self._tasks.pop(name)
        gone.retire()
        self._retired.append(gone)

    def _begin_locked(self, name: str, wanted: schedule.Schedule) -> None:
        known = self._tasks.get(name)
        if known is not None and not known.ended:
            known.update(wanted)
            return
        if known is not None:  # its thread failed, which was logged
            known.close()
        if any(one.vm.name == name for one in self._retired):
            return  # it ends what it has under way; the next look at the files begins the new one
        made = self._tasks[name] = task.Task(self._host, self._home.vm(name), wanted)
        made.start()

    def run_now(self, vm: str) -> None:
        with self._lock:
            found = self._tasks.get(vm)
        if found is None:
            raise errors.NotFoundError(f"VM {vm} has no schedule; take one yourself: blkckpt checkpoint {vm}")
        if reason := readings.obstacle(found.vm, found.wanted):
            raise errors.StateError(f"no checkpoint of {vm} can be taken now: {reason}")
        found.ask()

    def shutdown(self) -> None:
        threading.Timer(ANSWER_SECONDS, self._signalled, (signal.SIGTERM, None)).start()

    def status(self) -> Mapping[str, Any]:
        with self._lock:
            tasks, damaged = list(self._tasks.values()), dict(self._damaged)
        shown = [service.Shown.of(one.vm.name, one.wanted, one.known, one.doing) for one in tasks]
        return {
            "pid": os.getpid(),
            "started_ns": self._began_ns,
            "metrics": list(self._addresses),
            "schedules": [asdict(one) for one in shown],
            "damaged": damaged,
        }

    def _schedule_readings(self) -> Iterable[metrics.ScheduleReading]:
        with self._lock:
            tasks = list(self._tasks.values())
        for one in tasks:
            shown = service.Shown.of(one.vm.name, one.wanted, one.known, one.doing)
            yield metrics.ScheduleReading(
                vm=shown.vm,
                every=shown.every_ns / 1e9,
                next_at=shown.next_ns / 1e9,
                last_success=shown.success["at_ns"] / 1e9 if shown.success else None,
                last_problem=shown.problem["at_ns"] / 1e9 if shown.problem else None,
                failures=shown.failures,
                under_way=shown.running is not None,
            )


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _busy(one: task.Task) -> bool:
    return one.known.running is not None

"""What the stores hold, measured now and then: ``blkckpt stats`` in a child, for the metrics.

To know how much deduplication saves, the tables of all images have to be read; so it is done seldom, by a niced child,
and not for a scrape.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blkckpt import log, paths
from blkckpt.daemon import jobs

TIMEOUT_SECONDS = 1800.0
NICE = 19

logger = log.get(__name__)


class Survey:
    """Measures at once, and then every *interval* seconds; *found* is told the ``stores`` of ``stats --json``."""

    def __init__(
        self,
        home: paths.Home,
        directory: Path,
        interval: float,
        found: Callable[[Sequence[Mapping[str, Any]]], None],
    ) -> None:
        self._home, self._interval, self._found = home, interval, found
        self._files = jobs.Files.of(directory, ",survey")  # no VM is called so
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Give up what is being measured, and end."""
        os.eventfd_write(self._stop, 1)
        if self._thread.ident is not None:
            self._thread.join(jobs.TAKE_BACK_SECONDS)
        if not self._thread.is_alive():
            os.close(self._stop)

    def _run(self) -> None:
        while True:
            try:
                self._measure()
            except Exception:
                logger.exception("the stores were not measured")
            if jobs.ready([self._stop], self._interval):
                return

    def _measure(self) -> None:
        with jobs.start(self._home, ["stats", "--json"], self._files) as job:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, job.process.pid, NICE)
            deadline = time.monotonic() + TIMEOUT_SECONDS
            if job.fileno() not in jobs.ready([job.fileno(), self._stop], deadline - time.monotonic()):
                job.end(jobs.Failure(jobs.TIMEOUT, "it took too long, or the agent was stopped"))
            result = job.result()
        self._files.remove()
        if isinstance(result, jobs.Failure):
            logger.warning("the stores were not measured", extra={"fields": {"error": result.text}})
        else:
            self._found(result.get("stores") or [])

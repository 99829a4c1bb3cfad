"""What the agent tells Prometheus.  The only module that knows ``prometheus_client``, with :mod:`exposition`.

Two kinds.  What happened is counted when it does: :class:`Metrics` has one method an event.  What is is asked for when
somebody scrapes: the schedules from the agent, the disks from their servers, with a deadline each and one for all, so
that a server that hangs costs its own figures only.

Names end in their unit; labels are ``vm``, ``disk``, ``store``, ``phase`` and ``reason`` (:data:`jobs.ALL_KINDS`,
:data:`task.PRUNE`), all of a bounded number of values.  Counters begin at zero with each start of the agent, as
Prometheus expects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client import core, registry

import blkckpt

STOPPED_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Seconds.  QEMU's own background snapshot stops a guest for 2 to 30 ms; an explicit pause for up to seconds."""
PREFAULT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""130 to 260 ms per GiB of guest memory."""
DURATION_BUCKETS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
_STORE_GAUGES = (
    ("logical", "store_logical_bytes", "What the checkpoints of the store stand for."),
    ("data", "store_data_bytes", "What of it is not zeros."),
    ("distinct", "store_distinct_bytes", "Each chunk of that once."),
    ("stored", "store_stored_bytes", "Those, compressed, with the tables that find them."),
    ("packs", "store_packs_bytes", "The packs of the store."),
    ("dead", "store_dead_bytes", "What of them no checkpoint needs."),
    ("dedup_ratio", "store_dedup_ratio", "Data by distinct data."),
    ("compression_ratio", "store_compression_ratio", "Distinct by stored data."),
)
"""Keys of a store in ``blkckpt stats --json``; measured now and then (:mod:`survey`)."""
SCRAPE_SECONDS = 8.0
"""For asking all disk servers; Prometheus itself waits 10 s by default."""


@dataclass(frozen=True, slots=True)
class ScheduleReading:
    """What a scrape says of one schedule; times are wall clock, seconds, None: never."""

    vm: str
    every: float
    next_at: float
    last_success: float | None
    last_problem: float | None
    failures: int
    under_way: bool


Disks = Sequence[Mapping[str, Any]]
AskDisks = Callable[[float], Iterable[tuple[str, Disks | None]]]
"""``(vm, its disks)`` of each VM that runs, until the given monotonic deadline; None where there is no answer."""


class Metrics:
    """The registry of one agent."""

    def __init__(self, schedules: Callable[[], Iterable[ScheduleReading]], disks: AskDisks) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        here = self.registry
        vm = ("vm",)
        prometheus_client.Info("blkckpt_agent", "The agent.", registry=here).info({"version": blkckpt.__version__})
        self._taken = prometheus_client.Counter(
            "blkckpt_checkpoints", "Scheduled checkpoints that were taken.", vm, registry=here
        )
        self._errors = prometheus_client.Counter(
            "blkckpt_errors", "Attempts that failed, by reason.", ("vm", "reason"), registry=here
        )
        self._skips = prometheus_client.Counter(
            "blkckpt_skips", "Times that a due checkpoint had to wait for the VM to run.", vm, registry=here
        )
        self._removed = prometheus_client.Counter(
            "blkckpt_pruned", "Checkpoints that keep rules have removed.", vm, registry=here
        )
        self._logical = prometheus_client.Counter(
            "blkckpt_logical_bytes", "What the checkpoints taken stand for: disks and memory.", vm, registry=here
        )
        self._added = prometheus_client.Counter(
            "blkckpt_added_bytes", "What they added to the store.", vm, registry=here
        )
        self._store = {
            key: prometheus_client.Gauge(f"blkckpt_{name}", text, ("store",), registry=here)
            for key, name, text in _STORE_GAUGES
        }
        self._stopped = prometheus_client.Histogram(
            "blkckpt_guest_stopped_seconds", "How long the guest stood still.", vm,
            buckets=STOPPED_BUCKETS, registry=here,
        )  # fmt: skip
        self._prefault = prometheus_client.Histogram(
            "blkckpt_prefault_seconds", "QEMU's preparation of guest memory before the stop, while the guest runs.", vm,
            buckets=PREFAULT_BUCKETS, registry=here,
        )  # fmt: skip
        self._duration = prometheus_client.Histogram(
            "blkckpt_checkpoint_seconds", "A checkpoint from beginning to end.", vm,
            buckets=DURATION_BUCKETS, registry=here,
        )  # fmt: skip
        self._phases = prometheus_client.Gauge(
            "blkckpt_phase_seconds", "The phases of the newest checkpoint (see `blkckpt show`).", ("vm", "phase"),
            registry=here,
        )  # fmt: skip
        here.register(_Schedules(schedules))
        here.register(_Disks(disks))

    def taken(self, vm: str, document: Mapping[str, Any]) -> None:
        """A checkpoint was taken: the JSON of ``blkckpt checkpoint``."""
        timings: Mapping[str, float] = document.get("timings") or {}
        logical, added = int(document["size"]), int(document["added_bytes"])
        self._taken.labels(vm).inc()
        self._logical.labels(vm).inc(logical)
        self._added.labels(vm).inc(max(added, 0))
        self._duration.labels(vm).observe(float(document["seconds"]))
        if document.get("stopped_ms") is not None:
            self._stopped.labels(vm).observe(float(document["stopped_ms"]) / 1000)
        if "prefault" in timings:
            self._prefault.labels(vm).observe(timings["prefault"])
        for phase, seconds in timings.items():
            self._phases.labels(vm, phase).set(seconds)

    def failed(self, vm: str, reason: str) -> None:
        self._errors.labels(vm, reason).inc()

    def skipped(self, vm: str) -> None:
        self._skips.labels(vm).inc()

    def measured(self, stores: Iterable[Mapping[str, Any]]) -> None:
        """The stores as ``blkckpt stats --json`` has them; a ratio that there is none of is left out."""
        for gauge in self._store.values():
            gauge.clear()
        for one in stores:
            for key, gauge in self._store.items():
                if one.get(key) is not None:
                    gauge.labels(str(one["path"])).set(float(one[key]))

    def pruned(self, vm: str, count: int) -> None:
        self._removed.labels(vm).inc(count)


class _Schedules(registry.Collector):
    def __init__(self, read: Callable[[], Iterable[ScheduleReading]]) -> None:
        self._read = read

    def describe(self) -> list[core.Metric]:
        return list(self._families().values())

    def collect(self) -> Iterable[core.Metric]:
        families = self._families()
        for one in self._read():
            values = {
                "interval": one.every,
                "next": one.next_at,
                "success": one.last_success,
                "failure": one.last_problem,
                "failures": one.failures,
                "under_way": int(one.under_way),
            }
            for name, value in values.items():
                if value is not None:
                    families[name].add_metric([one.vm], value)
        return families.values()

    @staticmethod
    def _families() -> dict[str, core.GaugeMetricFamily]:
        vm = ["vm"]
        return {
            name: core.GaugeMetricFamily(f"blkckpt_{metric}", text, labels=vm)
            for name, metric, text in (
                ("interval", "schedule_interval_seconds", "Time between two scheduled checkpoints."),
                ("next", "next_timestamp_seconds", "When the next checkpoint is due."),
                ("success", "last_success_timestamp_seconds", "When the newest scheduled checkpoint was taken."),
                ("failure", "last_failure_timestamp_seconds", "When an attempt failed last."),
                ("failures", "consecutive_failures", "Attempts that failed since the newest success."),
                ("under_way", "checkpoint_under_way", "Whether a scheduled checkpoint is being taken."),
            )
        }


_DISK_GAUGES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("disk_chain_depth", "Layers of the disk; 1: its base alone.", lambda disk: 1 + len(disk.get("overlays") or ())),
    (
        "disk_overlay_bytes",
        "What the overlays hold that is not in the base yet.",
        lambda disk: sum(int(one.get("bytes") or 0) for one in disk.get("overlays") or ()),
    ),
    ("disk_in_flight", "Requests being served.", lambda disk: disk.get("in_flight")),
    (
        "disk_failed",
        "Whether an fsync of the disk failed: its writes are refused.",
        lambda d: int(bool(d.get("error"))),
    ),
)
_DISK_COUNTERS = (
    ("reads", "disk_reads", "Read requests."),
    ("writes", "disk_writes", "Requests that changed something."),
    ("read_bytes", "disk_read_bytes", "Bytes read."),
    ("written_bytes", "disk_written_bytes", "Bytes written."),
    ("flushes", "disk_flushes", "Flush requests."),
    ("fast_requests", "disk_fast_requests", "Requests that the C fast path served."),
    ("waits", "disk_waits", "Requests (step 812) and windows of a commit that had to wait for one in flight."),
    ("drains", "disk_drains", "Times that requests in flight were waited for, to leave a layer."),
    ("drain_seconds", "disk_drain_seconds", "Time spent in that."),
)


class _Disks(registry.Collector):
    """Counters are those of the disk servers: they begin anew when one is started."""

    def __init__(self, ask: AskDisks) -> None:
        self._ask = ask

    def describe(self) -> list[core.Metric]:
        return [self._up(), *self._gauges(), *self._counters()]

    def collect(self) -> Iterable[core.Metric]:
        up, gauges, counters = self._up(), self._gauges(), self._counters()
        for vm, disks in self._ask(time.monotonic() + SCRAPE_SECONDS):
            up.add_metric([vm], int(disks is not None))
            for disk in disks or ():
                labels = [vm, str(disk.get("name"))]
                for (_, _, take), gauge in zip(_DISK_GAUGES, gauges, strict=True):
                    if (value := take(disk)) is not None:
                        gauge.add_metric(labels, float(value))
                for (key, _, _), counter in zip(_DISK_COUNTERS, counters, strict=True):
                    if disk.get(key) is not None:
                        counter.add_metric(labels, float(disk[key]))
        return [up, *gauges, *counters]

    @staticmethod
    def _up() -> core.GaugeMetricFamily:
        return core.GaugeMetricFamily(
            "blkckpt_disk_server_up", "Whether a running VM's disk server answers.", labels=["vm"]
        )

    @staticmethod
    def _gauges() -> list[core.GaugeMetricFamily]:
        return [
            core.GaugeMetricFamily(f"blkckpt_{name}", text, labels=["vm", "disk"]) for name, text, _ in _DISK_GAUGES
        ]

    @staticmethod
    def _counters() -> list[core.CounterMetricFamily]:
        return [
            core.CounterMetricFamily(f"blkckpt_{name}", text, labels=["vm", "disk"]) for _, name, text in _DISK_COUNTERS
        ]

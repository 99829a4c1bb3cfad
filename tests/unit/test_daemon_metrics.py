"""Metrics: what happened is counted, what is is asked for, all of it parses; what is shipped refers to nothing else.

The text comes through the agent's own HTTP server on a unix socket, as Prometheus would get it.
"""

from __future__ import annotations

import configparser
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click import testing
from prometheus_client import core
from prometheus_client.openmetrics import parser

from blkckpt.agent import rundir
from blkckpt.cli import main
from blkckpt.daemon import exposition, jobs, metrics, packaged

DISK = {
    "name": "vda", "overlays": [{"bytes": 4096}, {"bytes": 8192}], "in_flight": 3, "error": None, "reads": 10,
    "writes": 5, "read_bytes": 1000, "written_bytes": 2000, "flushes": 1, "fast_requests": None, "waits": 7,
    "drains": 2, "drain_seconds": 0.25,
}  # fmt: skip
TAKEN = {
    "name": "one", "size": 1 << 30, "added_bytes": 1 << 20, "seconds": 2.5, "stopped_ms": 4.2,
    "timings": {"prepare": 0.1, "prefault": 0.2, "stopped": 0.0042, "memory": 1.5},
}  # fmt: skip


def schedules() -> Iterator[metrics.ScheduleReading]:
    yield metrics.ScheduleReading("web", 900.0, 2000.5, 1000.5, None, 2, True)


def disks(_deadline: float) -> Iterator[tuple[str, Sequence[dict[str, Any]] | None]]:
    yield "web", [DISK]
    yield "silent", None


@pytest.fixture
def counted() -> metrics.Metrics:
    found = metrics.Metrics(schedules, disks)
    found.taken("web", TAKEN)
    found.taken("web", {**TAKEN, "stopped_ms": None, "timings": {}})
    found.failed("web", "busy")
    found.skipped("web")
    found.pruned("web", 3)
    found.measured([{"path": "/s", "dedup_ratio": 2.5, "compression_ratio": None, "logical": 7}])
    return found


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self.path))


@pytest.fixture
def served(counted: metrics.Metrics, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "metrics.sock"
    server = exposition.Exposition(rundir.bind(path), counted.registry)
    server.start()
    yield path
    server.close()


def get(connection: http.client.HTTPConnection, path: str = "/metrics") -> http.client.HTTPResponse:
    connection.request("GET", path, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    return connection.getresponse()


_parse: Callable[[str], Iterable[core.Metric]] = parser.text_string_to_metric_families


def families(response: http.client.HTTPResponse) -> dict[str, core.Metric]:
    assert response.status == 200 and "openmetrics-text" in (response.getheader("Content-Type") or "")
    text = response.read().decode()
    return {family.name: family for family in _parse(text)}


def values(found: dict[str, core.Metric]) -> dict[tuple[str, str], float]:
    """By sample name and the labels' values, sorted by label."""
    return {
        (sample.name, ",".join(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in found.values()
        for sample in family.samples
    }


def test_everything_that_happened_and_is_comes_out_as_openmetrics(served: Path) -> None:
    found = values(families(get(Connection(served))))
    assert found["blkckpt_checkpoints_total", "web"] == 2
    assert found["blkckpt_errors_total", "busy,web"] == 1
    assert found["blkckpt_skips_total", "web"] == 1
    assert found["blkckpt_pruned_total", "web"] == 3
    assert found["blkckpt_logical_bytes_total", "web"] == 2 << 30
    assert found["blkckpt_added_bytes_total", "web"] == 2 << 20
    assert found["blkckpt_guest_stopped_seconds_count", "web"] == 1, "one of the two stopped no guest"
    assert found["blkckpt_guest_stopped_seconds_bucket", "0.005,web"] == 1
    assert found["blkckpt_guest_stopped_seconds_bucket", "0.002,web"] == 0
    assert found["blkckpt_prefault_seconds_sum", "web"] == 0.2
    assert found["blkckpt_checkpoint_seconds_count", "web"] == 2
    assert found["blkckpt_phase_seconds", "memory,web"] == 1.5
    assert found["blkckpt_next_timestamp_seconds", "web"] == 2000.5
    assert found["blkckpt_last_success_timestamp_seconds", "web"] == 1000.5
    assert ("blkckpt_last_failure_timestamp_seconds", "web") not in found, "never is no time"
    assert found["blkckpt_consecutive_failures", "web"] == 2
    assert found["blkckpt_checkpoint_under_way", "web"] == 1
    assert found["blkckpt_disk_server_up", "web"] == 1 and found["blkckpt_disk_server_up", "silent"] == 0
    assert found["blkckpt_disk_chain_depth", "vda,web"] == 3
    assert found["blkckpt_disk_overlay_bytes", "vda,web"] == 12288
    assert found["blkckpt_disk_waits_total", "vda,web"] == 7
    assert found["blkckpt_disk_drain_seconds_total", "vda,web"] == 0.25
    assert ("blkckpt_disk_fast_requests_total", "vda,web") not in found, "the fast path is not loaded"
    assert found["blkckpt_store_dedup_ratio", "/s"] == 2.5
    assert ("blkckpt_store_compression_ratio", "/s") not in found


def test_the_port_is_of_the_loopback_and_other_paths_are_not_there(counted: metrics.Metrics, served: Path) -> None:
    assert get(Connection(served), "/").status == 404
    assert get(Connection(served), "/metrics/../../etc/passwd").status == 404
    listener = exposition.loopback(0)
    address = listener.getsockname()
    server = exposition.Exposition(listener, counted.registry)
    server.start()
    try:
        assert address[0] == "127.0.0.1"
        assert "blkckpt_checkpoints" in families(get(http.client.HTTPConnection("127.0.0.1", address[1], timeout=30)))
    finally:
        server.close()


def test_a_silent_peer_does_not_hold_up_the_next_for_long(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition._Handler, "timeout", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(served))
        assert get(Connection(served)).status == 200


def test_another_users_scrape_is_refused(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blkckpt.control.server.peer_of", lambda _: (1, 4711))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
        get(Connection(served))


def test_a_store_that_is_gone_is_not_told_of_any_more(counted: metrics.Metrics) -> None:
    counted.measured([])
    assert counted.registry.get_sample_value("blkckpt_store_dedup_ratio", {"store": "/s"}) is None


# What is shipped.


def known_names(counted: metrics.Metrics) -> set[str]:
    """Every sample's name that there can be, with or without a value yet."""
    suffixes = {
        "counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",),
    }  # fmt: skip
    return {family.name + suffix for family in counted.registry.collect() for suffix in suffixes[family.type]}


def used_names(text: str) -> set[str]:
    return set(re.findall(r"\bblkckpt_[a-z_]+", text))


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def test_the_dashboard_shows_metrics_that_exist(counted: metrics.Metrics) -> None:
    board = json.loads(packaged.read(packaged.DASHBOARD))
    used = set().union(*(used_names(one) for one in expressions(board)))
    assert used <= known_names(counted), used - known_names(counted)
    for wanted in (
        "blkckpt_guest_stopped_seconds_bucket", "blkckpt_prefault_seconds_sum", "blkckpt_added_bytes_total",
        "blkckpt_store_dedup_ratio", "blkckpt_disk_chain_depth", "blkckpt_disk_drain_seconds_total",
        "blkckpt_errors_total",
    ):  # fmt: skip
        assert wanted in used
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["targets"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])


def test_the_alerts_are_about_metrics_that_exist(counted: metrics.Metrics) -> None:
    text = packaged.read(packaged.ALERTS)
    assert text.count("- alert:") == text.count("expr:") == text.count("summary:") > 5
    assert used_names(text) <= known_names(counted)


@pytest.mark.parametrize("name", [packaged.SYSTEM, packaged.USER])
def test_the_units_say_what_the_agent_does(name: str) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(packaged.unit(name, ["/a b/blkckpt", "100%"]))
    service = unit["Service"]
    assert service["Type"] == "notify" and service["ExecStart"].startswith('"/a b/blkckpt" 100%% agent run')
    assert service["KillMode"] == "process", "a checkpoint under way outlives a killed agent"
    assert int(service["TimeoutStopSec"]) > 20 + jobs.TAKE_BACK_SECONDS
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
@pytest.mark.parametrize("words", [(), ("--user",)], ids=["system", "user"])
def test_systemd_has_no_complaint(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About what `agent files` writes, for the command that is installed here."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    made = testing.CliRunner().invoke(
        main.command, ["agent", "files", "--directory", str(tmp_path), "--unit", *words, "--json"]
    )
    assert json.loads(made.stdout) == {"files": [str(tmp_path / packaged.SYSTEM)]}
    done = subprocess.run(
        ["systemd-analyze", *words, "verify", "--man=no", tmp_path / packaged.SYSTEM], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

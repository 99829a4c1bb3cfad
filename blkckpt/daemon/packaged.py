"""What comes with the agent: systemd units, a Grafana dashboard, alert rules for Prometheus; in ``packaging/``.

A unit names ``/usr/local/bin/blkckpt``; :func:`unit` puts the command that is installed here in its place.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
import sys
from collections.abc import Sequence

SYSTEM = "blkckpt-agent.service"
USER = "blkckpt-agent.user.service"
DASHBOARD = "grafana-dashboard.json"
ALERTS = "alerts.yml"
COMMAND = "/usr/local/bin/blkckpt"


def read(name: str) -> str:
    """One of the files, as it is."""
    return importlib.resources.files("blkckpt.daemon").joinpath("packaging", name).read_text()


def unit(name: str, command: Sequence[str] | None = None) -> str:
    """The unit *name* for *command*, else for the ``blkckpt`` on the path, else for this interpreter's."""
    if command is None:
        found = shutil.which("blkckpt")
        command = [found] if found else [sys.executable, "-P", "-m", "blkckpt.cli.main"]
    words = " ".join(_quoted(word) for word in command)
    return re.sub(f"^ExecStart={re.escape(COMMAND)}", lambda _: f"ExecStart={words}", read(name), flags=re.MULTILINE)


def _quoted(word: str) -> str:
    """As ``systemd.service(5)`` reads it back: specifiers and escapes are taken for what they are."""
    word = word.replace("\\", "\\\\").replace("%", "%%")
    return word if re.fullmatch(r"[\w./@:+,=%-]+", word) else '"' + word.replace('"', '\\"') + '"'

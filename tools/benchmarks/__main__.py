"""``tools/bench``: run benches, print a table, write JSON."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from benchmarks import chart, context, figures, machine

MIN_WIDTH = 120
"""Of the table, also where the output is no terminal."""

BENCHES = ("io", "scale", "checkpoint", "restore", "fork", "diff", "view", "store", "history")

EPILOG = """\b
Examples:
  tools/bench io                      the data path beside qemu-nbd and nbdkit
  tools/bench checkpoint --quick      the pause that a checkpoint adds, in under 5 minutes
  tools/bench all --json out.json     everything, with all samples in a file
  tools/bench io --chart io.svg       the same as a picture (.png, .svg)
  tools/bench io --dir /mnt/fast      on another file system

\b
A ratio compares medians. "bar" is what the project promises; "missed" means it was not reached here; "ceiling" is
what a server reaches there that does less: nothing at all, or no more than the file.
The JSON is {"when", "machine", "notes", "figures": [{"name", "unit", "value", "peers", "bar", "holds", "ceiling"}]}.
Exit code: 0 measured, 1 failed, or with --strict when a bar was missed.
"""


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _measure(names: list[str], directory: Path, quick: bool, console: Console) -> list[figures.Figure]:
    found: list[figures.Figure] = []
    for name in names:
        bench = importlib.import_module(f"benchmarks.bench_{name}")
        console.print(f"[bold]{name}[/]: {bench.DESCRIPTION}", highlight=False)
        with tempfile.TemporaryDirectory(prefix=f"blkckpt-bench-{name}-", dir=directory) as own:
            found += bench.run(context.Context(Path(own), quick, console))
    return found


def _notes(name: str) -> str:
    """What one must know to read the figures of bench *name*, if there is something."""
    return str(getattr(importlib.import_module(f"benchmarks.bench_{name}"), "NOTES", ""))


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=click.Choice([*BENCHES, "all"]))
@click.option("--quick", is_flag=True, help="Fewer rounds and shorter samples: each bench ends within 5 minutes.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result there.")
@click.option(
    "--chart", "chart_path", type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the figures there; the suffix says how (.png, .svg).",
)  # fmt: skip
@click.option(
    "--dir", "directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default="/var/tmp",
    show_default=True, help="Where disks, stores and overlays are made and removed again.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 1 when a bar is missed.")
def main(
    names: tuple[str, ...], quick: bool, json_path: Path | None, chart_path: Path | None, directory: Path, strict: bool
) -> None:
    """Measure blkckpt beside its peers.  NAME is one of the benches, or all."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupted)
    chosen = list(BENCHES) if "all" in names else list(dict.fromkeys(names))
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: dict[str, object] = {"when": when, "machine": machine.describe(directory)}
    try:
        if chart_path is not None:
            chart.need()
        found = _measure(chosen, directory, quick, console)
    except context.BenchError as error:
        console.print(f"[red]bench:[/] {error}", highlight=False)
        sys.exit(1)
    notes = {name: text for name in chosen if (text := _notes(name))}
    result["notes"] = notes
    result["figures"] = [figure.as_json() for figure in found]
    output = Console()
    output.width = max(output.width, MIN_WIDTH)
    output.print(figures.table(found))
    for text in notes.values():
        output.print(text, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if chart_path is not None:
        chart.write(found, chart_path)
    if strict and any(figure.holds is False for figure in found):
        sys.exit(1)


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main(prog_name="tools/bench")

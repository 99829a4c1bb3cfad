"""Tables, times and progress lines."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from blkckpt.cli import output, progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_table_is_aligned_and_never_cut() -> None:
    long = "x" * 300
    text = output.table(("NAME", "SIZE", "NOTE"), [("a", "1.0 KiB", long), ("bbbbbb", "12 B", "")], right=["SIZE"])
    assert text.splitlines() == ["NAME       SIZE  NOTE", f"a       1.0 KiB  {long}", "bbbbbb     12 B"]


def test_table_without_rows_is_its_header() -> None:
    assert output.table(("A", "B"), []) == "A  B"


def test_fields() -> None:
    assert output.fields({"a": 1, "long": "x", "none": ""}) == "a:     1\nlong:  x\nnone:"


def test_timestamp() -> None:
    assert output.timestamp(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123Z"


def test_lines_come_now_and_then_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress.Lines(stream, clock) as lines:
        for step in range(12):
            lines.update("memory", step << 20, 12 << 20)
            clock.now += 1
    assert stream.getvalue().splitlines() == [
        "blkckpt: memory: 5.0 MiB of 12.0 MiB (41 %), 1.0 MiB/s, 7.0 s left",
        "blkckpt: memory: 10.0 MiB of 12.0 MiB (83 %), 1.0 MiB/s, 2.0 s left",
        "blkckpt: memory: 11.0 MiB of 12.0 MiB (91 %), 938.7 KiB/s, 1.1 s left",
    ]


def test_short_work_prints_no_line() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress.Lines(stream, clock) as lines:
        lines.update("copy", 1, 2)
        clock.now += 1
        lines.update("copy", 2, 2)
    assert stream.getvalue() == ""


def test_description_leaves_out_what_is_not_known() -> None:
    assert progress.describe("copy", 512, None, 0, 0.0) == "copy: 512 B"
    assert progress.describe("copy", 1024, 1024, 0, 1.0) == "copy: 1.0 KiB of 1.0 KiB (100 %), 1.0 KiB/s"
    assert progress.describe("copy", 0, 1024, 0, 1.0) == "copy: 0 B of 1.0 KiB (0 %)"


def test_a_resumed_stage_does_not_count_what_was_done_before() -> None:
    assert "1.0 KiB/s" in progress.describe("copy", 11 << 10, 20 << 10, 10 << 10, 1.0)


def test_reporter_fits_the_stream() -> None:
    assert isinstance(progress.reporter(stream=io.StringIO()), progress.Lines)
    assert type(progress.reporter(quiet=True)) is progress.Silent


def test_bars_draw_on_a_terminal() -> None:
    stream = io.StringIO()
    with progress.Bars(stream) as bars:
        bars.update("memory", 1 << 20, 2 << 20)
        bars.update("memory", 2 << 20, 2 << 20)


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_reader_that_went_away_is_no_error(kind: str) -> None:
    """``blkckpt … | head -1``: no traceback, no complaint, the status a shell gives for SIGPIPE."""
    call = "output.write_json(list(range(100000)))" if kind == "json" else "output.write('x' * 1000000)"
    script = (
        "import click\nfrom blkckpt.cli import output\n"
        f"@click.command()\ndef command() -> None: {call}\ncommand(prog_name='t')"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(30) == output.PIPE_CLOSED

"""The report: looked at in a real browser; everything in it is input."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click import testing

from blkckpt import paths
from blkckpt.cli import main
from blkckpt.store import manifest
from blkckpt.view import heatmap, report
from tests.support import browser, checkpoints

CHUNK = checkpoints.CHUNK
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">' & \x1b[31m\u202e"
TIMINGS = {
    "prepare": 0.2, "prefault": 0.3, "stopped": 0.004, "switch": 0.0004, "memory": 2.0, "copy": 1.0, "publish": 0.1,
    "commit": 0.5, "total": 3.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, the second with notes and a RAM block that were made up to do harm."""
    root = tmp_path_factory.mktemp("report")
    home = paths.home(root / "home")
    disk = bytearray(64 * CHUNK)
    previous = None
    for number, name in enumerate(("first", "second", "third")):
        disk[number * 9 * CHUNK : (number * 9 + 4) * CHUNK] = bytes([number + 1]) * (4 * CHUNK)
        checkpoints.checkpoint(
            home, name, {"vda": bytes(disk)}, number=number + 1, parent=previous, timings={**TIMINGS, EVIL[:60]: 1.0},
            memory={"<b>ram</b>": bytes([number]) * CHUNK}, notes=(EVIL,) if number == 1 else (),
        )  # fmt: skip
        previous = name
    path = root / "page.html"
    result = testing.CliRunner().invoke(
        main.command, ["--home", str(home.root), "report", "web", "-o", str(path), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["drawn"] == 3
    return path


class Tags(HTMLParser):
    """The tags of a page, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "src"]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_in_it_is_markup_that_was_not_meant(page: Path) -> None:
    tags = Tags()
    tags.feed(page.read_text())
    assert not tags.open
    assert not {"script", "img", "link", "iframe"} & set(tags.seen)
    assert "&lt;b&gt;ram&lt;/b&gt;" in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", ""), "it loads nothing"


def test_a_browser_shows_the_text_and_runs_nothing(page: Path) -> None:
    document = browser.dump(page)
    assert "<title>web: checkpoints</title>" in document, "no script has changed it"
    assert "&lt;script&gt;" in document and "\x1b" not in document and "\u202e" not in document
    assert document.count('<section class="ckpt"') == 3
    assert "Where it differs from first" in document and "What is in use (it is the first)" in document
    assert not browser.complaints(page)


@pytest.mark.parametrize(
    ("dark", "colours"), [(False, ("#f6f8fa", "#2f6fb0", "#9c1f22")), (True, ("#0e1318", "#5b9bdc", "#ffe0ad"))]
)
def test_a_browser_paints_it(page: Path, dark: bool, colours: tuple[str, ...]) -> None:
    """The page's ground, the bars and the hottest cells, in the theme's colours."""
    pixels = browser.paint(page, 1000, 1400, dark=dark)
    assert pixels.shape == (1400, 1000, 3)
    ground, bar, hot = (np.all(pixels == list(bytes.fromhex(colour[1:])), axis=2).sum() for colour in colours)
    assert ground > 50_000
    assert bar > 3_000
    assert hot > 200
    assert (pixels[0, 0] == list(bytes.fromhex(colours[0][1:]))).all()


def test_phases_follow_each_other() -> None:
    found = {one.phase: one for one in report.spans(TIMINGS)}
    assert found["prefault"].start == found["memory"].start == 0.2
    assert found["stopped"].start == pytest.approx(0.5)
    assert found["copy"].start == pytest.approx(0.504)
    assert found["publish"].start == pytest.approx(2.2)
    assert found["commit"].start == pytest.approx(2.3)
    assert report.spans({"memory": -5.0, "copy": 1e300}) == [report.Span("copy", 0.0, 1e9)]


def test_times_that_no_calendar_has() -> None:
    made = manifest.Manifest("web", "one", "0" * 32, 1 << 62, (), timings={"stopped": 1.0})
    hot = heatmap.Map("x", 5 * CHUNK, CHUNK, np.ones(5))
    text = report.page("web", [report.Checkpoint(made, None, 0, 0, (hot,))], (1 << 63) - 1)
    Tags().feed(text)
    assert "One checkpoint" in text


def test_mistakes(tmp_path: Path) -> None:
    home = paths.home(tmp_path / "home")
    run = testing.CliRunner()
    missing = run.invoke(main.command, ["--home", str(home.root), "report", "web", "-o", str(tmp_path / "x.html")])
    assert missing.exit_code == 4 and "no VM web" in missing.stderr
    checkpoints.checkpoint(home, "one", {"vda": b"x" * CHUNK})
    wrong = run.invoke(main.command, ["--home", str(home.root), "report", "web", "-o", str(tmp_path / "no" / "x.html")])
    assert wrong.exit_code == 4 and "x.html" in wrong.stderr

"""A VM's history as one HTML page: what was taken, how long it stopped the guest, where it changed.  Pure.

The page is self-contained: no script, nothing loaded (its content security policy says so), light or dark as the
reader has it, readable on paper and on a small screen.  Every name, note and number of a manifest is input: all text
goes through :func:`text`.
"""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blkckpt import units
from blkckpt.store import manifest
from blkckpt.view import heatmap

CELLS = heatmap.COLUMNS * 6
"""Cells of one map on the page."""

SMALL = 1 << 20
"""What is smaller (the ROMs among the RAM blocks) is drawn only when it changed."""

PHASES = {
    "prepare": "new layers are put over the disks",
    "prefault": "QEMU looks at all of memory",
    "stopped": "the guest stands still",
    "memory": "memory is received and stored",
    "copy": "the frozen layers are copied to the store",
    "publish": "the manifest is made durable",
    "commit": "the layers go back into the disks",
}
"""The timings that are drawn, in the order in which they begin."""

_BARS = 30
"""Checkpoints in the bar charts, the newest."""

_WIDTH, _LANE, _NAME = 720, 20, 84


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: its manifest, and what it differs in from *before* (None: it is the first, all is new).

    *maps* are empty when they are not shown for it; *disk* and *memory* are changed bytes, None when not known.
    """

    manifest: manifest.Manifest
    before: str | None
    disk: int | None
    memory: int | None
    maps: tuple[heatmap.Map, ...]


_Values = list[tuple[Checkpoint, float | None]]


@dataclass(frozen=True, slots=True)
class Span:
    """A phase on the time line, in seconds from the beginning."""

    phase: str
    start: float
    length: float


def page(vm: str, found: Sequence[Checkpoint], made_ns: int) -> str:
    """The page for *vm*; *found* are all its checkpoints, the oldest first."""
    body = "".join(
        (
            f"<header><h1>{text(vm)}</h1><p>{_summary(found)}</p></header>",
            _tiles(found),
            _bars(found),
            _history(found),
            "".join(_details(one) for one in reversed(found) if one.maps or one.manifest.timings),
            f"<footer>Made by blkckpt on {_clock(made_ns)}. Times are UTC. "
            "Changed bytes are counted in whole chunks of 64&nbsp;KiB.</footer>",
        )
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{text(vm)}: checkpoints</title><style>{_STYLE}{heatmap.style()}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def text(value: object) -> str:
    """*value* as text of the page, whatever is in it; what cannot be shown is a mark."""
    shown = "".join(one if one.isprintable() else "�" for one in str(value))
    return html.escape(shown)


def spans(timings: Mapping[str, float]) -> list[Span]:
    """The phases of one checkpoint on a line of time.

    A manifest has durations, not points in time; what follows what is fixed (:mod:`blkckpt.agent`): preparation; then
    QEMU's stream, of which pre-fault and stop are the beginning; the copy once the disks have switched; the manifest
    when both are there; the commit.
    """
    length = {name: min(max(timings.get(name, 0.0), 0.0), 1e9) for name in PHASES}
    begin = length["prepare"]
    stop = begin + length["prefault"]
    go = stop + length["stopped"]
    publish = max(begin + length["memory"], go + length["copy"], go)
    starts = {
        "prepare": 0.0, "prefault": begin, "stopped": stop, "memory": begin, "copy": go, "publish": publish,
        "commit": publish + length["publish"],
    }  # fmt: skip
    return [Span(name, starts[name], length[name]) for name in PHASES if length[name] > 0]


def _summary(found: Sequence[Checkpoint]) -> str:
    if not found:
        return "No checkpoints."
    first, last = found[0].manifest, found[-1].manifest
    if len(found) == 1:
        return f"One checkpoint, taken on {_clock(first.created_ns)}."
    return f"{len(found)} checkpoints, from {_clock(first.created_ns)} to {_clock(last.created_ns)}."


def _tiles(found: Sequence[Checkpoint]) -> str:
    if not found:
        return ""
    last = found[-1].manifest
    stopped = [one.manifest.timings["stopped"] for one in found if "stopped" in one.manifest.timings]
    changed = [one.disk for one in found[1:] if one.disk is not None]
    ram = sum(block.size for block in last.memory.blocks) if last.memory else 0
    tiles = [
        ("Disks", units.format_size(sum(disk.size for disk in last.disks)), f"{len(last.disks)} in the newest"),
        ("Memory", units.format_size(ram) if ram else "none", "in the newest"),
        (
            "Guest stopped",
            units.format_duration(statistics.median(stopped)) if stopped else "not known",
            f"median; at most {units.format_duration(max(stopped))}" if stopped else "no timings",
        ),
        (
            "Disk changed",
            units.format_size(statistics.median(changed)) if changed else "not known",
            "a checkpoint, in the median" if changed else "needs two checkpoints",
        ),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><span>{text(name)}</span><b>{text(value)}</b><small>{text(note)}</small></div>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _bars(found: Sequence[Checkpoint]) -> str:
    """Bars of the newest checkpoints: stopped windows, and what changed."""
    recent = found[-_BARS:]
    stopped: _Values = [(one, one.manifest.timings.get("stopped")) for one in recent]
    changed: _Values = [(one, None if one.before is None else one.disk) for one in recent]
    memory: _Values = [(one, None if one.before is None else one.memory) for one in recent]
    charts: list[tuple[str, _Values, Callable[[float], str]]] = [
        ("How long the guest stopped", stopped, units.format_duration),
        ("Disk changed", changed, units.format_size),
        ("Memory changed", memory, units.format_size),
    ]
    drawn = [
        f"<figure><figcaption>{title}</figcaption>{_chart(values, shown)}</figure>"
        for title, values, shown in charts
        if any(value is not None for _, value in values)
    ]
    return f'<section class="charts">{"".join(drawn)}</section>' if drawn else ""


def _chart(values: _Values, shown: Callable[[float], str]) -> str:
    most = max((value for _, value in values if value is not None), default=0) or 1
    rows = []
    for one, value in values:
        width = 0 if value is None else max(100 * value / most, 0.4 if value else 0)
        words = ("the first" if one.before is None else "not known") if value is None else shown(value)
        rows.append(
            f'<div class="bar"><span title="{text(one.manifest.name)}">{text(one.manifest.name)}</span>'
            f'<i><b style="width:{width:.2f}%"></b></i><em>{text(words)}</em></div>'
        )
    return "".join(rows)


_NUMBERS = ("Stopped", "Total", "Disk changed", "Memory changed", "Disks", "Memory")


def _history(found: Sequence[Checkpoint]) -> str:
    if not found:
        return ""
    columns = (
        "Checkpoint",
        "Taken",
        "After",
        "Kind",
        "Disks",
        "Memory",
        "Disk changed",
        "Memory changed",
        "Stopped",
        "Total",
    )
    head = "".join(f"<th{' class=n' if index > 3 else ''}>{name}</th>" for index, name in enumerate(columns))
    rows = "".join(_row(one) for one in reversed(found))
    return (
        f'<section><h2>History</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>"
    )


def _row(one: Checkpoint) -> str:
    m = one.manifest
    ram = sum(block.size for block in m.memory.blocks) if m.memory else None
    name = (
        f'<a href="#{text(m.id)}" title="{text(m.name)}">{text(m.name)}</a>' if one.maps or m.timings else text(m.name)
    )
    numbers = (
        _duration(m.timings.get("stopped")),
        _duration(m.timings.get("total")),
        _size(one.disk),
        _size(one.memory if ram is not None else None),
        units.format_size(sum(disk.size for disk in m.disks)),
        _size(ram),
    )
    cells = [
        f"<td>{name}</td>",
        f"<td>{_clock(m.created_ns)}</td>",
        *(f"<td class=n>{text(one)}</td>" for one in numbers),
    ]
    cells += [f"<td>{text(m.consistency)}</td>", f"<td>{text(m.parent or '-')}</td>"]
    return f"<tr>{''.join(cells)}</tr>"


def _details(one: Checkpoint) -> str:
    m = one.manifest
    notes = "".join(f"<li>{text(note)}</li>" for note in m.notes)
    parts = [f'<section class="ckpt" id="{text(m.id)}"><h2>{text(m.name)}</h2>', f"<p>{_facts(one)}</p>"]
    if notes:
        parts.append(f"<ul>{notes}</ul>")
    if m.timings:
        parts.append(f"<h3>How it was taken</h3>{_timeline(m.timings)}")
    if one.maps:
        where = f"Where it differs from {text(one.before)}" if one.before else "What is in use (it is the first)"
        parts.append(f"<h3>{where}</h3>")
        parts += [f'<div class="map"><div>{text(each.caption)}</div>{heatmap.inline(each)}</div>' for each in one.maps]
        parts.append(_legend())
    return "".join((*parts, "</section>"))


def _facts(one: Checkpoint) -> str:
    m = one.manifest
    words = [f"Taken on {_clock(m.created_ns)}", f"{text(m.consistency)} consistent"]
    if m.machine:
        words.append(f"{text(m.machine.machine_type)}, {text(m.machine.accel)}, QEMU {text(m.machine.qemu_version)}")
    return " · ".join(words)


def _timeline(timings: Mapping[str, float]) -> str:
    """Lanes of phases; the stop is so short that it is drawn at least as wide as can be seen."""
    found = spans(timings)
    end = max([*(one.start + one.length for one in found), 1e-9])
    scale = (_WIDTH - _NAME - 90) / end
    lanes = "".join(_lane(number, one, scale) for number, one in enumerate(found))
    height = len(found) * _LANE + 4
    listed = ", ".join(f"{text(name)} {_duration(value)}" for name, value in timings.items() if name not in PHASES)
    rest = f'<p class="rest">Also measured: {listed}.</p>' if listed else ""
    return (
        f'<svg class="time" viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" style="max-width:{_WIDTH}px">'
        f"<title>Time line of the phases</title>{lanes}</svg>{rest}"
    )


def _lane(number: int, one: Span, scale: float) -> str:
    top, left, width = number * _LANE, _NAME + one.start * scale, max(one.length * scale, 2.0)
    return (
        f"<g><title>{text(PHASES[one.phase])}: {_duration(one.length)}</title>"
        f'<text x="0" y="{top + 14}" class="t">{one.phase}</text>'
        f'<rect x="{left:.1f}" y="{top + 4}" width="{width:.1f}" height="12" rx="2" class="p p-{one.phase}"/>'
        f'<text x="{left + width + 5:.1f}" y="{top + 14}" class="t q">{_duration(one.length)}</text></g>'
    )


def _legend() -> str:
    return (
        '<p class="legend">'
        + "".join(
            f'<svg width="11" height="11"><rect width="11" height="11" class="s{shade}"/></svg> {words} &ensp;'
            for shade, words in enumerate(heatmap.LEGEND)
        )
        + "</p>"
    )


def _size(value: int | None) -> str:
    return "-" if value is None else units.format_size(value)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else units.format_duration(seconds)


def _clock(nanoseconds: int) -> str:
    """A point in time, UTC; a manifest's may be beyond any calendar."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(nanoseconds // 10**9))
    except (OverflowError, ValueError, OSError):
        return "an impossible time"


_STYLE = """
:root{color-scheme:light dark;--bg:#f6f8fa;--card:#fff;--ink:#1d2630;--soft:#5b6875;--line:#dbe2e8;--bar:#2f6fb0;
--stop:#c23b2e}
@media(prefers-color-scheme:dark){:root{--bg:#0e1318;--card:#161d24;--ink:#dde5ec;--soft:#93a1ae;--line:#2a3540;
--bar:#5b9bdc;--stop:#f0705f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 20px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{margin:0;font-size:30px;overflow-wrap:anywhere}h2{margin:0 0 10px;font-size:19px;overflow-wrap:anywhere}
h3{margin:18px 0 8px;font-size:14px;color:var(--soft);font-weight:600}
header p{margin:4px 0 20px;color:var(--soft)}
section,.tiles>div{background:var(--card);border:1px solid var(--line);border-radius:8px}
section{padding:18px 20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px}
.tiles>div{padding:12px 16px;display:flex;flex-direction:column}
.tiles span,.tiles small{color:var(--soft);font-size:13px}.tiles b{font-size:24px;line-height:1.35}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:8px 36px}
figure{margin:0}figcaption{font-weight:600;margin-bottom:8px}
.bar{display:grid;grid-template-columns:minmax(70px,30%) 1fr 78px;gap:10px;align-items:center;font-size:13px;
line-height:1.7}
.bar span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar i{height:11px;background:var(--line);border-radius:3px;overflow:hidden}
.bar i b{display:block;height:100%;background:var(--bar)}
.bar em{font-style:normal;text-align:right;color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:600}th,td{padding:5px 10px;border-bottom:1px solid var(--line);
white-space:nowrap;max-width:190px;overflow:hidden;
text-overflow:ellipsis}tbody tr:last-child td{border-bottom:0}.n{text-align:right;font-variant-numeric:tabular-nums}
a{color:var(--bar);text-decoration:none}a:hover{text-decoration:underline}
.ckpt p{margin:0 0 6px;color:var(--soft);font-size:13.5px}.ckpt ul{margin:6px 0;padding-left:20px}
.ckpt li{overflow-wrap:anywhere}
.map{margin:8px 0 12px}.map div{font-size:13px;margin-bottom:4px;overflow-wrap:anywhere}
.map svg{display:block}
svg .t{fill:var(--ink);font-size:12px}svg .q{fill:var(--soft)}
.p{fill:var(--bar)}.p-stopped{fill:var(--stop)}.p-prefault{opacity:.55}.p-prepare,.p-publish{opacity:.7}
.ckpt .legend{font-size:12px;margin-top:10px}.legend svg{vertical-align:-1px}
footer{color:var(--soft);font-size:12.5px;margin-top:24px}
@media print{body{background:none}section{break-inside:avoid}}
"""

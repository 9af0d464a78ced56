"""The page: one HTML file that needs nothing else, with what to use at the top and the curves below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape as escape_html

from reelbatch.tune.charts import CHARTS
from reelbatch.tune.figures import Point
from reelbatch.tune.report import Report, between_dtypes, columns, facts, instead, significant, size, unquiet
from reelbatch.tune.results import SweepResult
from reelbatch.wording import duration

CSS = """
:root { color-scheme: light dark; --ink: #111827; --soft: #4b5563; --line: #e5e7eb; --ground: #f3f4f6; --card: #fff;
  --good: #ecfdf5; --edge: #059669; --bad: #fef2f2; --bad-edge: #b91c1c; --warn: #fffbeb; --warn-edge: #d97706;
  --exact: #1d4ed8; --packed: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #a3adbb; --line: #374151; --ground: #0f141c; --card: #1a212c;
    --good: #0b3327; --edge: #10b981; --bad: #3b1518; --bad-edge: #f87171; --warn: #362a10; --warn-edge: #f59e0b;
    --exact: #7ea6ff; --packed: #fb923c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.15rem; margin: 0; } h2 { font-size: 1.05rem; margin: 28px 0 10px; }
.about { color: var(--soft); margin: 2px 0 18px; font-size: .92rem; }
.advice { background: var(--good); border: 2px solid var(--edge); border-radius: 12px; padding: 18px 22px;
  margin-bottom: 14px; }
.advice.none { background: var(--bad); border-color: var(--bad-edge); }
.use { font-size: 1.9rem; font-weight: 700; line-height: 1.2; } .why { margin: 6px 0 0; max-width: 75ch; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 14px 0 0; padding: 0; list-style: none; }
.tiles b { display: block; font-size: 1.25rem; } .tiles span { color: var(--soft); font-size: .88rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px; }
figure svg { width: 100%; height: auto; display: block; fill: var(--ink); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 7px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } .words { text-align: left; }
tr.chosen td { background: var(--good); font-weight: 700; }
code { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 2px 8px;
  font-size: .92rem; }
code.bare { border: 0; padding: 0; background: none; white-space: nowrap; font-size: .95em; }
ul.facts { color: var(--soft); font-size: .92rem; padding-left: 20px; }
.warn { background: var(--warn); border: 1px solid var(--warn-edge); border-radius: 10px; padding: 10px 16px;
  margin-bottom: 14px; }
@media (max-width: 520px) { .charts { grid-template-columns: 1fr; } .use { font-size: 1.4rem; } }
"""

ALT = {
    "throughput": "videos an hour against batch size; the band holds the middle half of the repeats",
    "latency": "seconds to the first and to the last video of a batch, against batch size",
    "memory": "peak memory in GiB against batch size",
    "drift": "largest pixel difference from the same video alone, against batch size",
}


def escape(text: str) -> str:
    """As HTML; names of options are set as code, and not broken across lines."""
    option = r"(--[a-z][a-z-]*(?: (?:\d+|packed|exact|component|block)\b)?)"
    return re.sub(option, r'<code class="bare">\1</code>', escape_html(text))


def page(report: Report, drawings: Sequence[dict[str, str]]) -> str:
    """The page. drawings: of each workload, the SVG text of each chart."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts = [
        f"<h1>Batch size for {escape(report.model)}</h1>",
        f'<p class="about">{escape(report.device)} · {escape(versions)} · {escape(report.when)} · measured in '
        f"{duration(report.seconds)}</p>",
    ]
    if report.interrupted:
        parts.append('<p class="warn">Stopped by hand: this is what was measured until then.</p>')
    parts += [f'<p class="warn">{escape(note)}</p>' for note in report.notes]
    for (name, sweeps), drawn in zip(report.workloads(), drawings, strict=True):
        parts.append(f"<h2>{escape(name)}</h2>")
        if line := unquiet(sweeps):
            parts.append(f'<p class="warn">{escape(line)}</p>')
        parts += [_advice(sweep, len(sweeps) > 1) for sweep in sweeps]
        if line := between_dtypes(sweeps):
            parts.append(f"<p>{escape(line)}</p>")
        figures = "".join(
            f'<figure role="img" aria-label="{escape(ALT[chart])}">{drawn[chart]}</figure>' for chart in CHARTS
        )
        parts.append(f'<div class="charts">{figures}</div>')
        parts.append(_table(sweeps))
        items = "".join(f"<li>{escape(line)}</li>" for line in facts(sweeps))
        parts.append(f'<ul class="facts">{items}</ul>')
    body = "\n".join(parts)
    title = f"reelbatch tune: {escape_html(report.model)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _advice(sweep: SweepResult, several: bool) -> str:
    point, choice = sweep.chosen, sweep.choice
    of = f"{escape(sweep.dtype)}: " if several else ""
    if point is None or choice is None:
        return (
            f'<section class="advice none"><div class="use">{of}{sweep.no_advice}</div>'
            f'<p class="why">{escape(sweep.why_none or "")}</p></section>'
        )
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in _tiles(point))
    option = f"--batch-size {choice.batch}" + (" --isolation packed" if choice.isolation == "packed" else "")
    use = f"{of}Use batch size {choice.batch}, {choice.isolation} isolation"
    if sweep.offload != "none":
        option += f" --offload {sweep.offload}"
        use += f", offload {sweep.offload}"
    return (
        f'<section class="advice"><div class="use">{use}</div>'
        f'<p class="why">In {escape(sweep.dtype)}: {escape(choice.why)} {escape(instead(sweep) or "")}</p>'
        f'<ul class="tiles">{tiles}</ul>'
        f"<p><code>reelbatch generate … {option}</code></p></section>"
    )


def _tiles(point: Point) -> list[tuple[str, str]]:
    rate = point.videos_per_hour
    return [
        (f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}", "videos an hour"),
        (f"{significant(point.last_video_seconds)} s", "to the last video of a batch"),
        (size(point.memory.peak), "memory at the peak"),
        _drift_tile(point),
    ]


def _drift_tile(point: Point) -> tuple[str, str]:
    quality = point.quality
    if quality is None:
        return "not compared", "with the same videos alone"
    own = quality.against.startswith(f"{point.dtype} ")
    of = "the same videos alone" if own else f"the same videos of {quality.against}"
    if own and quality.equal:
        return "equal, bit for bit", f"to {of}"
    return f"≤ {quality.largest} of 255", f"any pixel's difference from {of}"


def _table(sweeps: list[SweepResult]) -> str:
    shown = [(column, "" if column.is_number else ' class="words"') for column in columns(sweeps)]
    head = "".join(f"<th{side}>{escape(column.name)}</th>" for column, side in shown)
    rows = []
    for sweep in sweeps:
        for point in sweep.points:
            cells = "".join(f"<td{side}>{escape(column.cell(point))}</td>" for column, side in shown)
            mark = ' class="chosen"' if point is sweep.chosen else ""
            rows.append(f"<tr{mark}>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>All that was measured</h2><div class="scroll">{table}</div>'

"""The report: one HTML page beside the videos, to browse them and to see how the run went.

The page holds its data as JSON and draws the gallery from it; `report_page.js` keeps only what is near the window in
the document, so thousands of videos do no harm. Everything else is written out here and needs no script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from reelbatch.jobs.report_data import (
    BAR,
    Fault,
    Stretch,
    as_json,
    group_faults,
    moment,
    page_data,
    phases_of,
    seconds_of,
    stretches,
    throughput,
)
from reelbatch.jobs.schema import JobRow, State, VideoRow
from reelbatch.video import aside
from reelbatch.wording import duration, shorten

FILE = "report.html"
FAULTS_SHOWN, PROMPTS_SHOWN, ERROR_SHOWN = 50, 5, 2000


def write_report(
    folder: Path, jobs: Sequence[JobRow], rows: Sequence[VideoRow], *, title: str | None = None, when: str | None = None
) -> Path:
    """Writes `report.html` into the output folder, replacing an earlier one at once; returns its path.

    Args:
        folder: of the videos, to which the page links by their names.
        jobs: whose settings are shown; a command line under "command" in them can be copied.
        rows: the videos, in any state.
        title: the folder's name by default.
        when: the moment that the page describes; now by default.

    Raises:
        OSError: if the folder cannot be written to; an earlier report is then still whole.
    """
    when = when or datetime.now(UTC).isoformat(timespec="seconds")
    html = page(jobs, rows, title=title or folder.resolve().name, when=when)
    path = folder / FILE
    with aside(path) as part:
        part.write_bytes(html.encode("utf-8", "replace"))
    return path


def page(jobs: Sequence[JobRow], rows: Sequence[VideoRow], *, title: str, when: str) -> str:
    """The whole page."""
    faults = group_faults(rows)
    script = _part("js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        # Nothing but this script runs, and nothing is loaded but videos and pictures from beside the page.
        "policy": "default-src 'none'; media-src 'self' file:; img-src 'self' file: data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        "title": escape(title),
        "style": _part("css"),
        "about": _about(jobs, rows, when),
        "summary": _summary(rows),
        "count": f"{len(rows):,}",
        "failures": f"{sum(row.state == State.FAILED for row in rows):,}",
        "run": _run_section(rows),
        "faults": _faults_section(faults),
        "settings": _settings_section(jobs, rows),
        "data": as_json(page_data(jobs, rows, faults)),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: values[name[1]], _part("html"))


def _part(kind: str) -> str:
    return files("reelbatch.jobs").joinpath(f"report_page.{kind}").read_text(encoding="utf-8")


# -- the page's parts ---------------------------------------------------------------------------------------


def _about(jobs: Sequence[JobRow], rows: Sequence[VideoRow], when: str) -> str:
    models = list(dict.fromkeys(str(job.settings["model"]) for job in jobs if job.settings.get("model")))
    versions = [row.versions for row in rows if row.versions]
    made_by = ", ".join(f"{name} {number}" for name, number in versions[-1].items()) if versions else ""
    parts = [", ".join(models), made_by]
    shown = [f"<span>{escape(part)}</span>" for part in parts if part]
    return " · ".join([*shown, f"<span>as of {_time(when)}</span>"])


def _summary(rows: Sequence[VideoRow]) -> str:
    counts = Counter(row.state for row in rows)
    done = [row for row in rows if row.state == State.DONE]
    tiles = [(f"{len(done):,} of {len(rows):,}", "videos done")]
    times = stretches(rows)
    busy = sum(stretch.seconds for stretch in times)
    if done and busy > 0:
        rate = sum(len(stretch.ends) for stretch in times) * 3600 / busy
        tiles += [(_figure(rate), "videos an hour"), (duration(busy), "of work")]
    if counts[State.FAILED]:
        tiles.append((f"{counts[State.FAILED]:,}", "failed"))
    if size := sum(row.size or 0 for row in done):
        tiles.append((_bytes(size), "of files"))
    shown = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in tiles)
    return f'<ul class="tiles">{shown}</ul>{_states(counts, len(rows))}'


def _states(counts: Mapping[str, int], total: int) -> str:
    """A bar with a part for each state, and what they are; a press on one shows only its videos."""
    if not total:
        return '<p class="about">No video has been asked for yet.</p>'
    there = [state for state in BAR if counts.get(state)]
    parts = "".join(f'<i class="{state}" style="flex-grow:{counts[state]}"></i>' for state in there)
    legend = "".join(
        f'<button type="button" data-state="{state}"><i class="{state}"></i>{counts[state]:,} {state}</button>'
        for state in there
    )
    words = ", ".join(f"{counts[state]:,} {state}" for state in there)
    bar = f'<div class="bar" role="img" aria-label="{words}">{parts}</div>'
    return f'{bar}<div class="legend">{legend}</div>'


def _run_section(rows: Sequence[VideoRow]) -> str:
    return _throughput(stretches(rows)) + _time_by_phase(rows)


def _throughput(times: Sequence[Stretch]) -> str:
    drawn = throughput(times)
    top = max((rate for bins in drawn for *_, rate in bins), default=0.0)
    total = sum(stretch.seconds for stretch in times)
    if top <= 0 or total <= 0:
        return '<h2>Videos an hour</h2><p class="about">No video is done yet.</p>'
    step = _step(top / 4)
    top = math.ceil(top / step) * step
    pause = min(2.0, 30 / len(times))  # per cent of the width
    scale = (100 - pause * (len(times) - 1)) / total
    rects, pauses, places, left = [], [], [], 0.0
    for place, (stretch, bins) in enumerate(zip(times, drawn, strict=True)):
        if place:
            length = duration(stretch.start - times[place - 1].end)
            pauses.append(f'<i class="pause" style="left:{left:.2f}%;width:{pause:.2f}%" title="{length} pause"></i>')
            left += pause
        for start, end, rate in bins:
            x, width, height = left + (start - stretch.start) * scale, (end - start) * scale, 100 * rate / top
            rects.append(
                f'<rect x="{x:.3f}" y="{100 - height:.2f}" width="{max(width * 0.92, 0.05):.3f}" height="{height:.2f}">'
                f"<title>{_figure(rate)} an hour, {_clock(start)} to {_clock(end)} UTC</title></rect>"
            )
        places.append((left, stretch.start))
        left += stretch.seconds * scale
    lines, ticks = [], []
    for i in range(round(top / step) + 1):
        y = 100 - 100 * i * step / top
        lines.append(f'<line x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}"></line>')
        ticks.append(f'<span style="top:{y:.2f}%">{_figure(i * step)}</span>')
    svg = (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="videos an hour against time">'
        f'<g class="lines">{"".join(lines)}</g><g class="bins">{"".join(rects)}</g></svg>'
    )
    noted = "" if len(times) == 1 else f" In {len(times):,} stretches; pauses between them are drawn narrow."
    return (
        f'<h2>Videos an hour</h2><figure><div class="plot"><div class="up">{"".join(ticks)}</div>'
        f'<div class="area">{svg}{"".join(pauses)}</div><div class="along">{_along(places, scale, times)}</div></div>'
        f"<figcaption>Videos done in each span of time, by the hour; times are UTC.{noted}"
        "</figcaption></figure>"
    )


def _along(places: Sequence[tuple[float, float]], scale: float, times: Sequence[Stretch]) -> str:
    """Times below the plot.

    Args:
        places: where each stretch begins (per cent of the width), and its first moment.
    """
    shown = []
    for x in (0.0, 25.0, 50.0, 75.0, 100.0):
        left, start = max((place for place in places if place[0] <= x), default=places[0])
        end = next(stretch.end for stretch in times if stretch.start == start)
        shown.append(_label(x, min(end, start + (x - left) / scale), times))
    return "".join(shown)


def _label(x: float, at: float, times: Sequence[Stretch]) -> str:
    time = datetime.fromtimestamp(at, UTC)
    long = times[-1].end - times[0].start > 20 * 3600
    kind = "day" if long else "clock"
    text = time.strftime("%d %b %H:%M" if long else "%H:%M")
    side = " first" if x < 1 else " last" if x > 99 else ""
    stamp = time.isoformat(timespec="seconds")
    return f'<time class="{kind}{side}" style="left:{x:.2f}%" datetime="{stamp}">{text}</time>'


def _time_by_phase(rows: Sequence[VideoRow]) -> str:
    timed = [seconds for row in rows if row.state == State.DONE and (seconds := seconds_of(row))]
    phases = phases_of(rows)
    sums = {phase: sum(seconds.get(phase, 0.0) for seconds in timed) for phase in phases}
    total = sum(sums.values())
    if total <= 0:
        return '<h2>Time by phase</h2><p class="about">No times have been recorded yet.</p>'
    parts = "".join(
        f'<i class="phase{i % 6}" style="flex-grow:{sums[phase] / total:.5f}"></i>' for i, phase in enumerate(phases)
    )
    words = escape(", ".join(f"{phase} {sums[phase] / total:.1%}" for phase in phases))
    lines = []
    for i, phase in enumerate(phases):
        values = [seconds[phase] for seconds in timed if phase in seconds]
        cells = (f"{sums[phase] / total:.1%}", _short(median(values)), _short(max(values))) if values else ("",) * 3
        tds = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr><td class="words"><i class="phase{i % 6}"></i>{escape(phase)}</td>{tds}</tr>')
    return (
        f'<h2>Time by phase</h2><figure><div class="bar" role="img" aria-label="{words}">{parts}</div>'
        '<div class="scroll"><table><thead><tr><th class="words">phase</th><th>share</th><th>median of a video</th>'
        f"<th>longest</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div><figcaption>Of "
        f"{_videos(len(timed))}. A step that several videos share counts in full for each of them.</figcaption>"
        "</figure>"
    )


def _faults_section(faults: Sequence[Fault]) -> str:
    if not faults:
        return '<p class="about">Nothing has failed.</p>'
    shown = []
    for place, fault in enumerate(faults[:FAULTS_SHOWN]):
        count = len(fault.rows)
        prompts = "".join(
            f'<li><bdi dir="auto">{escape(shorten(row.prompt, 160))}</bdi> <span class="soft">seed {escape(row.seed)}'
            f"</span></li>"
            for row in fault.rows[:PROMPTS_SHOWN]
        )
        more = f"<li class=soft>and {count - PROMPTS_SHOWN:,} more</li>" if count > PROMPTS_SHOWN else ""
        error = fault.error if len(fault.error) <= ERROR_SHOWN else fault.error[:ERROR_SHOWN] + " …"
        shown.append(
            f'<article class="fault"><h3>{_videos(count)}</h3><pre dir="auto">{escape(error)}</pre>'
            f"<ul>{prompts}{more}</ul>"
            f'<button type="button" data-fault="{place}">Show in the gallery</button></article>'
        )
    if len(faults) > FAULTS_SHOWN:
        rest = sum(len(fault.rows) for fault in faults[FAULTS_SHOWN:])
        shown.append(f'<p class="about">and {len(faults) - FAULTS_SHOWN:,} more kinds, of {_videos(rest)}</p>')
    return "".join(shown)


def _settings_section(jobs: Sequence[JobRow], rows: Sequence[VideoRow]) -> str:
    of_job = Counter(row.job for row in rows)
    shown = []
    for job in reversed(jobs):
        settings = _without_passwords(job.settings)
        command = _command(settings.get("command"))
        line = f'<div class="copyable"><pre>{escape(command)}</pre>{_COPY}</div>' if command else ""
        text = escape(json.dumps(settings, indent=2, ensure_ascii=False, default=str))
        shown.append(
            f'<article class="job"><h2>Job {job.number}</h2><p class="about">begun {_time(job.created)} · '
            f'{_videos(of_job[job.number])}</p>{line}<div class="copyable"><pre>{text}</pre>{_COPY}</div></article>'
        )
    return "".join(shown) + _made_by(rows)


_COPY = '<button type="button" class="copy">Copy</button>'


def _made_by(rows: Sequence[VideoRow]) -> str:
    """Versions, weights and isolation that videos were made with, and how many by each."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row.state == State.DONE:
            used = {"isolation": row.isolation, "model_hash": row.model_hash, "versions": row.versions}
            counts[json.dumps(used, indent=2, ensure_ascii=False, default=str)] += 1
    return "".join(
        f'<article class="job"><h2>Made with</h2><p class="about">{_videos(count)}</p>'
        f'<div class="copyable"><pre>{escape(text)}</pre>{_COPY}</div></article>'
        for text, count in counts.most_common()
    )


def _command(recorded: Any) -> str:
    """As a shell takes it, whether it was recorded as a line or as words."""
    if isinstance(recorded, list | tuple):
        words = [str(word) for word in recorded]
        return shlex.join(words if words[:1] == ["reelbatch"] else ["reelbatch", *words])
    return recorded if isinstance(recorded, str) else ""


def _without_passwords(value: Any) -> Any:
    """A page is passed on to others; a database URL in a command may hold a password."""
    if isinstance(value, Mapping):
        return {key: _without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_passwords(inner) for inner in value]
    return re.sub(r"(\w://[^\s/:@]*):\S*@", r"\1:***@", value) if isinstance(value, str) else value


# -- figures ---------------------------------------------------------------------------------------------


def _videos(count: int) -> str:
    return f"{count:,} video{'' if count == 1 else 's'}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _short(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _step(about: float) -> float:
    """1, 2 or 5 times a power of ten, at least `about`."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= about)


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def _time(text: str) -> str:
    at = moment(text)
    if at is None:
        return escape(text)
    time = datetime.fromtimestamp(at, UTC)
    return f'<time class="full" datetime="{time.isoformat(timespec="seconds")}">{time:%Y-%m-%d %H:%M} UTC</time>'

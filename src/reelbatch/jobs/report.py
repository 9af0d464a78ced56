"""The report: one HTML page beside the videos, to browse them and to see how the run went.

The page holds its data as JSON and draws the gallery from it; `report_page.js` keeps only what is near the window in
the document, so thousands of videos do no harm. Everything else is written out here and needs no script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from reelbatch.jobs.manifest import JobRow, State, VideoRow
from reelbatch.video import aside
from reelbatch.wording import duration, shorten

FILE = "report.html"
PHASES = ("text", "denoise", "decode", "write")
"""Of a row's `seconds`, in the order in which they follow one another; others come after."""
MOST_BINS = 60
PAUSE_SECONDS = 60.0
"""Moments in which nothing ran, and which are too short to be drawn as a pause."""
FAULTS_SHOWN, PROMPTS_SHOWN, ERROR_SHOWN = 50, 5, 2000
BAR = (State.DONE, State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED)
SAFE_INTEGER = 2**53 - 1  # what a JavaScript number holds exactly
SAID_BY_ROW = ("id", "prompt", "seed", "tags")
"""Fields of a request that the row has too."""


def write_report(
    folder: Path, jobs: Sequence[JobRow], rows: Sequence[VideoRow], *, title: str | None = None, when: str | None = None
) -> Path:
    """Writes `report.html` into the output folder, replacing an earlier one at once; returns its path.

    Args:
        folder: of the videos, to which the page links by their names.
        jobs: whose settings are shown; a command line under "command" in them can be copied.
        rows: the videos, in any state.
        title: the folder's name by default.
        when: the moment that the page tells of; now by default.

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
        # Nothing but this script runs, and nothing is loaded but videos from beside the page.
        "policy": "default-src 'none'; media-src 'self' file:; img-src data:; style-src 'unsafe-inline'; "
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
        "data": as_json(_data(jobs, rows, faults)),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], _part("html"))


def _part(kind: str) -> str:
    return files("reelbatch.jobs").joinpath(f"report_page.{kind}").read_text(encoding="utf-8")


# -- the data -----------------------------------------------------------------------------------------


def as_json(value: Any) -> str:
    """Compact JSON that may stand in a `<script>`: no `<` ends it or opens a comment, no character breaks a line."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    """As JavaScript reads it back unchanged: large integers as text, no infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if abs(value) <= SAFE_INTEGER else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _data(jobs: Sequence[JobRow], rows: Sequence[VideoRow], faults: Sequence[Fault]) -> dict[str, Any]:
    """All rows, a list each. What many rows say alike (requests, less what the row says too, and versions) stands once.

    url: null where it is the file's name itself. fault: its place among `faults`, null for what has not failed.
    """
    columns = [*(column.name for column in VideoRow.__table__.columns), "url", "fault"]
    fault_of = {row.id: place for place, fault in enumerate(faults) for row in fault.rows}
    requests, versions = _Once(), _Once()
    lists = []
    for row in rows:
        url = file_url(row.file)
        record = row.record() | {
            "request": requests.place(_rest(row)),
            "versions": versions.place(row.versions),
            "url": None if url == row.file else url,
            "fault": fault_of.get(row.id),
        }
        lists.append([record[name] for name in columns])
    return {
        "columns": columns,
        "rows": lists,
        "requests": requests.values,
        "versions": versions.values,
        "phases": _phases(rows),
        "jobs": [job.number for job in jobs],
        "states": list(BAR),
    }


class _Once:
    """Values, each once; told by their place."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        place = self._places.setdefault(json.dumps(value, sort_keys=True, default=str), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


def _rest(row: VideoRow) -> dict[str, Any]:
    request = row.request or {}
    said = {name: getattr(row, name) for name in SAID_BY_ROW} | {"tags": list(row.tags or [])}
    as_row = {**request, "seed": str(request.get("seed")), "tags": list(request.get("tags") or [])}
    return {name: value for name, value in request.items() if name not in said or as_row[name] != said[name]}


def file_url(file: str) -> str:
    """Relative to the page."""
    return quote(os.fsencode(file.replace(os.sep, "/")), safe="/")


# -- what the rows tell -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """A time in which something ran without a longer pause; seconds since 1970. ends: when videos were done."""

    start: float
    end: float
    ends: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Fault:
    """Rows that failed alike. error: as the first of them has it."""

    error: str
    rows: tuple[VideoRow, ...]


def group_faults(rows: Iterable[VideoRow]) -> list[Fault]:
    """Failed rows by error, the most frequent first. Errors that differ only in numbers and names are one."""
    groups: dict[str, list[VideoRow]] = defaultdict(list)
    for row in rows:
        if row.state == State.FAILED:
            groups[_likeness(row)].append(row)
    faults = [Fault(group[0].error or "no error was recorded", tuple(group)) for group in groups.values()]
    return sorted(faults, key=lambda fault: -len(fault.rows))


def _likeness(row: VideoRow) -> str:
    error = row.error or ""
    for own in sorted(filter(None, (row.id, row.file, row.prompt)), key=len, reverse=True):
        error = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", "…", error)
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+(?:[.,]\d+)*", "#", error)


def stretches(rows: Iterable[VideoRow]) -> list[Stretch]:
    """When videos were made: the times that rows' `started` and `ended` cover, with short gaps closed."""
    spans, ends = [], []
    for row in rows:
        ended = _moment(row.ended)
        if ended is None or row.state not in (State.DONE, State.FAILED):
            continue
        started = _moment(row.started)
        spans.append((ended - sum(_seconds(row).values()) if started is None else min(started, ended), ended))
        if row.state == State.DONE:
            ends.append(ended)
    joined: list[list[float]] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] <= PAUSE_SECONDS:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    ends.sort()
    return [Stretch(start, end, tuple(at for at in ends if start <= at <= end)) for start, end in joined]


def throughput(found: Sequence[Stretch]) -> list[list[tuple[float, float, float]]]:
    """Of each stretch: (start, end, videos an hour), all bins about as long.

    A bin spans several batches, as the videos of a batch end together and would else be peaks with nothing between.
    """
    total = sum(stretch.seconds for stretch in found)
    gaps = [b - a for one in found for a, b in zip((one.start, *one.ends), one.ends, strict=False)]
    usual = sum(gap * gap for gap in gaps) / sum(gaps) if sum(gaps) > 0 else 0.0  # as a random moment meets it
    width = max(total / MOST_BINS, 4 * usual)
    drawn = []
    for stretch in found:
        count = max(1, round(stretch.seconds / width)) if width > 0 else 1
        length = stretch.seconds / count
        if length <= 0:
            drawn.append([(stretch.start, stretch.end, 0.0)])
            continue
        held = Counter(min(count - 1, int((at - stretch.start) / length)) for at in stretch.ends)
        edges = [stretch.start + i * length for i in range(count + 1)]
        drawn.append([(edges[i], edges[i + 1], held[i] * 3600 / length) for i in range(count)])
    return drawn


def _moment(text: str | None) -> float | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _seconds(row: VideoRow) -> dict[str, float]:
    found = row.seconds if isinstance(row.seconds, dict) else {}
    return {
        str(phase): float(value)
        for phase, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    }


def _phases(rows: Iterable[VideoRow]) -> list[str]:
    known = {phase for row in rows for phase in _seconds(row)}
    return [*(phase for phase in PHASES if phase in known), *sorted(known - set(PHASES))]


# -- the page's parts ---------------------------------------------------------------------------------------


def _about(jobs: Sequence[JobRow], rows: Sequence[VideoRow], when: str) -> str:
    models = list(dict.fromkeys(str(job.settings["model"]) for job in jobs if job.settings.get("model")))
    versions = [row.versions for row in rows if row.versions]
    made_by = ", ".join(f"{name} {number}" for name, number in versions[-1].items()) if versions else ""
    parts = [", ".join(models), made_by]
    told = [f"<span>{escape(part)}</span>" for part in parts if part]
    return " · ".join([*told, f"<span>as of {_time(when)}</span>"])


def _summary(rows: Sequence[VideoRow]) -> str:
    counts = Counter(row.state for row in rows)
    done = [row for row in rows if row.state == State.DONE]
    tiles = [(f"{len(done):,} of {len(rows):,}", "videos done")]
    found = stretches(rows)
    busy = sum(stretch.seconds for stretch in found)
    if done and busy > 0:
        rate = sum(len(stretch.ends) for stretch in found) * 3600 / busy
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


def _throughput(found: Sequence[Stretch]) -> str:
    drawn = throughput(found)
    top = max((rate for bins in drawn for *_, rate in bins), default=0.0)
    total = sum(stretch.seconds for stretch in found)
    if top <= 0 or total <= 0:
        return '<h2>Videos an hour</h2><p class="about">No video is done yet.</p>'
    step = _step(top / 4)
    top = math.ceil(top / step) * step
    pause = min(2.0, 30 / len(found))  # per cent of the width
    scale = (100 - pause * (len(found) - 1)) / total
    rects, pauses, places, left = [], [], [], 0.0
    for place, (stretch, bins) in enumerate(zip(found, drawn, strict=True)):
        if place:
            length = duration(stretch.start - found[place - 1].end)
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
    noted = "" if len(found) == 1 else f" In {len(found):,} stretches; pauses between them are drawn narrow."
    return (
        f'<h2>Videos an hour</h2><figure><div class="plot"><div class="up">{"".join(ticks)}</div>'
        f'<div class="area">{svg}{"".join(pauses)}</div><div class="along">{_along(places, scale, found)}</div></div>'
        f"<figcaption>Videos done in each span of time, by the hour; times are UTC.{noted}"
        "</figcaption></figure>"
    )


def _along(places: Sequence[tuple[float, float]], scale: float, found: Sequence[Stretch]) -> str:
    """Times below the plot. places: of each stretch, where it begins (per cent) and its first moment."""
    shown = []
    for x in (0.0, 25.0, 50.0, 75.0, 100.0):
        left, start = max((place for place in places if place[0] <= x), default=places[0])
        end = next(stretch.end for stretch in found if stretch.start == start)
        shown.append(_label(x, min(end, start + (x - left) / scale), found))
    return "".join(shown)


def _label(x: float, at: float, found: Sequence[Stretch]) -> str:
    moment = datetime.fromtimestamp(at, UTC)
    long = found[-1].end - found[0].start > 20 * 3600
    kind = "day" if long else "clock"
    text = moment.strftime("%d %b %H:%M" if long else "%H:%M")
    side = " first" if x < 1 else " last" if x > 99 else ""
    stamp = moment.isoformat(timespec="seconds")
    return f'<time class="{kind}{side}" style="left:{x:.2f}%" datetime="{stamp}">{text}</time>'


def _time_by_phase(rows: Sequence[VideoRow]) -> str:
    timed = [found for row in rows if row.state == State.DONE and (found := _seconds(row))]
    phases = _phases(rows)
    sums = {phase: sum(found.get(phase, 0.0) for found in timed) for phase in phases}
    total = sum(sums.values())
    if total <= 0:
        return '<h2>Time by phase</h2><p class="about">No times have been recorded yet.</p>'
    parts = "".join(
        f'<i class="phase{i % 6}" style="flex-grow:{sums[phase] / total:.5f}"></i>' for i, phase in enumerate(phases)
    )
    words = escape(", ".join(f"{phase} {sums[phase] / total:.1%}" for phase in phases))
    lines = []
    for i, phase in enumerate(phases):
        values = [found[phase] for found in timed if phase in found]
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
            made = {"isolation": row.isolation, "model_hash": row.model_hash, "versions": row.versions}
            counts[json.dumps(made, indent=2, ensure_ascii=False, default=str)] += 1
    return "".join(
        f'<article class="job"><h2>Made with</h2><p class="about">{_videos(count)}</p>'
        f'<div class="copyable"><pre>{escape(text)}</pre>{_COPY}</div></article>'
        for text, count in counts.most_common()
    )


def _command(found: Any) -> str:
    """As a shell takes it, whether it was recorded as a line or as words."""
    if isinstance(found, list | tuple):
        words = [str(word) for word in found]
        return shlex.join(words if words[:1] == ["reelbatch"] else ["reelbatch", *words])
    return found if isinstance(found, str) else ""


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
    at = _moment(text)
    if at is None:
        return escape(text)
    moment = datetime.fromtimestamp(at, UTC)
    return f'<time class="full" datetime="{moment.isoformat(timespec="seconds")}">{moment:%Y-%m-%d %H:%M} UTC</time>'

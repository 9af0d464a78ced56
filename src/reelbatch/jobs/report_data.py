"""What a report says, as data: rows as JSON, failures by error, and when videos were made."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from reelbatch.jobs.schema import JobRow, State, VideoRow

PHASES = ("text", "denoise", "decode", "write")
"""Keys of a row's `seconds`, in the order in which they follow one another; others come after."""
MOST_BINS = 60
PAUSE_SECONDS = 60.0
"""Moments in which nothing ran, and which are too short to be drawn as a pause."""
BAR = (State.DONE, State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED)
SAFE_INTEGER = 2**53 - 1  # what a JavaScript number holds exactly
IN_ROW = ("id", "prompt", "seed", "tags")
"""Fields of a request that the row has too."""


def as_json(value: Any) -> str:
    """Compact JSON that may stand in a `<script>`: no `<` ends it or opens a comment, no character breaks a line."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<\u2028\u2029\ud800-\udfff]", lambda character: f"\\u{ord(character[0]):04x}", text)


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


def page_data(jobs: Sequence[JobRow], rows: Sequence[VideoRow], faults: Sequence[Fault]) -> dict[str, Any]:
    """All rows, a list each. What many rows say alike (requests, less what the row says too, and versions) stands once.

    Two columns are added: `url`, null where it is the file's name itself, and `fault`, the row's place among `faults`,
    null for what has not failed.
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
        "phases": phases_of(rows),
        "jobs": [job.number for job in jobs],
        "states": list(BAR),
    }


class _Once:
    """Values, each once, and the place of each."""

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
    said = {name: getattr(row, name) for name in IN_ROW} | {"tags": list(row.tags or [])}
    as_row = {**request, "seed": str(request.get("seed")), "tags": list(request.get("tags") or [])}
    return {name: value for name, value in request.items() if name not in said or as_row[name] != said[name]}


def file_url(file: str) -> str:
    """Relative to the page."""
    return quote(os.fsencode(file.replace(os.sep, "/")), safe="/")


@dataclass(frozen=True)
class Stretch:
    """A time in which something ran without a longer pause; seconds since 1970.

    Attributes:
        ends: when videos were done.
    """

    start: float
    end: float
    ends: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Fault:
    """Rows that failed alike.

    Attributes:
        error: as the first of them has it.
    """

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
        ended = moment(row.ended)
        if ended is None or row.state not in (State.DONE, State.FAILED):
            continue
        started = moment(row.started)
        spans.append((ended - sum(seconds_of(row).values()) if started is None else min(started, ended), ended))
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


def throughput(times: Sequence[Stretch]) -> list[list[tuple[float, float, float]]]:
    """Bins of each stretch, as (start, end, videos an hour), all about as long.

    A bin spans several batches, as the videos of a batch end together and would else be peaks with nothing between.
    """
    total = sum(stretch.seconds for stretch in times)
    gaps = [b - a for one in times for a, b in zip((one.start, *one.ends), one.ends, strict=False)]
    usual = sum(gap * gap for gap in gaps) / sum(gaps) if sum(gaps) > 0 else 0.0  # as a random moment meets it
    width = max(total / MOST_BINS, 4 * usual)
    drawn = []
    for stretch in times:
        count = max(1, round(stretch.seconds / width)) if width > 0 else 1
        length = stretch.seconds / count
        if length <= 0:
            drawn.append([(stretch.start, stretch.end, 0.0)])
            continue
        held = Counter(min(count - 1, int((at - stretch.start) / length)) for at in stretch.ends)
        edges = [stretch.start + i * length for i in range(count + 1)]
        drawn.append([(edges[i], edges[i + 1], held[i] * 3600 / length) for i in range(count)])
    return drawn


def moment(text: str | None) -> float | None:
    """Seconds since 1970 of a time in ISO's form; None for anything else."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def seconds_of(row: VideoRow) -> dict[str, float]:
    """Seconds by phase, without what is no number."""
    recorded = row.seconds if isinstance(row.seconds, dict) else {}
    return {
        str(phase): float(value)
        for phase, value in recorded.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    }


def phases_of(rows: Iterable[VideoRow]) -> list[str]:
    """Phases that rows have times of, in their order."""
    known = {phase for row in rows for phase in seconds_of(row)}
    return [*(phase for phase in PHASES if phase in known), *sorted(known - set(PHASES))]

"""What lies ahead: how many videos, in how many batches, and the time and disk that they will take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from reelbatch.jobs.manifest import OPEN, State, VideoRow
from reelbatch.request import VideoRequest

if TYPE_CHECKING:
    from reelbatch.jobs.job import Job

LATEST = 200
"""Videos that the present pace is taken from."""
BYTES_A_FILE, BITS_A_PIXEL = 5000, 0.15
"""Size of an mp4 and its sidecar, where no file is there to measure; of the bundled model's videos, whose plain
pictures compress well."""


class Kind(NamedTuple):
    """Sizes in pixels. branches: 2 with classifier-free guidance."""

    width: int
    height: int
    frames: int
    steps: int
    branches: int


class Measured(NamedTuple):
    """What `tune` measured for such videos."""

    videos_per_hour: float
    when: date


class Pace(NamedTuple):
    """None before a video was made."""

    videos_per_hour: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class Outlook:
    """What a job will take.

    Attributes:
        videos, prompts: in all. kept: there already. batches: for the rest.
        seconds: None where nothing was measured.
        time_from, disk_from: what the estimate was made from, in words.
    """

    videos: int
    prompts: int
    kept: int
    batches: int
    batch_size: int
    kinds: Mapping[Kind, int]
    seconds: float | None
    time_from: str
    bytes: int
    disk_from: str
    free_bytes: int | None = None

    def record(self) -> dict[str, Any]:
        kinds = [{**kind._asdict(), "videos": count} for kind, count in self.kinds.items()]
        return {**vars(self), "kinds": kinds}


def look_ahead(
    job: Job, rows: Sequence[VideoRow], batch_size: int, measured: Measured | None, free_bytes: int | None = None
) -> Outlook:
    """What a job will take.

    Args:
        job: as it stands, or as it is foreseen.
        rows: all that its folder holds.
        measured: by `tune`, if it was.
    """
    left = [row.to_request() for row in job.open]
    seconds, time_from = _seconds(job.open, rows, measured)
    size, disk_from = _bytes(left, rows)
    return Outlook(
        videos=len(job.rows),
        prompts=len({row.prompt for row in job.rows}),
        kept=len(job.kept),
        batches=-(-len(left) // batch_size),
        batch_size=batch_size,
        kinds=Counter(_kind(request) for request in left),
        seconds=seconds,
        time_from=time_from,
        bytes=size,
        disk_from=disk_from,
        free_bytes=free_bytes,
    )


def pace(rows: Sequence[VideoRow]) -> Pace:
    """The pace of the latest videos, over the time in which any was made; what is left is weighed by its work."""
    done = sorted((row for row in rows if row.state == State.DONE and row.ended), key=lambda row: str(row.ended))
    done = done[-LATEST:]
    seconds = _covered([(_seconds_of(row.started), _seconds_of(row.ended)) for row in done])
    if not seconds:
        return Pace(None, None)
    units = sum(row.to_request().work for row in done)
    left = sum(work_left(row) for row in rows if row.state in OPEN)
    return Pace(3600 * len(done) / seconds, seconds * left / units)


def work_left(row: VideoRow) -> float:
    """The work of a video that is to be made, less the steps that were saved of it."""
    request = row.to_request()
    return request.work * (1 - min(1.0, row.step / (request.steps or 1)))


def _seconds_of(moment: str | None) -> float:
    return datetime.fromisoformat(str(moment)).timestamp()


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans of time."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _kind(request: VideoRequest) -> Kind:
    height, width, frames = request.size
    return Kind(width, height, frames, request.steps or 0, 2 if request.uses_cfg else 1)


def _seconds(left: Sequence[VideoRow], rows: Sequence[VideoRow], measured: Measured | None) -> tuple[float | None, str]:
    rate = pace(rows).videos_per_hour
    done = [row.to_request().work for row in rows if row.state == State.DONE]
    if rate is not None:
        per_work = 3600 / rate / (sum(done) / len(done))
        return per_work * sum(map(work_left, left)), "as the videos in this folder took"
    if measured is not None:
        return 3600 / measured.videos_per_hour * len(left), f"as `tune` measured on {measured.when}"
    return None, "nothing was measured yet: `reelbatch tune` does, and so does a first run with --limit"


def _bytes(left: Sequence[VideoRequest], rows: Sequence[VideoRow]) -> tuple[int, str]:
    pixels = sum(math.prod(request.size) for request in left)
    done = [row for row in rows if row.state == State.DONE and row.size]
    if done:
        share = sum(row.size or 0 for row in done) / sum(math.prod(row.to_request().size) for row in done)
        return int(share * pixels), "as the videos in this folder"
    source = "as the bundled model's videos; others may take several times as much"
    return int(len(left) * BYTES_A_FILE + pixels * BITS_A_PIXEL / 8), source

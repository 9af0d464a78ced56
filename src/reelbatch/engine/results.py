"""How requests end, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reelbatch.engine.events import Progress
from reelbatch.engine.sample import Sample
from reelbatch.request import VideoRequest
from reelbatch.video import Video


@dataclass(frozen=True)
class Failure:
    """A request that ended without a video."""

    request: VideoRequest
    error: Exception
    cancelled: bool = False


class Cancelled(Exception):
    """The request was cancelled by its owner."""


class FailedRequests(Exception):
    """Some requests of a `generate` call failed; the others finished and are in `videos`."""

    def __init__(self, videos: list[Video], failures: list[Failure]) -> None:
        reasons = "; ".join(f"{failure.request.id}: {failure.error}" for failure in failures)
        super().__init__(f"{len(failures)} of {len(videos) + len(failures)} requests failed: {reasons}")
        self.videos = videos
        self.failures = failures


def progress_of(outcomes: Sequence[Sample | Exception]) -> Iterator[Progress]:
    """What a step did for each sample that it advanced."""
    for sample in outcomes:
        if isinstance(sample, Sample):
            steps = sample.schedule.steps
            yield Progress(sample.id, "denoise", sample.step, steps, *sample.last_step)
            if sample.done:
                yield Progress(sample.id, "decode", sample.step, steps)


def end_of(result: Video | Failure) -> Progress:
    """That a request has ended."""
    request, steps = result.request, result.request.steps or 1
    if isinstance(result, Video):
        return Progress(request.id, "done", steps, steps)
    return Progress(request.id, "cancelled" if result.cancelled else "failed", 0, steps)

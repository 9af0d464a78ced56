"""Figures of one batch size: medians with their spread, and full runs extrapolated from a few steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from reelbatch.engine.planner import Isolation
from reelbatch.request import VideoRequest
from reelbatch.tune.quality import Quality
from reelbatch.tune.workload import steps_of

STEADY = 0.02
"""A median is steady once its standard error is below this share of it."""
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Spread:
    """A median, and between which values the middle half of the repeats lies (all of them, if three or fewer)."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, high = min(values), max(values)
        if len(values) > 3:
            low, _, high = statistics.quantiles(values, n=4)
        return cls(statistics.median(values), low, high, len(values))


def is_steady(values: Sequence[float]) -> bool:
    """Whether the median would hardly move with more repeats: its standard error, from the median absolute deviation
    (× 1.4826 is a normal distribution's standard deviation, and × 1.2533 / √n the error of its median)."""
    if len(values) < LEAST_REPEATS:
        return False
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return 1.2533 * 1.4826 * deviation / len(values) ** 0.5 <= STEADY * median


@dataclass(frozen=True)
class MemorySplit:
    """Bytes. weights: of all networks. process: what else is held before a run (0 on a GPU). The rest is what each
    phase takes on top; phases do not meet, so the peak is not their sum."""

    weights: int
    process: int
    text: int
    activations: int
    vae: int
    peak: int


@dataclass(frozen=True)
class Point:
    """One batch size, measured. Rates and times are of full runs, extrapolated from the steps that were measured.

    Attributes:
        seconds_per_step: of the whole batch.
        seconds_per_video: of one video's share of a batch, on the CPU with the writing of its file; `spread` is of it.
        first_video_seconds, last_video_seconds: from asking for a batch to its first and to its last decoded video.
        flops: achieved FLOP/s of the denoising steps. flops_share: of the device's measured matrix rate.
        joules_per_video: None where the device does not measure its energy.
    """

    dtype: str
    isolation: Isolation
    batch: int
    seconds_per_step: float
    seconds_per_video: float
    videos_per_hour: float
    spread: Spread
    first_video_seconds: float
    last_video_seconds: float
    memory: MemorySplit
    flops: float | None = None
    flops_share: float | None = None
    joules_per_video: float | None = None
    quality: Quality | None = None

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak


@dataclass(frozen=True)
class Repeat:
    """A few steps of each wave of a workload: the seconds of its text and of each step, and the power drawn (watts)."""

    waves: tuple[tuple[float, tuple[float, ...]], ...]
    watts: float | None = None

    @property
    def seconds(self) -> float:
        return sum(text + sum(steps) for text, steps in self.waves)

    @classmethod
    def pooled(cls, repeats: Sequence[Repeat]) -> Repeat:
        """All repeats as one: a step that was disturbed is then one of many."""
        watts = [repeat.watts for repeat in repeats if repeat.watts is not None]
        waves = []
        for wave in zip(*(repeat.waves for repeat in repeats), strict=True):
            texts, steps = zip(*wave, strict=True)
            waves.append((statistics.median(texts), tuple(chain.from_iterable(steps))))
        return cls(tuple(waves), statistics.median(watts) if watts else None)


@dataclass(frozen=True)
class Extrapolated:
    """Seconds of full runs, from a few steps."""

    per_video: float
    first: float
    last: float
    per_step: float


def extrapolate(
    waves: Sequence[Sequence[VideoRequest]],
    repeat: Repeat,
    decode_seconds: Callable[[VideoRequest], float],
    write_seconds: Callable[[VideoRequest], float] = lambda _: 0.0,
) -> Extrapolated:
    """What full runs of these waves take, if every step takes what the measured ones took.

    A video's share of a step is one part in as many as share it: places that get free are taken by the next in line.

    Args:
        write_seconds: what writing a video's file takes from the next steps; it is in `per_video` only.
    """
    total, videos = 0.0, 0
    firsts, lasts, per_step = [], [], []
    for wave, (text, measured) in zip(waves, repeat.waves, strict=True):
        step = statistics.median(measured)
        steps = [steps_of(request) for request in wave]
        decodes = [decode_seconds(request) for request in wave]
        total += text + step * statistics.fmean(steps) + sum(decodes) + sum(map(write_seconds, wave))
        videos += len(wave)
        firsts.append(text + step * min(steps) + decodes[steps.index(min(steps))])
        lasts.append(text + step * max(steps) + sum(decodes))
        per_step.append(step)
    return Extrapolated(total / videos, max(firsts), max(lasts), statistics.fmean(per_step))

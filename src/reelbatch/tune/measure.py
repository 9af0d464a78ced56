"""Measures one batch: the engine runs it, and what it reports is timed and weighed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from reelbatch.device import is_out_of_memory
from reelbatch.engine.engine import Engine, Failure, Progress
from reelbatch.engine.planner import Isolation
from reelbatch.loading.model import Model
from reelbatch.request import VideoRequest
from reelbatch.tune.gauges import Memory, tidy
from reelbatch.tune.quality import Quality
from reelbatch.tune.workload import steps_of
from reelbatch.video import Video

STEADY = 0.02
"""A median is steady once its standard error is below this share of it."""
LEAST_REPEATS, MOST_REPEATS = 3, 15


class Stopped(Exception):
    """A person asked to stop."""


class DoesNotFit(Exception):
    """A batch that ran out of memory, or that the engine had to divide."""


@dataclass
class Seen:
    """What one run showed. Seconds from the start; bytes above what was held before.

    text: until all prompts were encoded. steps: of each step of the whole batch. decodes: of each video, by id.
    first, last: until the first and the last video was decoded (0 if none was).
    """

    seconds: float = 0.0
    text: float = 0.0
    steps: list[float] = field(default_factory=list)
    decodes: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    last: float = 0.0
    denoise_bytes: int = 0
    decode_bytes: int = 0
    joules: float | None = None
    videos: dict[str, Video] = field(default_factory=dict)


def observe(
    model: Model,
    requests: Sequence[VideoRequest],
    isolation: Isolation,
    batch: int,
    *,
    attention: str = "auto",
    only_steps: int | None = None,
    memory: Memory | None = None,
    joules: Callable[[], float] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Seen:
    """Runs requests in batches of `batch`, every prompt encoded anew.

    Args:
        only_steps: leave the run after so many steps, undecoded; None runs to the end.
        memory: if given, the peaks of denoising and of decoding are taken, which costs time of its own.
        joules: energy so far.

    Raises:
        Stopped: as soon as `stopping` says so.
        DoesNotFit: if memory ran out, or if fewer than `batch` samples went through a step together.
        Exception: whatever else a request failed with.
    """
    model.family.text.forget()
    engine = Engine(model, isolation=isolation, max_batch_size=batch, keep_latents=True, attention=attention)
    seen, decoding_since, held = Seen(), 0.0, 0
    forwards, together, latest = 0, 0, 0.0

    def forwarded(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    def weigh(decoded: bool) -> None:
        if memory is not None:
            grown = memory.peak() - held
            if decoded:
                seen.decode_bytes = max(seen.decode_bytes, grown)
            else:
                seen.denoise_bytes = max(seen.denoise_bytes, grown)
            memory.reset()

    def progressed(progress: Progress) -> None:
        nonlocal decoding_since, together, latest
        now = time.perf_counter()
        if progress.phase == "denoise" and progress.seconds_per_step is not None:
            if not together:
                seen.text = now - started - progress.seconds_per_step
            latest, together = progress.seconds_per_step, max(together, progress.batch_size)
        elif progress.phase == "decode":
            weigh(decoded=False)
            decoding_since = time.perf_counter()
        elif progress.phase == "done":
            seen.decodes[progress.id] = now - decoding_since
            seen.first, seen.last = seen.first or now - started, now - started
            weigh(decoded=True)

    engine.on_progress = progressed
    for request in requests:
        engine.submit(request)
    if memory is not None:
        tidy(model.device)
        held = memory.used()
        memory.reset()
    energy = joules() if joules else 0.0
    hook = model.family.transformer.register_forward_pre_hook(forwarded)
    started = time.perf_counter()
    try:
        while engine.waiting or engine.running:
            if stopping():
                raise Stopped
            before = forwards
            for end in engine.step():
                if isinstance(end, Failure):
                    if is_out_of_memory(end.error):
                        raise DoesNotFit(str(end.error))
                    raise end.error
                seen.videos[end.request.id] = end
            seen.steps.append(latest)
            if forwards - before > 1:
                raise DoesNotFit(f"memory ran out, and the engine did a step in {forwards - before} parts")
            if only_steps is not None and len(seen.steps) >= only_steps:
                break
    finally:
        hook.remove()
    seen.seconds = time.perf_counter() - started
    if together < min(batch, len(requests)):
        raise DoesNotFit(f"the engine let only {together} of {batch} videos share a step")
    if joules:
        seen.joules = joules() - energy
    if memory is not None and not seen.decodes:
        weigh(decoded=False)
    return seen


# -- figures of one batch size ---------------------------------------------------------------------


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
    """Whether the median would hardly move with more repeats: its standard error, from the median deviation."""
    if len(values) < LEAST_REPEATS:
        return False
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return 1.2533 * 1.4826 * deviation / len(values) ** 0.5 <= STEADY * median


@dataclass(frozen=True)
class MemorySplit:
    """Bytes. weights: of all networks. process: what else is held before a run (0 on a GPU). The rest is what each
    phase takes on top; they do not meet, so the peak is not their sum."""

    weights: int
    process: int
    text: int
    activations: int
    vae: int
    peak: int


@dataclass(frozen=True)
class Point:
    """One batch size, measured. Rates and times are of full runs, extrapolated from the steps that were measured.

    seconds_per_step: of the whole batch.
    seconds_per_video: of one video's share of a batch, on the CPU with the writing of its file; `spread` is of it.
    first_video_seconds, last_video_seconds: from asking for a batch to its first and to its last decoded video.
    flops: achieved FLOP/s of the denoising steps; flops_share: of the device's measured matrix rate.
    joules_per_video: None where the device does not tell.
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
    """A few steps of each wave of a workload: the seconds of its text and of each step, and what it drew (watts)."""

    waves: tuple[tuple[float, tuple[float, ...]], ...]
    watts: float | None = None

    @property
    def seconds(self) -> float:
        return sum(text + sum(steps) for text, steps in self.waves)

    @classmethod
    def pooled(cls, repeats: Sequence[Repeat]) -> Repeat:
        """All repeats as one: a step that was disturbed is then one of many."""
        waves = zip(*(repeat.waves for repeat in repeats), strict=True)
        watts = [repeat.watts for repeat in repeats if repeat.watts is not None]
        return cls(
            tuple(
                (statistics.median(text for text, _ in wave), tuple(step for _, steps in wave for step in steps))
                for wave in waves
            ),
            statistics.median(watts) if watts else None,
        )


def write_seconds(video: Video) -> float:
    """What it takes to write a video's file."""
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        video.save(Path(folder, "video.mp4"))
        return time.perf_counter() - started


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
    firsts, lasts, weighted = [], [], []
    for wave, (text, measured) in zip(waves, repeat.waves, strict=True):
        step = statistics.median(measured)
        steps = [steps_of(request) for request in wave]
        decodes = [decode_seconds(request) for request in wave]
        total += text + step * statistics.fmean(steps) + sum(decodes) + sum(map(write_seconds, wave))
        videos += len(wave)
        firsts.append(text + step * min(steps) + decodes[steps.index(min(steps))])
        lasts.append(text + step * max(steps) + sum(decodes))
        weighted.append(step)
    return Extrapolated(total / videos, max(firsts), max(lasts), statistics.fmean(weighted))

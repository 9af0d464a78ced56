"""One sweep: batches of growing size, both isolations, of one workload in one dtype, within a budget of time.

Growing first; then all sizes again in turn until their medians are steady; then the videos against those alone; and a
full run of the chosen size as a check of the extrapolation.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reelbatch.engine.planner import Isolation
from reelbatch.loading.model import Model
from reelbatch.memory.placement import Offload
from reelbatch.request import VideoRequest
from reelbatch.tune.choose import NO_LIMITS, Choice, Limits, choose
from reelbatch.tune.gauges import counting, energy_meter, matrix_rate, memory_of, tidy, weight_bytes
from reelbatch.tune.measure import (
    MOST_REPEATS,
    DoesNotFit,
    Extrapolated,
    MemorySplit,
    Point,
    Repeat,
    Seen,
    Spread,
    Stopped,
    extrapolate,
    is_steady,
    observe,
    write_seconds,
)
from reelbatch.tune.quality import Alone, Quality, compare
from reelbatch.tune.workload import Workload, pixels, shape_of, steps_of
from reelbatch.video import Video

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ISOLATIONS: tuple[Isolation, ...] = ("exact", "packed")
STEPS, MOST_STEPS, STEP_SECONDS = 3, 8, 0.3
"""Steps of a repeat: more of them where they are quicker than so many seconds together."""
LONG_STEP = 10.0
"""Seconds from which a repeat is two steps."""
GAIN, PATIENCE = 1.03, 2
"""Throughput over the best so far that counts as a gain, and how many sizes without one end the growing."""
GROWING, REPEATING, COMPARING = 0.45, 0.45, 0.85
"""Shares of the time that is left which growing, then repeating, then comparing may take."""
MEMORY_MARGIN = 1.1
"""On the memory that a size is expected to take, as much more as it is larger than the last one."""
COMPARED = ((8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0), (2, 0.25), (1, 0.0))
"""Videos that are compared, and the share of their steps: the first for which the best sizes take half the time."""
COMPARED_BYTES = 2**30
"""Frames that are kept for comparing, at most."""

Key = tuple[Isolation, int]


class News(NamedTuple):
    """What is going on, and about how many seconds are left (at most, while it is not known how far it grows)."""

    text: str
    left: float | None = None
    at_most: bool = False
    done: bool = False


@dataclass(frozen=True)
class Check:
    """The extrapolation against full runs of the chosen size: seconds to the last video of a batch."""

    batch: int
    isolation: Isolation
    promised: float
    took: float
    runs: int

    @property
    def error(self) -> float:
        """Promised over taken, less one: +0.05 promises 5 % too long a time."""
        return self.promised / self.took - 1


@dataclass(frozen=True)
class Swept:
    """A sweep's result. `choice` is None if no size keeps to the limits; `why_none` then says why.

    memory_limit: bytes that were not to be passed. matrix_flops: the measured matrix rate. notes: why growing stopped,
    what could not be measured. `interrupted`: whether a person stopped it. offload: which weights were on the device;
    those that came and went are in the figures of the phases, and not in `weights`.
    """

    workload: str
    shapes: str
    dtype: str
    points: tuple[Point, ...]
    choice: Choice | None
    why_none: str | None
    check: Check | None
    matrix_flops: float
    memory_limit: int
    memory_what: str
    full_steps: int
    measured_steps: int
    seconds: float
    interrupted: bool
    notes: tuple[str, ...]
    offload: Offload = "none"

    @property
    def chosen(self) -> Point | None:
        if self.choice is None:
            return None
        for isolation in (self.choice.isolation, *ISOLATIONS):
            for point in self.points:
                if (point.isolation, point.batch) == (isolation, self.choice.batch):
                    return point
        return None

    @property
    def alone(self) -> Point | None:
        return next((point for point in self.points if point.batch == 1), None)


@dataclass
class _Record:
    """What is known of one batch size in one isolation."""

    repeats: list[Repeat] = field(default_factory=list)
    denoise_bytes: int = 0
    decode_bytes: int = 0
    quality: Quality | None = None


class Sweep:
    """Measures one workload in one dtype.

    Args:
        budget: seconds; batch size 1 is measured whatever it takes.
        limits: of the choice; growing stops at the first size that breaks one.
        reference: videos that others of the same workload gave alone, to compare with (another dtype's, say).
        largest: the largest batch size tried.
        memory_limit: bytes; None asks the device.
        tell: called with what is going on.
        stopping: asked between steps.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        model: Model,
        workload: Workload,
        *,
        budget: float,
        limits: Limits = NO_LIMITS,
        attention: str = "auto",
        reference: Alone | None = None,
        largest: int = 32,
        memory_limit: int | None = None,
        tell: Callable[[News], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.workload = model, workload
        self.budget, self.limits, self.attention = budget, limits, attention
        self.reference, self.largest = reference, largest
        self.alone: Alone | None = None
        self._tell, self._stopping, self._clock = tell, stopping, clock
        self._started = clock()
        self._memory = memory_of(model.device)
        self._joules = energy_meter(model.device)
        self._limit = memory_limit
        self._records: dict[Key, _Record] = {}
        self._decodes: dict[str, list[float]] = {}
        self._write_rate = 0.0  # seconds per byte of frames, where the steps are computed by the cores that write
        self._flops: dict[str, int] = {}
        self._weights = 0
        if model.offload == "none":
            self._weights = weight_bytes(
                model.family.transformer, model.family.decoder.vae, model.family.text.llama, model.family.text.clip
            )
        self._matrix = 0.0
        self._base = self._text_bytes = self._vae_bytes = 0
        self._steps = min(STEPS, workload.steps)
        self._check: Check | None = None
        self._full_runs: dict[Key, float] = {}
        self._notes: list[str] = []

    def run(self) -> Swept:
        """Everything, as far as budget and limits allow. What was measured is kept if a person stops it."""
        interrupted = False
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look through it again and again
        try:
            for phase in (self._prepare, self._grow, self._repeat, self._compare, self._verify):
                phase()
        except Stopped:
            interrupted = True
        except DoesNotFit as error:
            raise MemoryError(f"not even one video fits: {error}") from None
        finally:
            gc.unfreeze()
        tidy(self.model.device)
        return self._result(interrupted)

    def run_alone(self) -> Alone | None:
        """Only the videos alone, as a reference for others. None if a person stops it."""
        try:
            self._prepare()
            self._begin(("exact", 1))
            self._measure(("exact", 1))
            count, steps = self._affordable(COMPARING * self._left())
            self._make_alone(count, steps)
        except Stopped:
            return None
        return self.alone

    # -- alone -------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Warms up, and takes what does not depend on the batch: FLOPs, matrix rate, decoding, text, held memory."""
        device, dtype = self.model.device, self.model.family.transformer.dtype
        self._say("warming up: a video alone")
        shapes = {shape_of(request): request for request in self.workload.requests}
        for shape, request in shapes.items():
            with counting(self.model.family.transformer) as flops:
                self._observe([request], "exact", 1, only_steps=1)
                self._flops[shape] = flops()
        self._matrix = matrix_rate(device, dtype)
        largest = max(shapes.values(), key=pixels)
        self._observe([_shortened(largest, 1)], "exact", 1)
        tidy(device)
        self._base = self._memory.used()
        if self._limit is None:
            self._limit = self._memory.limit()
        self._weigh_text()
        for request in shapes.values():
            seen = self._observe([_shortened(request, 1)], "exact", 1, weigh=True)
            self._vae_bytes = max(self._vae_bytes, seen.decode_bytes)

    def _weigh_text(self) -> None:
        text = self.model.family.text
        longest = max(self.workload.requests, key=lambda request: len(request.prompt))
        text.forget()
        self._memory.reset()
        held = self._memory.used()
        text.encode(longest.prompt, longest.prompt_2)
        self._text_bytes = max(self._memory.peak() - held, 0)

    # -- growing -----------------------------------------------------------------------------------

    def _grow(self) -> None:
        end = self._clock() + GROWING * self._left()
        growing: dict[Isolation, int] = dict.fromkeys(ISOLATIONS, 0)  # sizes since the last gain
        best: dict[Isolation, float] = dict.fromkeys(ISOLATIONS, 0.0)
        for size in (size for size in SIZES if size <= self.largest):
            tried = [
                isolation for isolation in ISOLATIONS if isolation in growing and (size > 1 or isolation == "exact")
            ]
            for isolation in tried:
                if (size > 1 and not self._has_time(size, isolation, end)) or not self._begin((isolation, size)):
                    del growing[isolation]
            tried = [isolation for isolation in tried if isolation in growing]
            for _ in range(2):
                for isolation in tried:
                    self._measure((isolation, size))
            for isolation in tried:
                point = self._point((isolation, size))
                self._say(_line(point), done=True)
                if point.videos_per_hour >= GAIN * best[isolation]:
                    growing[isolation] = 0
                else:
                    growing[isolation] += 1
                best[isolation] = max(best[isolation], point.videos_per_hour)
                if size == 1:
                    best = dict.fromkeys(ISOLATIONS, point.videos_per_hour)
                if growing[isolation] >= PATIENCE:
                    self._note(f"{isolation}: stopped at {size}, as {PATIENCE} larger sizes brought no gain")
                    del growing[isolation]
                elif not self.limits.kept_by(point):
                    self._note(f"{isolation}: stopped at {size}, which breaks --max-latency or --max-memory")
                    del growing[isolation]
                    if size == 1:
                        return
            if not growing:
                return
        for isolation in growing:
            self._note(f"{isolation}: stopped at {self.largest}, the largest size asked for (--max-batch)")

    def _has_time(self, size: int, isolation: Isolation, end: float) -> bool:
        last = max(batch for _, batch in self._records)
        known: Key = (isolation, last) if (isolation, last) in self._records else ("exact", 1)
        point = self._point(known)
        expected = point.seconds_per_step / known[1] * size * (1 + 2 * self._steps * -(-self.workload.period // size))
        if self._clock() + expected <= end:
            return True
        self._note(
            f"{isolation}: stopped before {size}, which would have taken about {expected:.0f} s more (--budget gives "
            "more time)"
        )
        return False

    def _begin(self, key: Key) -> bool:
        """Warms up a size and weighs it; False if there is no memory for it."""
        isolation, size = key
        assert self._limit is not None
        expected = self._expected_bytes(key)
        if size > 1 and expected > self._limit:
            self._note(
                f"{isolation}: stopped before {size}: it would take up to {expected / 2**30:.2f} GiB, and the limit is "
                f"{self._limit / 2**30:.2f} GiB"
            )
            return False
        self._say(f"batch size {size}, {isolation}", at_most=True)
        waves = self.workload.waves(size)
        heaviest = max(waves, key=lambda wave: sum(map(pixels, wave)))
        try:
            seen = self._observe(heaviest, isolation, size, only_steps=1, weigh=True)
        except DoesNotFit as error:
            if size == 1:
                raise
            self._note(f"{isolation}: stopped before {size}: {error}")
            tidy(self.model.device)
            return False
        self._records[key] = _Record(denoise_bytes=seen.denoise_bytes)
        return True

    def _expected_bytes(self, key: Key) -> int:
        isolation, size = key
        smaller = [batch for kind, batch in self._records if batch < size and (kind == isolation or batch == 1)]
        if not smaller:
            return self._base
        last = max(smaller)
        record = self._records.get((isolation, last)) or self._records["exact", 1]
        weights = min(self.model.visiting_bytes("transformer"), record.denoise_bytes)  # those do not grow
        growth = weights + (record.denoise_bytes - weights) * size / last * MEMORY_MARGIN
        return self._base + int(max(growth, self._vae_bytes))

    def _measure(self, key: Key) -> None:
        """One repeat: a few steps of each wave."""
        isolation, size = key
        record = self._records[key]
        steps = self._steps_of_repeat(record)
        waves: list[tuple[float, tuple[float, ...]]] = []
        watts: list[float] = []
        for wave in self.workload.waves(size):
            seen = self._observe(wave, isolation, size, only_steps=steps)
            waves.append((seen.text, tuple(seen.steps)))
            if seen.joules is not None and seen.seconds:
                watts.append(seen.joules / seen.seconds)
        record.repeats.append(Repeat(tuple(waves), statistics.fmean(watts) if watts else None))

    def _steps_of_repeat(self, record: _Record) -> int:
        if not record.repeats:
            return self._steps
        step = statistics.median(record.repeats[0].waves[0][1])
        if step > LONG_STEP:
            return min(2, self._steps)
        return min(self.workload.steps, MOST_STEPS, max(self._steps, round(STEP_SECONDS / max(step, 1e-6))))

    # -- against alone -----------------------------------------------------------------------------

    def _compare(self) -> None:
        """Every size's videos against the same alone, the best sizes first."""
        share = COMPARING * self._left()
        end = self._clock() + share
        count, steps = self._sizes_of_reference() or self._affordable(share)
        self._make_alone(count, steps)
        order = sorted(self._records, key=lambda key: (key not in self._candidates(), key[1]))
        skipped: list[str] = []
        for key in order:
            expected = self._full_seconds(key, max(count, key[1]), steps)
            if self._clock() + expected > end and key != order[0]:
                skipped.append(f"{key[1]} {key[0]}")
                continue
            ahead = sum(self._full_seconds(other, max(count, other[1]), steps) for other in order[order.index(key) :])
            left = min(ahead, end - self._clock())
            self._say(f"comparing the videos of batch size {key[1]}, {key[0]}", left)
            self._compare_one(key, count, steps)
        if skipped:
            self._note(f"not compared with the videos alone, for want of time (--budget): {', '.join(skipped)}")

    def _compare_one(self, key: Key, count: int, steps: int) -> None:
        assert self.alone is not None
        isolation, size = key
        record = self._records[key]
        if size == 1:
            made = list(self.alone.videos)
        else:
            requests = [_shortened(request, steps) for request in self.workload.take(max(count, size))]
            try:
                seen = self._observe(requests, isolation, size, weigh=True)
            except DoesNotFit as error:
                self._note(f"{isolation} {size}: no full run: {error}")
                return
            record.denoise_bytes = max(record.denoise_bytes, seen.denoise_bytes)
            record.decode_bytes = max(record.decode_bytes, seen.decode_bytes)
            made = [seen.videos[str(i)] for i in range(count)]
            if self.alone.full and count <= size and self.workload.period == 1:
                self._full_runs[key] = seen.last
        scenes = self.workload.scenes[:count] if self.workload.scenes else None
        record.quality = compare(made, self.alone, self.reference or self.alone, scenes)

    def _make_alone(self, count: int, steps: int) -> None:
        videos: list[Video] = []
        expected = self._full_seconds(("exact", 1), 1, steps)
        for i, request in enumerate(self.workload.take(count)):
            self._say(f"video {i + 1} of {count} alone, to compare with", expected * (count - i))
            seen = self._observe([_shortened(request, steps)], "exact", 1)
            videos += seen.videos.values()
        full = steps >= self.workload.steps
        if not full:
            self._note(f"videos are compared after {steps} of {self.workload.steps} steps: all would take too long")
        dtype = self._dtype
        self.alone = Alone(tuple(videos), steps, full, f"{dtype} alone")
        if self.model.device.type == "cpu":
            self._write_rate = statistics.median(write_seconds(video) / video.frames.nbytes for video in videos)

    def _sizes_of_reference(self) -> tuple[int, int] | None:
        return None if self.reference is None else self.reference.sizes

    def _affordable(self, seconds: float) -> tuple[int, int]:
        """How many videos to compare, after how many steps."""
        full = self.workload.steps
        size = max(_frame_bytes(request) for request in self.workload.requests)
        most = max(1, COMPARED_BYTES // size)
        for count, share in COMPARED:
            steps = max(round(share * full), self._steps)
            best = {*self._candidates(), ("exact", 1)}
            cost = sum(self._full_seconds(key, max(count, key[1]), steps) for key in best if key in self._records)
            if count <= most and cost <= seconds / 2:
                return count, steps
        return 1, self._steps

    def _full_seconds(self, key: Key, videos: int, steps: int) -> float:
        """About what a full run of so many videos takes, with so many steps at most."""
        point = self._point(key)
        decode = statistics.fmean(self._decode_seconds(request) for request in self.workload.requests)
        alone = self._point(("exact", 1)).seconds_per_step
        step = min(point.seconds_per_step / point.batch, alone)  # a disturbed figure must not frighten
        return videos * (step * min(steps, self.workload.steps) + decode)

    # -- until steady ------------------------------------------------------------------------------

    def _repeat(self) -> None:
        """Sizes in turn, so that what disturbs the machine disturbs them alike; those that decide first."""
        end = self._clock() + REPEATING * self._left()
        while True:
            open_keys = [
                key
                for key, record in self._records.items()
                if len(record.repeats) < MOST_REPEATS and not is_steady(self._per_video(key))
            ]
            if not open_keys:
                return
            open_keys = [key for key in open_keys if key in self._deciding()] or open_keys
            cost = {key: self._repeat_seconds(key) for key in open_keys}
            if self._clock() + min(cost.values()) > end:
                sizes = ", ".join(f"{size} {isolation}" for isolation, size in open_keys)
                self._note(f"not steady yet when the time was up (--budget gives more): {sizes}")
                return
            for key in open_keys:
                if self._clock() + cost[key] > end:
                    continue
                self._say(f"again: batch size {key[1]}, {key[0]}", at_most=True)
                self._measure(key)
            for request in {shape_of(request): request for request in self.workload.requests}.values():
                self._observe([_shortened(request, 1)], "exact", 1)  # decoding too is measured again

    def _repeat_seconds(self, key: Key) -> float:
        return statistics.median(repeat.seconds for repeat in self._records[key].repeats)

    def _per_video(self, key: Key) -> list[float]:
        return [found.per_video for found in self._extrapolated(key)]

    # -- the check ---------------------------------------------------------------------------------

    def _verify(self) -> None:
        """A full run of the chosen size, against what was promised; the median of up to three."""
        key = self._chosen_key()
        if key is None:
            return
        isolation, size = key
        if self._records[key].quality is None and self.alone is not None:
            videos, steps = self.alone.sizes
            if self._full_seconds(key, max(videos, size), steps) <= self._left():
                self._compare_one(key, videos, steps)
        point = self._point(key)
        if point.last_video_seconds > self._left():
            if key in self._full_runs:
                self._check_against(key, [self._full_runs[key]])
                return
            self._note(
                f"the extrapolation was not checked: a full run takes about {point.last_video_seconds:.0f} s, more "
                "than is left of the budget (--budget)"
            )
            return
        wave = max(self.workload.waves(size), key=lambda wave: sum(pixels(r) * steps_of(r) for r in wave))
        took: list[float] = []
        while len(took) < 3 and (not took or self._left() > point.last_video_seconds):
            self._say(f"checking with a full run of {size}", point.last_video_seconds * (3 - len(took)), at_most=True)
            took.append(self._observe(wave, isolation, size).last)
        self._check_against(key, took)

    def _check_against(self, key: Key, took: Sequence[float]) -> None:
        promised = self._point(key).last_video_seconds
        self._check = Check(key[1], key[0], promised, statistics.median(took), len(took))

    # -- figures -----------------------------------------------------------------------------------

    def _point(self, key: Key) -> Point:
        isolation, batch = key
        record = self._records[key]
        waves = self.workload.waves(batch)
        pooled = Repeat.pooled(record.repeats)
        found = extrapolate(waves, pooled, self._decode_seconds, self._write_seconds)
        spread = Spread.of([one.per_video for one in self._extrapolated(key)])
        work = statistics.fmean(sum(self._flops[shape_of(request)] for request in wave) for wave in waves)
        vae = max(self._vae_bytes, record.decode_bytes)
        return Point(
            dtype=self._dtype,
            isolation=isolation,
            batch=batch,
            seconds_per_step=found.per_step,
            seconds_per_video=found.per_video,
            videos_per_hour=3600 / found.per_video,
            spread=spread,
            first_video_seconds=found.first,
            last_video_seconds=found.last,
            memory=MemorySplit(
                weights=self._weights,
                process=max(self._base - self._weights, 0),
                text=self._text_bytes,
                activations=record.denoise_bytes,
                vae=vae,
                peak=self._base + max(record.denoise_bytes, vae, self._text_bytes),
            ),
            flops=work / found.per_step if work else None,
            flops_share=work / found.per_step / self._matrix if work else None,
            joules_per_video=None if pooled.watts is None else pooled.watts * found.per_video,
            quality=record.quality,
        )

    def _extrapolated(self, key: Key) -> list[Extrapolated]:
        waves = self.workload.waves(key[1])
        return [
            extrapolate(waves, repeat, self._decode_seconds, self._write_seconds)
            for repeat in self._records[key].repeats
        ]

    def _decode_seconds(self, request: VideoRequest) -> float:
        return statistics.median(self._decodes[_frames_of(request)])

    def _write_seconds(self, request: VideoRequest) -> float:
        return self._write_rate * _frame_bytes(request)

    def _chosen_key(self) -> Key | None:
        points = [self._point(key) for key, record in self._records.items() if record.repeats]
        try:
            choice = choose(points, self.limits)
        except ValueError:
            return None
        found: Key = (choice.isolation, choice.batch)
        return found if found in self._records else ("exact", choice.batch)

    def _candidates(self) -> list[Key]:
        """The chosen size, and the best of each isolation."""
        try:
            choice = choose([self._point(key) for key in self._records], self.limits)
        except ValueError:
            return []
        return [(choice.isolation, choice.batch), ("exact", choice.exact_batch), ("packed", choice.packed_batch)]

    def _deciding(self) -> set[Key]:
        """One alone, and of each isolation the advised size, the fastest, and those next to it."""
        found = {("exact", 1), *self._candidates()}
        for isolation in ISOLATIONS:
            own = sorted(key for key in self._records if key[0] == isolation)
            if own:
                best = max(range(len(own)), key=lambda i: self._point(own[i]).videos_per_hour)
                found |= set(own[max(best - 1, 0) : best + 2])
        return {key for key in found if key in self._records}

    def _result(self, interrupted: bool) -> Swept:
        points = [self._point(key) for key, record in sorted(self._records.items()) if record.repeats]
        choice, why_none = None, None
        try:
            choice = choose(points, self.limits)
        except ValueError as error:
            why_none = str(error)
        unequal = [p for p in points if p.isolation == "exact" and p.quality is not None and not p.quality.equal]
        if unequal:
            sizes = ", ".join(str(point.batch) for point in unequal)
            self._note(f"exact isolation was not bit for bit equal to alone at {sizes}: please report this as a fault")
        return Swept(
            workload=self.workload.name,
            shapes=self.workload.shapes,
            dtype=self._dtype,
            points=tuple(points),
            choice=choice,
            why_none=why_none,
            check=self._check,
            matrix_flops=self._matrix,
            memory_limit=self._limit or 0,
            memory_what=self._memory.what,
            full_steps=self.workload.steps,
            measured_steps=self._steps,
            seconds=self._clock() - self._started,
            interrupted=interrupted,
            notes=tuple(self._notes),
            offload=self.model.offload,
        )

    # -- small parts -------------------------------------------------------------------------------

    def _observe(
        self,
        requests: Sequence[VideoRequest],
        isolation: Isolation,
        batch: int,
        only_steps: int | None = None,
        weigh: bool = False,
    ) -> Seen:
        seen = observe(
            self.model,
            requests,
            isolation,
            batch,
            attention=self.attention,
            only_steps=only_steps,
            memory=self._memory if weigh else None,
            joules=self._joules,
            stopping=self._stopping,
        )
        if not weigh:
            for request in requests:
                if request.id in seen.decodes:
                    self._decodes.setdefault(_frames_of(request), []).append(seen.decodes[request.id])
        return seen

    @property
    def _dtype(self) -> str:
        return str(self.model.precision)

    def _left(self) -> float:
        return self.budget - (self._clock() - self._started)

    def _say(self, text: str, left: float | None = None, at_most: bool = False, done: bool = False) -> None:
        self._tell(News(text, max(self._left(), 0.0) if left is None else left, at_most or left is None, done))

    def _note(self, text: str) -> None:
        self._notes.append(text)


def _shortened(request: VideoRequest, steps: int) -> VideoRequest:
    return request.model_copy(update={"steps": min(steps, steps_of(request))})


def _frames_of(request: VideoRequest) -> str:
    """What decoding depends on: guidance branches share one video."""
    return shape_of(request).removesuffix(" cfg")


def _frame_bytes(request: VideoRequest) -> int:
    return 3 * (request.height or 1) * (request.width or 1) * (request.frames or 1)


def _line(point: Point) -> str:
    return (
        f"batch size {point.batch}, {point.isolation}: {point.videos_per_hour:,.0f} videos an hour, "
        f"{point.last_video_seconds:.3g} s to the last, {point.memory.peak / 2**30:.2f} GiB"
    )

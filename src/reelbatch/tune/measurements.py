"""What was measured of one workload, by isolation and batch size, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from reelbatch.engine.planner import Isolation
from reelbatch.request import VideoRequest
from reelbatch.tune.choose import ISOLATIONS, NO_LIMITS, Choice, Limits, choose
from reelbatch.tune.figures import Extrapolated, MemorySplit, Point, Repeat, Spread, extrapolate
from reelbatch.tune.quality import Quality
from reelbatch.tune.workload import Workload, frame_bytes, frames_of, shape_of

Key = tuple[Isolation, int]
"""An isolation and a batch size."""
ALONE: Key = ("exact", 1)


@dataclass
class Record:
    """What is known of one batch size in one isolation.

    Attributes:
        step_bytes, decode_bytes: peaks, above what is held before a run.
        full_run: seconds of a run to its last video, if one ran in full.
    """

    repeats: list[Repeat] = field(default_factory=list)
    step_bytes: int = 0
    decode_bytes: int = 0
    quality: Quality | None = None
    full_run: float | None = None


@dataclass
class Measurements:
    """All of one workload in one dtype.

    Attributes:
        weights: bytes of all networks, or 0 where weights come and go.
        held: bytes in use before a run, weights included.
        text_bytes, decode_bytes: peaks of one video, above what is held.
        matrix_flops: the device's matrix rate, FLOP/s.
        flops: floating point operations of a step of one video, by shape.
        decodes: seconds of decoding one video, by frames.
        write_rate: seconds per byte of frames, where the steps are computed by the cores that write; else 0.
    """

    workload: Workload
    dtype: str
    limits: Limits = NO_LIMITS
    weights: int = 0
    held: int = 0
    text_bytes: int = 0
    decode_bytes: int = 0
    matrix_flops: float = 0.0
    flops: dict[str, int] = field(default_factory=dict)
    decodes: dict[str, list[float]] = field(default_factory=dict)
    write_rate: float = 0.0
    records: dict[Key, Record] = field(default_factory=dict)

    # -- figures -----------------------------------------------------------------------------------

    def point(self, key: Key) -> Point:
        """The figures of one batch size."""
        isolation, batch = key
        record, waves = self.records[key], self.workload.waves(batch)
        pooled = Repeat.pooled(record.repeats)
        whole = self._extrapolated(key, pooled)
        flops = statistics.fmean(sum(self.flops[shape_of(request)] for request in wave) for wave in waves)
        rate = flops / whole.per_step if flops else None
        decode_bytes = max(self.decode_bytes, record.decode_bytes)
        return Point(
            dtype=self.dtype,
            isolation=isolation,
            batch=batch,
            seconds_per_step=whole.per_step,
            seconds_per_video=whole.per_video,
            videos_per_hour=3600 / whole.per_video,
            spread=Spread.of(self.per_video(key)),
            first_video_seconds=whole.first,
            last_video_seconds=whole.last,
            memory=MemorySplit(
                weights=self.weights,
                process=max(self.held - self.weights, 0),
                text=self.text_bytes,
                activations=record.step_bytes,
                vae=decode_bytes,
                peak=self.held + max(record.step_bytes, decode_bytes, self.text_bytes),
            ),
            flops=rate,
            flops_share=rate / self.matrix_flops if rate is not None else None,
            joules_per_video=None if pooled.watts is None else pooled.watts * whole.per_video,
            quality=record.quality,
        )

    def points(self) -> list[Point]:
        """All sizes that were measured, by isolation and size."""
        return [self.point(key) for key, record in sorted(self.records.items()) if record.repeats]

    def per_video(self, key: Key) -> list[float]:
        """Seconds of a video, by each repeat."""
        return [self._extrapolated(key, repeat).per_video for repeat in self.records[key].repeats]

    def full_seconds(self, key: Key, videos: int, steps: int) -> float:
        """About what a full run of so many videos takes, with so many steps at most."""
        decode = statistics.fmean(map(self._decode_seconds, self.workload.requests))
        alone = self.point(ALONE).seconds_per_step
        step = min(self.point(key).seconds_per_step / key[1], alone)  # a disturbed figure must not count for much
        return videos * (step * min(steps, self.workload.steps) + decode)

    def _extrapolated(self, key: Key, repeat: Repeat) -> Extrapolated:
        return extrapolate(self.workload.waves(key[1]), repeat, self._decode_seconds, self._write_seconds)

    def _decode_seconds(self, request: VideoRequest) -> float:
        return statistics.median(self.decodes[frames_of(request)])

    def _write_seconds(self, request: VideoRequest) -> float:
        return self.write_rate * frame_bytes(request)

    # -- the choice --------------------------------------------------------------------------------

    def choice(self) -> Choice:
        """As of `choose`.

        Raises:
            NothingKept: if no size keeps to the limits.
            ValueError: if nothing was measured.
        """
        return choose(self.points(), self.limits)

    def candidates(self) -> list[Key]:
        """The chosen size, and the best of each isolation; none if nothing keeps to the limits."""
        try:
            choice = self.choice()
        except ValueError:
            return []
        keys: Sequence[Key] = (
            (choice.isolation, choice.batch),
            ("exact", choice.exact_batch),
            ("packed", choice.packed_batch),
        )
        return [key if key in self.records else ("exact", key[1]) for key in keys]

    def deciding(self) -> set[Key]:
        """One alone, and of each isolation the best size, the fastest, and those next to it."""
        keys = {ALONE, *self.candidates()}
        for isolation in ISOLATIONS:
            own = sorted(key for key in self.records if key[0] == isolation)
            if own:
                best = max(range(len(own)), key=lambda i: self.point(own[i]).videos_per_hour)
                keys |= set(own[max(best - 1, 0) : best + 2])
        return keys

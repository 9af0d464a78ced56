"""Comparison: every size's videos against the same videos alone."""

from __future__ import annotations

import statistics

from reelbatch.tune.bench import Bench
from reelbatch.tune.measure import DoesNotFit, write_seconds
from reelbatch.tune.measurements import ALONE, Key
from reelbatch.tune.quality import Alone, compare
from reelbatch.tune.workload import frame_bytes, shortened
from reelbatch.video import Video

TIME_SHARE = 0.85
"""Of the time that is left, what comparing may take."""
COMPARED = ((8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0), (2, 0.25), (1, 0.0))
"""Videos that are compared, and the share of their steps: the first for which the best sizes take half the time."""
COMPARED_BYTES = 2**30
"""Frames that are kept for comparing, at most."""


class Comparison:
    """Generates videos alone and compares with them.

    Args:
        reference: videos that others of the same workload gave alone, to compare with (another dtype's, say).

    Attributes:
        alone: this model's own videos alone; None before `run` or `generate_alone`.
    """

    def __init__(self, bench: Bench, reference: Alone | None = None) -> None:
        self.bench, self.reference = bench, reference
        self.alone: Alone | None = None

    def run(self) -> None:
        """Compares as many sizes as there is time for, the best first."""
        bench, measured = self.bench, self.bench.measured
        share = TIME_SHARE * bench.left()
        end = bench.clock() + share
        self.alone = self.generate_alone(share)
        best = measured.candidates()
        order = sorted(measured.records, key=lambda key: (key not in best, key[1]))
        skipped: list[str] = []
        for number, key in enumerate(order):
            seconds = [self.seconds(other) for other in order[number:]]
            if number and bench.clock() + seconds[0] > end:
                skipped.append(f"{key[1]} {key[0]}")
                continue
            left = min(sum(seconds), end - bench.clock())
            bench.say(f"comparing the videos of batch size {key[1]}, {key[0]}", left)
            self.compare(key)
        if skipped:
            bench.note(f"not compared with the videos alone, for want of time (--budget): {', '.join(skipped)}")

    def generate_alone(self, seconds: float) -> Alone:
        """Videos alone, as many as the reference has, or as can be compared in so many seconds."""
        bench, workload, measured = self.bench, self.bench.workload, self.bench.measured
        count, steps = self.reference.sizes if self.reference else self._affordable(seconds)
        videos: list[Video] = []
        each = measured.full_seconds(ALONE, 1, steps)
        for i, request in enumerate(workload.take(count)):
            bench.say(f"video {i + 1} of {count} alone, to compare with", each * (count - i))
            videos += bench.observe([shortened(request, steps)]).videos.values()
        full = steps >= workload.steps
        if not full:
            bench.note(f"videos are compared after {steps} of {workload.steps} steps: all would take too long")
        if bench.model.device.type == "cpu":
            measured.write_rate = statistics.median(write_seconds(video) / video.frames.nbytes for video in videos)
        return Alone(tuple(videos), steps, full, f"{measured.dtype} alone")

    def compare(self, key: Key) -> None:
        """The videos of one size, and what a full run of it shows besides."""
        assert self.alone is not None
        isolation, size = key
        record, workload = self.bench.measured.records[key], self.bench.workload
        count, steps = self.alone.sizes
        videos = list(self.alone.videos)
        if size > 1:
            requests = [shortened(request, steps) for request in workload.take(max(count, size))]
            try:
                trace = self.bench.observe(requests, isolation, size, weigh=True)
            except DoesNotFit as error:
                self.bench.note(f"{isolation} {size}: no full run: {error}")
                return
            record.step_bytes = max(record.step_bytes, trace.peaks["step"])
            record.decode_bytes = max(record.decode_bytes, trace.peaks["decode"])
            videos = [trace.videos[str(i)] for i in range(count)]
            if self.alone.full and count <= size and workload.period == 1:
                record.full_run = trace.last
        record.quality = compare(videos, self.alone, self.reference or self.alone, workload.scenes[:count])

    def seconds(self, key: Key) -> float:
        """About what comparing a size takes."""
        assert self.alone is not None
        count, steps = self.alone.sizes
        return self.bench.measured.full_seconds(key, max(count, key[1]), steps)

    def _affordable(self, seconds: float) -> tuple[int, int]:
        """How many videos to compare, after how many steps."""
        bench, measured = self.bench, self.bench.measured
        most = max(1, COMPARED_BYTES // max(map(frame_bytes, bench.workload.requests)))
        best = {*measured.candidates(), ALONE}
        for count, share in COMPARED:
            steps = max(round(share * bench.workload.steps), bench.steps)
            cost = sum(measured.full_seconds(key, max(count, key[1]), steps) for key in best)
            if count <= most and cost <= seconds / 2:
                return count, steps
        return 1, bench.steps

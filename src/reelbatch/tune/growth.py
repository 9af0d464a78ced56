"""Growth: batches of growing size, in both isolations, until one brings no gain, breaks a limit or does not fit."""

from __future__ import annotations

from reelbatch.device import free_memory, gibibytes
from reelbatch.engine.planner import Isolation
from reelbatch.tune.bench import Bench
from reelbatch.tune.choose import ISOLATIONS
from reelbatch.tune.figures import Point
from reelbatch.tune.measure import DoesNotFit
from reelbatch.tune.measurements import ALONE, Key, Record

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GAIN, PATIENCE = 1.03, 2
"""Throughput over the best so far that counts as a gain, and how many sizes without one end the growing."""
TIME_SHARE = 0.45
"""The share of the time left that growing may take."""
MEMORY_MARGIN = 1.1
"""On the memory that a size is expected to take, as much more as it is larger than the last one."""


class Growth:
    """Grows the batch of a bench that has a baseline."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._records = bench.measured.records
        self._end = bench.clock() + TIME_SHARE * bench.left()
        self._best: dict[Isolation, float] = {}
        self._without_gain: dict[Isolation, int] = dict.fromkeys(ISOLATIONS, 0)
        """Sizes since the last gain, of each isolation that still grows."""

    def run(self) -> None:
        """Measures every size twice, the isolations in turn.

        Raises:
            DoesNotFit: if not even one video fits.
        """
        for size in (size for size in SIZES if size <= self.bench.largest):
            keys: list[Key] = [(kind, size) for kind in self._without_gain] if size > 1 else [ALONE]
            for key in keys:
                if reason := self._reason_against(key) or self.begin(key):
                    self._stop(key[0], reason)
            keys = [key for key in keys if key[0] in self._without_gain]
            for key in keys * 2:
                self.bench.measure(key)
            for key in keys:
                self._judge(key)
            if not self._without_gain:
                return
        for isolation in list(self._without_gain):
            self._stop(isolation, f"stopped at {self.bench.largest}, the largest size asked for (--max-batch)")

    def begin(self, key: Key) -> str | None:
        """Warms up a size and weighs it; why that cannot be done, where memory ran out.

        Raises:
            DoesNotFit: for a batch of one.
        """
        isolation, size = key
        self.bench.say(f"batch size {size}, {isolation}", at_most=True)
        heaviest = max(self.bench.workload.waves(size), key=lambda wave: sum(request.pixels for request in wave))
        try:
            trace = self.bench.observe(heaviest, isolation, size, only_steps=1, weigh=True)
        except DoesNotFit as error:
            if size == 1:
                raise
            free_memory(whole=True)
            return f"stopped before {size}: {error}"
        self._records[key] = Record(step_bytes=trace.peaks["step"])
        return None

    def _reason_against(self, key: Key) -> str | None:
        """Why a larger size is not tried: for want of time or of memory."""
        size = key[1]
        if size == 1:
            return None
        known = self._last_of(key[0])
        repeat = 1 + 2 * self.bench.steps * -(-self.bench.workload.period // size)
        seconds = self.bench.measured.point(known).seconds_per_step / known[1] * size * repeat
        if self.bench.clock() + seconds > self._end:
            if known == ALONE:  # both isolations, three times, in the share of the time that growing has
                self.bench.needs = self.bench.seconds() + 3 * seconds / TIME_SHARE
            return (
                f"stopped before {size}, which would have taken about {seconds:.0f} s more (--budget gives more time)"
            )
        expected, limit = self._expected_bytes(known, size), self.bench.memory_limit or 0
        if expected <= limit:
            return None
        return f"stopped before {size}: it would take up to {gibibytes(expected)}, and the limit is {gibibytes(limit)}"

    def _last_of(self, isolation: Isolation) -> Key:
        """The largest size that was measured in an isolation; one alone counts for both."""
        return max((key for key in self._records if key[0] == isolation), key=lambda key: key[1], default=ALONE)

    def _expected_bytes(self, known: Key, size: int) -> int:
        measured, peak = self.bench.measured, self._records[known].step_bytes
        weights = min(self.bench.model.placement.visiting_bytes("step"), peak)  # those do not grow
        growth = weights + (peak - weights) * size / known[1] * MEMORY_MARGIN
        return measured.held + int(max(growth, measured.decode_bytes))

    def _judge(self, key: Key) -> None:
        """Whether growing goes on after a size."""
        isolation, size = key
        point = self.bench.measured.point(key)
        self.bench.say(_line(point), done=True)
        gained = point.videos_per_hour >= GAIN * self._best.get(isolation, 0.0)
        self._without_gain[isolation] = 0 if gained else self._without_gain[isolation] + 1
        for kind in ISOLATIONS if size == 1 else (isolation,):
            self._best[kind] = max(self._best.get(kind, 0.0), point.videos_per_hour)
        if self._without_gain[isolation] >= PATIENCE:
            self._stop(isolation, f"stopped at {size}, as {PATIENCE} larger sizes brought no gain")
        elif not self.bench.limits.kept_by(point):
            self._stop(isolation, f"stopped at {size}, which breaks --max-latency or --max-memory")
            if size == 1:
                self._without_gain.clear()

    def _stop(self, isolation: Isolation, why: str) -> None:
        del self._without_gain[isolation]
        self.bench.note(f"{isolation}: {why}")


def _line(point: Point) -> str:
    return (
        f"batch size {point.batch}, {point.isolation}: {point.videos_per_hour:,.0f} videos an hour, "
        f"{point.last_video_seconds:.3g} s to the last, {gibibytes(point.memory.peak)}"
    )

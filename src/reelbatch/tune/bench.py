"""Bench: runs batches of one workload on one model, within a budget of time, and keeps what they show."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reelbatch.engine.config import EngineConfig
from reelbatch.engine.planner import Isolation
from reelbatch.loading.model import Model
from reelbatch.memory.gauge import memory_of
from reelbatch.request import VideoRequest
from reelbatch.tune.choose import NO_LIMITS, Limits
from reelbatch.tune.figures import Repeat
from reelbatch.tune.gauges import energy_meter
from reelbatch.tune.measure import RunTrace, observe
from reelbatch.tune.measurements import Key, Measurements, Record
from reelbatch.tune.quality import Alone
from reelbatch.tune.results import Update
from reelbatch.tune.workload import Workload, frames_of

STEPS, MOST_STEPS, STEP_SECONDS = 3, 8, 0.3
"""Steps of a repeat: more of them where they are quicker than so many seconds together."""
LONG_STEP = 10.0
"""Seconds from which a repeat is two steps."""


@dataclass
class Bench:
    """What all phases of a sweep share.

    Args:
        budget: seconds for all of it; batch size 1 is measured whatever it takes.
        limits: of the choice; growing stops at the first size that breaks one.
        config: of the engine: attention.
        command: the command that measures the same anew with a budget for this sweep of so many seconds.
        reference: videos that others of the same workload gave alone, to compare with (another dtype's, say).
        largest: batch size tried.
        memory_limit: bytes that are not to be passed; None asks the device.
        on_update: called with what is going on.
        stopping: asked between steps.
        clock: seconds, for tests.

    Attributes:
        measured: figures so far.
        alone: the videos that were generated alone.
        steps: of the first repeat of a size.
        needs: seconds of a budget with which a second size could have been measured; None unless time was lacking.
        notes: why growing stopped, and what could not be measured.
    """

    model: Model
    workload: Workload
    budget: float
    limits: Limits = NO_LIMITS
    config: EngineConfig = EngineConfig()  # noqa: RUF009  (frozen)
    command: Callable[[float], str] = lambda seconds: f"reelbatch tune --budget {math.ceil(seconds / 60)}m"
    reference: Alone | None = None
    largest: int = 32
    memory_limit: int | None = None
    on_update: Callable[[Update], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.measured = Measurements(self.workload, str(self.model.precision), self.limits)
        self.alone: Alone | None = None
        self.steps = min(STEPS, self.workload.steps)
        self.needs: float | None = None
        self.notes: list[str] = []
        self.gauge = memory_of(self.model.device)
        self._joules = energy_meter(self.model.device)
        self._started = self.clock()

    # -- running -----------------------------------------------------------------------------------

    def observe(
        self,
        requests: Sequence[VideoRequest],
        isolation: Isolation = "exact",
        batch: int = 1,
        only_steps: int | None = None,
        weigh: bool = False,
    ) -> RunTrace:
        """`measure.observe`. weigh: with peaks of memory; its times then do not count.

        Raises:
            Stopped: if a person asks for it.
            DoesNotFit: if memory ran out.
        """
        gauge = self.gauge if weigh else None
        trace = observe(
            self.model, requests, isolation, batch, self.config, only_steps, gauge, self._joules, self.stopping
        )
        for request in () if weigh else requests:
            if request.id in trace.decodes:
                self.measured.decodes.setdefault(frames_of(request), []).append(trace.decodes[request.id])
        return trace

    def measure(self, key: Key) -> None:
        """One repeat: a few steps of each wave."""
        isolation, size = key
        record = self.measured.records[key]
        steps = self._steps_of_repeat(record)
        traces = [self.observe(wave, isolation, size, steps) for wave in self.workload.waves(size)]
        watts = [trace.joules / trace.seconds for trace in traces if trace.joules is not None]
        waves = tuple((trace.text, tuple(trace.steps)) for trace in traces)
        record.repeats.append(Repeat(waves, statistics.fmean(watts) if watts else None))

    def _steps_of_repeat(self, record: Record) -> int:
        if not record.repeats:
            return self.steps
        step = statistics.median(record.repeats[0].waves[0][1])
        if step > LONG_STEP:
            return min(2, self.steps)
        return min(self.workload.steps, MOST_STEPS, max(self.steps, round(STEP_SECONDS / max(step, 1e-6))))

    # -- time and words ----------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the start."""
        return self.clock() - self._started

    def left(self) -> float:
        """Seconds of the budget; below 0 once it is spent."""
        return self.budget - self.seconds()

    def say(self, text: str, left: float | None = None, at_most: bool = False, done: bool = False) -> None:
        """What is going on. left: seconds; those of the budget if not given."""
        seconds = self.left() if left is None else left
        self.on_update(Update(text, max(seconds, 0.0), at_most or left is None, done))

    def note(self, text: str) -> None:
        self.notes.append(text)

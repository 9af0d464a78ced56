"""Bench: runs batches of one workload on one model, within a budget of time, and keeps what they show."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

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
from reelbatch.tune.results import Update
from reelbatch.tune.workload import Workload, frames_of

STEPS, MOST_STEPS, STEP_SECONDS = 3, 8, 0.3
"""Steps of a repeat: more of them where they are quicker than so many seconds together."""
LONG_STEP = 10.0
"""Seconds from which a repeat is two steps."""


class Bench:
    """What all phases of a sweep share.

    Args:
        config: of the engine: attention.
        budget: seconds for all of it.
        on_update: called with what is going on.
        stopping: asked between steps.
        clock: seconds, for tests.

    Attributes:
        measured: figures so far.
        steps: of the first repeat of a size.
        notes: why growing stopped, and what could not be measured.
    """

    def __init__(
        self,
        model: Model,
        workload: Workload,
        config: EngineConfig,
        budget: float,
        limits: Limits = NO_LIMITS,
        on_update: Callable[[Update], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.workload, self.config, self.limits = model, workload, config, limits
        self.measured = Measurements(workload, str(model.precision), limits)
        self.gauge = memory_of(model.device)
        self.steps = min(STEPS, workload.steps)
        self.notes: list[str] = []
        self.clock, self._budget, self._started = clock, budget, clock()
        self._joules = energy_meter(model.device)
        self._on_update, self._stopping = on_update, stopping

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
        trace = observe(
            self.model,
            requests,
            isolation,
            batch,
            config=self.config,
            only_steps=only_steps,
            gauge=self.gauge if weigh else None,
            joules=self._joules,
            stopping=self._stopping,
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
        return self._budget - self.seconds()

    def say(self, text: str, left: float | None = None, at_most: bool = False, done: bool = False) -> None:
        """What is going on. left: seconds; those of the budget if not given."""
        at_most = at_most or left is None
        self._on_update(Update(text, max(self.left(), 0.0) if left is None else left, at_most, done))

    def note(self, text: str) -> None:
        self.notes.append(text)

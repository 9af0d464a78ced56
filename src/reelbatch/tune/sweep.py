"""One sweep: batches of growing size, both isolations, of one workload in one dtype, within a budget of time.

Growing first; then all sizes again in turn until their medians are steady; then the videos against those alone; and a
full run of the chosen size as a check of the extrapolation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from reelbatch.device import free_memory
from reelbatch.engine.config import EngineConfig
from reelbatch.loading.model import Model
from reelbatch.tune.baseline import prepare
from reelbatch.tune.bench import Bench
from reelbatch.tune.choose import NO_LIMITS, Choice, Limits
from reelbatch.tune.comparison import TIME_SHARE, Comparison
from reelbatch.tune.growth import Growth
from reelbatch.tune.measure import DoesNotFit, Stopped
from reelbatch.tune.measurements import ALONE
from reelbatch.tune.quality import Alone
from reelbatch.tune.repeats import repeat
from reelbatch.tune.results import Check, SweepResult, Update
from reelbatch.tune.verification import verify
from reelbatch.tune.workload import Workload


class Sweep:
    """Measures one workload in one dtype.

    Args:
        budget: seconds; batch size 1 is measured whatever it takes.
        limits: of the choice; growing stops at the first size that breaks one.
        config: of the engine: attention.
        reference: videos that others of the same workload gave alone, to compare with (another dtype's, say).
        largest: the largest batch size tried.
        memory_limit: bytes; None asks the device.
        on_update: called with what is going on.
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
        config: EngineConfig = EngineConfig(),  # noqa: B008  (frozen)
        reference: Alone | None = None,
        largest: int = 32,
        memory_limit: int | None = None,
        on_update: Callable[[Update], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._bench = Bench(model, workload, config, budget, limits, on_update, stopping, clock)
        self._comparison = Comparison(self._bench, reference)
        self._largest, self._memory_limit = largest, memory_limit
        self._check: Check | None = None

    @property
    def alone(self) -> Alone | None:
        """The videos that were generated alone, as a reference for others."""
        return self._comparison.alone

    def run(self) -> SweepResult:
        """Everything, as far as budget and limits allow. What was measured is kept if a person stops it.

        Raises:
            MemoryError: if not even one video fits.
        """
        interrupted = False
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look through it again and again
        try:
            self._begin().run()
            repeat(self._bench)
            self._comparison.run()
            self._check = verify(self._bench, self._comparison)
        except Stopped:
            interrupted = True
        except DoesNotFit as error:
            raise MemoryError(f"not even one video fits: {error}") from None
        finally:
            gc.unfreeze()
        free_memory()
        return self._result(interrupted)

    def run_alone(self) -> Alone | None:
        """Only the videos alone, as a reference for others. None if a person stops it.

        Raises:
            DoesNotFit: if there is no memory for one video.
        """
        try:
            self._begin().begin(ALONE)
            self._bench.measure(ALONE)
            return self._comparison.generate_alone(TIME_SHARE * self._bench.left())
        except Stopped:
            return None

    def _begin(self) -> Growth:
        prepare(self._bench)
        if self._memory_limit is None:
            self._memory_limit = self._bench.gauge.limit()
        return Growth(self._bench, self._largest, self._memory_limit)

    def _result(self, interrupted: bool) -> SweepResult:
        bench, measured = self._bench, self._bench.measured
        choice: Choice | None = None
        why_none = None
        try:
            choice = measured.choice()
        except ValueError as error:
            why_none = str(error)
        points = tuple(measured.points())
        unequal = [p for p in points if p.isolation == "exact" and p.quality is not None and not p.quality.equal]
        if unequal:
            sizes = ", ".join(str(point.batch) for point in unequal)
            bench.note(f"exact isolation was not bit for bit equal to alone at {sizes}: please report this as a fault")
        return SweepResult(
            workload=bench.workload.name,
            shapes=bench.workload.shapes,
            dtype=measured.dtype,
            points=points,
            choice=choice,
            why_none=why_none,
            check=self._check,
            matrix_flops=measured.matrix_flops,
            memory_limit=self._memory_limit or 0,
            memory_what=bench.gauge.what,
            full_steps=bench.workload.steps,
            measured_steps=bench.steps,
            seconds=bench.seconds(),
            interrupted=interrupted,
            notes=tuple(bench.notes),
            offload=bench.model.offload,
        )

"""One sweep: batches of growing size, both isolations, of one workload in one dtype, within a budget of time.

Growing first; then all sizes again in turn until their medians are steady; then the videos against those alone; and a
full run of the chosen size as a check of the extrapolation.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from reelbatch.device import free_memory
from reelbatch.tune.baseline import prepare
from reelbatch.tune.bench import Bench
from reelbatch.tune.comparison import TIME_SHARE, compare_all, generate_alone
from reelbatch.tune.evidence import TooLittle, check_evidence
from reelbatch.tune.figures import Point
from reelbatch.tune.growth import Growth
from reelbatch.tune.measure import DoesNotFit, Stopped
from reelbatch.tune.measurements import ALONE
from reelbatch.tune.quality import Alone
from reelbatch.tune.repeats import repeat
from reelbatch.tune.results import Check, SweepResult
from reelbatch.tune.verification import verify


class Sweep(Bench):
    """Measures one workload in one dtype."""

    def run(self) -> SweepResult:
        """Everything, as far as budget and limits allow. What was measured is kept if a person stops it.

        Raises:
            MemoryError: if not even one video fits.
        """
        check, interrupted = None, False
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look through it again and again
        try:
            prepare(self)
            Growth(self).run()
            repeat(self)
            compare_all(self)
            check = verify(self)
        except Stopped:
            interrupted = True
        except DoesNotFit as error:
            raise MemoryError(f"not even one video fits: {error}") from None
        finally:
            gc.unfreeze()
        free_memory(whole=True)
        return self._result(check, interrupted)

    def run_alone(self) -> Alone | None:
        """Only the videos alone, as a reference for others. None if a person stops it.

        Raises:
            DoesNotFit: if there is no memory for one video.
        """
        try:
            prepare(self)
            Growth(self).begin(ALONE)
            self.measure(ALONE)
            return generate_alone(self, TIME_SHARE * self.left())
        except Stopped:
            return None

    def _result(self, check: Check | None, interrupted: bool) -> SweepResult:
        choice, why_none, too_little = None, None, False
        points = tuple(self.measured.points())
        try:
            choice = self.measured.choice()
            check_evidence(points, choice, self.limits)
        except TooLittle as error:
            choice, why_none, too_little = None, f"{error} {self._more(points)}", True
        except ValueError as error:
            why_none = str(error)
        unequal = [p for p in points if p.isolation == "exact" and p.quality is not None and not p.quality.equal]
        if unequal:
            sizes = ", ".join(str(point.batch) for point in unequal)
            self.note(f"exact isolation was not bit for bit equal to alone at {sizes}: please report this as a fault")
        return SweepResult(
            workload=self.workload.name,
            shapes=self.workload.shapes,
            dtype=self.measured.dtype,
            points=points,
            choice=choice,
            why_none=why_none,
            check=check,
            matrix_flops=self.measured.matrix_flops,
            memory_limit=self.memory_limit or 0,
            memory_what=self.gauge.what,
            full_steps=self.workload.steps,
            measured_steps=self.steps,
            seconds=self.seconds(),
            interrupted=interrupted,
            notes=tuple(self.notes),
            offload=self.model.offload,
            too_little=too_little,
        )

    def _more(self, points: Sequence[Point]) -> str:
        """What to do where too little was measured."""
        if len(points) < 2 <= self.largest and self.needs is None:
            return (
                "A larger one does not keep to the memory or to the limits: nothing can be chosen; give --batch-size 1."
            )
        command = self.command(max(2 * self.budget, self.needs or 0.0))
        return f"Nothing was stored. Measure more, while nothing else works on the machine: {command}"

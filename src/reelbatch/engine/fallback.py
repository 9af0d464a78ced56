"""What to do when memory runs out: one ladder for texts, steps, decoding and files.

Work that ran out is tried again after memory was freed, and then in one relief after the other, the cheapest first.
Which reliefs there are depends on where weights can go and on whether there is a slower device, not on what the device
is called, so that a CPU climbs all of its rungs too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from reelbatch.device import OutOfMemory, device_memory_bytes, free_memory, gibibytes, is_out_of_memory, log
from reelbatch.engine.events import FellBack, Worked
from reelbatch.engine.planner import Planner
from reelbatch.engine.runner import Runner
from reelbatch.engine.sample import Sample, SavedState
from reelbatch.memory.gauge import Memory
from reelbatch.memory.placement import Relief
from reelbatch.models.family import Phase
from reelbatch.request import VideoRequest

Result = TypeVar("Result")
FREED = Relief("after memory was freed", nullcontext)


def with_reliefs(
    what: str,
    work: Callable[[], Result],
    reliefs: Sequence[Relief] = (),
    on_fallback: Callable[[Relief], None] = lambda relief: None,
) -> tuple[Result, Relief | None]:
    """The result of `work`; where memory runs out, of `work` again, in one relief after the other; and which helped.

    Args:
        what: the work, for messages.
        on_fallback: called before each further try.

    Raises:
        OutOfMemory: if it runs out whatever was tried.
        Exception: whatever else `work` raises, at once.
    """
    reason = ""
    for relief in (None, FREED, *reliefs):
        if relief is not None:
            free_memory()  # outside of a handler, whose traceback held what the failed work had allocated
            log.warning("out of memory in %s: tried again %s", what, relief.what)
            on_fallback(relief)
        with ExitStack() as entered:
            try:
                if relief is not None:
                    entered.enter_context(relief.entered())
            except (OSError, MemoryError, RuntimeError) as error:  # no room where the weights were to go
                log.warning("%s could not be tried: %s", relief.what if relief else "it", error)
                continue
            try:
                return work(), relief
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
    raise OutOfMemory(f"{what} runs out of memory, whatever was tried: {reason}")


@dataclass(frozen=True)
class StepResult:
    """A step: each sample after it, or the error that ends it; and what happened."""

    outcomes: list[Sample | Exception]
    events: list[FellBack | Worked]


class Fallback:
    """Does a runner's work, with fallbacks where memory runs out.

    Args:
        planner: learns which batches ran out.
        gauge: measures the peak of each piece of work, if given.
        keep_pixels: whether a request fails rather than take a fallback that changes its pixels.
        wait: returns when nothing else works on the device.
    """

    def __init__(
        self,
        runner: Runner,
        planner: Planner,
        gauge: Memory | None = None,
        keep_pixels: bool = False,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner, self.planner, self.gauge, self.keep_pixels, self.wait = runner, planner, gauge, keep_pixels, wait
        self._fallbacks: list[FellBack] = []
        self._calls = 0

    def start(self, request: VideoRequest, saved: SavedState | None) -> tuple[Sample, list[FellBack | Worked]]:
        """`Runner.start`."""
        started = self.begin()
        reliefs = self.reliefs("text")
        sample, helped = self.alone("the text", request, lambda: self.runner.start(request, saved), reliefs)
        if helped is not None and not helped.exact:
            sample = replace(sample, changes=(f"the text was encoded {helped.what}",))
        return sample, self.done("text", [request.id], started)

    def step(self, samples: Sequence[Sample]) -> StepResult:
        """One step of all of these, in as few forwards as memory allows."""
        started, self._calls = self.begin(), 0
        groups = self.planner.groups(samples)
        velocities = [velocity for group in groups for velocity in self._velocities(group)]
        outcomes, _ = with_reliefs("the end of a step", partial(self.runner.advance, samples, velocities, started))
        return StepResult(outcomes, self.done("step", [sample.id for sample in samples], started))

    def reliefs(self, phase: Phase) -> list[Relief]:
        """The placement's reliefs: those that keep the video's bits, and the others where they are allowed."""
        reliefs = self.runner.model.placement.reliefs(phase)
        return [relief for relief in reliefs if relief.exact or not self.keep_pixels]

    def alone(
        self, what: str, request: VideoRequest, work: Callable[[], Result], reliefs: Sequence[Relief]
    ) -> tuple[Result, Relief | None]:
        """The result of work for one request, with the relief that it took if memory ran out.

        Raises:
            OutOfMemory: if nothing helps, with what the request is and what there is.
        """
        placement, family = self.runner.model.placement, self.runner.model.family

        def begin(relief: Relief) -> None:
            self._fallbacks.append(FellBack(f"{what} of {request.id}", relief.what))
            self.wait()
            family.release()

        try:
            return with_reliefs(f"{what} of {request.id}", work, reliefs, begin)
        except OutOfMemory as error:
            there = gibibytes(device_memory_bytes(placement.device))
            raise OutOfMemory(
                f"{what} of request {request.id!r} ({request.width}×{request.height}, {request.frames} frames) runs "
                f"out of memory even alone: {str(error).rpartition('tried: ')[2]}. {placement.device} has {there} in "
                "all. Make it smaller or shorter, use a dtype of fewer bytes, or a device with more memory."
            ) from None

    def _velocities(self, samples: list[Sample]) -> list[list[Tensor] | Exception]:
        """Velocities of samples that share a forward. What fails is tried again in halves, until the sample that cannot
        be computed stands alone."""
        if len(samples) == 1:
            return [self._velocities_alone(samples[0])]
        try:
            self._calls += 1
            return [*self.runner.velocities(samples)]
        except Exception as error:
            ran_out = is_out_of_memory(error)
        free_memory()  # outside of the handler, whose traceback held the failed step's activations
        halves = self.planner.halves(samples)
        if ran_out:
            self.planner.limit_forward(halves)
            log.warning("out of memory in a step of %d videos: it is done in parts", len(samples))
            self._fallbacks.append(FellBack(f"a step of {len(samples)} videos", "in parts"))
        return [velocity for half in halves for velocity in self._velocities(half)]

    def _velocities_alone(self, sample: Sample) -> list[Tensor] | Exception:
        self._calls += 1
        try:
            work = partial(self.runner.velocities, [sample])
            return self.alone("a step", sample.request, work, self.reliefs("step"))[0][0]
        except Exception as error:
            return error

    def begin(self) -> float:
        """Work begins; returns when."""
        self.runner.model.placement.restore()  # what an interrupt, or memory that was short, left elsewhere
        self._fallbacks, self._calls = [], 1
        if self.gauge is not None:
            self.gauge.reset()
        return time.perf_counter()

    def done(self, phase: Phase, ids: Sequence[str], started: float) -> list[FellBack | Worked]:
        seconds = time.perf_counter() - started
        peak = None if self.gauge is None else self.gauge.peak()
        return [*self._fallbacks, Worked(phase, tuple(ids), seconds, self._calls, peak)]

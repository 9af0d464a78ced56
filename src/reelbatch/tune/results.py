"""What a sweep gives: updates while it runs, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from reelbatch.engine.planner import Isolation
from reelbatch.memory.placement import Offload
from reelbatch.tune.choose import Choice
from reelbatch.tune.figures import Point


class Update(NamedTuple):
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
class SweepResult:
    """One workload in one dtype.

    Attributes:
        choice: None if no size keeps to the limits, or too little was measured; `why_none` then says why.
        matrix_flops: the measured matrix rate of the device, FLOP/s.
        memory_limit: bytes that were not to be passed. memory_what: whose they are.
        full_steps: denoising steps of a video. measured_steps: those measured at a time, at least.
        seconds: that the sweep took.
        interrupted: whether a person stopped it.
        notes: why growing stopped, and what could not be measured.
        offload: which weights were on the device; those that came and went are in the figures of the phases, and not in
            `weights`.
        too_little: whether too little was measured for advice; `why_none` says what is missing, and how to measure it.
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
    too_little: bool = False

    @property
    def no_advice(self) -> str:
        """A headline where there is no choice."""
        return "Too little was measured to choose a batch size" if self.too_little else "No batch size fits"

    @property
    def chosen(self) -> Point | None:
        if self.choice is None:
            return None
        own = [point for point in self.points if point.batch == self.choice.batch]
        return next((p for p in own if p.isolation == self.choice.isolation), own[0] if own else None)

    @property
    def alone(self) -> Point | None:
        return next((point for point in self.points if point.batch == 1), None)

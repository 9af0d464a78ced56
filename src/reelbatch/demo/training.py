"""What both trainings share: a clock to train by, and averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel

Model = TypeVar("Model", bound=ModelMixin)


@dataclass
class Clock:
    """Where a training run stands. `progress` goes from 0 to 1 with time; `last` marks the final step."""

    step: int = 0
    progress: float = 0.0
    last: bool = False

    @classmethod
    def run(cls, minutes: float) -> Iterator[Clock]:
        """A clock a step, until the time is up."""
        started, clock = time.monotonic(), cls()
        while not clock.last:
            clock.step += 1
            clock.progress = min((time.monotonic() - started) / (60 * minutes), 1.0)
            clock.last = clock.progress >= 1
            yield clock

    def cosine(self, warmup_steps: int) -> float:
        """Factor of the learning rate: a linear warm-up, then a cosine to 1 % at the end."""
        return min(1.0, self.step / warmup_steps) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * self.progress)))


def averaged(model: Model, average: EMAModel) -> Model:
    """A copy of `model` with the averaged weights, for use."""
    copy = type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    average.copy_to(copy.parameters())
    return copy.eval()

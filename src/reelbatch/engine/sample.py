"""Sample: one video between noise and latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reelbatch.engine.flow import Schedule
from reelbatch.request import VideoRequest


@dataclass(frozen=True)
class SavedState:
    """Where a sample stands between two steps: with its request, all that it takes to go on.

    Attributes:
        step: steps that are behind it.
        latents: fp32, on the CPU.
        seconds, largest_batch, batch_mates: as of `Sample`.
    """

    step: int
    latents: Float[Tensor, "channels frames height width"]
    seconds: float = 0.0
    largest_batch: int = 0
    batch_mates: frozenset[str] = frozenset()

    def check(self, request: VideoRequest, shape: tuple[int, ...]) -> None:
        """Raises ValueError if it is none of this request."""
        if tuple(self.latents.shape) != shape or self.latents.dtype != torch.float32:
            raise ValueError(
                f"the saved latents are {self.latents.dtype} {list(self.latents.shape)}, and request {request.id!r} "
                f"needs float32 {list(shape)}: they are of another request or model"
            )
        if not 0 <= self.step < (request.steps or 0):
            raise ValueError(f"the saved step is {self.step}, and request {request.id!r} has {request.steps} steps")


@dataclass(frozen=True)
class Sample:
    """One video in progress. A step gives a new sample and leaves this one as it was.

    Attributes:
        request: what was asked, with the model's defaults filled in.
        conditioning: what the family encoded of it.
        latents: fp32, on the model's device.
        schedule: the sigmas it walks down.
        rows: transformer rows of each of its guidance branches.
        step: steps that are behind it.
        text_seconds: time that its text took. seconds: time spent in steps that it took part in.
        batch_mates: ids of all that shared a step with it. largest_batch: samples in the fullest of those steps.
        last_step: seconds of its last step, and how many samples shared it.
        changes: what was done otherwise than alone on a device with enough memory, and shows in its pixels.
    """

    request: VideoRequest
    conditioning: Any
    latents: Float[Tensor, "channels frames height width"]
    schedule: Schedule
    rows: tuple[int, ...]
    text_seconds: float = 0.0
    step: int = 0
    seconds: float = 0.0
    largest_batch: int = 0
    batch_mates: frozenset[str] = frozenset()
    changes: tuple[str, ...] = ()
    last_step: tuple[float, int] = (0.0, 0)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def tokens(self) -> int:
        """Rows that one step of it puts through the transformer, all branches."""
        return sum(self.rows)

    @property
    def timestep(self) -> Float[Tensor, ""]:
        """sigma × 1000 of its current step."""
        return self.schedule.timesteps[self.step]

    @property
    def next_timestep(self) -> Float[Tensor, ""]:
        """sigma × 1000 that its current step leads to: 0 at the last."""
        later = self.step + 1 < self.schedule.steps
        return self.schedule.timesteps[self.step + 1] if later else self.schedule.sigmas[-1]

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    def advanced(self, latents: Tensor, seconds: float, ids: frozenset[str]) -> Sample:
        """After one more step, which it shared with these ids."""
        return replace(
            self,
            latents=latents,
            step=self.step + 1,
            seconds=self.seconds + seconds,
            largest_batch=max(self.largest_batch, len(ids)),
            batch_mates=self.batch_mates | (ids - {self.id}),
            last_step=(seconds, len(ids)),
        )

    def save(self) -> SavedState:
        latents = self.latents.to("cpu", copy=True)
        return SavedState(self.step, latents, self.seconds, self.largest_batch, self.batch_mates)

    def resumed(self, saved: SavedState | None) -> Sample:
        """Where the saved one stood; at the start if there is none."""
        if saved is None:
            return self
        latents = saved.latents.to(self.latents.device, copy=True)
        return replace(
            self,
            latents=latents,
            step=saved.step,
            seconds=saved.seconds,
            largest_batch=saved.largest_batch,
            batch_mates=frozenset(saved.batch_mates),
        )

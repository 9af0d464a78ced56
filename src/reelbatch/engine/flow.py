"""Rectified flow: the sigmas that a sample walks down, and the step that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The noise levels from noise (sigma 1) to a video (sigma 0)."""

    sigmas: Float[Tensor, " steps_plus_one"]
    """fp32, from 1 down to the 0 that ends the last step."""
    timesteps: Float[Tensor, " steps"]
    """The network's input: sigma × 1000."""

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=64)
def schedule(steps: int, shift: float, device: torch.device) -> Schedule:
    """The sigmas that Diffusers' pipeline would use: `linspace(1, 0, steps + 1)[:-1]`, shifted.

    `sigma' = shift · sigma / (1 + (shift - 1) · sigma)` (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2), computed
    by `FlowMatchEulerDiscreteScheduler` itself, so that they agree to the last bit.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    return Schedule(scheduler.sigmas.to(device), scheduler.timesteps.to(device))


def guide(branches: Sequence[Tensor], scale: float) -> Tensor:
    """The velocity of a sample, in fp32: of its one branch, or of its conditional and unconditional branches together.

    Two branches are true classifier-free guidance: `unconditional + scale · (conditional - unconditional)`
    (arXiv 2207.12598).
    """
    if len(branches) == 1:
        return branches[0].float()
    conditional, unconditional = (branch.float() for branch in branches)
    return unconditional + scale * (conditional - unconditional)


def euler_step(latents: Tensor, velocity: Tensor, schedule: Schedule, step: int) -> Tensor:
    """The latents after one step, in fp32 (Diffusers would round them to the network's dtype)."""
    return latents + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity.float()

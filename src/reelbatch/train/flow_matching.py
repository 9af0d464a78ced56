"""The flow-matching loss, over ragged packs: samples of any size and text length, none padded, none cropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from jaxtyping import Float
from torch import Tensor

TIMESTEPS = 1000.0
"""A timestep is sigma times this."""


@dataclass(frozen=True)
class Example:
    """A clip and what conditions it (its caption, its first frame), encoded, as a `TrainableFamily` gives them."""

    latents: Float[Tensor, "channels frames height width"]
    conditioning: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Example:
        conditioning = {name: tensor.to(device) for name, tensor in self.conditioning.items()}
        return Example(self.latents.to(device), conditioning)


def shift(sigmas: Tensor, by: Tensor | float) -> Tensor:
    """Levels shifted towards noise, as a schedule of this flow shift takes them (arXiv 2403.03206, section 5.3.2)."""
    return by * sigmas / (1 + (by - 1) * sigmas)


def draw_sigmas(
    count: int, generator: torch.Generator, *, logit_normal: bool = False, mean: float = 0.0, std: float = 1.0
) -> Float[Tensor, " samples"]:
    """Noise levels before the shift, one a sample: uniform, or the sigmoid of a normal (there, section 3.1)."""
    scheme = "logit_normal" if logit_normal else "none"
    return compute_density_for_timestep_sampling(scheme, count, mean, std, None, "cpu", generator)


def flow_matching_loss(
    transformer: Callable[..., Any],
    branch: Callable[..., Any],
    examples: Sequence[Example],
    sigmas: Float[Tensor, " samples"],
    guidance: Float[Tensor, " samples"],
    noise: Sequence[Float[Tensor, "channels frames height width"]],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " samples"]:
    """Mean squared error of the velocity `noise - latents` at `(1 - sigma) latents + sigma noise`, one a sample.

    Rectified flow (arXiv 2209.03003), in the sign and time convention of Diffusers' flow-matching schedulers.

    Args:
        transformer: that of a `TrainableFamily`, or what wraps it; the examples go through it as one pack.
        branch: the family's `training_branch`.
        sigmas: noise level of each sample, 0 to 1.
        guidance: the embedded guidance scale of each sample.
        noise: of each sample, as large as its latents.
        dtype: of what the network is given.
    """
    pack = [
        branch((1 - sigma) * example.latents + sigma * eps, example.conditioning, sigma * TIMESTEPS, scale, dtype)
        for example, eps, sigma, scale in zip(examples, noise, sigmas, guidance, strict=True)
    ]
    velocities = transformer(packs=[pack])[0]
    errors = [
        (velocity.float() - (eps - example.latents)).square().mean()
        for velocity, eps, example in zip(velocities, noise, examples, strict=True)
    ]
    return torch.stack(errors)

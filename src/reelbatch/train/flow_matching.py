"""The flow-matching loss, over ragged packs: samples of any size and text length, none padded, none cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reelbatch.models.hunyuan_video import Branch, HunyuanVideoTransformer3DModel
from reelbatch.models.text import Conditioning


@dataclass(frozen=True)
class Example:
    """A clip and its caption, both encoded. Latents are scaled as the transformer sees them."""

    latents: Float[Tensor, "channels frames height width"]
    caption: Conditioning


def shifted_sigmas(
    count: int, shift: float, generator: torch.Generator, device: torch.device
) -> Float[Tensor, " samples"]:
    """Noise levels, uniform over the steps that a schedule of this flow shift takes; one a sample."""
    uniform = torch.rand(count, generator=generator).to(device)
    return shift * uniform / (1 + (shift - 1) * uniform)


def flow_matching_loss(
    transformer: HunyuanVideoTransformer3DModel,
    examples: Sequence[Example],
    sigmas: Float[Tensor, " samples"],
    guidance: Float[Tensor, " samples"],
    generator: torch.Generator,
) -> Float[Tensor, " samples"]:
    """Mean squared error of the velocity `noise - latents` at `(1 - sigma) latents + sigma noise`, one a sample.

    Rectified flow (arXiv 2209.03003), in the sign and time convention of Diffusers' flow-matching schedulers. Every
    sample counts the same, whatever its size.

    Args:
        examples: they go through the network as one pack.
        sigmas: noise level of each sample, 0 to 1.
        guidance: the embedded guidance scale that each sample is told.
        generator: of the noise.
    """
    dtype = transformer.dtype
    noise = [torch.randn(e.latents.shape, generator=generator).to(e.latents.device) for e in examples]
    pack = [
        Branch(
            latents=((1 - sigma) * example.latents + sigma * eps).to(dtype),
            text=example.caption.text.to(dtype),
            pooled=example.caption.pooled.to(dtype),
            timestep=sigma * 1000,
            guidance=scale.to(dtype) * 1000,
        )
        for example, eps, sigma, scale in zip(examples, noise, sigmas, guidance, strict=True)
    ]
    velocities = transformer(packs=[pack])[0]
    errors = [
        (velocity.float() - (eps - example.latents)).square().mean()
        for velocity, eps, example in zip(velocities, noise, examples, strict=True)
    ]
    return torch.stack(errors)

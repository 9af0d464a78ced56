"""Diffusers' pipelines, and what the tests of `repair` ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    HunyuanVideoPipeline,
)
from torch import Tensor, nn

from reelbatch.memory.alignment import align_weights

PROMPTS = [
    "a cat",
    "two small red horses running on the sea at night in the rain , cinematic",
    "a robot standing still",
    "three yellow stars moving up slowly on a black background",
]
SEEDS = [3, 1, 4, 15]
SCALES = [6.0, 2.5, 9.0, 4.0]
TOKENS = 40
"""Text tokens that every prompt is padded to."""
STEPS = 3


def aligned(pipe: Any) -> Any:
    """The pipeline, all weights of which lie at aligned addresses: Diffusers' bits depend on where they lie."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            align_weights(part)
    return pipe


def generate(pipe: Any, prompt: Any = None, seeds: list[int] = SEEDS[:1], **options: Any) -> Any:
    """Latents of 2 frames of 4×4, unless `options` say otherwise."""
    defaults = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "max_sequence_length": TOKENS,
        "output_type": "latent",
    }
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompt = PROMPTS[1] if prompt is None and "prompt_embeds" not in options else prompt
    return pipe(prompt=prompt, generator=generator, **{**defaults, **options}).frames


def frames(pipe: Any, prompt: Any = None, seeds: list[int] = SEEDS[:1], **options: Any) -> Tensor:
    """9 frames of 64×64, as the bundled model makes them."""
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    return generate(pipe, prompt, seeds, **{"output_type": "pt", **sizes, **options})


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_transformer(pipe: Any, transformer: Any) -> HunyuanVideoPipeline:
    return quiet(HunyuanVideoPipeline(**{**pipe.components, "transformer": transformer}))


def classes(pipe: Any) -> list[type]:
    return [type(pipe), *(type(module) for module in pipe.transformer.modules())]


def batch(pipe: Any, order: list[int], make: Callable[..., Any] = generate, **options: Any) -> Any:
    """Videos of requests that differ in prompt, seed and guidance scale, in one call."""
    prompts, seeds, scales = ([values[i] for i in order] for values in (PROMPTS, SEEDS, SCALES))
    return make(pipe, prompts, seeds, guidance_scale=options.pop("scales", scales), **options)


def parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()}


def is_repaired(pipe: Any) -> bool:
    """By what is computed: padding, here not even a number, plays no part."""
    embeds, pooled, mask = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
    embeds = embeds.masked_fill(mask[..., None] == 0, float("nan"))
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    return bool(generate(pipe, **given, num_inference_steps=1).isfinite().all())

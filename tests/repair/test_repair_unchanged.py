"""What is right in Diffusers' HunyuanVideoPipeline stays as it is after `repair`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import PROMPTS, SEEDS, STEPS, TOKENS, difference, frames, generate
from torch import Tensor

import reelbatch


def brighten(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A callback that changes the latents."""
    return {"latents": tensors["latents"] * (1.0 + 0.1 * step)}


CASES = (
    (PROMPTS[1], {}),
    (PROMPTS[:3], {}),
    (PROMPTS[:2], {"num_videos_per_prompt": 2}),
    (PROMPTS[:2], {"negative_prompt": ["blurry", "low quality , grey"], "true_cfg_scale": 3.0}),
    (PROMPTS[0], {"callback_on_step_end": brighten}),
    (PROMPTS[0], {"guidance_scale": 1.5, "sigmas": [1.0, 0.4]}),
)


@pytest.mark.parametrize(
    ("prompt", "options"), CASES, ids=["one", "three", "two a prompt", "cfg", "callback", "guidance"]
)
def test_frames(pipe, prompt, options):
    seeds = SEEDS[: (1 if isinstance(prompt, str) else len(prompt)) * options.get("num_videos_per_prompt", 1)]
    expected = generate(pipe, prompt, seeds, output_type="pt", **options)
    reelbatch.repair(pipe)
    found = generate(pipe, prompt, seeds, output_type="pt", **options)
    assert found.shape == (len(seeds), 5, 3, 32, 32)
    assert (found - expected).abs().max() <= 1e-4


def test_frames_of_the_demo(demo):
    options = {"num_videos_per_prompt": 2, "negative_prompt": ["blurry"], "true_cfg_scale": 3.0}
    expected = frames(demo, PROMPTS[:1], SEEDS[:2], **options)
    reelbatch.repair(demo)
    found = frames(demo, PROMPTS[:1], SEEDS[:2], **options)
    assert found.shape == (2, 9, 3, 64, 64)
    assert (found - expected).abs().max() <= 1e-4


def test_tiling(own_pipe):
    plain = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
    own_pipe.vae.enable_tiling(16, 16, 16, 12, 12, 12)
    expected = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
    assert difference(expected, plain) > 1e-3
    reelbatch.repair(own_pipe)
    found = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
    assert (found - expected).abs().max() <= 1e-4
    assert not own_pipe.vae.use_slicing  # but during the call


def test_outputs(pipe):
    kinds = ("pil", "np", "pt", "latent")
    expected = {kind: generate(pipe, PROMPTS[:2], SEEDS[:2], output_type=kind) for kind in kinds}
    reelbatch.repair(pipe)
    for kind in kinds:
        found = generate(pipe, PROMPTS[:2], SEEDS[:2], output_type=kind)
        assert type(found) is type(expected[kind])
        if kind == "pil":
            found, expected["pil"] = (
                [[np.asarray(image) / 255.0 for image in video] for video in videos]
                for videos in (found, expected["pil"])
            )
        tolerance = 1 / 255 + 1e-6 if kind == "pil" else 1e-4
        assert np.abs(np.asarray(found) - np.asarray(expected[kind])).max() <= tolerance
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    (sample,) = pipe(PROMPTS[0], return_dict=False, max_sequence_length=TOKENS, **call)  # prompt by position
    assert sample.shape == (1, 4, 2, 4, 4)


def test_callback_is_given_every_tensor(pipe):
    seen = []

    def note(of, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["prompt_embeds"].shape))
        return tensors

    options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = generate(pipe, PROMPTS[:2], SEEDS[:2], **options)
    reelbatch.repair(pipe)
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2], **options), expected) <= 1e-5
    assert seen[STEPS:] == seen[:STEPS]


def test_what_is_wrong_is_told_as_before(pipe):
    for wrong in (
        {"prompt": ("a cat",)},
        {"prompt": "a cat", "prompt_2": 2},
        {"prompt": "a cat", "height": 30},
        {"prompt": "a cat", "prompt_embeds": torch.zeros(1, 2, 32)},
        {"prompt": "a cat", "seeds": [1, 2]},
    ):
        with pytest.raises(ValueError) as before:  # noqa: PT011
            generate(pipe, **wrong)
        reelbatch.repair(pipe)
        with pytest.raises(ValueError, match=re.escape(str(before.value)[:60])):
            generate(pipe, **wrong)
        reelbatch.restore(pipe)

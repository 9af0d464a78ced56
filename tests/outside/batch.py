"""The batch tests that Diffusers skips for every HunyuanVideo pipeline, run; and one that looks at every sample.

Diffusers' `test_inference_batch_single_identical` compares the first sample of a batch with the same request alone.
`test_every_sample_of_a_batch_is_as_alone` does so for each of them, with prompts of different lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SKIPPED = ("test_inference_batch_consistent", "test_inference_batch_single_identical")
PROMPTS = ("dance monkey", "dance", "a small red circle is moving right on a yellow background")
TOLERANCE = 1e-4  # Diffusers' own, for its first sample

largest_difference: dict[str, list[float]] = {}
"""For each test class: sample by sample, the largest difference of a value in [0, 1] between batch and alone."""


def unskip(tests: type) -> None:
    """Remove the skipped overrides from a pipeline's tests, so that the mixin's own tests show, and add ours."""
    for name in SKIPPED:
        skipped = vars(tests).get(name)
        if skipped is not None and getattr(skipped, "__unittest_skip__", False):
            delattr(tests, name)
    tests.test_every_sample_of_a_batch_is_as_alone = every_sample_as_alone


def every_sample_as_alone(self: Any) -> None:
    pipeline = self.pipeline_class(**self.get_dummy_components())
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)

    def run(prompts: list[str], seeds: list[int]) -> np.ndarray:
        inputs = self.get_dummy_inputs("cpu")
        inputs |= {name: [inputs[name]] * len(prompts) for name in self.batch_params if name in inputs}
        inputs["prompt"] = prompts
        inputs["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return np.asarray(pipeline(**inputs)[0])

    seeds = list(range(len(PROMPTS)))
    together = run(list(PROMPTS), seeds)
    alone = [run([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert len(together) == len(alone), f"{len(together)} videos for {len(alone)} prompts"

    differences = [float(np.abs(sample - single).max()) for sample, single in zip(together, alone, strict=True)]
    largest_difference[type(self).__name__] = differences
    assert max(differences) < TOLERANCE, f"largest difference, sample by sample: {differences}"

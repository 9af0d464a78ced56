"""The tests that the plugin adds to those of every HunyuanVideo pipeline, on every side.

Diffusers skips its two batch tests for all of them; they are run. As the second compares only the first sample of a
batch with the same request alone, one more compares each, with prompts of different lengths. And as the numbers that
`test_inference` expects hold for the hub's tokenizers only, one more compares the video with that of Diffusers' own
classes with the same weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sides
import torch

SKIPPED = ("test_inference_batch_consistent", "test_inference_batch_single_identical")
PROMPTS = ("dance monkey", "dance", "a small red circle is moving right on a yellow background")
TOLERANCE = 1e-4  # Diffusers' own, for the first sample; values of a video are in [0, 1]

differences: dict[str, dict[str, list[float]]] = {}
"""Of each test class and test: the largest difference, sample by sample."""


def add_to(tests: type) -> None:
    for name in SKIPPED:
        for kind in tests.__mro__:
            if getattr(vars(kind).get(name), "__unittest_skip__", False):
                delattr(kind, name)  # what shows then is the mixin's
    tests.test_every_sample_of_a_batch_is_as_alone = every_sample_is_as_alone
    tests.test_video_is_that_of_diffusers = video_is_that_of_diffusers


def every_sample_is_as_alone(self: Any) -> None:
    pipeline = self.pipeline_class(**_components(self))
    for what, output_type in (("latents of a batch as alone", "latent"), ("videos of a batch as alone", "pt")):
        together = _outputs(self, pipeline, PROMPTS, range(len(PROMPTS)), output_type)
        alone = [_outputs(self, pipeline, [prompt], [seed], output_type)[0] for seed, prompt in enumerate(PROMPTS)]
        _compare(self, what, together, alone)


def video_is_that_of_diffusers(self: Any) -> None:
    components = _components(self)
    theirs = sides.as_in_diffusers(self.pipeline_class, components)
    expected = _outputs(self, theirs, PROMPTS[:1], [0])
    video = _outputs(self, self.pipeline_class(**components), PROMPTS[:1], [0])
    _compare(self, "video as of Diffusers' classes", video, expected)


def _components(tests: Any) -> dict[str, Any]:
    components = tests.get_dummy_components()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components


def _outputs(tests: Any, pipeline: Any, prompts: Any, seeds: Any, output_type: str = "pt") -> np.ndarray:
    inputs = tests.get_dummy_inputs("cpu") | {"output_type": output_type}
    inputs |= {name: [inputs[name]] * len(prompts) for name in tests.batch_params if name in inputs}
    inputs["prompt"] = list(prompts)
    inputs["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(**inputs)[0])


def _compare(tests: Any, what: str, outputs: Any, expected: Any) -> None:
    assert len(outputs) == len(expected), f"{len(outputs)} samples, expected {len(expected)}"
    largest = [float(np.abs(output - wanted).max()) for output, wanted in zip(outputs, expected, strict=True)]
    differences.setdefault(type(tests).__name__, {})[what] = largest
    assert max(largest) < TOLERANCE, f"{what}: largest difference, sample by sample: {largest}"

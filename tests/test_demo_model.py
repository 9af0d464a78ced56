"""The bundled model: it is a HunyuanVideo that Diffusers opens too, and it draws what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline

from reelbatch import Engine, VideoRequest
from reelbatch.demo.evaluate import prompts, score
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.loading.inspection import inspect

MAX_BYTES = 25_000_000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo", keep_latents=True)


@pytest.fixture(scope="module")
def pipeline() -> HunyuanVideoPipeline:
    """Diffusers' own, on the same folder, with nothing said about it."""
    opened = HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER)
    opened.set_progress_bar_config(disable=True)
    return opened


@pytest.fixture(scope="module")
def reference(pipeline: HunyuanVideoPipeline) -> Callable[[VideoRequest], tuple[torch.Tensor, np.ndarray]]:
    """The pipeline's last latents and its frames for a request, computed once."""

    @cache
    def called(request: VideoRequest) -> tuple[torch.Tensor, np.ndarray]:
        latents: list[torch.Tensor] = []

        def keep(_: object, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            latents.append(tensors["latents"])
            return tensors

        frames = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            true_cfg_scale=request.true_cfg,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=keep,
            output_type="np",
        ).frames[0]
        assert len(latents) == request.steps
        return latents[-1], frames

    return called


def test_the_folder_is_whole_small_and_can_run_here() -> None:
    info = inspect(DEMO_FOLDER)
    assert info.problems == ()
    assert info.fits("cpu")
    assert info.profile.vocabulary
    assert sum(file.stat().st_size for file in DEMO_FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES


@pytest.mark.parametrize(
    ("isolation", "guidance"),
    [("packed", {}), ("exact", {"negative_prompt": "small blue cross, up, white", "true_cfg": 2.0})],
    ids=["packed", "exact-cfg"],
)
def test_videos_are_those_of_the_pipeline_over_20_steps(
    engine: Engine, reference: Callable, isolation: str, guidance: dict
) -> None:
    requests = [
        VideoRequest(prompt="a large red circle moving left on a black background", seed=1, steps=20, **guidance),
        VideoRequest(prompt="small yellow square, still, white", seed=2, steps=20, width=96),
    ]
    made = Engine(engine.model, isolation=isolation, keep_latents=True).generate(requests)
    for request, video in zip(requests, made, strict=True):
        latents, frames = reference(request.for_model(engine.model.family.limits))
        assert video.latents is not None
        assert ((video.latents - latents[0]).abs().max() / latents.abs().max()).item() < 1e-4
        assert np.abs(video.frames / 255 - frames).max() < 1e-4 + 0.5 / 255  # half a step of eight bits


def test_a_batch_of_eight_is_bit_for_bit_what_its_requests_give_alone(engine: Engine) -> None:
    seen, unseen = prompts(8)
    requests = [
        VideoRequest(prompt=caption, seed=i, steps=4 + i % 2, width=64 + 32 * (i % 2), frames=5 + 4 * (i % 3 > 0))
        for i, (_, caption) in enumerate(seen + unseen)
    ]
    together = Engine(engine.model, max_batch_size=8, keep_latents=True).generate(requests)
    for request, video in zip(requests, together, strict=True):
        (alone,) = Engine(engine.model, keep_latents=True).generate([request])
        assert video.provenance["batch"]["largest"] == 8
        assert video.latents is not None
        assert alone.latents is not None
        assert torch.equal(video.latents, alone.latents)
        assert video.frames_sha256 == alone.frames_sha256


def test_it_draws_what_it_is_asked_on_combinations_it_never_saw(engine: Engine) -> None:
    """A quick look; `python -m reelbatch.demo.evaluate` measures it on 200 prompts."""
    _, unseen = prompts(24)
    found = score(unseen, lambda requests: [video.frames for video in engine.generate(requests)], steps=20)
    assert found.all >= 0.92  # 98.0 % on 200 prompts; two dozen vary

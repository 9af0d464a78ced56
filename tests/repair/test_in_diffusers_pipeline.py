"""Our transformer in the place of Diffusers' in its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoPipeline
from diffusers import HunyuanVideoTransformer3DModel as Reference
from diffusers.hooks import FirstBlockCacheConfig
from padded import difference, padded_batch, run
from torch import Tensor

import reelbatch
from reelbatch import HunyuanVideoTransformer3DModel
from reelbatch.attention import AttentionBackendError
from reelbatch.loading.hub import DEMO_FOLDER

PROMPTS = ["a cat", "two small red horses running on the sea at night", "a robot standing still"]
SEEDS = [3, 1, 4]


def generate(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> Tensor:
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 40}
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompt, generator=generator, **{"output_type": "pt", **sizes, **options}).frames


@pytest.fixture(scope="module")
def dropped_in(tiny_folder: Path, tiny_pipeline: HunyuanVideoPipeline) -> HunyuanVideoPipeline:
    ours = HunyuanVideoTransformer3DModel.from_pretrained(tiny_folder, subfolder="transformer")
    pipe = HunyuanVideoPipeline(**{**tiny_pipeline.components, "transformer": ours})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "options", [{}, {"negative_prompt": ["blurry"] * 3, "true_cfg_scale": 3.0}], ids=["plain", "cfg"]
)
def test_equals_diffusers(dropped_in, tiny_pipeline, options):
    expected = generate(tiny_pipeline, PROMPTS, SEEDS, **options)
    assert (generate(dropped_in, PROMPTS, SEEDS, **options) - expected).abs().max() <= 1e-4


def test_demo():
    theirs = HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER)
    ours = HunyuanVideoTransformer3DModel.from_pretrained(DEMO_FOLDER, subfolder="transformer")
    pipe = HunyuanVideoPipeline(**{**theirs.components, "transformer": ours})
    options = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    for each in (theirs, pipe):
        each.set_progress_bar_config(disable=True)
    found, expected = (generate(each, PROMPTS, SEEDS, **options) for each in (pipe, theirs))
    assert found.shape == (3, 9, 3, 64, 64)
    assert (found - expected).abs().max() <= 1e-4


def test_a_list_of_scales_for_a_batch(dropped_in, tiny_pipeline):
    scales = [6.0, 2.5, 9.0]
    expected = torch.cat(
        [
            generate(tiny_pipeline, prompt, [seed], guidance_scale=scale)
            for prompt, seed, scale in zip(PROMPTS, SEEDS, scales, strict=True)
        ]
    )
    found = generate(dropped_in, PROMPTS, SEEDS, guidance_scale=scales)
    assert (found - expected).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="2 guidance scales were given for a batch of 3"):
        generate(dropped_in, PROMPTS, SEEDS, guidance_scale=scales[:2])


def test_saved_and_loaded(dropped_in, tiny_pipeline, tmp_path):
    expected = generate(dropped_in, PROMPTS[0], SEEDS[:1])
    dropped_in.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["reelbatch.models.hunyuan_video", "HunyuanVideoTransformer3DModel"]
    transformer = tmp_path / "transformer"
    loaded = (
        HunyuanVideoPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path),
        HunyuanVideoPipeline.from_pretrained(
            tmp_path, transformer=HunyuanVideoTransformer3DModel.from_pretrained(transformer)
        ),
    )
    for pipe in loaded:
        assert type(pipe.transformer) is HunyuanVideoTransformer3DModel
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(generate(pipe, PROMPTS[0], SEEDS[:1]), expected)
    # and by Diffusers' own class, as its weights are
    plain = HunyuanVideoPipeline.from_pretrained(tmp_path, transformer=Reference.from_pretrained(transformer))
    plain.set_progress_bar_config(disable=True)
    original = generate(tiny_pipeline, PROMPTS[0], SEEDS[:1])
    assert torch.equal(generate(plain, PROMPTS[0], SEEDS[:1]), original)


def test_repaired_pipeline_keeps_it(dropped_in):
    """What is left to repair is the pipeline; isolation is set for our own class too."""
    ours = dropped_in.transformer
    (done,) = reelbatch.repair(dropped_in, isolation="packed")
    assert done.fault.startswith("prompt_2")
    packs = []
    ours.register_forward_pre_hook(lambda module, args, kwargs: packs.append(module.isolation), with_kwargs=True)
    four = {"num_videos_per_prompt": 2, "guidance_scale": [6.0, 2.5], "negative_prompt": "blurry"}
    generate(dropped_in, PROMPTS[:2], [*SEEDS, 5], true_cfg_scale=2.0, **four)
    assert set(packs) == {"packed"}
    assert ours.isolation == "exact" and "isolation" not in vars(ours)
    reelbatch.restore(dropped_in)
    assert dropped_in.transformer is ours and type(ours) is HunyuanVideoTransformer3DModel
    assert type(dropped_in) is HunyuanVideoPipeline
    ours._forward_pre_hooks.clear()
    ours._forward_pre_hooks_with_kwargs.clear()


def test_attention_backends_by_our_names_and_by_those_of_diffusers(model):
    batch = padded_batch()
    expected = run(model, batch)
    names = {
        "auto": "auto",
        "sdpa": "sdpa",
        "flash": "flash",
        "math": "math",
        "native": "auto",
        "_native_flash": "flash",
        "_native_math": "math",
        "_NATIVE_MATH": "math",
        "Flash": "flash",
    }
    for name, ours in names.items():
        model.set_attention_backend(name)
        assert model.attention_backend == ours
        assert difference(run(model, batch), expected) <= 1e-5
    for name in ("_native_cudnn", "_native_efficient", "varlen"):
        model.set_attention_backend(name)
        with pytest.raises(AttentionBackendError, match=r"CUDA|float16"):
            run(model, batch)
    model.reset_attention_backend()
    assert model.attention_backend == "auto"
    assert torch.equal(run(model, batch), expected)
    with pytest.raises(AttentionBackendError, match="No attention backend 'sage'; there are sdpa, flash"):
        model.set_attention_backend("sage")
    assert model.attention_backend == "auto"


def test_step_caches_are_refused(model):
    with pytest.raises(NotImplementedError, match=r"FirstBlockCacheConfig: .*decides once for the whole batch"):
        model.enable_cache(FirstBlockCacheConfig())
    assert not model.is_cache_enabled

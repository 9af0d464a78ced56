"""`restore` leaves a pipeline as it was."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from diffusers import (
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from pipelines import PROMPTS, SCALES, SEEDS, classes, difference, generate, is_repaired, with_transformer

import reelbatch
from reelbatch.repairs.fix import CannotRepair


def test_bit_for_bit(pipe):
    options = {"prompt": PROMPTS[:2], "seeds": SEEDS[:2], "output_type": "pt"}
    expected, found, kept = generate(pipe, **options), classes(pipe), set(vars(pipe.transformer))
    reelbatch.restore(pipe)  # nothing to do
    for _ in range(2):
        assert len(reelbatch.repair(pipe)) == 2
        assert reelbatch.repair(pipe) == []
        assert not set(classes(pipe)) & {HunyuanVideoPipeline, HunyuanVideoTransformer3DModel}
        assert is_repaired(pipe)
        reelbatch.restore(pipe)
        reelbatch.restore(pipe)
        assert classes(pipe) == found
        assert set(vars(pipe.transformer)) == kept | {"_diffusers_hook"}  # Diffusers' own, made by a call
        assert torch.equal(generate(pipe, **options), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_pipelines_that_share_a_transformer(pipe, first):
    """It stays ours until the last of them is restored."""
    other = with_transformer(pipe, pipe.transformer)
    expected, found = generate(pipe), classes(pipe)
    assert len(reelbatch.repair(pipe)) == 2
    assert len(reelbatch.repair(other)) == 1  # the pipeline; the transformer is repaired already
    one, two = (pipe, other) if first == 0 else (other, pipe)
    reelbatch.restore(one)
    assert type(one) is HunyuanVideoPipeline
    assert is_repaired(two)
    assert torch.equal(
        generate(two, PROMPTS[:2], SEEDS[:2], guidance_scale=SCALES[:2])[1:],
        generate(two, PROMPTS[1], SEEDS[1:2], guidance_scale=SCALES[1]),
    )
    assert difference(generate(one), expected) <= 1e-5
    assert len(reelbatch.repair(one)) == 1
    reelbatch.restore(one)
    reelbatch.restore(two)
    assert classes(one) == classes(two) == found
    assert torch.equal(generate(one), expected)
    assert torch.equal(generate(two), expected)


def test_a_pipeline_that_is_gone_or_has_another_transformer_holds_nothing(pipe):
    found = classes(pipe)
    gone, other = (with_transformer(pipe, pipe.transformer) for _ in range(2))
    for each in (pipe, gone, other):
        reelbatch.repair(each)
    del gone, each
    gc.collect()
    other.transformer = copy.deepcopy(pipe.transformer)
    reelbatch.restore(pipe)
    assert classes(pipe) == found


def test_one_that_was_never_repaired_is_left_alone(pipe):
    other = with_transformer(pipe, pipe.transformer)
    reelbatch.repair(pipe)
    reelbatch.restore(other)
    assert is_repaired(pipe)
    reelbatch.repair(other)
    assert is_repaired(other)


def test_copies(pipe):
    """A copy is repaired too, and for good: what it was is known of the original only."""
    found = classes(pipe)
    reelbatch.repair(pipe)
    other = with_transformer(pipe, copy.deepcopy(pipe.transformer))
    assert torch.equal(generate(other), generate(pipe))
    with pytest.raises(CannotRepair, match="copy of what was repaired"):
        reelbatch.restore(other)
    assert is_repaired(pipe)
    reelbatch.restore(pipe)
    assert classes(pipe) == found
    assert is_repaired(other)


def test_a_failed_call_leaves_nothing(pipe):
    reelbatch.repair(pipe, isolation="packed")
    with pytest.raises(RuntimeError):
        generate(pipe, latents=torch.zeros(1, 3, 2, 4, 4))
    assert pipe.transformer.isolation == "exact"
    assert not pipe.vae.use_slicing

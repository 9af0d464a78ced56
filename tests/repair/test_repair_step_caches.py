"""Step caches of Diffusers, which let the videos of a batch decide together, are refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import hooks
from pipelines import STEPS, classes, difference, generate, is_repaired

import reelbatch
from reelbatch.repairs.fix import CannotRepair


def cache_config(name: str, pipe: Any) -> Any:
    ranges = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (0, 1001),
        "current_timestep_callback": lambda: pipe.current_timestep,
    }
    return {
        "first_block_cache": lambda: hooks.FirstBlockCacheConfig(threshold=0.5),
        "pyramid_attention_broadcast": lambda: hooks.PyramidAttentionBroadcastConfig(**ranges),
        "faster_cache": lambda: hooks.FasterCacheConfig(**ranges, is_guidance_distilled=True),
        "mag_cache": lambda: hooks.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
        "taylorseer_cache": lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
        "taylorseer_lite": lambda: hooks.TaylorSeerCacheConfig(use_lite_mode=True),
        "sea_cache": lambda: hooks.SeaCacheConfig(),
        "text_kv_cache": lambda: hooks.TextKVCacheConfig(),
    }[name]()


CACHES = {
    "first_block_cache": hooks.apply_first_block_cache,
    "pyramid_attention_broadcast": hooks.apply_pyramid_attention_broadcast,
    "faster_cache": hooks.apply_faster_cache,
    "mag_cache": hooks.apply_mag_cache,
    "taylorseer_cache": hooks.apply_taylorseer_cache,
    "taylorseer_lite": hooks.apply_taylorseer_cache,
    "sea_cache": hooks.apply_sea_cache,
    "text_kv_cache": hooks.apply_text_kv_cache,
}


def test_every_one_of_diffusers_is_here():
    names = {name.removeprefix("apply_") for name in dir(hooks) if name.startswith("apply_")}
    others = {"context_parallel", "group_offloading", "layer_skip", "tensor_parallel"}
    others |= {"layerwise_casting", "layerwise_casting_hook"}
    assert names - others == set(CACHES) - {"taylorseer_lite"}


@pytest.mark.parametrize(
    ("how", "name"), [("enable_cache", "first_block_cache"), *(("apply", name) for name in CACHES)]
)
def test_refused_with_the_call_that_turns_it_off(pipe, name, how):
    expected, found = generate(pipe), classes(pipe)
    if how == "enable_cache":
        pipe.transformer.enable_cache(cache_config(name, pipe))
    else:
        CACHES[name](pipe.transformer, cache_config(name, pipe))
    with pytest.raises(CannotRepair, match="decides once for the whole batch") as refused:
        reelbatch.repair(pipe)
    assert classes(pipe) == found
    call = str(refused.value).partition("Turn it off first: ")[2]
    assert call == "pipe.transformer.disable_cache()" or how == "apply"
    exec(call, {"pipe": pipe, "diffusers": diffusers})  # what the message says, as it says it
    assert torch.equal(generate(pipe), expected)
    reelbatch.repair(pipe)
    assert difference(generate(pipe), expected) <= 1e-5
    assert is_repaired(pipe)


@pytest.mark.parametrize("name", CACHES)
def test_refused_after_the_repair(pipe, name):
    reelbatch.repair(pipe)
    expected = generate(pipe)
    with pytest.raises(NotImplementedError, match=r"decides once for the whole batch.*restore"):
        pipe.transformer.enable_cache(cache_config(name, pipe))
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipe), expected)
    try:
        CACHES[name](pipe.transformer, cache_config(name, pipe))
    except ValueError:  # some look for classes that they know, and do not find them
        assert torch.equal(generate(pipe), expected)
        return
    with pytest.raises(CannotRepair, match="decides once for the whole batch") as refused:
        generate(pipe)
    exec(str(refused.value).partition("Turn it off first: ")[2], {"pipe": pipe, "diffusers": diffusers})
    assert torch.equal(generate(pipe), expected)

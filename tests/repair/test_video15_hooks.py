"""A repair of HunyuanVideo 1.5 keeps hooks and adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig
from video15 import differences, mixed_batch, repair, run, solo


class CountingHook(ModelHook):
    """accelerate's."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingDiffusersHook(DiffusersHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingNewForwardHook(DiffusersHook):
    """One that calls the forward that it replaces itself."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hooks(model: torch.nn.Module) -> Callable[[], int]:
    hooks = [CountingHook(), CountingHook(), CountingHook()]
    for module, hook in zip((model, model.context_embedder, model.transformer_blocks[0].attn), hooks, strict=True):
        add_hook_to_module(module, hook)
    return lambda: min(hook.calls for hook in hooks)


def diffusers_hooks(model: torch.nn.Module) -> Callable[[], int]:
    hooks = []
    for module in (model, model.context_embedder, model.context_embedder.token_refiner, model.transformer_blocks[0]):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        hooks += [CountingDiffusersHook(), CountingNewForwardHook(), CountingDiffusersHook()]
        for position, hook in enumerate(hooks[-3:]):
            registry.register_hook(hook, f"count{position}")
    return lambda: min(hook.calls for hook in hooks)


def both_hooks(model: torch.nn.Module) -> Callable[[], int]:
    counts = diffusers_hooks(model), accelerate_hooks(model)
    return lambda: min(count() for count in counts)


def cpu_offload(model: torch.nn.Module) -> Callable[[], int]:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return lambda: 1


def group_offload(model: torch.nn.Module, **options: Any) -> Callable[[], int]:
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **options)
    return lambda: 1


def dispatch(model: torch.nn.Module) -> Callable[[], int]:
    """What `device_map` does, with blocks that wait on the CPU."""
    names = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, names, main_device="cpu", force_hooks=True)
    return lambda: 1


HOOKS = {
    "accelerate": accelerate_hooks,
    "diffusers": diffusers_hooks,
    "both": both_hooks,
    "cpu_offload": cpu_offload,
    "device_map": dispatch,
    "group_leaf": functools.partial(group_offload, offload_type="leaf_level"),
    "group_block": functools.partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@torch.no_grad()
def test_kept(transformer, hooks, when):
    batch = mixed_batch()
    expected, unrepaired = solo(transformer, batch), run(transformer, batch)
    if when == "before":
        count = hooks(transformer)
        undo = repair(transformer=transformer)
    else:
        undo = repair(transformer=transformer)
        count = hooks(transformer)
    assert max(differences(run(transformer, batch), expected)) <= 1e-5
    assert count() >= 1
    undo()
    assert max(differences(run(transformer, batch), unrepaired)) <= 1e-6
    assert max(differences(run(transformer, batch), expected)) > 1e-3


@torch.no_grad()
def test_hooks_may_go_in_between(transformer):
    batch = mixed_batch()
    expected, unrepaired = solo(transformer, batch), run(transformer, batch)
    accelerate_hooks(transformer)
    undo = repair(transformer=transformer)
    remove_hook_from_module(transformer, recurse=True)
    assert "forward" in vars(transformer)  # the bound method that accelerate leaves behind
    assert max(differences(run(transformer, batch), expected)) <= 1e-5
    undo()
    assert torch.equal(run(transformer, batch), unrepaired)
    repair(transformer=transformer)
    assert max(differences(run(transformer, batch), expected)) <= 1e-5


@torch.no_grad()
def test_vae_with_hooks(vae):
    latents = torch.randn(2, 4, 2, 4, 4)
    expected = torch.cat([vae.decode(one).sample for one in latents.split(1)])
    add_hook_to_module(vae.decoder.mid_block.attentions[0], hook := CountingHook())
    undo = repair(vae=vae)
    assert max(differences(vae.decode(latents).sample, expected)) <= 1e-5
    assert hook.calls == 1
    undo()
    with pytest.raises(RuntimeError, match="broadcast"):
        vae.decode(latents)


@torch.no_grad()
def test_lora(transformer):
    torch.manual_seed(3)
    targets = ["to_q", "add_k_proj", "to_out.0", "proj_in", "linear_2"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    batch, scale = mixed_batch(), {"attention_kwargs": {"scale": 0.5}}
    expected, scaled = solo(transformer, batch), solo(transformer, batch, **scale)
    transformer.disable_adapters()
    plain = solo(transformer, batch)
    transformer.enable_adapters()
    repair(transformer=transformer)
    assert min(differences(expected, plain)) > 1e-3
    assert min(differences(scaled, expected)) > 1e-3
    assert max(differences(run(transformer, batch), expected)) <= 1e-5
    assert max(differences(run(transformer, batch, **scale), scaled)) <= 1e-5

"""`repair` keeps parameters, hooks, adapters, gradients, compilation and quantized layers."""

from __future__ import annotations

import copy
import functools
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import diffusers
import psutil
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    hooks,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
)
from diffusers.utils.torch_utils import is_compiled_module
from peft import LoraConfig, get_peft_model_state_dict
from pipelines import (
    PROMPTS,
    SCALES,
    SEEDS,
    aligned,
    batch,
    classes,
    difference,
    generate,
    is_repaired,
    parameters,
    quiet,
    with_transformer,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import reelbatch


def live_bytes() -> int:
    """Of all tensors that the garbage collector knows, each storage once."""
    gc.collect()
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors = [thing for thing in things if not isinstance(thing, FakeTensor) and thing.device.type == "cpu"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def offload_whole_models(pipe: Any) -> None:
    """What `enable_model_cpu_offload` does, on the CPU."""
    previous = None
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        _, previous = accelerate.cpu_offload_with_hook(getattr(pipe, name), torch.device("cpu"), previous)


def offload_sequentially(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def offload_groups(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)


def cast_layers(pipe: Any) -> None:
    """Stored in 8 bits: what these bits hold must be computed in fp32 as without a repair."""
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cast_layers_and_offload_groups(pipe: Any) -> None:
    cast_layers(pipe)
    offload_groups(pipe, offload_type="leaf_level")


def dispatch(pipe: Any) -> None:
    """What `device_map` does, with blocks that wait on the CPU."""
    accelerate.dispatch_model(
        pipe.transformer,
        {name: "cpu" for name, _ in pipe.transformer.named_children()},
        main_device="cpu",
        force_hooks=True,
    )


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model_cpu_offload": offload_whole_models,
    "sequential": offload_sequentially,
    "group_block": functools.partial(offload_groups, offload_type="block_level", num_blocks_per_group=1),
    "group_leaf": functools.partial(offload_groups, offload_type="leaf_level"),
    "layerwise_casting": cast_layers,
    "casting_and_group": cast_layers_and_offload_groups,
    "device_map": dispatch,
}


class Counting(hooks.ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


LORA = {"r": 4, "target_modules": ["to_q", "add_k_proj", "to_out.0", "proj_mlp", "linear"], "init_lora_weights": False}


class QuantizedLinear(torch.nn.Linear):
    """Stands in for those of bitsandbytes, torchao and GGUF: another class, and weights of another kind."""

    def __init__(self, of: torch.nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, device="meta")
        weight = of.weight.detach()
        self.step = weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = of.bias
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.weight * self.step, self.bias)


def quantize(model: torch.nn.Module) -> list[QuantizedLinear]:
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "_blocks." in n]
    for name in names:
        model.set_submodule(name, QuantizedLinear(model.get_submodule(name)))
    return [model.get_submodule(name) for name in names]


def test_the_very_same_parameters_and_no_new_tensors(pipe):
    before, state = parameters(pipe.transformer), list(pipe.transformer.state_dict())
    weights = sum(tensor.nbytes for tensor in pipe.transformer.parameters())
    generate(pipe, PROMPTS, SEEDS, num_inference_steps=1)
    live = live_bytes()
    reelbatch.repair(pipe)
    assert parameters(pipe.transformer) == before
    assert list(pipe.transformer.state_dict()) == state
    assert abs(live_bytes() - live) <= 0.001 * weights
    generate(pipe, PROMPTS, SEEDS, num_inference_steps=1)
    assert live_bytes() - live <= 0.05 * weights  # rotary tables and the like; this model has 0.4 MB
    reelbatch.restore(pipe)
    assert parameters(pipe.transformer) == before


def test_resident_memory():
    """Of 260 MB of weights, repaired and restored."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "rope_axes_dim": (16, 24, 24), "num_layers": 4}
    with torch.device("meta"):
        big = HunyuanVideoTransformer3DModel(
            **{**tiny.transformer_config(), **sizes, "mlp_ratio": 4.0, "num_single_layers": 4}
        )
    big = big.to_empty(device="cpu")
    for tensor in big.parameters():
        tensor.data.zero_()  # touched, hence resident
    weights = sum(tensor.nbytes for tensor in big.parameters())
    assert weights > 2.4e8
    pipe = with_transformer(HunyuanVideoPipeline(*[None] * 7), big)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    reelbatch.repair(pipe)
    assert process.memory_info().rss - before <= 0.01 * weights
    reelbatch.restore(pipe)
    assert process.memory_info().rss - before <= 0.01 * weights


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_hooks(own_pipe, name, when):
    pipe = own_pipe
    if name.startswith("casting") or name == "layerwise_casting":
        pipe.transformer.to(torch.float8_e4m3fn).to(torch.float32)  # so that storing them loses nothing more
    options = {"prompt": PROMPTS[:2], "seeds": SEEDS[:2], "num_inference_steps": 2}
    expected = generate(pipe, **options)
    if when == "before":
        OFFLOADS[name](pipe)
        reelbatch.repair(pipe)
    else:
        reelbatch.repair(pipe)
        OFFLOADS[name](pipe)
    counts = []
    for module in pipe.transformer.modules():
        if hasattr(module, "_diffusers_hook") and module._diffusers_hook.hooks:
            counts.append(Counting())
            module._diffusers_hook.register_hook(counts[-1], "count")
    assert bool(counts) == (name not in ("model_cpu_offload", "sequential", "device_map"))
    assert difference(generate(pipe, **options), expected) <= 1e-5
    assert all(hook.calls for hook in counts)
    assert is_repaired(pipe)
    offloaded = [tensor.is_meta for tensor in pipe.transformer.parameters()]
    assert all(offloaded) if name == "sequential" else not any(offloaded)
    reelbatch.restore(pipe)
    assert difference(generate(pipe, **options), expected) <= 1e-6
    assert not is_repaired(pipe)


@pytest.mark.parametrize("name", ["sequential", "group_block"])
def test_hooks_may_come_and_go(own_pipe, name):
    pipe = own_pipe
    expected, found = generate(pipe), classes(pipe)
    OFFLOADS[name](pipe)
    reelbatch.repair(pipe)
    if name == "sequential":
        remove_hook_from_module(pipe.transformer, recurse=True)
    else:
        registry = hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        for hook in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
            registry.remove_hook(hook)
    assert "forward" in vars(pipe.transformer)  # the bound method that a hook leaves behind
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    assert difference(generate(pipe), expected) <= 1e-5
    assert is_repaired(pipe)
    reelbatch.restore(pipe)
    assert classes(pipe) == found
    assert torch.equal(generate(pipe), expected)
    assert not is_repaired(pipe)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(pipe, when, tmp_path):
    torch.manual_seed(0)
    other = copy.deepcopy(pipe.transformer)
    other.add_adapter(LoraConfig(**LORA))
    layers = get_peft_model_state_dict(other)
    HunyuanVideoPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    plain = generate(pipe, PROMPTS[:2], SEEDS[:2])
    half = {"attention_kwargs": {"scale": 0.5}}
    if when == "after":
        reelbatch.repair(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    loaded = generate(pipe, PROMPTS[:2], SEEDS[:2])
    scaled = generate(pipe, PROMPTS[:2], SEEDS[:2], **half)
    (reelbatch.restore if when == "after" else reelbatch.repair)(pipe)
    assert min(difference(loaded, plain), difference(scaled, plain), difference(scaled, loaded)) > 1e-3
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), loaded) <= 1e-5
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2], **half), scaled) <= 1e-5
    pipe.set_adapters("style", 0.5)
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), scaled) <= 1e-5
    pipe.fuse_lora()
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), scaled) <= 1e-4
    pipe.unfuse_lora()
    pipe.delete_adapters("style")
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), plain) <= 1e-5
    pipe.unload_lora_weights()
    reelbatch.restore(pipe)
    assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), plain) <= 1e-5  # fused and unfused again: rounded


def test_batch_promise_with_an_adapter(pipe):
    pipe.transformer.add_adapter(LoraConfig(**LORA))
    reelbatch.repair(pipe)
    alone = torch.cat([batch(pipe, [i]) for i in range(3)])
    assert torch.equal(batch(pipe, [0, 1, 2]), alone)


def test_gradients(pipe):
    """Of the adapter's weights, with and without gradient checkpointing."""
    torch.manual_seed(0)
    model = pipe.transformer
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**LORA))
    inputs = padded_batch()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.train()
    expected = gradients()
    model.enable_gradient_checkpointing()
    reelbatch.repair(pipe)
    checkpointed = gradients()
    model.disable_gradient_checkpointing()
    plain = gradients()
    assert expected.keys() == plain.keys() == checkpointed.keys()
    for name, wanted in expected.items():
        assert torch.equal(checkpointed[name], plain[name])
        assert (plain[name] - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-9, name
    model.enable_gradient_checkpointing()
    reelbatch.restore(pipe)
    again = gradients()
    assert all((again[name] - expected[name]).abs().max() <= 1e-6 for name in expected)


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
def test_compiled(compile_pipe):
    """One that `torch.compile` wrapped and that ran before is repaired inside, and compiled anew."""
    pipe = compile_pipe
    expected = generate(pipe, num_inference_steps=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert is_compiled_module(pipe.transformer)
    assert torch.equal(generate(pipe, num_inference_steps=1), expected)
    reelbatch.repair(pipe)
    assert difference(generate(pipe, num_inference_steps=1), expected) <= 1e-5
    assert is_repaired(pipe)
    with pytest.raises(NotImplementedError, match="decides once for the whole batch"):
        pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig())
    reelbatch.restore(pipe)
    assert torch.equal(generate(pipe, num_inference_steps=1), expected)
    assert type(pipe.transformer._orig_mod) is HunyuanVideoTransformer3DModel


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_blocks(compile_pipe, when):
    pipe = compile_pipe
    expected = generate(pipe, num_inference_steps=1)
    if when == "after":
        reelbatch.repair(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    compiled = [module for module in pipe.transformer.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == 4  # two blocks, the patch embedding and the refiner
    reelbatch.repair(pipe)
    assert difference(generate(pipe, num_inference_steps=1), expected) <= 1e-5
    assert is_repaired(pipe)


def test_quantized_layers(pipe):
    layers = quantize(pipe.transformer)
    weights = {id(layer.weight): layer.weight.data_ptr() for layer in layers}
    expected = torch.cat([batch(pipe, [i], scales=SCALES[i]) for i in range(3)])
    reelbatch.repair(pipe)
    assert all(type(layer) is QuantizedLinear for layer in layers)
    assert {id(layer.weight): layer.weight.data_ptr() for layer in layers} == weights
    before = [layer.calls for layer in layers]
    assert difference(batch(pipe, [0, 1, 2]), expected) <= 1e-5
    assert all(layer.calls > calls for layer, calls in zip(layers, before, strict=True))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantize_per_tensor")
def test_dynamically_quantized_layers(tiny_pipeline):
    """Their scale is that of the whole tensor that comes in, batch-mates and padding included; not after."""
    model = torch.ao.quantization.quantize_dynamic(tiny_pipeline.transformer, {torch.nn.Linear})
    pipe = with_transformer(tiny_pipeline, model)
    alone = torch.cat([batch(pipe, [i], scales=6.0) for i in range(3)])
    assert difference(batch(pipe, [0, 1, 2], scales=6.0), alone) > 1e-4
    reelbatch.repair(pipe)
    alone = torch.cat([batch(pipe, [i]) for i in range(3)])
    assert torch.equal(batch(pipe, [0, 1, 2]), alone)


def test_attention_backend(pipe):
    expected = generate(pipe, PROMPTS[:2], SEEDS[:2])
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        pipe.transformer.set_attention_backend("_native_math")
        reelbatch.repair(pipe)
        assert pipe.transformer.attention_backend == "math"
        assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), expected) <= 1e-5
        for name, ours in (("native", "auto"), ("_native_flash", "flash"), ("sdpa", "sdpa")):
            pipe.transformer.set_attention_backend(name)
            assert pipe.transformer.attention_backend == ours
            assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2]), expected) <= 1e-5
        pipe.transformer.reset_attention_backend()
        assert pipe.transformer.attention_backend == "auto"
        reelbatch.restore(pipe)
        processor = pipe.transformer.transformer_blocks[0].attn.processor
        assert processor._attention_backend is AttentionBackendName._NATIVE_MATH
        assert "attention_backend" not in vars(pipe.transformer)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def test_processors_have_no_effect_and_say_so(pipe):
    pipe.transformer.fuse_qkv_projections()  # which Diffusers offers, and which does nothing to this network
    expected = generate(pipe)
    reelbatch.repair(pipe)
    assert difference(generate(pipe), expected) <= 1e-5
    with pytest.raises(NotImplementedError, match=r"set_attention_backend, or call reelbatch\.restore"):
        pipe.transformer.set_attn_processor(HunyuanVideoAttnProcessor2_0())
    with pytest.raises(NotImplementedError, match=r"reelbatch\.restore"):
        pipe.transformer.fuse_qkv_projections()


def test_saves_as_what_it_is(pipe, tmp_path):
    expected = generate(aligned(pipe))
    reelbatch.repair(pipe)
    pipe.transformer = pipe.transformer  # makes Diffusers look at the class again
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoPipeline"
    assert index["transformer"] == ["diffusers", "HunyuanVideoTransformer3DModel"]
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "HunyuanVideoTransformer3DModel"
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again) is HunyuanVideoPipeline
    assert type(again.transformer) is HunyuanVideoTransformer3DModel
    assert torch.equal(generate(aligned(again)), expected)
    assert type(type(pipe).from_pretrained(tmp_path)) is HunyuanVideoPipeline
    # which takes a transformer over by itself only if it is of its very class
    shared = HunyuanVideoPipeline.from_pipe(pipe, transformer=pipe.transformer)
    assert shared.transformer is pipe.transformer
    assert type(type(pipe.transformer).from_pretrained(tmp_path / "transformer")) is HunyuanVideoTransformer3DModel
    assert str(type(pipe.transformer)) == str(HunyuanVideoTransformer3DModel)


def padded_batch() -> dict[str, Tensor]:
    """Two samples of the transformer, with 7 and 4 of 9 text tokens."""
    torch.manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 9, 32),
        "encoder_attention_mask": (torch.arange(9) < torch.tensor([[7], [4]])).float(),
        "pooled_projections": torch.randn(2, 24),
        "guidance": torch.tensor([6000.0, 2500.0]),
    }


@pytest.fixture
def compile_pipe(tiny_pipeline) -> Iterator[HunyuanVideoPipeline]:
    """With one block of each kind, as `torch.compile` takes seconds for each."""
    torch._dynamo.reset()
    small = tiny.transformer(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    yield with_transformer(tiny_pipeline, small)
    torch._dynamo.reset()

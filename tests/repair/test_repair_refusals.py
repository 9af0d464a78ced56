"""Nothing is changed by a repair that is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import accelerate
import diffusers
import pytest
import tiny
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformerBlock,
)
from pipelines import classes, difference, generate, is_repaired, with_transformer

import reelbatch
from reelbatch.repairs import hunyuan_video
from reelbatch.repairs.fix import CannotRepair


class Wrapped(HunyuanVideoTransformerBlock):
    """Somebody's own block."""


class OwnProcessor(HunyuanVideoAttnProcessor2_0):
    """Somebody's own attention."""


@pytest.fixture(autouse=True)
def unchanged(request) -> Iterator[None]:
    if "pipe" not in request.fixturenames:
        yield
        return
    pipe = request.getfixturevalue("pipe")
    yield
    assert type(pipe) is HunyuanVideoPipeline
    ours = [kind for kind in classes(pipe) if kind.__mro__[1].__module__.startswith("reelbatch")]
    assert ours == []
    assert not {"_reelbatch_repair", "attention_backend"} & {*vars(pipe), *vars(pipe.transformer)}


@pytest.mark.parametrize(
    "unknown", [HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoImageToVideoPipeline, diffusers.DDPMPipeline, dict]
)
def test_unknown_pipeline(pipe, unknown):
    parts = {**pipe.components, "image_processor": None}
    if unknown is diffusers.DDPMPipeline:
        other = unknown(unet=None, scheduler=FlowMatchEulerDiscreteScheduler())
    elif unknown is dict:
        other = parts
    else:
        names = set(inspect.signature(unknown.__init__).parameters)
        other = unknown(**{name: part for name, part in parts.items() if name in names})
    with pytest.raises(CannotRepair, match=rf"{unknown.__name__} is not a pipeline that .* HunyuanVideoPipeline, "):
        reelbatch.repair(other)
    assert type(other) is unknown


def test_somebodys_own_pipeline(pipe):
    class Own(HunyuanVideoPipeline):
        pass

    with pytest.raises(CannotRepair, match=r"found a .*Own where HunyuanVideoPipeline was expected"):
        reelbatch.repair(Own(**pipe.components))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, name, _ in hunyuan_video.SOURCE + hunyuan_video.PIPELINE_SOURCE],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_changed_source(pipe, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    with pytest.raises(CannotRepair, match=rf"Diffusers 0\.42\.1 has.*{owner.__name__}\.{name}.*Nothing was ch"):
        reelbatch.repair(pipe)


def test_every_method_that_is_replaced_is_guarded():
    guarded = {(owner, name) for owner, name, _ in hunyuan_video.SOURCE + hunyuan_video.PIPELINE_SOURCE}
    assert {(their, "forward") for their in hunyuan_video.STAND_INS} <= guarded
    replaced = {name for name in vars(hunyuan_video.BatchedPipeline) if name in vars(HunyuanVideoPipeline)}
    own = {"__module__", "__doc__", "__init__", "__firstlineno__", "__static_attributes__"}
    assert {(HunyuanVideoPipeline, name) for name in replaced - own} <= guarded


@pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
def test_image_to_video_transformer(pipe, kind):
    other = with_transformer(pipe, tiny.transformer(image_condition_type=kind))
    found = classes(other)
    with pytest.raises(CannotRepair, match=f"image_condition_type '{kind}'"):
        reelbatch.repair(other)
    assert classes(other) == found


def test_another_transformer(pipe):
    """FramePack's has the same blocks."""
    sizes = {name: value for name, value in tiny.transformer_config().items() if name != "patch_size_t"}
    other = with_transformer(pipe, HunyuanVideoFramepackTransformer3DModel(**sizes, image_proj_dim=8))
    found = classes(other)
    with pytest.raises(CannotRepair, match="HunyuanVideoFramepackTransformer3DModel"):
        reelbatch.repair(other)
    assert classes(other) == found


def test_somebodys_own_block(pipe):
    block = pipe.transformer.transformer_blocks[1]
    block.__class__ = Wrapped
    with pytest.raises(CannotRepair, match=r"transformer_blocks\.1 is a test_repair_refusals\.Wrapped, not a Hunyuan"):
        reelbatch.repair(pipe)
    assert type(block) is Wrapped


def test_attention_processors(pipe):
    expected = generate(pipe)
    transformer = pipe.transformer
    transformer.set_attn_processor(OwnProcessor())
    for name, right in (("HunyuanVideoAttnProcessor2_0", 4), ("AttnProcessor2_0", 6)):
        with pytest.raises(CannotRepair, match=f"refusals.OwnProcessor where {name} was expected") as refused:
            reelbatch.repair(pipe)
        call = str(refused.value).partition(": ")[2].removesuffix(" Nothing was changed.").removesuffix(".")
        exec(call, {"pipe": pipe, **{kind.__name__: kind for kind in hunyuan_video.NETWORK.processors.values()}})
        kinds = [type(processor) for processor in transformer.attn_processors.values()]
        assert kinds.count(OwnProcessor) == len(kinds) - right
    reelbatch.repair(pipe)
    assert difference(generate(pipe), expected) <= 1e-5
    reelbatch.restore(pipe)
    assert torch.equal(generate(pipe), expected)


def test_attention_backend(pipe):
    for attention in (block.attn for block in pipe.transformer.transformer_blocks):
        attention.processor._attention_backend = AttentionBackendName.SAGE  # its package is not here
    with pytest.raises(CannotRepair, match=r"'sage' .*pipe\.transformer\.reset_attention_backend\(\) first"):
        reelbatch.repair(pipe)
    pipe.transformer.reset_attention_backend()
    reelbatch.repair(pipe)
    reelbatch.restore(pipe)


@pytest.mark.parametrize("place", ["", "transformer_blocks.1", "context_embedder.token_refiner", "norm_out"])
def test_unknown_wrapper(pipe, place):
    expected = generate(pipe)
    module = pipe.transformer.get_submodule(place)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(CannotRepair, match=f"wraps the forward of this {type(module).__name__}"):
        reelbatch.repair(pipe)
    assert torch.equal(generate(pipe), expected)
    # a hook over it does not hide it
    accelerate.cpu_offload_with_hook(module, torch.device("cpu"))
    with pytest.raises(CannotRepair, match="wraps the forward"):
        reelbatch.repair(pipe)
    assert torch.equal(generate(pipe), expected)
    remove_hook_from_module(module)
    del module.forward
    reelbatch.repair(pipe)
    assert difference(generate(pipe), expected) <= 1e-5
    reelbatch.restore(pipe)


def test_wrapper_over_a_hook_goes_on(pipe):
    """It calls what the hook keeps, which is exchanged."""
    expected = generate(pipe)
    block = pipe.transformer.transformer_blocks[0]
    accelerate.cpu_offload_with_hook(block, torch.device("cpu"))
    forward, calls = block.forward, []
    block.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    reelbatch.repair(pipe)
    assert difference(generate(pipe), expected) <= 1e-5
    assert is_repaired(pipe)
    assert calls
    reelbatch.restore(pipe)


def test_a_class_that_changed_after_the_repair(pipe):
    block = pipe.transformer.transformer_blocks[0]
    reelbatch.repair(pipe)
    ours = type(block)
    block.__class__ = Wrapped
    with pytest.raises(CannotRepair, match="changed again after its repair"):
        reelbatch.restore(pipe)
    block.__class__ = ours
    reelbatch.restore(pipe)


def test_no_transformer(pipe):
    other = with_transformer(pipe, None)
    assert [done.fault[:8] for done in reelbatch.repair(other)] == ["prompt_2"]
    other.transformer = pipe.transformer
    assert len(reelbatch.repair(other)) == 1
    assert is_repaired(other)
    reelbatch.restore(other)

"""drop_in/: `repair` and `restore` on Diffusers' HunyuanVideoPipeline.

What is right in Diffusers stays as it is; every fault is first shown on the unrepaired pipeline.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import psutil
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    hooks,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformerBlock,
)
from diffusers.utils.torch_utils import is_compiled_module
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.overrides import TorchFunctionMode

import reelbatch
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.repair import hunyuan_video
from reelbatch.repair.fix import CannotRepair

PROMPTS = [
    "a cat",
    "two small red horses running on the sea at night in the rain , cinematic",
    "a robot standing still",
    "three yellow stars moving up slowly on a black background",
]
SEEDS = [3, 1, 4, 15]
SCALES = [6.0, 2.5, 9.0, 4.0]
TOKENS = 40
"""Text tokens that every prompt is padded to."""
STEPS = 3


def generate(pipe: Any, prompt: Any = None, seeds: list[int] = SEEDS[:1], **options: Any) -> Any:
    """Latents of 2 frames of 4×4, unless `options` say otherwise."""
    defaults = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "max_sequence_length": TOKENS,
        "output_type": "latent",
    }
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompt = PROMPTS[1] if prompt is None and "prompt_embeds" not in options else prompt
    return pipe(prompt=prompt, generator=generator, **{**defaults, **options}).frames


def frames(pipe: Any, prompt: Any = None, seeds: list[int] = SEEDS[:1], **options: Any) -> Tensor:
    """9 frames of 64×64, as the bundled model makes them."""
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    return generate(pipe, prompt, seeds, **{"output_type": "pt", **sizes, **options})


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_transformer(pipe: Any, transformer: Any) -> HunyuanVideoPipeline:
    return quiet(HunyuanVideoPipeline(**{**pipe.components, "transformer": transformer}))


@pytest.fixture
def pipe(tiny_pipeline) -> HunyuanVideoPipeline:
    """Diffusers' pipeline with a transformer of its own; the other components are shared by all tests."""
    return with_transformer(tiny_pipeline, copy.deepcopy(tiny_pipeline.transformer))


@pytest.fixture(scope="module")
def loaded_demo() -> HunyuanVideoPipeline:
    return quiet(HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER))


@pytest.fixture
def demo(loaded_demo) -> Iterator[HunyuanVideoPipeline]:
    yield loaded_demo
    reelbatch.restore(loaded_demo)


def classes(pipe: Any) -> list[type]:
    return [type(pipe), *(type(module) for module in pipe.transformer.modules())]


def text_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    mask = pipe.encode_prompt(prompts, max_sequence_length=TOKENS)[2]
    return [int(row.sum()) for row in mask]


class AttentionCalls(TorchFunctionMode):
    """(has a mask, samples, queries, keys) of every call of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, int, int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, query, key, value, attn_mask=None, **options) -> None:
        self.calls.append((attn_mask is not None, query.shape[0], query.shape[-2], key.shape[-2]))


def brighten(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A callback that changes the latents."""
    return {"latents": tensors["latents"] * (1.0 + 0.1 * step)}


class TestWhatWasRightStays:
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
    def test_frames(self, pipe, prompt, options):
        seeds = SEEDS[: (1 if isinstance(prompt, str) else len(prompt)) * options.get("num_videos_per_prompt", 1)]
        expected = generate(pipe, prompt, seeds, output_type="pt", **options)
        reelbatch.repair(pipe)
        found = generate(pipe, prompt, seeds, output_type="pt", **options)
        assert found.shape == (len(seeds), 5, 3, 32, 32)
        assert (found - expected).abs().max() <= 1e-4

    def test_frames_of_the_demo(self, demo):
        options = {"num_videos_per_prompt": 2, "negative_prompt": ["blurry"], "true_cfg_scale": 3.0}
        expected = frames(demo, PROMPTS[:1], SEEDS[:2], **options)
        reelbatch.repair(demo)
        found = frames(demo, PROMPTS[:1], SEEDS[:2], **options)
        assert found.shape == (2, 9, 3, 64, 64)
        assert (found - expected).abs().max() <= 1e-4

    def test_tiling(self, own_pipe):
        plain = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
        own_pipe.vae.enable_tiling(16, 16, 16, 12, 12, 12)
        expected = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
        assert difference(expected, plain) > 1e-3
        reelbatch.repair(own_pipe)
        found = generate(own_pipe, PROMPTS[:2], SEEDS[:2], output_type="pt")
        assert (found - expected).abs().max() <= 1e-4
        assert not own_pipe.vae.use_slicing  # but during the call

    def test_outputs(self, pipe):
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

    def test_callback_is_given_every_tensor(self, pipe):
        seen = []

        def note(of, step, timestep, tensors):
            seen.append((step, float(timestep), tensors["prompt_embeds"].shape))
            return tensors

        options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        expected = generate(pipe, PROMPTS[:2], SEEDS[:2], **options)
        reelbatch.repair(pipe)
        assert difference(generate(pipe, PROMPTS[:2], SEEDS[:2], **options), expected) <= 1e-5
        assert seen[STEPS:] == seen[:STEPS]

    def test_what_is_wrong_is_told_as_before(self, pipe):
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


class TestFaults:
    def test_padded_text_and_masks(self, pipe):
        lengths = text_lengths(pipe, PROMPTS[:3])
        assert len(set(lengths)) == 3
        video = 2 * 2 * 2
        with AttentionCalls() as before:
            generate(pipe, PROMPTS[:3], SEEDS[:3], num_inference_steps=1)
        # the fault: a mask in every call, and the padding in every block
        assert set(before.calls[-4:]) == {(True, 3, video + TOKENS, video + TOKENS)}
        assert before.calls[-6:-4] == 2 * [(True, 3, TOKENS, TOKENS)]
        reelbatch.repair(pipe)
        with AttentionCalls() as after:
            generate(pipe, PROMPTS[:3], SEEDS[:3], num_inference_steps=1)
        refined = [(False, 1, n, n) for n in lengths for _ in range(2)]
        joint = [(False, 1, video + n, video + n) for n in lengths]
        assert after.calls[-18:] == refined + 4 * joint

    @pytest.mark.parametrize("place", ["left", "holes"])
    def test_padding_leaks(self, pipe, place):
        states, pooled, _ = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
        length = text_lengths(pipe, PROMPTS[1:2])[0]
        at = torch.arange(TOKENS - length, TOKENS) if place == "left" else 2 * torch.arange(length)
        room = int(at[-1]) + 1
        mask = torch.zeros(1, room).index_fill(1, at, 1.0)

        def run(padding: float) -> Tensor:
            embeds = torch.full((1, room, 32), padding).index_copy(1, at, states[:, :length])
            return generate(pipe, prompt_embeds=embeds, pooled_prompt_embeds=pooled, prompt_attention_mask=mask)

        alone = {"prompt_embeds": states[:, :length], "pooled_prompt_embeds": pooled}
        expected = generate(pipe, **alone, prompt_attention_mask=torch.ones(1, length))
        assert difference(generate(pipe, PROMPTS[1]), expected) <= 1e-5  # right padding was right
        assert difference(run(0.0), expected) > 1e-3  # the fault
        assert difference(run(0.0), run(5.0)) > 1e-3
        reelbatch.repair(pipe)
        trimmed = generate(pipe, **alone, prompt_attention_mask=torch.ones(1, length))
        assert difference(trimmed, expected) <= 1e-5
        for padding in (0.0, 5.0, float("nan")):
            assert torch.equal(run(padding), trimmed)
        assert torch.equal(generate(pipe, PROMPTS[1]), trimmed)

    def test_prompt_2_is_ignored(self, pipe):
        states, _, mask = pipe.encode_prompt(PROMPTS[0], max_sequence_length=TOKENS)
        pooled = pipe.encode_prompt(PROMPTS[1])[1]
        given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
        expected = generate(pipe, **given)
        plain = generate(pipe, PROMPTS[0])
        assert difference(expected, plain) > 1e-3
        assert torch.equal(generate(pipe, PROMPTS[0], prompt_2=PROMPTS[1]), plain)  # the fault
        reelbatch.repair(pipe)
        found = generate(pipe, PROMPTS[0], prompt_2=PROMPTS[1])
        assert difference(found, expected) <= 1e-5
        assert difference(generate(pipe, PROMPTS[0]), plain) <= 1e-5
        # one for all prompts, or one each
        several = generate(pipe, PROMPTS[:2], SEEDS[:2], prompt_2=PROMPTS[1])
        assert torch.equal(several, generate(pipe, PROMPTS[:2], SEEDS[:2], prompt_2=[PROMPTS[1]] * 2))
        assert torch.equal(several[:1], found)

    def test_prompt_2_of_the_negative_prompt_and_wrong_counts(self, pipe):
        reelbatch.repair(pipe)
        options = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
        plain = generate(pipe, PROMPTS[0], **options)
        other = generate(pipe, PROMPTS[0], negative_prompt_2="low quality", **options)
        assert difference(other, plain) > 1e-4
        assert torch.equal(generate(pipe, PROMPTS[0], negative_prompt_2="blurry", **options), plain)
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
            for prompt, seeds in ((PROMPTS[:2], SEEDS[:2]), (PROMPTS[0], SEEDS[:1])):
                with pytest.raises(ValueError, match=f"{name} has 3 texts for {len(seeds)} prompts: give one, or one"):
                    generate(pipe, prompt, seeds, **{**options, name: PROMPTS[:3]})

    def test_embeddings_with_several_videos(self, pipe):
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        given = dict(zip(names, pipe.encode_prompt(PROMPTS[:2], max_sequence_length=TOKENS), strict=True))
        negative = pipe.encode_prompt(["blurry", "grey"], max_sequence_length=TOKENS)
        given |= {f"negative_{name}": value for name, value in zip(names, negative, strict=True)}
        several = {"seeds": SEEDS, "num_videos_per_prompt": 2, "true_cfg_scale": 3.0}
        expected = generate(pipe, PROMPTS[:2], negative_prompt=["blurry", "grey"], **several)
        with pytest.raises(RuntimeError):  # the fault
            generate(pipe, **given, **several)
        reelbatch.repair(pipe)
        found = generate(pipe, **given, **several)
        assert difference(found, expected) <= 1e-5
        # no two of the four videos are of the same prompt and seed, and each is at its place
        assert min(difference(found[[i]], expected[[k]]) for i in range(4) for k in range(4) if i != k) > 1e-2

    def test_embeddings_without_a_mask(self, pipe):
        states, pooled, mask = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
        trimmed = states[:, : int(mask.sum())]
        given = {"prompt_embeds": trimmed, "pooled_prompt_embeds": pooled}
        expected = generate(pipe, PROMPTS[1])
        with pytest.raises(AttributeError, match="NoneType"):  # the fault
            generate(pipe, **given)
        reelbatch.repair(pipe)
        assert difference(generate(pipe, **given), expected) <= 1e-5
        both = generate(pipe, **given, seeds=SEEDS[:2], num_videos_per_prompt=2)
        assert torch.equal(both[:1], generate(pipe, **given))
        with pytest.raises(ValueError, match="without pooled_prompt_embeds"):
            generate(pipe, prompt_embeds=trimmed)

    @pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")
    @pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
    def test_a_list_of_guidance_scales(self, pipe, kind):
        alone = [
            generate(pipe, prompt, [seed], guidance_scale=scale)
            for prompt, seed, scale in zip(PROMPTS, SEEDS, SCALES, strict=True)
        ]
        assert difference(alone[0], generate(pipe, PROMPTS[0], guidance_scale=SCALES[1])) > 1e-3
        with pytest.raises((AssertionError, ValueError, TypeError)):  # the fault
            generate(pipe, PROMPTS, SEEDS, guidance_scale=kind(SCALES))
        reelbatch.repair(pipe)
        assert difference(generate(pipe, PROMPTS, SEEDS, guidance_scale=kind(SCALES)), torch.cat(alone)) <= 1e-5

    def test_a_scale_for_a_prompt_or_for_a_video(self, pipe):
        reelbatch.repair(pipe)
        order = [(PROMPTS[0], 0), (PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[1], 1)]

        def expected(scales: list[float]) -> Tensor:
            return torch.cat(
                [
                    generate(pipe, prompt, [seed], guidance_scale=scale)
                    for (prompt, _), seed, scale in zip(order, SEEDS, scales, strict=True)
                ]
            )

        several = {"prompt": PROMPTS[:2], "seeds": SEEDS, "num_videos_per_prompt": 2}
        a, b, c, d = SCALES
        assert torch.equal(generate(pipe, guidance_scale=[a, b], **several), expected([a, a, b, b]))
        assert torch.equal(generate(pipe, guidance_scale=[a, b, c, d], **several), expected([a, b, c, d]))
        both = generate(pipe, PROMPTS[0], SEEDS[:2], num_videos_per_prompt=2, guidance_scale=[a, b])
        assert torch.equal(both, expected([a, b, c, d])[:2])
        for scales in ([a], [a, b, c], [], SCALES + SCALES):
            with pytest.raises(
                ValueError, match=rf"guidance_scale has {len(scales)} scales for 2 prompts of 2 videos .*2 \(one a pro"
            ):
                generate(pipe, guidance_scale=scales, **several)
        number = generate(pipe, PROMPTS[0], guidance_scale=a)
        for same in (np.float32(a), torch.tensor(a), [a]):
            assert torch.equal(generate(pipe, PROMPTS[0], guidance_scale=same), number)

    def test_one_negative_prompt_for_several_prompts(self, pipe):
        options = {"true_cfg_scale": 3.0}
        expected = generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt=["blurry"] * 2, **options)
        with pytest.raises(RuntimeError):  # the fault
            generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt="blurry", **options)
        encoded = dict(
            zip(
                ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
                pipe.encode_prompt(PROMPTS[:2], max_sequence_length=TOKENS),
                strict=True,
            )
        )
        reelbatch.repair(pipe)
        found = generate(pipe, PROMPTS[:2], SEEDS[:2], negative_prompt="blurry", **options)
        assert difference(found, expected) <= 1e-5
        assert torch.equal(generate(pipe, **encoded, seeds=SEEDS[:2], negative_prompt="blurry", **options), found)
        four = {"seeds": SEEDS, "num_videos_per_prompt": 2, **options}
        assert torch.equal(
            generate(pipe, PROMPTS[:2], negative_prompt="blurry", **four),
            generate(pipe, PROMPTS[:2], negative_prompt=["blurry"] * 2, **four),
        )

    def test_what_was_done_is_told_once(self, pipe):
        done = reelbatch.repair(pipe)
        assert len(done) == 2
        assert "flash" in str(done[0]) and " → " in str(done[0])
        assert "prompt_2" in done[1].fault and "prompt_2" in done[1].cure
        assert reelbatch.repair(pipe) == []


def batch(pipe: Any, order: list[int], make: Callable[..., Any] = generate, **options: Any) -> Any:
    """Videos of requests that differ in prompt, seed and guidance scale, in one call."""
    prompts, seeds, scales = ([values[i] for i in order] for values in (PROMPTS, SEEDS, SCALES))
    return make(pipe, prompts, seeds, guidance_scale=options.pop("scales", scales), **options)


class TestPromise:
    """Every video of a batch is the one that its request gives alone."""

    CFG = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}  # noqa: RUF012

    def test_exact_is_bit_for_bit(self, demo):
        reelbatch.repair(demo)
        alone = torch.cat([batch(demo, [i], make=frames) for i in range(4)])
        assert torch.equal(batch(demo, [0, 1, 2, 3], make=frames), alone)

    @pytest.mark.parametrize("options", [{}, CFG, {"output_type": "pt"}], ids=["plain", "cfg", "frames"])
    def test_exact_whoever_else_is_there(self, pipe, options):
        reelbatch.repair(pipe)
        alone = [batch(pipe, [i], **options)[0] for i in range(4)]
        for order in ([3, 1, 2, 0], [2, 0], [1, 1, 3]):
            found = batch(pipe, order, **options)
            assert all(torch.equal(video, alone[i]) for video, i in zip(found, order, strict=True))

    def test_exact_in_bfloat16(self, pipe):
        pipe.transformer.to(torch.bfloat16)
        reelbatch.repair(pipe)
        alone = torch.cat([batch(pipe, [i]) for i in range(4)])
        assert torch.equal(batch(pipe, [0, 1, 2, 3]), alone)

    @pytest.mark.parametrize("options", [{}, CFG], ids=["plain", "cfg"])
    def test_packed_is_the_same_to_rounding(self, pipe, options):
        reelbatch.repair(pipe, isolation="packed")
        alone = torch.cat([batch(pipe, [i], **options) for i in range(4)])
        assert difference(batch(pipe, [0, 1, 2, 3], **options), alone) <= 1e-5

    def test_packed_on_the_demo(self, demo):
        reelbatch.repair(demo, isolation="packed")
        latents = functools.partial(frames, output_type="latent")
        alone = torch.cat([batch(demo, [i], make=latents) for i in range(4)])
        assert difference(batch(demo, [0, 1, 2, 3], make=latents), alone) <= 1e-5

    def test_isolation_is_of_the_pipeline(self, pipe, monkeypatch):
        packs = []
        monkeypatch.setattr(
            hunyuan_video.Transformer,
            "_packs",
            lambda self, given: packs.append(len(given)) or type(self).__mro__[2]._packs(self, given),
        )
        shared = with_transformer(pipe, pipe.transformer)
        reelbatch.repair(pipe, isolation="packed")
        reelbatch.repair(shared)
        for of in (pipe, shared):
            generate(of, PROMPTS, SEEDS, num_inference_steps=1)
        assert packs == [1, 4]
        reelbatch.repair(pipe)  # again, to set it anew
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=1)
        assert packs[2:] == [4]
        with pytest.raises(ValueError, match="isolation is 'pack'; it must be 'exact' or 'packed'"):
            reelbatch.repair(pipe, isolation="pack")

    def test_every_text_is_read_alone_and_once(self, pipe, monkeypatch):
        reelbatch.repair(pipe)
        reads = []
        forward = type(pipe.text_encoder).forward
        monkeypatch.setattr(
            type(pipe.text_encoder),
            "forward",
            lambda self, input_ids, **options: reads.append(len(input_ids)) or forward(self, input_ids, **options),
        )
        generate(pipe, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], SEEDS[:3], num_inference_steps=1)
        assert reads == [1, 1]


def parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.named_parameters()}


def live_bytes() -> int:
    """Of all tensors that the garbage collector knows, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == "cpu"]
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


@pytest.fixture
def own_pipe(tiny_folder: Path) -> HunyuanVideoPipeline:
    """One that shares nothing with other tests, for hooks on every component."""
    return quiet(HunyuanVideoPipeline.from_pretrained(tiny_folder))


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


class TestKeeps:
    def test_the_very_same_parameters_and_no_new_tensors(self, pipe):
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

    def test_resident_memory(self):
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
    def test_hooks(self, own_pipe, name, when):
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
    def test_hooks_may_come_and_go(self, own_pipe, name):
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
    def test_lora(self, pipe, when, tmp_path):
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

    def test_batch_promise_with_an_adapter(self, pipe):
        pipe.transformer.add_adapter(LoraConfig(**LORA))
        reelbatch.repair(pipe)
        alone = torch.cat([batch(pipe, [i]) for i in range(3)])
        assert torch.equal(batch(pipe, [0, 1, 2]), alone)

    def test_gradients(self, pipe):
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
    def test_compiled(self, compile_pipe):
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
    def test_compiled_blocks(self, compile_pipe, when):
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

    def test_quantized_layers(self, pipe):
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
    def test_dynamically_quantized_layers(self, tiny_pipeline):
        """Their scale is that of the whole tensor that comes in, batch-mates and padding included; not after."""
        model = torch.ao.quantization.quantize_dynamic(tiny_pipeline.transformer, {torch.nn.Linear})
        pipe = with_transformer(tiny_pipeline, model)
        alone = torch.cat([batch(pipe, [i], scales=6.0) for i in range(3)])
        assert difference(batch(pipe, [0, 1, 2], scales=6.0), alone) > 1e-4
        reelbatch.repair(pipe)
        alone = torch.cat([batch(pipe, [i]) for i in range(3)])
        assert torch.equal(batch(pipe, [0, 1, 2]), alone)

    def test_attention_backend(self, pipe):
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

    def test_processors_have_no_effect_and_say_so(self, pipe):
        pipe.transformer.fuse_qkv_projections()  # which Diffusers offers, and which does nothing to this network
        expected = generate(pipe)
        reelbatch.repair(pipe)
        assert difference(generate(pipe), expected) <= 1e-5
        with pytest.raises(NotImplementedError, match=r"set_attention_backend, or call reelbatch\.restore"):
            pipe.transformer.set_attn_processor(HunyuanVideoAttnProcessor2_0())
        with pytest.raises(NotImplementedError, match=r"reelbatch\.restore"):
            pipe.transformer.fuse_qkv_projections()

    def test_saves_as_what_it_is(self, pipe, tmp_path):
        expected = generate(pipe)
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
        assert torch.equal(generate(again), expected)
        assert type(type(pipe).from_pretrained(tmp_path)) is HunyuanVideoPipeline
        # which takes a transformer over by itself only if it is of its very class
        shared = HunyuanVideoPipeline.from_pipe(pipe, transformer=pipe.transformer)
        assert shared.transformer is pipe.transformer
        assert type(type(pipe.transformer).from_pretrained(tmp_path / "transformer")) is HunyuanVideoTransformer3DModel
        assert str(type(pipe.transformer)) == str(HunyuanVideoTransformer3DModel)


def is_repaired(pipe: Any) -> bool:
    """By what is computed: padding, here not even a number, plays no part."""
    embeds, pooled, mask = pipe.encode_prompt(PROMPTS[1], max_sequence_length=TOKENS)
    embeds = embeds.masked_fill(mask[..., None] == 0, float("nan"))
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    return bool(generate(pipe, **given, num_inference_steps=1).isfinite().all())


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


class TestRestore:
    def test_bit_for_bit(self, pipe):
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
    def test_pipelines_that_share_a_transformer(self, pipe, first):
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

    def test_a_pipeline_that_is_gone_or_has_another_transformer_holds_nothing(self, pipe):
        found = classes(pipe)
        gone, other = (with_transformer(pipe, pipe.transformer) for _ in range(2))
        for each in (pipe, gone, other):
            reelbatch.repair(each)
        del gone, each
        gc.collect()
        other.transformer = copy.deepcopy(pipe.transformer)
        reelbatch.restore(pipe)
        assert classes(pipe) == found

    def test_one_that_was_never_repaired_is_left_alone(self, pipe):
        other = with_transformer(pipe, pipe.transformer)
        reelbatch.repair(pipe)
        reelbatch.restore(other)
        assert is_repaired(pipe)
        reelbatch.repair(other)
        assert is_repaired(other)

    def test_copies(self, pipe):
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

    def test_a_failed_call_leaves_nothing(self, pipe):
        reelbatch.repair(pipe, isolation="packed")
        with pytest.raises(RuntimeError):
            generate(pipe, latents=torch.zeros(1, 3, 2, 4, 4))
        assert pipe.transformer.isolation == "exact"
        assert not pipe.vae.use_slicing


class Wrapped(HunyuanVideoTransformerBlock):
    """Somebody's own block."""


class OwnProcessor(HunyuanVideoAttnProcessor2_0):
    """Somebody's own attention."""


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


class TestStepCaches:
    def test_every_one_of_diffusers_is_here(self):
        names = {name.removeprefix("apply_") for name in dir(hooks) if name.startswith("apply_")}
        others = {"context_parallel", "group_offloading", "layer_skip", "tensor_parallel"}
        others |= {"layerwise_casting", "layerwise_casting_hook"}
        assert names - others == set(CACHES) - {"taylorseer_lite"}

    @pytest.mark.parametrize("how", ["enable_cache", "apply"])
    @pytest.mark.parametrize("name", CACHES)
    def test_refused_with_the_call_that_turns_it_off(self, pipe, name, how):
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
    def test_refused_after_the_repair(self, pipe, name):
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


class TestRefusals:
    """Nothing is changed by a repair that is refused."""

    @pytest.fixture(autouse=True)
    def unchanged(self, request) -> Iterator[None]:
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
    def test_unknown_pipeline(self, pipe, unknown):
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

    def test_somebodys_own_pipeline(self, pipe):
        class Own(HunyuanVideoPipeline):
            pass

        with pytest.raises(CannotRepair, match=r"found a .*Own where HunyuanVideoPipeline was expected"):
            reelbatch.repair(Own(**pipe.components))

    @pytest.mark.parametrize(
        ("owner", "name"),
        [(owner, name) for owner, name, _ in hunyuan_video.SOURCE + hunyuan_video.PIPELINE_SOURCE],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_changed_source(self, pipe, monkeypatch, owner, name):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
        with pytest.raises(CannotRepair, match=rf"Diffusers 0\.42\.1 has.*{owner.__name__}\.{name}.*Nothing was ch"):
            reelbatch.repair(pipe)

    def test_every_method_that_is_replaced_is_guarded(self):
        guarded = {(owner, name) for owner, name, _ in hunyuan_video.SOURCE + hunyuan_video.PIPELINE_SOURCE}
        assert {(their, "forward") for their in hunyuan_video.STAND_INS} <= guarded
        replaced = {name for name in vars(hunyuan_video.BatchedPipeline) if name in vars(HunyuanVideoPipeline)}
        own = {"__module__", "__doc__", "__init__", "__firstlineno__", "__static_attributes__"}
        assert {(HunyuanVideoPipeline, name) for name in replaced - own} <= guarded

    @pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
    def test_image_to_video_transformer(self, pipe, kind):
        other = with_transformer(pipe, tiny.transformer(image_condition_type=kind))
        found = classes(other)
        with pytest.raises(CannotRepair, match=f"image_condition_type '{kind}'"):
            reelbatch.repair(other)
        assert classes(other) == found

    def test_another_transformer(self, pipe):
        """FramePack's has the same blocks."""
        sizes = {name: value for name, value in tiny.transformer_config().items() if name != "patch_size_t"}
        other = with_transformer(pipe, HunyuanVideoFramepackTransformer3DModel(**sizes, image_proj_dim=8))
        found = classes(other)
        with pytest.raises(CannotRepair, match="HunyuanVideoFramepackTransformer3DModel"):
            reelbatch.repair(other)
        assert classes(other) == found

    def test_somebodys_own_block(self, pipe):
        block = pipe.transformer.transformer_blocks[1]
        block.__class__ = Wrapped
        with pytest.raises(
            CannotRepair, match=r"transformer_blocks\.1 is a test_repair\.Wrapped, not a HunyuanVideoTr"
        ):
            reelbatch.repair(pipe)
        assert type(block) is Wrapped

    def test_attention_processors(self, pipe):
        expected = generate(pipe)
        transformer = pipe.transformer
        transformer.set_attn_processor(OwnProcessor())
        for name, right in (("HunyuanVideoAttnProcessor2_0", 4), ("AttnProcessor2_0", 6)):
            with pytest.raises(CannotRepair, match=f"test_repair.OwnProcessor where {name} was expected") as refused:
                reelbatch.repair(pipe)
            call = str(refused.value).partition(": ")[2].removesuffix(" Nothing was changed.").removesuffix(".")
            exec(call, {"pipe": pipe, **{kind.__name__: kind for kind in hunyuan_video.PROCESSORS.values()}})
            kinds = [type(processor) for processor in transformer.attn_processors.values()]
            assert kinds.count(OwnProcessor) == len(kinds) - right
        reelbatch.repair(pipe)
        assert difference(generate(pipe), expected) <= 1e-5
        reelbatch.restore(pipe)
        assert torch.equal(generate(pipe), expected)

    def test_attention_backend(self, pipe):
        for attention in (block.attn for block in pipe.transformer.transformer_blocks):
            attention.processor._attention_backend = AttentionBackendName.SAGE  # its package is not here
        with pytest.raises(CannotRepair, match=r"'sage' .*pipe\.transformer\.reset_attention_backend\(\) first"):
            reelbatch.repair(pipe)
        pipe.transformer.reset_attention_backend()
        reelbatch.repair(pipe)
        reelbatch.restore(pipe)

    @pytest.mark.parametrize("place", ["", "transformer_blocks.1", "context_embedder.token_refiner", "norm_out"])
    def test_unknown_wrapper(self, pipe, place):
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

    def test_wrapper_over_a_hook_goes_on(self, pipe):
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

    def test_a_class_that_changed_after_the_repair(self, pipe):
        block = pipe.transformer.transformer_blocks[0]
        reelbatch.repair(pipe)
        ours = type(block)
        block.__class__ = Wrapped
        with pytest.raises(CannotRepair, match="changed again after its repair"):
            reelbatch.restore(pipe)
        block.__class__ = ours
        reelbatch.restore(pipe)

    def test_no_transformer(self, pipe):
        other = with_transformer(pipe, None)
        assert [done.fault[:8] for done in reelbatch.repair(other)] == ["prompt_2"]
        other.transformer = pipe.transformer
        assert len(reelbatch.repair(other)) == 1
        assert is_repaired(other)
        reelbatch.restore(other)

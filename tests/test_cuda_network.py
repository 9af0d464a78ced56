"""The networks on a fake CUDA device: every tensor on it, no wait in a forward, no more kernels than stated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKLHunyuanVideo
from fake_cuda import CUDA, Trace, weightless
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from reelbatch.attention import HeadRules, own_frame, own_pixel
from reelbatch.demo.tokenizers import clip_tokenizer, llama_tokenizer
from reelbatch.loading.hub import DEMO_FOLDER
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.text import TextEncoder
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import WHOLE_PIXELS, VideoDecoder

Config = dict[str, Any]
DEMO: Config = json.loads((DEMO_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))
FULL: Config = {}
SHORT: Config = {"num_layers": 2, "num_single_layers": 2}
"""The 13B network with fewer blocks of each kind."""
LATENTS = {"demo": (16, 3, 16, 16), "13B": (16, 3, 32, 48)}
GIB = 2**30

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make(config: Config) -> HunyuanVideoTransformer3DModel:
    model = weightless(lambda: HunyuanVideoTransformer3DModel.from_config(config))
    return model.eval().requires_grad_(False)


def branch_of(model: HunyuanVideoTransformer3DModel, latents: tuple[int, ...], text: int, mask: Any = None) -> Branch:
    config = model.config

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    return Branch(
        empty(*latents),
        empty(text, config.text_embed_dim),
        empty(config.pooled_projection_dim),
        empty(dtype=torch.float32),
        empty(),
        mask,
    )


def packs_of(branches: list[Branch], isolation: str) -> list[list[Branch]]:
    return [[branch] for branch in branches] if isolation == "exact" else [branches]


def second(trace: Trace, work: Callable[[], Any]) -> Any:
    """The work done twice; what counts is the second time, when layouts, rotary tables and masks are made."""
    work()
    trace.reset()
    return work()


def check_no_wait(trace: Trace) -> None:
    assert not trace.waits, [f"{kind} {place}" for kind, place in trace.waits]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("name", ["demo", "13B"])
def test_a_forward_waits_for_nothing_and_launches_as_many_kernels_as_its_blocks(
    name: str, isolation: str, batch: int, cuda: Trace
) -> None:
    model, latents = make(DEMO if name == "demo" else SHORT), LATENTS[name]
    branches = [branch_of(model, latents, 30 + i) for i in range(batch)]
    velocities = second(cuda, lambda: model(packs=packs_of(branches, isolation)))
    check_no_wait(cuda)
    assert [tuple(v.shape) for pack in velocities for v in pack] == [latents] * batch
    assert all(v.device.type == "cuda" for pack in velocities for v in pack)
    ceiling = batch * kernels_at_most(model, 1) if isolation == "exact" else kernels_at_most(model, batch)
    assert cuda.launches <= ceiling, cuda.kernels


CEILINGS = {1: (44, 21, 103), 2: (64, 27, 121), 4: (84, 35, 141)}
"""Kernels of a pack of so many branches: in a dual-stream block, in a single-stream block, around them. Measured were
42, 20, 97; 62, 26, 115; 82, 34, 135."""


def kernels_at_most(model: HunyuanVideoTransformer3DModel, branches: int) -> int:
    dual, single, around = CEILINGS[branches]
    return dual * model.config.num_layers + single * model.config.num_single_layers + around


def test_the_full_13b_network_at_720p_and_129_frames(cuda: Trace) -> None:
    """Measured: 1,737 and 2,395 kernels; 8.91 and 17.76 GiB of activations."""
    model = make(FULL)
    weights = cuda.live
    assert weights / GIB == pytest.approx(23.88, abs=0.01)  # 12.8 billion parameters in bfloat16
    for batch, kernels, activations in ((1, 1800, 9.2), (2, 2500, 18.3)):
        branches = [branch_of(model, (16, 33, 90, 160), 30 + i) for i in range(batch)]
        second(cuda, lambda branches=branches: model(packs=packs_of(branches, "packed")))
        check_no_wait(cuda)
        assert cuda.launches <= kernels, cuda.kernels
        assert (cuda.peak_bytes - weights) / GIB < activations, cuda.peak_at


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("name", ["demo", "13B"])
def test_masks_and_rules_are_made_ready_once_and_then_wait_for_nothing(name: str, isolation: str, cuda: Trace) -> None:
    model, latents = make(DEMO if name == "demo" else SHORT), LATENTS[name]
    config = model.config
    tokens = latents[1] * latents[2] * latents[3] // (config.patch_size**2 * config.patch_size_t)
    heads = config.num_attention_heads
    masks = [
        None,
        torch.empty(tokens + 31, dtype=torch.bool, device=CUDA),
        torch.empty(tokens + 32, tokens + 32, dtype=torch.bfloat16, device=CUDA) if name == "demo" else None,
        HeadRules({range(heads): own_frame}),
        HeadRules({0: own_frame, range(1, heads): own_pixel}),
    ]
    branches = [branch_of(model, latents, 30 + i, mask) for i, mask in enumerate(masks)]
    second(cuda, lambda: model(packs=packs_of(branches, isolation)))
    check_no_wait(cuda)
    blocks = config.num_layers + config.num_single_layers
    assert cuda.kernels["fake_cuda.flex_attention"] == 2 * blocks  # the two samples with rules


@pytest.mark.parametrize("isolation", ["exact", "packed"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_diffusers_padded_signature_waits_for_nothing_once_its_mask_is_known(
    batch: int, isolation: str, cuda: Trace
) -> None:
    model, latents = make(DEMO), LATENTS["demo"]
    model.isolation = isolation
    config = model.config

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    given = {
        "hidden_states": empty(batch, *latents),
        "timestep": empty(batch, dtype=torch.int64),
        "encoder_hidden_states": empty(batch, 40, config.text_embed_dim),
        "encoder_attention_mask": empty(batch, 40, dtype=torch.bool),
        "pooled_projections": empty(batch, config.pooled_projection_dim),
        "guidance": empty(batch),
    }
    sample = second(cuda, lambda: model(**given).sample)
    check_no_wait(cuda)
    assert sample.shape == (batch, *latents) and sample.device.type == "cuda"


def test_both_text_encoders_stay_on_the_device(tmp_path: Any, cuda: Trace) -> None:
    """At the sizes of Llama 3 8B and CLIP L, with few layers: the weights of all are the same network again."""
    tokenizer, tokenizer_2 = llama_tokenizer(tiny.WORDS), clip_tokenizer(tiny.WORDS, tmp_path)
    llama_config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8
    )
    clip_config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12)
    llama, clip = weightless(lambda: (LlamaModel(llama_config).eval(), CLIPTextModel(clip_config).eval()))
    encoder = TextEncoder(llama, tokenizer, clip, tokenizer_2)
    encoder.encode("a cat")  # the template's beginning is kept from here on
    cuda.reset()
    states = encoder.encode("a red dog")
    assert states.text.device.type == states.pooled.device.type == "cuda"
    assert states.text.shape[1:] == (4096,) and states.pooled.shape == (768,)
    # token ids come from the CPU; transformers reads a few values to make its masks; nothing else comes back
    ours = [kind for kind, place in cuda.waits.elements() if "torch.tensor" in place.code]
    assert len(ours) <= cuda.waits.total() <= TEXT_WAITS, cuda.waits
    assert not any(kind == "copy from cuda to cpu" for kind, _ in cuda.waits)


TEXT_WAITS = 8
"""Of a prompt through both encoders, as measured with transformers 5."""


@pytest.mark.parametrize("side", [None, 256])
def test_a_vae_tile_is_decoded_on_the_device_and_only_its_checks_and_its_frames_wait(
    side: int | None, cuda: Trace
) -> None:
    decoder = VideoDecoder(weightless(AutoencoderKLHunyuanVideo).eval())
    weights = cuda.live
    latents = torch.empty(16, 2, 32, 36, device=CUDA)
    cuda.reset()
    frames = decoder.decode(latents, side)
    assert frames.shape == (5, 256, 288, 3) and frames.device.type == "cpu"
    kinds = sorted(kind for kind, _ in cuda.waits.elements())
    assert kinds == ["_local_scalar_dense", "_local_scalar_dense", "copy from cuda to cpu"]
    assert cuda.peak_bytes - weights < 1.5 * GIB


def test_frames_that_are_decoded_whole_have_no_tensor_of_two_to_the_31_elements(cuda: Trace) -> None:
    """A kernel that counts in 32 bits would refuse it. Rows of 8 latents make the most padding that is likely."""
    decoder = VideoDecoder(weightless(AutoencoderKLHunyuanVideo).eval())
    sizes = [
        (64, WHOLE_PIXELS // 64 // 16 * 16),
        (480, 864),
        (720, 576),
        (640, 656),
        (544, 960),
        (720, 720),
        (720, 1280),
    ]
    whole = [size for size in sizes if decoder.tile_side(*size) is None]
    assert whole == sizes[:4]
    for height, width in whole:
        cuda.reset()
        decoder.decode(torch.empty(16, 5, height // 8, width // 8, device=CUDA))
        assert cuda.largest < 2**31, (height, width, cuda.largest_of)

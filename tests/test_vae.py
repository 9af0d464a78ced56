"""The VAE's decoder against Diffusers' own, whole and in tiles, and the memory it takes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from probes import LargestTensor

from reelbatch.device import _cgroup_limits, device_memory_bytes
from reelbatch.models.hunyuan_video.vae import FrameCausalMidBlock3D, VideoDecoder, use_frame_causal_attention


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LEVEL = 1 / 255
"""Of 8-bit frames."""


def reference(vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> torch.Tensor:
    """Frames as Diffusers' pipeline makes them: [frames, height, width, 3]."""
    with torch.no_grad():
        video = vae.decode(latents[None].to(vae.dtype) / vae.config.scaling_factor).sample[0].float()
    return (video * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)


def off(frames: torch.Tensor, expected: torch.Tensor) -> float:
    """The most that 8-bit frames differ from what they were rounded from, beyond rounding; 0 to 1 is black to white."""
    assert frames.dtype == torch.uint8 and frames.shape == expected.shape
    return (frames * LEVEL - expected).abs().max().item() - LEVEL / 2


@pytest.fixture
def vae() -> AutoencoderKLHunyuanVideo:
    """Scaled so that hardly a pixel is clamped."""
    model = tiny.vae()
    with torch.no_grad():
        model.decoder.conv_out.conv.weight.mul_(0.3)
    return model


# 1 frame; up to 5 latent frames in one go; more in temporal tiles, the last of them of any length.
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 4), (4, 6, 4), (5, 4, 4), (6, 4, 4), (7, 2, 4), (9, 4, 4)])
@pytest.mark.parametrize("side", [None, 16], ids=["whole", "tiles"])
def test_equals_diffusers(vae: AutoencoderKLHunyuanVideo, shape: tuple[int, ...], side: int | None) -> None:
    sample, theirs = latents(4, *shape), copy.deepcopy(vae)
    if side is not None:  # tiles of 2 x 2 latents, 1 apart
        theirs.enable_tiling(side, side, tile_sample_stride_height=12, tile_sample_stride_width=12)
    expected, decoder = reference(theirs, sample), VideoDecoder(vae)
    frames = decoder.decode(sample, side)
    assert frames.shape == (4 * shape[0] - 3, 8 * shape[1], 8 * shape[2], 3)
    assert frames.is_contiguous()
    assert expected.std() > 0.03
    assert off(frames, expected) <= 1e-5
    assert (reference(decoder._tiled(side), sample) - expected).abs().max() <= 1e-5


def test_tiles_are_an_argument_and_threads_that_decode_at_once_have_their_own(vae: AutoencoderKLHunyuanVideo) -> None:
    decoder, sample = VideoDecoder(vae), latents(4, 3, 6, 8)
    sides = (None, 16, 32, None)
    alone = [decoder.decode(sample, side).numpy() for side in sides]
    assert not np.array_equal(alone[0], alone[1])  # else this test could not tell which was done
    with ThreadPoolExecutor(len(sides)) as threads:
        for _ in range(5):
            together = threads.map(lambda side: decoder.decode(sample, side).numpy(), sides)
            assert all(np.array_equal(frames, own) for frames, own in zip(together, alone, strict=True))
    assert not vae.use_tiling


def test_the_rule_of_tiles_looks_at_height_and_width_alone(vae: AutoencoderKLHunyuanVideo) -> None:
    decoder = VideoDecoder(vae)
    sizes = ((16, 16), (480, 864), (544, 960), (720, 1280))
    assert [decoder.tile_side(*size) for size in sizes] == [None, None, 256, 256]


def test_attention_matters(vae: AutoencoderKLHunyuanVideo) -> None:
    """The parity above would be empty if the attention hardly moved the result."""
    block = use_frame_causal_attention(vae).decoder.mid_block
    without = copy.deepcopy(block)
    without.attentions[0].to_out[0].weight.data.zero_()
    hidden = latents(1, 16, 4, 3, 3)
    assert (without(hidden) - block(hidden)).abs().max() > 1e-2


def test_encoder_equals_diffusers_too(vae: AutoencoderKLHunyuanVideo) -> None:
    video = latents(1, 3, 9, 32, 32)
    expected = vae.encode(video).latent_dist.mode()
    assert torch.allclose(use_frame_causal_attention(vae).encode(video).latent_dist.mode(), expected, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(vae: AutoencoderKLHunyuanVideo) -> None:
    use_frame_causal_attention(vae)
    gradients = []
    for checkpointing in (False, True):
        vae.enable_gradient_checkpointing() if checkpointing else vae.disable_gradient_checkpointing()
        sample = latents(1, 4, 2, 4, 4).requires_grad_()
        vae.decode(sample).sample.square().sum().backward()
        gradients.append(sample.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients)


def test_weights_hooks_and_flags_stay(vae: AutoencoderKLHunyuanVideo) -> None:
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    calls = []
    vae.decoder.mid_block.register_forward_hook(lambda *_: calls.append("block"))
    vae.decoder.mid_block.attentions[0].register_forward_hook(lambda *_: calls.append("attention"))
    decoder = VideoDecoder(vae)
    decoder.decode(latents(4, 2, 4, 4))
    assert isinstance(vae.decoder.mid_block, FrameCausalMidBlock3D)
    assert calls == ["attention", "block"]
    assert (vae.use_tiling, vae.use_slicing, vae.use_framewise_decoding) == (False, False, True)
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())

    vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.decode(latents(4, 2, 4, 4), 16)
    assert vae.use_tiling is False


def test_bfloat16_stays_near_float32(vae: AutoencoderKLHunyuanVideo) -> None:
    sample = latents(4, 3, 4, 4)
    expected = VideoDecoder(vae).decode(sample)
    frames = VideoDecoder(vae.to(torch.bfloat16)).decode(sample)
    assert 0 < (frames.int() - expected.int()).abs().max() < 0.1 / LEVEL


def test_bad_latents_are_refused(vae: AutoencoderKLHunyuanVideo) -> None:
    decoder = VideoDecoder(vae)
    with pytest.raises(ValueError, match=r"\[3, 2, 4, 4\].*\[4, latent_frames, h, w\]"):
        decoder.decode(latents(3, 2, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        decoder.decode(latents(4, 2, 4, 4) / 0)
    with pytest.raises(ValueError, match=r"decoding gave NaN or infinity in torch\.float16"):
        VideoDecoder(vae.half()).decode(latents(4, 2, 4, 4) * 1e8)


def largest_tensor(block: HunyuanVideoMidBlock3D, frames: int, side: int) -> int:
    with torch.no_grad(), LargestTensor() as largest:
        block(latents(1, 16, frames, side, side))
    return largest.numel


def test_mid_block_makes_no_tensor_that_grows_with_the_square(vae: AutoencoderKLHunyuanVideo) -> None:
    """Sixteen channels, 5 frames of s x s: the largest tensor is a padded activation, not S x S."""
    sides = (8, 16, 32)
    masked = [largest_tensor(vae.decoder.mid_block, 5, side) for side in sides]
    assert masked == [(5 * side**2) ** 2 for side in sides]  # Diffusers' mask, and proof that the counter sees it

    use_frame_causal_attention(vae)
    assert [largest_tensor(vae.decoder.mid_block, 5, side) for side in sides] == [
        16 * (5 + 2) * (side + 2) ** 2 for side in sides
    ]


def test_device_memory_counts_a_container_limit(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "cgroup"
    (root / "jobs" / "one").mkdir(parents=True)
    (root / "jobs" / "one" / "memory.max").write_text("max\n")
    (root / "jobs" / "memory.max").write_text("1000\n")
    membership.write_text("0::/jobs/one\n")
    assert list(_cgroup_limits(root, membership)) == [1000]

    (root / "memory" / "box").mkdir(parents=True)
    (root / "memory" / "box" / "memory.limit_in_bytes").write_text("2000\n")
    membership.write_text("3:cpu:/box\n4:memory:/box/not/seen/from/inside\n0::/\n")
    assert list(_cgroup_limits(root, membership)) == [2000]

    assert list(_cgroup_limits(root, tmp_path / "absent")) == []
    assert 2**20 < device_memory_bytes("cpu") < 2**60

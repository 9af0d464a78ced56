"""The VAE against Diffusers' own decoder, whole and in tiles."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from hypothesis import given
from hypothesis import strategies as st
from probes import LargestTensor

from reelbatch.device import _cgroup_limits, device_memory_bytes
from reelbatch.models.hunyuan_video.vae import FrameCausalMidBlock3D, VideoDecoder, use_frame_causal_attention


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(vae, latents: torch.Tensor) -> torch.Tensor:
    """Frames as Diffusers' pipeline makes them: [frames, height, width, 3]."""
    with torch.no_grad():
        video = vae.decode(latents[None].to(vae.dtype) / vae.config.scaling_factor).sample[0].float()
    return (video * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)


def levels_apart(frames: torch.Tensor, expected: torch.Tensor) -> float:
    """How far 8-bit frames are from frames in [0, 1], in levels; rounding alone is 0.5."""
    return float((frames.float() - 255 * expected).abs().max())


@pytest.fixture
def vae():
    """Scaled so that hardly a pixel is clamped."""
    model = tiny.vae()
    with torch.no_grad():
        model.decoder.conv_out.conv.weight.mul_(0.3)
    return model


# 1 frame; up to 5 latent frames in one go; more in temporal tiles, the last of them of any length.
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 4), (4, 6, 4), (5, 4, 4), (6, 4, 4), (7, 2, 4), (9, 4, 4)])
@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiles"])
def test_equals_diffusers(vae, shape, tiling):
    if tiling:  # tiles of 2 x 2 latents, 1 apart
        vae.enable_tiling(16, 16, tile_sample_stride_height=12, tile_sample_stride_width=12)
    sample = latents(4, *shape)
    expected = reference(vae, sample)
    vae.disable_tiling()
    frames = VideoDecoder(vae).decode(sample, 16 if tiling else None)
    assert frames.shape == (4 * shape[0] - 3, 8 * shape[1], 8 * shape[2], 3)
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    assert expected.std() > 0.03
    assert levels_apart(frames, expected) <= 0.501


def test_attention_matters(vae):
    """The parity above would be empty if the attention hardly moved the result."""
    block = use_frame_causal_attention(vae).decoder.mid_block
    without = copy.deepcopy(block)
    without.attentions[0].to_out[0].weight.data.zero_()
    hidden = latents(1, 16, 4, 3, 3)
    assert (without(hidden) - block(hidden)).abs().max() > 1e-2


def test_encoder_equals_diffusers_too(vae):
    video = latents(1, 3, 9, 32, 32)
    expected = vae.encode(video).latent_dist.mode()
    assert torch.allclose(use_frame_causal_attention(vae).encode(video).latent_dist.mode(), expected, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(vae):
    use_frame_causal_attention(vae)
    gradients = []
    for checkpointing in (False, True):
        vae.enable_gradient_checkpointing() if checkpointing else vae.disable_gradient_checkpointing()
        sample = latents(1, 4, 2, 4, 4).requires_grad_()
        vae.decode(sample).sample.square().sum().backward()
        gradients.append(sample.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients)


def test_weights_hooks_and_flags_stay(vae):
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    calls = []
    vae.decoder.mid_block.register_forward_hook(lambda *_: calls.append("block"))
    vae.decoder.mid_block.attentions[0].register_forward_hook(lambda *_: calls.append("attention"))
    decoder = VideoDecoder(vae)
    decoder.decode(latents(4, 2, 4, 4), 64)
    assert isinstance(vae.decoder.mid_block, FrameCausalMidBlock3D)
    assert calls == ["attention", "block"]
    assert (vae.use_tiling, vae.use_slicing, vae.use_framewise_decoding) == (False, False, True)
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())

    vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.decode(latents(4, 2, 4, 4), 64)
    assert vae.use_tiling is False


def test_tiles_are_an_argument_that_no_other_decode_sees(vae):
    sample = latents(4, 7, 12, 12)  # more than one stretch of time, each of which looks at the tiles
    whole = reference(vae, sample)
    vae.enable_tiling(64, 64, tile_sample_stride_height=48, tile_sample_stride_width=48)
    tiled = reference(vae, sample)
    vae.disable_tiling()
    assert (whole - tiled).abs().max() > 2 / 255  # else this test could not tell which was done
    decoder, inside = VideoDecoder(vae), []

    def decode_whole(*_: object) -> None:
        if not inside:  # in the middle of a decode in tiles, as another thread might
            inside.append(None)
            inside.append(decoder.decode(sample))

    handle = vae.decoder.register_forward_pre_hook(decode_whole)
    frames = decoder.decode(sample, 64)
    handle.remove()
    assert levels_apart(frames, tiled) <= 0.501
    assert levels_apart(inside[1], whole) <= 0.501
    assert levels_apart(decoder.decode(sample), whole) <= 0.501


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_tiles_are_decided_by_height_and_width_alone(height, width):
    side = VideoDecoder.tile_side(height, width)
    assert side == (256 if height * width > 424_000 else None)
    # tensors of a whole decode stay below what kernels that count in 32 bits take
    assert side or 256 * 19 * (height + 2) * (width + 2) < 2**31 or min(height, width) < 8


def test_bfloat16_stays_near_float32(vae):
    sample = latents(4, 3, 4, 4)
    expected = VideoDecoder(vae).decode(sample)
    frames = VideoDecoder(vae.to(torch.bfloat16)).decode(sample)
    assert 0 < (frames.float() - expected.float()).abs().max() < 25


def test_bad_latents_are_refused(vae):
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


def test_mid_block_makes_no_tensor_that_grows_with_the_square(vae):
    """Sixteen channels, 5 frames of s x s: the largest tensor is a padded activation, not S x S."""
    sides = (8, 16, 32)
    masked = [largest_tensor(vae.decoder.mid_block, 5, side) for side in sides]
    assert masked == [(5 * side**2) ** 2 for side in sides]  # Diffusers' mask, and proof that the counter sees it

    use_frame_causal_attention(vae)
    assert [largest_tensor(vae.decoder.mid_block, 5, side) for side in sides] == [
        16 * (5 + 2) * (side + 2) ** 2 for side in sides
    ]


def test_device_memory_counts_a_container_limit(tmp_path: Path):
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

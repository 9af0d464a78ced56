"""models/vae.py against Diffusers' own decoder, and the memory it takes."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from probes import LargestTensor

from reelbatch.device import _cgroup_limits, device_memory_bytes
from reelbatch.memory.estimate import decode_peak_bytes
from reelbatch.models.hunyuan_video.vae import FrameCausalMidBlock3D, VideoDecoder, use_frame_causal_attention


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(vae, latents: torch.Tensor) -> torch.Tensor:
    """Frames as Diffusers' pipeline makes them: [frames, height, width, 3]."""
    with torch.no_grad():
        video = vae.decode(latents[None].to(vae.dtype) / vae.config.scaling_factor).sample[0].float()
    return (video * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)


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
        vae.enable_tiling(16, 16, tile_sample_stride_height=8, tile_sample_stride_width=8)
    sample = latents(4, *shape)
    expected = reference(vae, sample)
    frames = VideoDecoder(vae).decode(sample)
    assert frames.shape == (4 * shape[0] - 3, 8 * shape[1], 8 * shape[2], 3)
    assert frames.dtype == torch.float32
    assert frames.is_contiguous()
    assert expected.std() > 0.03
    assert (frames - expected).abs().max() <= 1e-5


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
    decoder = VideoDecoder(vae, tile_above_bytes=0)
    decoder.decode(latents(4, 2, 4, 4))
    assert isinstance(vae.decoder.mid_block, FrameCausalMidBlock3D)
    assert calls == ["attention", "block"]
    assert (vae.use_tiling, vae.use_slicing, vae.use_framewise_decoding) == (False, False, True)
    assert vae.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())

    vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.decode(latents(4, 2, 4, 4))
    assert vae.use_tiling is False


def test_tiles_when_the_estimate_for_this_shape_says_so(vae):
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
    small, large = latents(4, 2, 4, 4), latents(4, 2, 8, 8)
    limit = decode_peak_bytes(vae.config, tuple(small.shape), vae.dtype)
    assert decode_peak_bytes(vae.config, tuple(large.shape), vae.dtype) > limit
    whole = reference(vae, large)
    vae.enable_tiling()
    tiled = reference(vae, large)
    vae.disable_tiling()
    assert (whole - tiled).abs().max() > 1e-3  # else this test could not tell which was done

    decoder = VideoDecoder(vae, tile_above_bytes=limit)
    assert [decoder.tiles(tuple(sample.shape)) for sample in (small, large)] == [False, True]
    assert (decoder.decode(large) - tiled).abs().max() <= 1e-5
    assert (VideoDecoder(vae).decode(large) - whole).abs().max() <= 1e-5


def test_bfloat16_stays_near_float32(vae):
    sample = latents(4, 3, 4, 4)
    expected = VideoDecoder(vae).decode(sample)
    frames = VideoDecoder(vae.to(torch.bfloat16)).decode(sample)
    assert frames.dtype == torch.float32
    assert 0 < (frames - expected).abs().max() < 0.1


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


MEASURED_VAE = {"block_out_channels": (16, 64, 16, 16), "norm_num_groups": 4}


def _decode_growth(sides: tuple[int, ...], results) -> None:
    """In a fresh process: how far the peak resident set of each decode is above what is resident after a tiny one."""
    torch.set_num_threads(1)
    decoder, growth = VideoDecoder(tiny.vae(**MEASURED_VAE)), []
    decoder.decode(latents(4, 5, 2, 2))
    resident = _resident("VmRSS")
    for side in sides:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of the imports say
        decoder.decode(latents(4, 5, side, side))
        growth.append(_resident("VmHWM") - resident)
    results.put(growth)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_estimate_of_the_decode_peak_holds():
    """Above what was measured, and its growth with the shape from 20 % below to 60 % above the measured one's.

    Measured here is a decode in a fresh process, without what its libraries take and what the allocator keeps.
    """
    context, sides = multiprocessing.get_context("spawn"), (10, 18)
    results = context.Queue()
    process = context.Process(target=_decode_growth, args=(sides, results))
    process.start()
    measured = results.get(timeout=300)
    process.join()
    config = tiny.vae(**MEASURED_VAE).config
    estimated = [decode_peak_bytes(config, (4, 5, side, side), torch.float32) for side in sides]
    assert measured[1] < estimated[1]
    growth = (estimated[1] - estimated[0]) / (measured[1] - measured[0])
    assert 0.8 < growth < 1.6, (estimated, measured)


def test_estimate_follows_the_tiles():
    config = tiny.vae(**MEASURED_VAE).config
    shape = (4, 33, 90, 160)
    whole = decode_peak_bytes(config, shape, torch.bfloat16)
    assert decode_peak_bytes(config, shape, torch.float32) > 1.6 * whole
    assert decode_peak_bytes(config, shape, torch.bfloat16, tiled=True) < whole
    assert decode_peak_bytes(config, shape, torch.bfloat16, framewise=False) > 2 * whole


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

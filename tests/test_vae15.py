"""HunyuanVideo 1.5's VAE, one sample at a time and with no mask, against Diffusers' own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny15
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from hypothesis import given
from hypothesis import strategies as st
from probes import LargestTensor
from torch import Tensor

from reelbatch.models.hunyuan_video15.vae import FrameCausalAttnBlock, VideoDecoder

VAE = tiny15.vae()


def pair() -> tuple[AutoencoderKLHunyuanVideo15, VideoDecoder]:
    """Diffusers' own, and ours with its weights."""
    return copy.deepcopy(VAE), VideoDecoder(copy.deepcopy(VAE))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def reference_frames(vae: AutoencoderKLHunyuanVideo15, latents: Tensor) -> Tensor:
    """[frames, height, width, 3] from 0 to 255, not rounded."""
    video = vae.decode(latents[None] / vae.config.scaling_factor).sample[0]
    return (video / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0) * 255


def levels_apart(frames: Tensor, expected: Tensor) -> float:
    return (frames.float() - expected).abs().max().item()


@pytest.mark.parametrize(("shape", "side"), [((1, 2, 3), None), ((3, 1, 2), None), ((3, 2, 1), None), ((2, 7, 5), 64)])
def test_decodes_as_diffusers_does(shape: tuple[int, ...], side: int | None) -> None:
    reference, ours = pair()
    if side:
        reference.enable_tiling(side, side, side // 16, side // 16)
    sample = draw(4, *shape)
    expected, frames = reference_frames(reference, sample), ours.decode(sample, side)
    assert frames.shape == (4 * shape[0] - 3, 16 * shape[1], 16 * shape[2], 3)
    assert frames.dtype == torch.uint8
    assert expected.std() > 10
    assert levels_apart(frames, expected) <= 0.51


def test_attention_and_tiles_matter() -> None:
    """The parity above would be empty if they hardly moved the result."""
    _, ours = pair()
    sample = draw(4, 2, 7, 5)
    whole = ours.decode(sample)
    assert levels_apart(ours.decode(sample, 64), whole.float()) > 2
    ours.vae.decoder.mid_block.attentions[0].proj_out.weight.data.zero_()
    assert levels_apart(ours.decode(sample), whole.float()) > 2


@torch.no_grad()
def test_encodes_as_diffusers_does() -> None:
    reference, ours = pair()
    image = draw(3, 32, 48).clamp(-1, 1)
    expected = reference.encode(image[None, :, None]).latent_dist.mode()[0, :, 0] * reference.config.scaling_factor
    assert torch.allclose(ours.encode_image(image), expected, atol=1e-5)

    frames = (draw(9, 32, 32, 3) * 60 + 128).clamp(0, 255).byte()
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    expected = reference.encode(video).latent_dist.mode()[0] * reference.config.scaling_factor
    assert expected.std() > 0.1
    assert torch.allclose(ours.encode(frames), expected, atol=1e-5)


@torch.no_grad()
def test_a_video_beside_others_is_the_video_alone() -> None:
    """Diffusers raises for two; here each goes by itself, whatever else the object has coded."""
    _, ours = pair()
    samples = [draw(4, 2, 2, 3), draw(4, 1, 3, 2), draw(4, 3, 1, 1)]
    for sample in samples:
        assert torch.equal(ours.decode(sample), VideoDecoder(copy.deepcopy(VAE)).decode(sample))


def test_blocks_serve_batches_too() -> None:
    block = VideoDecoder(copy.deepcopy(VAE)).vae.decoder.mid_block.attentions[0]
    assert isinstance(block, FrameCausalAttnBlock)
    hidden = draw(2, 16, 3, 2, 2)
    together, alone = block(hidden), torch.cat([block(hidden[:1]), block(hidden[1:])])
    assert torch.allclose(together, alone, atol=1e-5)


def test_tiles_are_an_argument_that_no_other_decode_sees() -> None:
    _, ours = pair()
    sample = draw(4, 2, 7, 5)
    whole, inside = ours.decode(sample), []

    def decode_whole(*_: object) -> None:
        if not inside:  # in the middle of a decode in tiles, as another thread might
            inside.append(None)
            inside.append(ours.decode(sample))

    ours.vae.decoder.register_forward_pre_hook(decode_whole)
    tiled = ours.decode(sample, 64)
    assert torch.equal(inside[1], whole)
    assert not torch.equal(tiled, whole)
    assert torch.equal(ours.decode(sample), whole)
    assert (ours.vae.use_tiling, ours.vae.tile_sample_min_height) == (False, 256)


with torch.device("meta"):
    PUBLISHED = VideoDecoder(AutoencoderKLHunyuanVideo15())


@given(st.integers(0, 500), st.integers(1, 120), st.integers(1, 120))
def test_tiles_are_decided_by_the_shape_alone(latent_frames: int, rows: int, columns: int) -> None:
    frames, height, width = 4 * latent_frames + 1, 16 * rows, 16 * columns
    side = PUBLISHED.tile_side(frames, height, width)
    assert side in (None, 256, 192, 128, 64)
    padded = [min(pixels, side or pixels) + 2 for pixels in (height, width)]
    if side != 64:  # no tensor has more elements than kernels that count in 32 bits take
        assert 128 * (frames + 2) * math.prod(padded) < 2**31
    if side in (None, 256):
        assert side is None or 128 * (frames + 2) * (height + 2) * (width + 2) >= 2**31


@pytest.mark.parametrize(
    ("shape", "side"),
    [((121, 352, 352), None), ((121, 480, 848), 256), ((121, 720, 1280), 256), ((1, 720, 1280), None)],
)
def test_tiles_of_usual_sizes(shape: tuple[int, int, int], side: int | None) -> None:
    assert PUBLISHED.tile_side(*shape) == side


def test_bad_latents_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ValueError, match=r"\[3, 2, 4, 4\].*\[4, latent_frames, h, w\]"):
        ours.decode(draw(3, 2, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        ours.decode(draw(4, 2, 4, 4) / 0)


def largest_tensor(block: Any, frames: int, side: int) -> int:
    with torch.no_grad(), LargestTensor() as largest:
        block(draw(1, 16, frames, side, side))
    return largest.numel


def test_attention_makes_no_tensor_that_grows_with_the_square() -> None:
    reference, ours = pair()
    sides = (6, 12)
    masked = [largest_tensor(reference.decoder.mid_block.attentions[0], 3, side) for side in sides]
    assert masked == [(3 * side**2) ** 2 for side in sides]  # the mask, and proof that the counter sees it
    assert [largest_tensor(ours.vae.decoder.mid_block.attentions[0], 3, side) for side in sides] == [
        16 * 3 * side**2 for side in sides
    ]

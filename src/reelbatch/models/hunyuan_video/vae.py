"""Latents to frames with Diffusers' `AutoencoderKLHunyuanVideo`, one sample at a time.

Its mid-block attention is frame-causal: a token attends to all tokens of its own and of earlier frames. Diffusers
does that with a mask of S×S (S tokens: 19 GiB in fp32 at 720×1280 without tiles). Here each frame's queries meet the
keys of the frames up to their own, unmasked: the same sums, no mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoMidBlock3D,
    HunyuanVideoUpsampleCausal3D,
)
from jaxtyping import Float
from torch import Tensor

from reelbatch.device import trim_heap
from reelbatch.memory.estimate import decode_peak_bytes


def frame_causal_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    frames: int,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Attention over `frames` frames of equally many tokens, each frame seeing itself and the earlier ones."""
    frame = query.shape[2] // frames
    ends = range(frame, frame * frames + 1, frame)
    parts = [
        F.scaled_dot_product_attention(query[:, :, end - frame : end], key[:, :, :end], value[:, :, :end])
        for end in ends
    ]
    return torch.cat(parts, dim=2)


class FrameCausalAttnProcessor:
    """Attention over `num_frames` frames of equally many tokens, each frame seeing itself and the earlier ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        num_frames: int = 1,
    ) -> Float[Tensor, "batch tokens channels"]:
        normed = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            project(normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = frame_causal_attention(query, key, value, num_frames)
        projection, dropout = attn.to_out
        return dropout(projection(attended.transpose(1, 2).flatten(2))) + hidden_states


class FrameCausalMidBlock3D(HunyuanVideoMidBlock3D):
    """`HunyuanVideoMidBlock3D` without its mask."""

    def forward(self, hidden_states: Float[Tensor, "batch channels frames height width"]) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self._run(self.resnets[0], hidden_states, checkpointing)
        for attn, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attn is not None:
                num_frames, height, width = hidden_states.shape[2:]
                tokens = hidden_states.permute(0, 2, 3, 4, 1).flatten(1, 3)
                tokens = attn(tokens, num_frames=num_frames)
                hidden_states = tokens.unflatten(1, (num_frames, height, width)).permute(0, 4, 1, 2, 3)
            hidden_states = self._run(resnet, hidden_states, checkpointing)
        return hidden_states

    def _run(self, module: torch.nn.Module, hidden_states: Tensor, checkpointing: bool) -> Tensor:
        return self._gradient_checkpointing_func(module, hidden_states) if checkpointing else module(hidden_states)


class SingleSampleConv3d(torch.nn.Conv3d):
    """A convolution that takes oneDNN for one sample too: PyTorch takes a path four times slower on the CPU for it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        usable = torch.backends.mkldnn.is_available() and not torch.is_grad_enabled()
        if input.device.type != "cpu" or input.dtype != torch.float32 or not usable:
            return super()._conv_forward(input, weight, bias)
        return torch.ops.aten.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


def use_frame_causal_attention(vae: AutoencoderKLHunyuanVideo) -> AutoencoderKLHunyuanVideo:
    """Make the loaded `vae` attend without masks, encoder and decoder; weights and hooks stay as they are."""
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        block.__class__ = FrameCausalMidBlock3D
        for attn in block.attentions:
            if attn is not None:
                attn.set_processor(FrameCausalAttnProcessor())
    return vae


TRIM_ABOVE_BYTES = 16 * 2**20
"""Of a tensor at full size; below, peaks differ little, and trimming would cost more time than that is worth."""


def _trim(upsampler: HunyuanVideoUpsampleCausal3D, inputs: tuple[Tensor, ...]) -> None:
    """Before decoding goes to full size: without it the peak on a CPU is higher, by an amount that differs from run to
    run."""
    if inputs[0].device.type == "cpu" and inputs[0].nbytes * math.prod(upsampler.upsample_factor) > TRIM_ABOVE_BYTES:
        trim_heap()


class VideoDecoder:
    """Decodes one sample at a time.

    Args:
        vae: changed in place to attend without masks; its weights and flags are not touched.
        tile_above_bytes: a sample whose decoding is estimated to take more than this is decoded in spatial tiles, which
            changes its pixels a little. The rule looks at the sample's own shape only, so that the same request always
            gives the same frames. None: never tile (unless the vae itself has tiling enabled).
    """

    def __init__(self, vae: AutoencoderKLHunyuanVideo, tile_above_bytes: int | None = None) -> None:
        self.vae = use_frame_causal_attention(vae)
        for module in vae.decoder.modules():
            if type(module) is torch.nn.Conv3d:
                module.__class__ = SingleSampleConv3d
        upsamplers = [upsampler for block in vae.decoder.up_blocks for upsampler in block.upsamplers or []]
        for upsampler in upsamplers[-1:]:
            upsampler.register_forward_pre_hook(_trim)
        self.tile_above_bytes = tile_above_bytes

    def tiles(self, latent_shape: tuple[int, ...]) -> bool:
        """Whether latents [channels, latent_frames, h, w] are decoded in spatial tiles."""
        if self.vae.use_tiling or self.tile_above_bytes is None:
            return self.vae.use_tiling
        framewise = self.vae.use_framewise_decoding
        return decode_peak_bytes(self.vae.config, latent_shape, self.vae.dtype, framewise) > self.tile_above_bytes

    @contextmanager
    def in_tiles_of(self, pixels: int) -> Iterator[None]:
        """While entered, decodes in tiles of so many pixels on a side, a quarter of which overlaps the next tile."""
        sizes = {
            "tile_sample_min_height": pixels,
            "tile_sample_min_width": pixels,
            "tile_sample_stride_height": pixels * 3 // 4,
            "tile_sample_stride_width": pixels * 3 // 4,
            "use_tiling": True,
        }
        found = {name: getattr(self.vae, name) for name in sizes}
        for name, value in sizes.items():
            setattr(self.vae, name, value)
        try:
            yield
        finally:
            for name, value in found.items():
                setattr(self.vae, name, value)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "channels latent_frames h w"]) -> Float[Tensor, "frames height width 3"]:
        """Frames in [0, 1], fp32, on the CPU.

        Args:
            latents: as the last denoising step leaves them, scaled by the VAE's scaling factor.

        Raises:
            ValueError: for latents of another shape, and for latents or frames with NaN or infinity in them.
        """
        vae, channels = self.vae, self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[0] != channels:
            raise ValueError(f"latents are {list(latents.shape)}; this VAE decodes [{channels}, latent_frames, h, w]")
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinity: there is no video in them to decode")
        # Under offloading the weights wait elsewhere than where they compute.
        device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
        scaled = latents.to(device, vae.dtype) / vae.config.scaling_factor
        found, vae.use_tiling = vae.use_tiling, self.tiles(tuple(latents.shape))
        try:
            video = vae.decode(scaled[None], return_dict=False)[0][0]
        finally:
            vae.use_tiling = found
        if not video.isfinite().all():
            raise ValueError(f"decoding gave NaN or infinity in {vae.dtype}: try bfloat16 or float32")
        return video.cpu().float().mul(0.5).add_(0.5).clamp_(0, 1).permute(1, 2, 3, 0).contiguous()

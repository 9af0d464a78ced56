"""Latents to frames with Diffusers' `AutoencoderKLHunyuanVideo`, one sample at a time.

Its mid-block attention is frame-causal: a token attends to all tokens of its own and of earlier frames. Diffusers
does that with a mask of S×S (S tokens: 19 GiB in fp32 at 720×1280 without tiles). Here each frame's queries meet the
keys of the frames up to their own, unmasked: the same sums, no mask.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoDecoder3D,
    HunyuanVideoMidBlock3D,
    HunyuanVideoUpsampleCausal3D,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from jaxtyping import Float, UInt8
from torch import Tensor

from reelbatch.device import trim_heap
from reelbatch.models.linear import linear
from reelbatch.tracing import run_tile, tracing


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
            linear(project, normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = frame_causal_attention(query, key, value, num_frames)
        projection, dropout = attn.to_out
        return dropout(linear(projection, attended.transpose(1, 2).flatten(2))) + hidden_states


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


class TileDecoder(HunyuanVideoDecoder3D):
    """`HunyuanVideoDecoder3D`, which traces of memory run once for each shape."""

    def forward(self, hidden_states: Float[Tensor, "batch channels frames height width"]) -> Tensor:
        return run_tile("decoder", super().forward, hidden_states)


class TiledVAE(AutoencoderKLHunyuanVideo):
    """`AutoencoderKLHunyuanVideo` that keeps traces of memory short: they take one of the equal stretches of time, and
    leave out blending, which goes row by row."""

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if not tracing():
            return super().tiled_decode(z, return_dict)
        decoded = run_tile("frames", lambda frames: super(TiledVAE, self).tiled_decode(frames, False)[0], z)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b if tracing() else super().blend_v(a, b, blend_extent)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b if tracing() else super().blend_h(a, b, blend_extent)


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
"""Size of a full-size tensor above which the heap is trimmed; below, peaks differ little, and trimming would cost more
time than that is worth."""


def _trim(upsampler: HunyuanVideoUpsampleCausal3D, inputs: tuple[Tensor, ...]) -> None:
    """Before decoding goes to full size: without it the peak on a CPU is higher, by an amount that differs from run to
    run."""
    if inputs[0].device.type == "cpu" and inputs[0].nbytes * math.prod(upsampler.upsample_factor) > TRIM_ABOVE_BYTES:
        trim_heap()


TILE_SIDE = 256
"""Pixels of the tiles that large frames are decoded in, as in Diffusers and in Tencent's own code."""
WHOLE_PIXELS = 424_000
"""Frames of up to so many pixels are decoded whole: 480 × 864 is, 544 × 960 is not. The largest tensor of a decode, 17
frames of 256 channels padded by 2 frames and by a pixel on each side, then has fewer than 2³¹ elements; kernels for
convolution and padding on a GPU count in 32 bits."""


class VideoDecoder:
    """Decodes and encodes one sample at a time. Several threads may decode at once: nothing is kept between calls.

    Args:
        vae: changed in place to attend without masks; its weights and flags are not touched.
    """

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        self.vae = use_frame_causal_attention(vae)
        vae.decoder.__class__ = TileDecoder
        for module in [*vae.decoder.modules(), *vae.encoder.modules()]:
            if type(module) is torch.nn.Conv3d:
                module.__class__ = SingleSampleConv3d
        upsamplers = [upsampler for block in vae.decoder.up_blocks for upsampler in block.upsamplers or []]
        for upsampler in upsamplers[-1:]:
            upsampler.register_forward_pre_hook(_trim)

    @staticmethod
    def tile_side(height: int, width: int) -> int | None:
        """Pixels on a side of the tiles that such frames are decoded in, the same on every device; None: whole."""
        return TILE_SIDE if height * width > WHOLE_PIXELS else None

    def _tiled(self, side: int | None) -> AutoencoderKLHunyuanVideo:
        """The VAE with its own flags for tiles of so many pixels, a quarter of which overlaps the next tile. Networks
        and weights are those of `vae`; what is set here is seen by no other call."""
        view = copy.copy(self.vae)
        view.__class__ = TiledVAE
        view.use_tiling = side is not None
        if side is not None:
            view.tile_sample_min_height = view.tile_sample_min_width = side
            view.tile_sample_stride_height = view.tile_sample_stride_width = side * 3 // 4
        return view

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "channels latent_frames h w"], tile_side: int | None = None
    ) -> UInt8[Tensor, "frames height width 3"]:
        """Frames on the CPU.

        Args:
            latents: as the last denoising step leaves them, scaled by the VAE's scaling factor.
            tile_side: pixels of the spatial tiles; None decodes whole.

        Raises:
            ValueError: for latents of another shape, and for latents or frames with NaN or infinity in them.
        """
        vae, channels = self.vae, self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[0] != channels:
            raise ValueError(f"latents are {list(latents.shape)}; this VAE decodes [{channels}, latent_frames, h, w]")
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinity: there is no video in them to decode")
        scaled = latents.to(self._device, vae.dtype) / vae.config.scaling_factor
        video = self._tiled(tile_side).decode(scaled[None], return_dict=False)[0][0]
        if not video.isfinite().all():
            raise ValueError(f"decoding gave NaN or infinity in {vae.dtype}: try bfloat16 or float32")
        return to_frames(video)

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "frames height width 3"]) -> Float[Tensor, "channels latent_frames h w"]:
        """Latents in fp32 on the CPU, scaled as the transformer sees them: the posterior's mean, not a sample of it, so
        that a clip is the same every time it is seen. In tiles where decoding is."""
        vae = self.vae
        video = frames.permute(3, 0, 1, 2)[None].to(self._device).float().div(127.5).sub(1).to(vae.dtype)
        view = self._tiled(self.tile_side(*frames.shape[1:3]))
        latents = view.encode(video.contiguous()).latent_dist.mean[0]
        return (latents.float() * vae.config.scaling_factor).cpu()

    @property
    def _device(self) -> torch.device:
        """Where the VAE computes: where its weights wait elsewhere, a hook knows."""
        return getattr(getattr(self.vae, "_hf_hook", None), "execution_device", None) or self.vae.device


def to_frames(video: Float[Tensor, "3 frames height width"]) -> UInt8[Tensor, "frames height width 3"]:
    """8-bit frames on the CPU of values from -1 to 1. Frame by frame, so that no copy of the video in fp32 is made."""
    _, count, height, width = video.shape
    frames = torch.empty(count, height, width, 3, dtype=torch.uint8, device=video.device)
    for i in range(1 if tracing() else count):  # a trace of memory: each frame takes the same
        values = video[:, i].float().mul(0.5).add_(0.5).clamp_(0, 1).mul_(255).round_()
        frames[i] = values.permute(1, 2, 0)
    return frames.cpu()

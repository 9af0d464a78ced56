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
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoDecoder3D,
    HunyuanVideoMidBlock3D,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from jaxtyping import Float
from torch import Tensor

from reelbatch.models.linear import linear
from reelbatch.models.vae import SampleDecoder, UnblendedInTraces, frame_causal_attention, trim_heap_before
from reelbatch.tracing import run_tile, tracing


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


class TiledVAE(UnblendedInTraces, AutoencoderKLHunyuanVideo):
    """`AutoencoderKLHunyuanVideo` that keeps traces of memory short: they take one of the equal stretches of time."""

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if not tracing():
            return super().tiled_decode(z, return_dict)
        decoded = run_tile("frames", lambda frames: super(TiledVAE, self).tiled_decode(frames, False)[0], z)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)


def use_frame_causal_attention(vae: AutoencoderKLHunyuanVideo) -> AutoencoderKLHunyuanVideo:
    """Make the loaded `vae` attend without masks, encoder and decoder; weights and hooks stay as they are."""
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        block.__class__ = FrameCausalMidBlock3D
        for attn in block.attentions:
            if attn is not None:
                attn.set_processor(FrameCausalAttnProcessor())
    return vae


TILE_SIDE = 256
"""Pixels of the tiles that large frames are decoded in, as in Diffusers and in Tencent's own code."""
WHOLE_PIXELS = 424_000
"""Frames of up to so many pixels are decoded whole: 480 × 864 is, 544 × 960 is not. The largest tensor of a decode, 17
frames of 256 channels padded by 2 frames and by a pixel on each side, then has fewer than 2³¹ elements; kernels for
convolution and padding on a GPU count in 32 bits."""


class VideoDecoder(SampleDecoder):
    """`SampleDecoder` of HunyuanVideo's VAE.

    Args:
        vae: changed in place to attend without masks; its weights and flags are not touched.
    """

    vae: AutoencoderKLHunyuanVideo

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        super().__init__(use_frame_causal_attention(vae))
        vae.decoder.__class__ = TileDecoder
        upsamplers = [upsampler for block in vae.decoder.up_blocks for upsampler in block.upsamplers or []]
        for upsampler in upsamplers[-1:]:
            trim_heap_before(upsampler, math.prod(upsampler.upsample_factor))

    @staticmethod
    def tile_side(height: int, width: int) -> int | None:
        """Pixels on a side of the tiles that such frames are decoded in, the same on every device; None: whole."""
        return TILE_SIDE if height * width > WHOLE_PIXELS else None

    def _side(self, frames: int, height: int, width: int) -> int | None:
        return self.tile_side(height, width)  # time is always cut into equal stretches

    def _tiled(self, side: int | None) -> AutoencoderKLHunyuanVideo:
        view = copy.copy(self.vae)
        view.__class__ = TiledVAE
        view.use_tiling = side is not None
        if side is not None:
            view.tile_sample_min_height = view.tile_sample_min_width = side
            view.tile_sample_stride_height = view.tile_sample_stride_width = side * 3 // 4
        return view

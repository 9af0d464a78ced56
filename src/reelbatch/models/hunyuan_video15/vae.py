"""Latents to frames and back with Diffusers' `AutoencoderKLHunyuanVideo15`, one sample at a time.

Its mid-blocks attend frame-causally: a token to all tokens of its own and of earlier frames. Diffusers does that with a
mask of S×S that is filled row by row in Python (S tokens: 4.9 GB in bfloat16 for 121 frames of 480×848), and whose
shape is wrong for more than one sample. Here each frame's queries meet the keys of the frames up to their own,
unmasked: the same sums, no mask.

Tiles are spatial only, as in the reference: all frames of a tile are coded at once.
"""

from __future__ import annotations

import copy

from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15Decoder3D,
    HunyuanVideo15Encoder3D,
)
from jaxtyping import Float
from torch import Tensor

from reelbatch.models.vae import SampleDecoder, UnblendedInTraces, frame_causal_attention, trim_heap_before
from reelbatch.tracing import run_tile


class FrameCausalAttnBlock(HunyuanVideo15AttnBlock):
    """`HunyuanVideo15AttnBlock` without its mask, for any batch."""

    def forward(self, x: Float[Tensor, "batch channels frames height width"]) -> Tensor:
        frames, height, width = x.shape[2:]
        normed = self.norm(x)
        query, key, value = (
            # one head: [B, 1, tokens, channels]
            project(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = frame_causal_attention(query, key, value, frames).squeeze(1).transpose(1, 2)
        return self.proj_out(attended.unflatten(2, (frames, height, width))) + x


class TileDecoder(HunyuanVideo15Decoder3D):
    """`HunyuanVideo15Decoder3D`, which traces of memory run once for each shape."""

    def forward(self, hidden_states: Float[Tensor, "batch channels frames height width"]) -> Tensor:
        return run_tile("decoder", super().forward, hidden_states)


class TileEncoder(HunyuanVideo15Encoder3D):
    """`HunyuanVideo15Encoder3D`, which traces of memory run once for each shape."""

    def forward(self, hidden_states: Float[Tensor, "batch channels frames height width"]) -> Tensor:
        return run_tile("encoder", super().forward, hidden_states)


class TiledVAE(UnblendedInTraces, AutoencoderKLHunyuanVideo15):
    """`AutoencoderKLHunyuanVideo15` that keeps traces of memory short."""


def attention_blocks(vae: AutoencoderKLHunyuanVideo15) -> list[HunyuanVideo15AttnBlock]:
    """Of encoder and decoder."""
    blocks = [*vae.encoder.mid_block.attentions, *vae.decoder.mid_block.attentions]
    return [block for block in blocks if block is not None]


TILE_OVERLAP = 0.25
TILE_SIDES = (256, 192, 128, 64)
"""Pixels of the tiles that large videos are coded in, the first that is small enough: 256 as in Diffusers, for videos
of up to 249 frames, and smaller ones for longer videos. A quarter of each is whole latents."""
MOST_ELEMENTS = 2**31
"""A tensor of a decode has fewer; kernels for convolution and padding on a GPU count in 32 bits."""


class VideoDecoder(SampleDecoder):
    """`SampleDecoder` of HunyuanVideo 1.5's VAE.

    Args:
        vae: changed in place to attend without masks; its weights and flags are not touched.
    """

    vae: AutoencoderKLHunyuanVideo15

    def __init__(self, vae: AutoencoderKLHunyuanVideo15) -> None:
        super().__init__(vae)
        for block in attention_blocks(vae):
            block.__class__ = FrameCausalAttnBlock
        vae.decoder.__class__, vae.encoder.__class__ = TileDecoder, TileEncoder
        upsamplers = [upsampler for block in vae.decoder.up_blocks for upsampler in block.upsamplers or []]
        for upsampler in upsamplers[-1:]:
            trim_heap_before(upsampler, 2)  # four pixels become of one, and channels half as many

    def tile_side(self, frames: int, height: int, width: int) -> int | None:
        """Pixels on a side of the tiles that such a video is coded in, the same on every device; None: whole.

        Whole, where no tensor has 2³¹ elements. The largest is one of the fewest channels at full size, padded by two
        frames and by a pixel on each side: 121 frames of 352 × 352 are coded whole, of 368 × 368 in tiles.
        """
        channels = self.vae.config.block_out_channels[0]
        fits = (
            side
            for side in (None, *TILE_SIDES)
            if channels * (frames + 2) * (min(height, side or height) + 2) * (min(width, side or width) + 2)
            < MOST_ELEMENTS
        )
        return next(fits, TILE_SIDES[-1])

    _side = tile_side

    def _tiled(self, side: int | None) -> AutoencoderKLHunyuanVideo15:
        view = copy.copy(self.vae)
        view.__class__ = TiledVAE
        view.use_tiling = side is not None
        if side is not None:
            # all of them: `enable_tiling` leaves those of latents as they were, and the frames come out smaller
            view.tile_sample_min_height = view.tile_sample_min_width = side
            view.tile_latent_min_height = view.tile_latent_min_width = side // self.vae.spatial_compression_ratio
            view.tile_overlap_factor = TILE_OVERLAP
        return view

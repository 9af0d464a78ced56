"""What the family's VAEs share: latents to frames and back, one sample at a time, whole or in tiles."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from reelbatch.device import trim_heap
from reelbatch.tracing import tracing


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


class SingleSampleConv3d(torch.nn.Conv3d):
    """A convolution that takes oneDNN for one sample too: PyTorch takes a path four times slower on the CPU for it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        usable = torch.backends.mkldnn.is_available() and not torch.is_grad_enabled()
        if input.device.type != "cpu" or input.dtype != torch.float32 or not usable:
            return super()._conv_forward(input, weight, bias)
        return torch.ops.aten.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )


class UnblendedInTraces:
    """Mixin for a tiled VAE: traces of memory leave out blending, which goes row by row."""

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b if tracing() else super().blend_v(a, b, blend_extent)  # type: ignore[misc]

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b if tracing() else super().blend_h(a, b, blend_extent)  # type: ignore[misc]


TRIM_ABOVE_BYTES = 16 * 2**20
"""Size of a full-size tensor above which the heap is trimmed; below, peaks differ little, and trimming would cost more
time than that is worth."""


def trim_heap_before(upsampler: torch.nn.Module, growth: int) -> None:
    """Trims the heap each time before decoding goes to full size: without it the peak on a CPU is higher, by an amount
    that differs from run to run.

    Args:
        upsampler: the decoder's last. growth: how many times as large its result is as its input.
    """

    def trim(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].device.type == "cpu" and inputs[0].nbytes * growth > TRIM_ABOVE_BYTES:
            trim_heap()

    upsampler.register_forward_pre_hook(trim)


class Posterior(NamedTuple):
    """Normal distributions of the latents of one frame."""

    mean: Float[Tensor, "channels h w"]
    std: Float[Tensor, "channels h w"]


class SampleDecoder(ABC):
    """Decodes and encodes one sample at a time. Several threads may decode at once: nothing is kept between calls.

    Args:
        vae: its convolutions are changed in place to be fast for one sample.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        for module in [*vae.decoder.modules(), *vae.encoder.modules()]:
            if type(module) is torch.nn.Conv3d:
                module.__class__ = SingleSampleConv3d

    @abstractmethod
    def _tiled(self, side: int | None) -> Any:
        """The VAE with its own flags for tiles of so many pixels, a quarter of which overlaps the next tile; None:
        whole. Networks and weights are those of `vae`; what is set here is seen by no other call."""

    @abstractmethod
    def _side(self, frames: int, height: int, width: int) -> int | None:
        """Pixels on a side of the tiles that a video is coded in, by its shape alone; None: whole."""

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
        view = self._tiled(self._side(*frames.shape[:3]))
        latents = view.encode(video.contiguous()).latent_dist.mean[0]
        return (latents.float() * vae.config.scaling_factor).cpu()

    def encode_image(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "channels h w"]:
        """Latents of one frame, in fp32 on the VAE's device, scaled as the transformer sees them: the mode of the
        posterior, so that they hang on no seed.

        Args:
            image: values from -1 to 1, height and width multiples of the VAE's stride.
        """
        return self.image_posterior(image).mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def image_posterior(self, image: Float[Tensor, "3 height width"]) -> Posterior:
        """What the VAE says of one frame, in fp32 on its device, not scaled; `image` as of `encode_image`."""
        view = self._tiled(self._side(1, *image.shape[1:]))
        video = image.to(self._device, self.vae.dtype)[None, :, None]
        latents = view.encode(video.contiguous()).latent_dist
        return Posterior(latents.mean[0, :, 0].float(), latents.std[0, :, 0].float())

    @property
    def settings(self) -> str:
        """The VAE's configuration, as text: with its weights, what latents of a clip depend on."""
        return json.dumps(dict(self.vae.config), sort_keys=True, default=str)

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

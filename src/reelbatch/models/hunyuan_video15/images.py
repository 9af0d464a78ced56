"""An image to conditioning: SigLIP's states of it, and the VAE's latents of it as the first frame.

The reference is `HunyuanVideo15ImageToVideoPipeline` of Diffusers: both networks see the image as it was resized and
cropped to the size of the video. Each image goes through them alone, once for a size while it is among the last few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from jaxtyping import Float, UInt8
from PIL.Image import Image, fromarray
from torch import Tensor
from transformers import SiglipVisionModel

from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.linear import pad_linears
from reelbatch.tracing import cached


@dataclass(frozen=True)
class ImageStates:
    """What the transformer is given of one image. Shared between requests: do not write into it.

    Attributes:
        states: SigLIP's last hidden states.
        latents: of the first frame, scaled as the transformer sees them.
    """

    states: Float[Tensor, "image_tokens image_embed_dim"]
    latents: Float[Tensor, "channels height width"]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ImageStates:
        """On a device, in a dtype."""
        return ImageStates(self.states.to(device, dtype), self.latents.to(device, dtype))


def nearest_size(height: int, width: int, target_size: int, stride: int) -> tuple[int, int]:
    """Height and width of the video whose first frame an image of such a shape is to be.

    The reference's buckets: multiples of `stride` with about as many pixels as a square of `target_size`, at most 4
    times as long as wide. Of them the one whose ratio of height to width is nearest to the image's, among those that
    are no further from square than the image.
    """
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=stride)
    chosen: tuple[int, int] = processor.calculate_default_height_width(height, width, target_size)
    return chosen


def fit(image: Image, height: int, width: int) -> Image:
    """The image resized (Lanczos) until it covers the frame, and cropped to it around its middle, as the reference
    does."""
    return HunyuanVideo15ImageProcessor().resize(image.convert("RGB"), height=height, width=width, resize_mode="crop")


class ImageEncoder:
    """Encodes one image at a time, so that its states never depend on another image.

    Args:
        siglip: the vision tower. processor: transformers' image processor that it was made with.
        decoder: of the VAE, which encodes too.
        cache_size: how many different images and sizes are kept.
    """

    def __init__(self, siglip: SiglipVisionModel, processor: Any, decoder: VideoDecoder, cache_size: int = 16) -> None:
        pad_linears(siglip)
        self.siglip, self.processor, self.decoder = siglip, processor, decoder
        self._pixels = HunyuanVideo15ImageProcessor(do_resize=False, do_convert_rgb=True)
        self._kept = cached(cache_size)(self._encode)

    @property
    def tokens(self) -> int:
        """Rows that SigLIP makes of any image."""
        config = self.siglip.config
        return int((config.image_size // config.patch_size) ** 2)

    def encode(self, source: Callable[[], Image], identity: str, height: int, width: int) -> ImageStates:
        """States of an image as the first frame of a video of this size.

        Args:
            source: gives the image; is called where it is not kept. It must be the same for the same identity.
            identity: of its content: equal ones are equal images.
        """
        return self._kept(_Source(source, identity), height, width)

    def encode_frame(self, frame: UInt8[Tensor, "height width 3"]) -> ImageStates:
        """States of a video's first frame, which has its size already; they are not kept."""
        return self._states(fromarray(frame.numpy()))

    def forget(self) -> None:
        """Drops what is kept of images encoded so far."""
        self._kept.cache_clear()

    def _encode(self, source: _Source, height: int, width: int) -> ImageStates:
        return self._states(fit(source.open(), height, width))

    @torch.no_grad()
    def _states(self, image: Image) -> ImageStates:
        inputs = self.processor.preprocess(images=image, do_resize=True, return_tensors="pt", do_convert_rgb=True)
        pixels = inputs["pixel_values"].to(self.siglip.device, self.siglip.dtype)
        states = self.siglip(pixel_values=pixels).last_hidden_state[0].clone()
        frame = self._pixels.preprocess(image, height=image.height, width=image.width)[0]
        return ImageStates(states, self.decoder.encode_image(frame))


@dataclass(frozen=True)
class _Source:
    """Equal where the identity is."""

    open: Callable[[], Image]
    identity: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

"""An image to conditioning: SigLIP's states of it, and the VAE's latents of it as the first frame.

The reference is `HunyuanVideo15ImageToVideoPipeline` of Diffusers: both networks see the image as it was resized and
cropped to the size of the video. Each image goes through them alone, once for a size while it is among the last few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL.Image import Image, fromarray
from torch import Tensor
from transformers import SiglipVisionModel

from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.images import Source, fit, pixels_of
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
        return self._kept(Source(source, identity), height, width)

    def encode_frame(self, frame: UInt8[Tensor, "height width 3"]) -> ImageStates:
        """States of a video's first frame, which has its size already; they are not kept."""
        return self._states(fromarray(frame.numpy()))

    def forget(self) -> None:
        """Drops what is kept of images encoded so far."""
        self._kept.cache_clear()

    def _encode(self, source: Source, height: int, width: int) -> ImageStates:
        return self._states(fit(source.open(), height, width))

    @torch.no_grad()
    def _states(self, image: Image) -> ImageStates:
        inputs = self.processor.preprocess(images=image, do_resize=True, return_tensors="pt", do_convert_rgb=True)
        pixels = inputs["pixel_values"].to(self.siglip.device, self.siglip.dtype)
        states = self.siglip(pixel_values=pixels).last_hidden_state[0].clone()
        return ImageStates(states, self.decoder.encode_image(pixels_of(image)))

"""HunyuanVideo's image-to-video models as a `Family`: HunyuanVideo-I2V of both kinds, and SkyReels V1.

They differ in how the transformer comes to know the first frame:

    token_replace   its latents stand in the first frame, which is not denoised
    latent_concat   its latents and a mask are further channels; the video's first four frames are not shown
    channels        its latents are further channels, zero in the other frames (SkyReels V1)

The references are `HunyuanVideoImageToVideoPipeline` and `HunyuanSkyreelsImageToVideoPipeline` of Diffusers. Which one
a model is, its configuration says; every request to it begins with an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reelbatch.models.family import Phase
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.family import AnyHunyuanVideo, Conditioning, RequestTexts
from reelbatch.models.hunyuan_video.text import TextStates
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.models.images import Source, fit, pixels_of
from reelbatch.models.noise import Noise
from reelbatch.models.vae import Posterior
from reelbatch.request import ModelLimits, VideoRequest
from reelbatch.tracing import cached

ImageCondition = Literal["token_replace", "latent_concat", "channels"]
IMAGE_STRIDES: Mapping[ImageCondition, int] = MappingProxyType({"token_replace": 4, "latent_concat": 2})
"""Every so manieth of LLaVA's states of the image is taken, in the models that have LLaVA."""
NOISE_SHARE = 0.999
"""Of the latents that HunyuanVideo-I2V begins with; the rest is the image's, in every frame."""
KEPT_IMAGES = 16


def input_channels(condition: ImageCondition, channels: int) -> int:
    """The transformer's input channels, for so many of the latents."""
    return {"token_replace": channels, "latent_concat": 2 * channels + 1, "channels": 2 * channels}[condition]


class ImageToVideo(AnyHunyuanVideo):
    """The loaded networks, and how they are used.

    Args:
        condition: how the transformer is given the first frame.
        text, flow_shift, limits, device: as of `AnyHunyuanVideo`.
    """

    also: Mapping[str, tuple[Phase, ...]] = MappingProxyType({"vae": ("text",)})  # it encodes images

    def __init__(
        self,
        condition: ImageCondition,
        transformer: HunyuanVideoTransformer3DModel,
        decoder: VideoDecoder,
        text: RequestTexts,
        flow_shift: float,
        limits: ModelLimits,
        device: torch.device,
    ) -> None:
        super().__init__(transformer, decoder, text, flow_shift, limits, device)
        self.condition = condition
        if condition == "latent_concat":
            self.geometry = replace(self.geometry, hidden_frames=1)
        self._posterior = cached(KEPT_IMAGES)(self._encode_image)

    @torch.no_grad()
    def encode(self, request: VideoRequest) -> Conditioning:
        """States of the prompt (with LLaVA, and of the image) and, with guidance, of the negative prompt; latents of
        the first frame.

        Raises:
            ValueError: without an image, and for one that is gone or changed since it was asked for.
        """
        if request.image is None:
            raise ValueError("this model begins its videos with an image, and the request gives none")
        height, width, _ = request.size
        known = super().encode(request)  # first: the VAE then works beside the text towers
        posterior = self._posterior(Source(request.image.open, request.image.sha256), height, width)
        latents = posterior.mean
        if self.condition == "channels":  # the reference draws it, before the noise
            drawn = Noise(request.seed).draw(tuple(latents.shape))
            latents = latents + posterior.std * drawn.to(latents.device)
        scale = self.decoder.vae.config.scaling_factor
        return replace(known, image=(latents * scale).to(self.device))

    def _encode_image(self, image: Source, height: int, width: int) -> Posterior:
        return self.decoder.image_posterior(pixels_of(fit(image.open(), height, width)))

    def _conditioning(self, request: VideoRequest, prompts: Sequence[TextStates]) -> Conditioning:
        channels, _, height, width = self.geometry.latent_shape(request)
        image = torch.empty(channels, height, width, device=self.device)
        return replace(super()._conditioning(request, prompts), image=image)

    def first_latents(
        self, request: VideoRequest, conditioning: Conditioning
    ) -> Float[Tensor, "channels frames height width"]:
        noise, image, shape = Noise(request.seed), conditioning.image, self.geometry.latent_shape(request)
        assert image is not None
        if self.condition == "channels":
            noise.draw(tuple(image.shape))  # was the image's
            return noise.draw(shape).to(self.device)
        share = torch.tensor(NOISE_SHARE, device=self.device)
        latents = noise.draw(shape).to(self.device) * share + image[:, None] * (1 - share)
        if self.condition == "token_replace":
            latents[:, 0] = image
        return latents

    def _inputs(
        self, latents: Float[Tensor, "channels frames height width"], known: Conditioning
    ) -> Float[Tensor, "in_channels frames height width"]:
        """`[latents | image in the first frame | 1 there]`, as far as the model has them. With `token_replace` the
        first frame of the latents is the image from the start to the end (`velocities`)."""
        if self.condition == "token_replace":
            return super()._inputs(latents, known)
        assert known.image is not None
        channels = len(latents)
        inputs = latents.new_zeros(input_channels(self.condition, channels), *latents.shape[1:], dtype=self.dtype)
        inputs[:channels] = latents
        inputs[channels : 2 * channels, 0] = known.image
        inputs[2 * channels :, 0] = 1
        return inputs

    @torch.no_grad()
    def velocities(self, packs: Sequence[Sequence[Branch]]) -> list[list[Tensor]]:
        """The transformer's, and none for a first frame that is given."""
        velocities = super().velocities(packs)
        if self.condition == "token_replace":
            for velocity in (velocity for pack in velocities for velocity in pack):
                velocity[:, 0] = 0
        return velocities

    def decode(
        self, latents: Float[Tensor, "channels latent_frames h w"], tile_side: int | None
    ) -> UInt8[Tensor, "frames height width 3"]:
        return super().decode(latents, tile_side)[self.geometry.hidden_frames * self.geometry.temporal :]

    def forget(self) -> None:
        super().forget()
        self._posterior.cache_clear()

    def release(self) -> None:
        super().release()
        self._posterior.cache_clear()

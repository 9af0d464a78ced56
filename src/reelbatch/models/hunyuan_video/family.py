"""HunyuanVideo (13B) as a `Family`: what all its models have, and the one of text to video."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelbatch.attention import HeadRules, rule_named
from reelbatch.geometry import Geometry
from reelbatch.models.family import EncoderIdentity, Phase, SampleView
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.text import TextEncoder, TextStates
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.models.noise import draw_noise
from reelbatch.request import ModelLimits, VideoRequest

PLAIN_GUIDANCE = 1.0
"""The embedded guidance scale of models that are guided by a negative prompt instead (SkyReels V1)."""


@dataclass(frozen=True)
class Conditioning:
    """What conditions one request.

    Attributes:
        prompts: of the conditional branch and, with classifier-free guidance, of the unconditional one.
        guidance: embedded guidance scale × 1000, in the transformer's dtype.
        rules: which tokens each head attends to; None is all.
        image: latents of the first frame, scaled, of models that begin with one.
    """

    prompts: tuple[TextStates, ...]
    guidance: Float[Tensor, ""]
    rules: HeadRules | None = None
    image: Float[Tensor, "channels height width"] | None = None

    def to(self, device: torch.device) -> Conditioning:
        return replace(
            self,
            prompts=tuple(prompt.to(device) for prompt in self.prompts),
            guidance=self.guidance.to(device),
            image=None if self.image is None else self.image.to(device),
        )


class RequestTexts(Protocol):
    """The text towers, as the family uses them."""

    @property
    def llama(self) -> nn.Module: ...

    @property
    def clip(self) -> nn.Module: ...

    def of_request(self, request: VideoRequest) -> list[TextStates]:
        """Of each guidance branch, the conditional one first."""

    def most_tokens(self, request: VideoRequest) -> tuple[int, ...]:
        """The most that `of_request` can give."""

    def forget(self, prefix: bool = False) -> None:
        """Drops what is kept of prompts; with `prefix`, of the template as well."""


class AnyHunyuanVideo:
    """The loaded networks, and how they are used.

    Args:
        text: the text towers.
        flow_shift: the scheduler's, where a request has none.
        limits: of its requests. Where their guidance is classifier-free, the embedded one is `PLAIN_GUIDANCE`.
        device: where the transformer computes, which is not where its weights are while they are offloaded.
    """

    phases: Mapping[str, Phase] = MappingProxyType(
        {"text_encoder": "text", "text_encoder_2": "text", "transformer": "step", "vae": "decode"}
    )
    also: Mapping[str, tuple[Phase, ...]] = MappingProxyType({})
    blockwise = frozenset({"transformer", "text_encoder"})
    untrainable: str | None = None

    def __init__(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        decoder: VideoDecoder,
        text: RequestTexts,
        flow_shift: float,
        limits: ModelLimits,
        device: torch.device,
    ) -> None:
        self.transformer, self.decoder, self.texts = transformer, decoder, text
        self.flow_shift, self.limits, self.device = flow_shift, limits, device
        self.parts: Mapping[str, nn.Module] = {
            "transformer": transformer,
            "vae": decoder.vae,
            "text_encoder": text.llama,
            "text_encoder_2": text.clip,
        }
        config, vae = transformer.config, decoder.vae
        self.geometry = Geometry(
            channels=vae.config.latent_channels,
            spatial=vae.spatial_compression_ratio,
            temporal=vae.temporal_compression_ratio,
            patch=config.patch_size,
            temporal_patch=config.patch_size_t,
        )

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @torch.no_grad()
    def encode(self, request: VideoRequest) -> Conditioning:
        """Llama's states and CLIP's pooled vector of the prompt and, with guidance, of the negative prompt."""
        return self._conditioning(request, self.texts.of_request(request))

    def stand_in(self, request: VideoRequest) -> Conditioning:
        """As `encode`, of as many tokens as are read at most."""
        config = self.transformer.config
        empty = partial(torch.empty, dtype=self.dtype, device=self.device)
        return self._conditioning(
            request,
            [
                TextStates(empty(tokens, config.text_embed_dim), empty(config.pooled_projection_dim))
                for tokens in self.texts.most_tokens(request)
            ],
        )

    def _conditioning(self, request: VideoRequest, prompts: Sequence[TextStates]) -> Conditioning:
        guidance = self.limits.defaults.guidance if request.guidance is None else request.guidance
        if self.limits.guidance == "classifier-free":
            guidance = PLAIN_GUIDANCE
        heads = self.transformer.config.num_attention_heads
        return Conditioning(
            tuple(prompt.to(self.device, self.dtype) for prompt in prompts),
            torch.tensor(guidance, dtype=self.dtype, device=self.device) * 1000.0,
            None if request.attention_rule is None else rule_named(request.attention_rule, heads),
        )

    def first_latents(
        self, request: VideoRequest, conditioning: Conditioning
    ) -> Float[Tensor, "channels frames height width"]:
        return draw_noise(request.seed, self.geometry.latent_shape(request)).to(self.device)

    def rows(self, request: VideoRequest, conditioning: Conditioning | None = None) -> tuple[int, ...]:
        video = self.geometry.tokens(request)
        if conditioning is not None:
            return tuple(video + len(prompt.text) for prompt in conditioning.prompts)
        return tuple(video + tokens for tokens in self.texts.most_tokens(request))

    def branches(self, sample: SampleView) -> list[Branch]:
        known: Conditioning = sample.conditioning
        inputs, timestep = self._inputs(sample.latents, known), sample.timestep
        return [
            Branch(inputs, prompt.text, prompt.pooled, timestep, known.guidance, known.rules)
            for prompt in known.prompts
        ]

    def _inputs(
        self, latents: Float[Tensor, "channels frames height width"], known: Conditioning
    ) -> Float[Tensor, "in_channels frames height width"]:
        """What the transformer is given of latents."""
        return latents.to(self.dtype)

    @torch.no_grad()
    def velocities(self, packs: Sequence[Sequence[Branch]]) -> list[list[Tensor]]:
        velocities: list[list[Tensor]] = self.transformer(packs=packs)
        return velocities

    def tile_side(self, request: VideoRequest) -> int | None:
        if request.vae_tiling is not None:
            return request.vae_tiling or None
        height, width, _ = request.size
        return self.decoder.tile_side(height, width)

    def decode(
        self, latents: Float[Tensor, "channels latent_frames h w"], tile_side: int | None
    ) -> UInt8[Tensor, "frames height width 3"]:
        return self.decoder.decode(latents, tile_side)

    def forget(self) -> None:
        self.texts.forget()

    def release(self) -> None:
        self.texts.forget(prefix=True)

    def set_attention_backend(self, backend: str) -> None:
        self.transformer.set_attention_backend(backend)


class HunyuanVideo(AnyHunyuanVideo):
    """Text to video, and its training."""

    def __init__(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        decoder: VideoDecoder,
        text: TextEncoder,
        flow_shift: float,
        limits: ModelLimits,
        device: torch.device,
    ) -> None:
        super().__init__(transformer, decoder, text, flow_shift, limits, device)
        self.text = text

    @property
    def clip_encoder(self) -> EncoderIdentity:
        return EncoderIdentity((self.decoder.settings,), ("vae",))

    @property
    def caption_encoder(self) -> EncoderIdentity:
        text = self.text
        vocabularies = json.dumps([text.tokenizer.get_vocab(), text.tokenizer_2.get_vocab()], sort_keys=True)
        return EncoderIdentity((f"{text.template} {text.max_tokens}", vocabularies), ("text_encoder", "text_encoder_2"))

    def encode_clip(self, frames: UInt8[Tensor, "frames height width 3"]) -> dict[str, Tensor]:
        return {"latents": self.decoder.encode(frames)}

    def encode_caption(self, caption: str) -> dict[str, Tensor]:
        """Llama's states under `text`, CLIP's vector under `pooled`."""
        states = self.text.encode(caption)
        return {"text": states.text.float().cpu(), "pooled": states.pooled.float().cpu()}

    def conditioning_rows(self, conditioning: Mapping[str, Tensor]) -> int:
        return len(conditioning["text"])

    @staticmethod
    def training_branch(
        latents: Float[Tensor, "channels frames height width"],
        conditioning: Mapping[str, Tensor],
        timestep: Float[Tensor, ""],
        guidance: Float[Tensor, ""],
        dtype: torch.dtype,
    ) -> Branch:
        return Branch(
            latents.to(dtype),
            conditioning["text"].to(dtype),
            conditioning["pooled"].to(dtype),
            timestep,
            guidance.to(dtype) * 1000.0,
        )

"""HunyuanVideo (13B, text to video) as a `Family`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelbatch.attention import HeadRules, rule_named, rule_names
from reelbatch.geometry import Geometry
from reelbatch.models.family import EncoderIdentity, Phase, SampleView
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.text import TextEncoder, TextStates
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.request import ModelLimits, RequestDefaults, VideoRequest


@dataclass(frozen=True)
class Conditioning:
    """What conditions one request.

    Attributes:
        prompts: of the conditional branch and, with classifier-free guidance, of the unconditional one.
        guidance: embedded guidance scale × 1000, in the transformer's dtype.
        rules: which tokens each head attends to; None is all.
    """

    prompts: tuple[TextStates, ...]
    guidance: Float[Tensor, ""]
    rules: HeadRules | None = None

    def to(self, device: torch.device) -> Conditioning:
        return replace(self, prompts=tuple(p.to(device) for p in self.prompts), guidance=self.guidance.to(device))


class HunyuanVideo:
    """The loaded networks, and how they are used.

    Args:
        flow_shift: the scheduler's, where a request has none.
        defaults: what requests get that leave something open.
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
        text: TextEncoder,
        flow_shift: float,
        defaults: RequestDefaults,
        device: torch.device,
    ) -> None:
        self.transformer, self.decoder, self.text = transformer, decoder, text
        self.flow_shift, self.device = flow_shift, device
        self.parts: Mapping[str, nn.Module] = {
            "transformer": transformer,
            "vae": decoder.vae,
            "text_encoder": text.llama,
            "text_encoder_2": text.clip,
        }
        config, vae = transformer.config, decoder.vae
        self.geometry = Geometry(
            channels=config.in_channels,
            spatial=vae.spatial_compression_ratio,
            temporal=vae.temporal_compression_ratio,
            patch=config.patch_size,
            temporal_patch=config.patch_size_t,
        )
        self.limits = ModelLimits(
            self.geometry.spatial_stride, self.geometry.temporal_stride, defaults, attention_rules=rule_names
        )

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @torch.no_grad()
    def encode(self, request: VideoRequest) -> Conditioning:
        """Llama's states and CLIP's pooled vector of the prompt and, with guidance, of the negative prompt."""
        prompts = [self.text.encode(request.prompt, request.prompt_2)]
        if request.uses_cfg:
            prompts.append(self.text.encode(request.negative_prompt or ""))
        return self._conditioning(request, [prompt.to(self.device, self.dtype) for prompt in prompts])

    def stand_in(self, request: VideoRequest) -> Conditioning:
        """As `encode`, of as many tokens as are read at most."""
        config, tokens = self.transformer.config, self.text.max_tokens
        empty = partial(torch.empty, dtype=self.dtype, device=self.device)
        prompt = TextStates(empty(tokens, config.text_embed_dim), empty(config.pooled_projection_dim))
        return self._conditioning(request, [prompt] * (2 if request.uses_cfg else 1))

    def _conditioning(self, request: VideoRequest, prompts: Sequence[TextStates]) -> Conditioning:
        guidance = self.limits.defaults.guidance if request.guidance is None else request.guidance
        heads = self.transformer.config.num_attention_heads
        return Conditioning(
            tuple(prompts),
            torch.tensor(guidance, dtype=self.dtype, device=self.device) * 1000.0,
            None if request.attention_rule is None else rule_named(request.attention_rule, heads),
        )

    def rows(self, request: VideoRequest, conditioning: Conditioning | None = None) -> tuple[int, ...]:
        video = self.geometry.tokens(request)
        if conditioning is not None:
            return tuple(video + len(prompt.text) for prompt in conditioning.prompts)
        return (video + self.text.max_tokens,) * (2 if request.uses_cfg else 1)

    def branches(self, sample: SampleView) -> list[Branch]:
        known: Conditioning = sample.conditioning
        latents, timestep = sample.latents.to(known.guidance.dtype), sample.timestep
        return [
            Branch(latents, prompt.text, prompt.pooled, timestep, known.guidance, known.rules)
            for prompt in known.prompts
        ]

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
        self.text.forget()

    def release(self) -> None:
        self.text.forget(prefix=True)

    def set_attention_backend(self, backend: str) -> None:
        self.transformer.set_attention_backend(backend)

    # -- training ----------------------------------------------------------------------------------

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

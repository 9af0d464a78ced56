"""HunyuanVideo 1.5 (text to video and image to video) as a `Family`.

Latents stay in fp32 between steps and timesteps are fp32, as in Tencent's own code. Diffusers keeps both in the
transformer's dtype, which in bfloat16 rounds a timestep by up to 2 of 1,000: its videos then differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from reelbatch.attention import HeadRules, rule_named
from reelbatch.geometry import Geometry
from reelbatch.models.family import EncoderIdentity, Phase, SampleView
from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.hunyuan_video15.images import ImageEncoder, ImageStates
from reelbatch.models.hunyuan_video15.text import TextEncoder, TextStates, glyph_text
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.noise import draw_noise
from reelbatch.request import ModelLimits, VideoRequest


@dataclass(frozen=True)
class Conditioning:
    """What conditions one request.

    Attributes:
        prompts: of the conditional branch and, with classifier-free guidance, of the unconditional one.
        image: the first frame, of both branches; None for text to video.
        rules: which tokens each head attends to; None is all.
    """

    prompts: tuple[TextStates, ...]
    image: ImageStates | None = None
    rules: HeadRules | None = None

    def to(self, device: torch.device) -> Conditioning:
        image = None if self.image is None else self.image.to(device)
        return replace(self, prompts=tuple(prompt.to(device) for prompt in self.prompts), image=image)


class HunyuanVideo15:
    """The loaded networks, and how they are used. Whether a request is text to video or image to video is decided by
    the request; both share steps.

    Args:
        images: None for a model without a vision tower, which makes videos from text alone.
        flow_shift: the scheduler's, where a request has none.
        limits: of its requests.
        device: where the transformer computes, which is not where its weights are while they are offloaded.
    """

    phases: Mapping[str, Phase] = MappingProxyType(
        {
            "text_encoder": "text",
            "text_encoder_2": "text",
            "image_encoder": "text",
            "transformer": "step",
            "vae": "decode",
        }
    )
    blockwise = frozenset({"transformer", "text_encoder"})

    def __init__(
        self,
        transformer: HunyuanVideo15Transformer3DModel,
        decoder: VideoDecoder,
        text: TextEncoder,
        images: ImageEncoder | None,
        flow_shift: float,
        limits: ModelLimits,
        device: torch.device,
    ) -> None:
        self.transformer, self.decoder, self.text, self.images = transformer, decoder, text, images
        self.flow_shift, self.limits, self.device = flow_shift, limits, device
        self.also: Mapping[str, tuple[Phase, ...]] = {} if images is None else {"vae": ("text",)}  # it encodes images
        self.parts: Mapping[str, nn.Module] = {
            "transformer": transformer,
            "vae": decoder.vae,
            "text_encoder": text.qwen,
            "text_encoder_2": text.byt5,
            **({} if images is None else {"image_encoder": images.siglip}),
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
        """States of the prompt, with guidance of the negative prompt (its glyphs are those that it quotes itself), and
        of the image.

        Raises:
            ValueError: for an image that is gone or changed since it was asked for, or that this model cannot take.
        """
        texts = [request.prompt, *([request.negative_prompt or ""] if request.uses_cfg else [])]
        prompts = [self.text.encode(text).to(self.device, self.dtype) for text in texts]
        return self._conditioning(request, prompts, self._image(request))

    def _image(self, request: VideoRequest) -> ImageStates | None:
        if request.image is None:
            return None
        if self.images is None:
            raise ValueError("this model has no vision tower: it makes videos from text alone, and takes no image")
        height, width, _ = request.size
        states = self.images.encode(request.image.open, request.image.sha256, height, width)
        return states.to(self.device, self.dtype)

    def first_latents(
        self, request: VideoRequest, conditioning: Conditioning
    ) -> Float[Tensor, "channels frames height width"]:
        return draw_noise(request.seed, self.geometry.latent_shape(request)).to(self.device)

    def stand_in(self, request: VideoRequest) -> Conditioning:
        """As `encode`, of as many tokens as are read at most."""
        config = self.transformer.config
        empty = partial(torch.empty, dtype=self.dtype, device=self.device)
        prompt = TextStates(
            empty(self.text.max_tokens, config.text_embed_dim),
            empty(self.text.max_glyph_tokens, config.text_embed_2_dim),
        )
        image = None
        if request.image is not None and self.images is not None:
            channels, _, height, width = self.geometry.latent_shape(request)
            image = ImageStates(empty(self.images.tokens, config.image_embed_dim), empty(channels, height, width))
        return self._conditioning(request, [prompt] * (2 if request.uses_cfg else 1), image)

    def _conditioning(
        self, request: VideoRequest, prompts: Sequence[TextStates], image: ImageStates | None
    ) -> Conditioning:
        heads = self.transformer.config.num_attention_heads
        rules = None if request.attention_rule is None else rule_named(request.attention_rule, heads)
        return Conditioning(tuple(prompts), image, rules)

    def rows(self, request: VideoRequest, conditioning: Conditioning | None = None) -> tuple[int, ...]:
        video = self.geometry.tokens(request)
        if request.image is not None and self.images is not None:
            video += self.images.tokens
        if conditioning is not None:
            return tuple(
                video + len(prompt.text) + (0 if prompt.glyphs is None else len(prompt.glyphs))
                for prompt in conditioning.prompts
            )
        texts = [request.prompt, *([request.negative_prompt or ""] if request.uses_cfg else [])]
        glyphs = [0 if glyph_text(text) is None else self.text.max_glyph_tokens for text in texts]
        return tuple(video + self.text.max_tokens + tokens for tokens in glyphs)

    def branches(self, sample: SampleView) -> list[Branch]:
        known: Conditioning = sample.conditioning
        image, first_frame = (None, None) if known.image is None else (known.image.states, known.image.latents)
        inputs = with_condition(sample.latents, first_frame, self.dtype)
        timestep_r = sample.next_timestep if self.transformer.config.use_meanflow else None
        return [
            Branch(inputs, prompt.text, sample.timestep, timestep_r, prompt.glyphs, image, known.rules)
            for prompt in known.prompts
        ]

    @torch.no_grad()
    def velocities(self, packs: Sequence[Sequence[Branch]]) -> list[list[Tensor]]:
        velocities: list[list[Tensor]] = self.transformer(packs=packs)
        return velocities

    def tile_side(self, request: VideoRequest) -> int | None:
        if request.vae_tiling is not None:
            return request.vae_tiling or None
        height, width, frames = request.size
        return self.decoder.tile_side(frames, height, width)

    def decode(
        self, latents: Float[Tensor, "channels latent_frames h w"], tile_side: int | None
    ) -> UInt8[Tensor, "frames height width 3"]:
        return self.decoder.decode(latents, tile_side)

    def forget(self) -> None:
        self.text.forget()
        if self.images is not None:
            self.images.forget()

    def release(self) -> None:
        self.text.forget(prefix=True)
        if self.images is not None:
            self.images.forget()

    def set_attention_backend(self, backend: str) -> None:
        self.transformer.set_attention_backend(backend)

    # -- training ----------------------------------------------------------------------------------

    @property
    def untrainable(self) -> str | None:
        if not self.transformer.config.use_meanflow:
            return None
        return (
            "was distilled to few steps (use_meanflow): its network predicts the mean velocity of a step, and the "
            "flow-matching loss would teach it another thing. Train the model that it was distilled from; a LoRA of "
            "that fits this one"
        )

    @property
    def clip_encoder(self) -> EncoderIdentity:
        settings = self.decoder.settings
        if self.images is None:
            return EncoderIdentity((settings,), ("vae",))
        return EncoderIdentity((settings, self.images.processor.to_json_string()), ("vae", "image_encoder"))

    @property
    def caption_encoder(self) -> EncoderIdentity:
        text = self.text
        vocabularies = json.dumps([text.tokenizer.get_vocab(), text.tokenizer_2.get_vocab()], sort_keys=True)
        settings = f"{text.template} {text.max_tokens} {text.max_glyph_tokens}"
        return EncoderIdentity((settings, vocabularies), ("text_encoder", "text_encoder_2"))

    def encode_clip(self, frames: UInt8[Tensor, "frames height width 3"]) -> dict[str, Tensor]:
        """`latents`; of an image-to-video model also `image`, SigLIP's states of the first frame, and `first_frame`,
        the latents of that frame alone: what a request gives with such an image. A clip of one frame has neither, as it
        would be its own answer."""
        encoded = {"latents": self.decoder.encode(frames)}
        if self.images is not None and len(frames) > 1:
            states = self.images.encode_frame(frames[0])
            encoded |= {"image": states.states.float().cpu(), "first_frame": states.latents.float().cpu()}
        return encoded

    def encode_caption(self, caption: str) -> dict[str, Tensor]:
        """Qwen's states under `text`, ByT5's under `glyphs` where the caption quotes words."""
        states = self.text.encode(caption)
        encoded = {"text": states.text.float().cpu()}
        if states.glyphs is not None:
            encoded["glyphs"] = states.glyphs.float().cpu()
        return encoded

    def conditioning_rows(self, conditioning: Mapping[str, Tensor]) -> int:
        return sum(len(conditioning[name]) for name in ("image", "glyphs", "text") if name in conditioning)

    def training_branch(
        self,
        latents: Float[Tensor, "channels frames height width"],
        conditioning: Mapping[str, Tensor],
        timestep: Float[Tensor, ""],
        guidance: Float[Tensor, ""],
        dtype: torch.dtype,
    ) -> Branch:
        """A piece that the sample lacks has no rows, and is there: every weight then gets a gradient in every step, as
        training on several devices needs."""
        config = self.transformer.config

        def states(name: str, width: int) -> Tensor:
            given = conditioning.get(name)
            # a copy: what the transformer keeps for a tensor of states is for weights that do not change
            return latents.new_zeros(0, width, dtype=dtype) if given is None else given.to(dtype, copy=True)

        return Branch(
            with_condition(latents, conditioning.get("first_frame"), dtype),
            conditioning["text"].to(dtype),
            timestep,
            glyphs=states("glyphs", config.text_embed_2_dim),
            image=states("image", config.image_embed_dim),
        )


def with_condition(
    latents: Float[Tensor, "channels frames height width"],
    first_frame: Float[Tensor, "channels height width"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "in_channels frames height width"]:
    """`[latents | condition | mask]`: the image's latents in the first frame of the condition, and 1 there in the
    mask; zeros elsewhere."""
    channels = len(latents)
    inputs = latents.new_zeros(2 * channels + 1, *latents.shape[1:], dtype=dtype)
    inputs[:channels] = latents
    if first_frame is not None:
        inputs[channels:-1, 0] = first_frame
        inputs[-1, 0] = 1
    return inputs

"""Folders of HunyuanVideo 1.5, of text to video and of image to video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

import transformers
from diffusers import AutoencoderKLHunyuanVideo15
from pydantic import Field, model_validator

from reelbatch.attention import rule_names
from reelbatch.loading.configs import (
    AnyImageProcessorConfig,
    AnyTransformerConfig,
    Channels,
    Config,
    Heads,
    Layers,
    Name,
    Positive,
    RopeValue,
    SchedulerConfig,
    Share,
    Side,
    Token,
    Width,
)
from reelbatch.loading.layout import (
    DIFFUSERS,
    MODEL,
    TOKENIZERS,
    Configs,
    Contents,
    Layout,
    shared_problems,
    with_defaults,
)
from reelbatch.models.hunyuan_video15.family import HunyuanVideo15
from reelbatch.models.hunyuan_video15.images import ImageEncoder
from reelbatch.models.hunyuan_video15.text import DEFAULT_TEMPLATE, TextEncoder
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.hunyuan_video15.variants import GuiderError, Variant, advice, defaults_of, guidance_of, variant_of
from reelbatch.models.images import nearest_size
from reelbatch.request import ModelLimits
from reelbatch.wording import shown


class TransformerConfig(AnyTransformerConfig):
    image_embed_dim: Width = 1152
    text_embed_2_dim: Width = 1472
    target_size: Annotated[int, Field(ge=16, le=2**13)] = 640
    task_type: Name | None = None
    use_meanflow: bool = False


class VaeConfig(Config):
    in_channels: Annotated[int, Field(ge=3, le=3)] = 3
    out_channels: Annotated[int, Field(ge=3, le=3)] = 3
    latent_channels: Channels = 32
    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=8)] = Field(
        [128, 256, 512, 1024, 1024]
    )
    layers_per_block: Annotated[int, Field(ge=1, le=32)] = 2
    spatial_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 16
    temporal_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    downsample_match_channel: bool = True
    upsample_match_channel: bool = True
    scaling_factor: Positive = 1.03682


class QwenTextConfig(Config):
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 152064
    hidden_size: Width = 8192
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 29568
    num_hidden_layers: Annotated[int, Field(ge=2, le=256)] = 80  # the last state but two is read
    num_attention_heads: Heads = 64
    num_key_value_heads: Heads | None = 8
    hidden_act: Name = "silu"
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 32768
    rms_norm_eps: Share = 1e-5
    use_sliding_window: bool | None = False
    sliding_window: Annotated[int, Field(ge=1, le=2**24)] | None = 4096
    max_window_layers: Layers | None = 80
    layer_types: Annotated[list[Name], Field(max_length=256)] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: Token | None = 151643
    eos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = 151645
    pad_token_id: Token | None = None
    rope_theta: Positive | None = None
    rope_scaling: Annotated[dict[Name, RopeValue], Field(max_length=32)] | None = None
    rope_parameters: Annotated[dict[Name, RopeValue], Field(max_length=32)] | None = None

    @model_validator(mode="after")
    def _sections(self) -> QwenTextConfig:
        sections = (self.rope_scaling or self.rope_parameters or {}).get("mrope_section")
        half = self.hidden_size // self.num_attention_heads / 2
        whole = [part for part in sections if isinstance(part, int) and part >= 0] if isinstance(sections, list) else []
        if len(whole) != 3 or whole != sections or sum(whole) != half:
            raise ValueError(
                f"rope_scaling must have an mrope_section of 3 whole numbers that add up to {half:g}, half the width "
                f"of a head, not {shown(sections)}"
            )
        return self


class ByT5Config(Config):
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Annotated[int, Field(ge=1, le=2**20)] = 2048
    num_layers: Annotated[int, Field(ge=1, le=256)] = 6
    num_decoder_layers: Layers | None = None
    num_heads: Heads = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1024)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=2**16)] = 128
    layer_norm_epsilon: Share = 1e-6
    feed_forward_proj: Name = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: Token | None = 0
    eos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = 1


class SiglipConfig(Config):
    hidden_size: Width = 768
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 3072
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Heads = 12
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3
    image_size: Side = 224
    patch_size: Side = 16
    hidden_act: Name = "gelu_pytorch_tanh"
    layer_norm_eps: Share = 1e-6
    vision_use_head: bool = True


class ImageSize(Config):
    height: Side
    width: Side


class ImageProcessorConfig(AnyImageProcessorConfig):
    size: ImageSize
    do_center_crop: Literal[False] | None = None
    do_convert_rgb: bool | None = None


class GuiderConfig(Config):
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 7.5
    guidance_rescale: float = 0.0
    use_original_formulation: bool = False
    start: float = 0.0
    stop: float = 1.0
    enabled: bool = True


def _problems(configs: Configs) -> list[tuple[str, str]]:
    problems = []
    transformer, vae = configs.get("transformer", {}), configs.get("vae", {})
    try:
        guidance_of(configs.get("guider", {}))
    except GuiderError as error:
        problems.append(("guider/guider_config.json", str(error)))
    channels, latent = transformer.get("in_channels"), vae.get("latent_channels")
    if channels is not None and latent is not None and channels != 2 * latent + 1:
        text = f"has in_channels {channels}; with latents of {latent} channels, a condition and a mask, it must be "
        problems.append(("transformer/config.json", text + str(2 * latent + 1)))
    size, side = (
        configs.get("feature_extractor", {}).get("size", {}),
        configs.get("image_encoder", {}).get("image_size"),
    )
    if size and side and set(size.values()) != {side}:
        text = f"makes images of {size['height']} x {size['width']} pixels, and image_encoder takes {side} x {side}"
        problems.append(("feature_extractor/preprocessor_config.json", text))
    return problems + shared_problems(
        configs,
        (
            ("out_channels", "vae", "latent_channels"),
            ("text_embed_dim", "text_encoder", "hidden_size"),
            ("text_embed_2_dim", "text_encoder_2", "d_model"),
            ("image_embed_dim", "image_encoder", "hidden_size"),
        ),
    )


def variant(configs: Configs) -> Variant:
    """Which of the published models it is."""
    try:
        guidance = guidance_of(configs.get("guider", {}))
    except GuiderError:  # is one of the folder's problems
        guidance = 1.0
    return variant_of(configs.get("transformer", {}), guidance, float(configs.get("scheduler", {}).get("shift", 1.0)))


def _limits(configs: Configs, defaults: Mapping[str, Any], images: bool) -> ModelLimits:
    vae, transformer = configs.get("vae", {}), configs.get("transformer", {})
    spatial = vae.get("spatial_compression_ratio", 16)
    stride, known = spatial * transformer.get("patch_size", 1), variant(configs)
    return ModelLimits(
        spatial_stride=stride,
        temporal_stride=vae.get("temporal_compression_ratio", 4),
        defaults=with_defaults(defaults_of(known), defaults),
        attention_rules=rule_names,
        image_size=partial(nearest_size, target_size=known.target_size, stride=stride) if images else None,
        guidance="classifier-free",
        tile_stride=4 * spatial,
        advice=partial(advice, known),
    )


def _build(contents: Contents) -> HunyuanVideo15:
    networks, tokenizers = contents.networks, contents.tokenizers
    decoder = VideoDecoder(networks["vae"])
    text = TextEncoder(
        networks["text_encoder"],
        tokenizers["tokenizer"],
        networks["text_encoder_2"],
        tokenizers["tokenizer_2"],
        contents.template or DEFAULT_TEMPLATE,
    )
    images = None
    if "image_encoder" in networks:
        images = ImageEncoder(networks["image_encoder"], tokenizers["feature_extractor"], decoder)
    return HunyuanVideo15(
        networks["transformer"], decoder, text, images, contents.flow_shift, contents.limits, contents.device
    )


TEXT = Layout(
    makes="text to video",
    example="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    classes={
        "transformer": ("HunyuanVideo15Transformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo15",),
        "text_encoder": ("Qwen2_5_VLTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *TOKENIZERS),
        "tokenizer_2": ("ByT5Tokenizer",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "guider": ("ClassifierFreeGuidance",),
    },
    weights={"transformer": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": MODEL, "text_encoder_2": MODEL},
    networks={
        "transformer": HunyuanVideo15Transformer3DModel,
        "vae": AutoencoderKLHunyuanVideo15,
        "text_encoder": transformers.Qwen2_5_VLTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    },
    configs={
        "transformer": TransformerConfig,
        "vae": VaeConfig,
        "text_encoder": QwenTextConfig,
        "text_encoder_2": ByT5Config,
        "scheduler": SchedulerConfig,
        "guider": GuiderConfig,
    },
    phases=HunyuanVideo15.phases,
    blockwise=HunyuanVideo15.blockwise,
    problems=_problems,
    limits=partial(_limits, images=False),
    build=_build,
    also=MappingProxyType({}),
)
IMAGE = replace(
    TEXT,
    makes="image to video",
    example="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    classes={
        **TEXT.classes,
        "image_encoder": ("SiglipVisionModel",),
        "feature_extractor": ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"),
    },
    weights={**TEXT.weights, "image_encoder": MODEL},
    configs={**TEXT.configs, "image_encoder": SiglipConfig, "feature_extractor": ImageProcessorConfig},
    networks={**TEXT.networks, "image_encoder": transformers.SiglipVisionModel},
    limits=partial(_limits, images=True),
    also=MappingProxyType({"vae": ("text",)}),  # it encodes the images
)

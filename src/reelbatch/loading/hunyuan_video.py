"""Folders of HunyuanVideo (13B, text to video)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import transformers
from diffusers import AutoencoderKLHunyuanVideo
from pydantic import Field

from reelbatch.attention import rule_names
from reelbatch.loading.configs import (
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
from reelbatch.models.hunyuan_video.family import HunyuanVideo
from reelbatch.models.hunyuan_video.text import DEFAULT_TEMPLATE, TextEncoder
from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.request import ModelLimits, RequestDefaults


class TransformerConfig(AnyTransformerConfig):
    num_single_layers: Layers = 40
    guidance_embeds: bool = True
    pooled_projection_dim: Width = 768
    image_condition_type: Name | None = None


class VaeConfig(Config):
    in_channels: Annotated[int, Field(ge=3, le=3)] = 3
    out_channels: Annotated[int, Field(ge=3, le=3)] = 3
    latent_channels: Channels = 16
    down_block_types: Annotated[list[Name], Field(min_length=1, max_length=8)] = Field(["HunyuanVideoDownBlock3D"] * 4)
    up_block_types: Annotated[list[Name], Field(min_length=1, max_length=8)] = Field(["HunyuanVideoUpBlock3D"] * 4)
    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=8)] = Field([128, 256, 512, 512])
    layers_per_block: Annotated[int, Field(ge=1, le=32)] = 2
    act_fn: Name = "silu"
    norm_num_groups: Channels = 32
    scaling_factor: Positive = 0.476986
    spatial_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 8
    temporal_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    mid_block_add_attention: bool = True


class LlamaTextConfig(Config):
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 32000
    hidden_size: Width = 4096
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 11008
    num_hidden_layers: Annotated[int, Field(ge=2, le=256)] = 32  # the last state but two is read
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    hidden_act: Name = "silu"
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 2048
    rms_norm_eps: Share = 1e-6
    pad_token_id: Token | None = None
    bos_token_id: Token | None = 1
    eos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = 2
    pretraining_tp: Heads | None = 1
    tie_word_embeddings: bool = False
    rope_theta: Positive | None = None
    rope_scaling: Annotated[dict[Name, RopeValue], Field(max_length=32)] | None = None
    rope_parameters: Annotated[dict[Name, RopeValue], Field(max_length=32)] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


class ClipTextConfig(Config):
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 49408
    hidden_size: Width = 512
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 2048
    projection_dim: Width | None = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Annotated[int, Field(ge=2, le=2**16)] = 77
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Share | None = 1e-5
    pad_token_id: Token | None = 1
    bos_token_id: Token | None = 49406
    eos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = 49407


def _problems(configs: Configs) -> list[tuple[str, str]]:
    problems = []
    if kind := configs.get("transformer", {}).get("image_condition_type"):
        text = f"is an image-to-video model (image_condition_type {kind}), and the model_index.json of such a folder "
        text += "has _class_name HunyuanVideoImageToVideoPipeline; get the whole folder of one model"
        problems.append(("transformer/config.json", text))
    return problems + shared_problems(
        configs,
        (
            ("in_channels", "vae", "latent_channels"),
            ("text_embed_dim", "text_encoder", "hidden_size"),
            ("pooled_projection_dim", "text_encoder_2", "hidden_size"),
        ),
    )


def _limits(configs: Configs, defaults: Mapping[str, Any]) -> ModelLimits:
    vae, transformer = configs.get("vae", {}), configs.get("transformer", {})
    return ModelLimits(
        spatial_stride=vae.get("spatial_compression_ratio", 8) * transformer.get("patch_size", 2),
        temporal_stride=vae.get("temporal_compression_ratio", 4),
        defaults=with_defaults(RequestDefaults(), defaults),
        attention_rules=rule_names,
    )


def _build(contents: Contents) -> HunyuanVideo:
    networks, tokenizers = contents.networks, contents.tokenizers
    text = TextEncoder(
        networks["text_encoder"],
        tokenizers["tokenizer"],
        networks["text_encoder_2"],
        tokenizers["tokenizer_2"],
        contents.template or DEFAULT_TEMPLATE,
    )
    return HunyuanVideo(
        networks["transformer"],
        VideoDecoder(networks["vae"]),
        text,
        contents.flow_shift,
        contents.limits,
        contents.device,
    )


NETWORKS: dict[str, Any] = {
    "transformer": HunyuanVideoTransformer3DModel,
    "vae": AutoencoderKLHunyuanVideo,
    "text_encoder": transformers.LlamaModel,
    "text_encoder_2": transformers.CLIPTextModel,
}
LAYOUT = Layout(
    makes="text to video",
    example="hunyuanvideo-community/HunyuanVideo",
    classes={
        "transformer": ("HunyuanVideoTransformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo",),
        "text_encoder": ("LlamaModel",),
        "text_encoder_2": ("CLIPTextModel",),
        "tokenizer": ("LlamaTokenizer", "LlamaTokenizerFast", *TOKENIZERS),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast", *TOKENIZERS),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    },
    weights={"transformer": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": MODEL, "text_encoder_2": MODEL},
    networks=NETWORKS,
    configs={
        "transformer": TransformerConfig,
        "vae": VaeConfig,
        "text_encoder": LlamaTextConfig,
        "text_encoder_2": ClipTextConfig,
        "scheduler": SchedulerConfig,
    },
    phases=HunyuanVideo.phases,
    blockwise=HunyuanVideo.blockwise,
    problems=_problems,
    limits=_limits,
    build=_build,
    also=MappingProxyType({}),
)

"""Folders of HunyuanVideo (13B, text to video)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import transformers
from diffusers import AutoencoderKLHunyuanVideo

from reelbatch.attention import rule_names
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


def _problems(configs: Configs) -> list[tuple[str, str]]:
    problems = []
    if kind := configs.get("transformer", {}).get("image_condition_type"):
        text = f"is an image-to-video model (image_condition_type {kind}); reelbatch runs text to video"
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
        contents.limits.defaults,
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
    phases=HunyuanVideo.phases,
    blockwise=HunyuanVideo.blockwise,
    problems=_problems,
    limits=_limits,
    build=_build,
    also=MappingProxyType({}),
)

"""Folders of HunyuanVideo 1.5, of text to video and of image to video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import transformers
from diffusers import AutoencoderKLHunyuanVideo15

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
from reelbatch.models.hunyuan_video15.family import HunyuanVideo15
from reelbatch.models.hunyuan_video15.images import ImageEncoder, nearest_size
from reelbatch.models.hunyuan_video15.text import DEFAULT_TEMPLATE, TextEncoder
from reelbatch.models.hunyuan_video15.transformer import HunyuanVideo15Transformer3DModel
from reelbatch.models.hunyuan_video15.vae import VideoDecoder
from reelbatch.models.hunyuan_video15.variants import GuiderError, Variant, advice, defaults_of, guidance_of, variant_of
from reelbatch.request import ModelLimits


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
    networks={**TEXT.networks, "image_encoder": transformers.SiglipVisionModel},
    limits=partial(_limits, images=True),
    also=MappingProxyType({"vae": ("text",)}),  # it encodes the images
)

"""Folders of HunyuanVideo's image-to-video models: HunyuanVideo-I2V of both kinds, and SkyReels V1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from reelbatch.loading.configs import (
    AnyImageProcessorConfig,
    Colour,
    Config,
    Heads,
    Layers,
    Name,
    Positive,
    Share,
    Side,
    Token,
    Width,
)
from reelbatch.loading.hunyuan_video import LAYOUT as TEXT
from reelbatch.loading.hunyuan_video import LlamaTextConfig
from reelbatch.loading.layout import Configs, Contents, shared_problems, with_defaults
from reelbatch.models.hunyuan_video.image_to_video import (
    IMAGE_STRIDES,
    ImageCondition,
    ImageToVideo,
    input_channels,
)
from reelbatch.models.hunyuan_video.llava import DEFAULT_TEMPLATE, ImageTextEncoder, LlavaModel
from reelbatch.models.hunyuan_video.text import DEFAULT_TEMPLATE as TEXT_TEMPLATE
from reelbatch.models.hunyuan_video.text import TextEncoder
from reelbatch.models.hunyuan_video.vae import VideoDecoder
from reelbatch.models.images import nearest_size
from reelbatch.request import ModelLimits, RequestDefaults
from reelbatch.wording import shown


class ClipVisionConfig(Config):
    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: Width = 1024
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 4096
    projection_dim: Width = 768
    num_hidden_layers: Layers = 24
    num_attention_heads: Heads = 16
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3
    image_size: Side = 336
    patch_size: Side = 14
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Share = 1e-5


class LlavaTextConfig(LlamaTextConfig):
    model_type: Literal["llama"] = "llama"


class LlavaConfig(Config):
    text_config: LlavaTextConfig
    vision_config: ClipVisionConfig
    image_token_index: Token = 32000
    image_seq_length: Annotated[int, Field(ge=1, le=2**16)] = 576
    projector_hidden_act: Name = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: Annotated[int, Field(ge=-257, le=256)] = -2
    multimodal_projector_bias: bool = True
    pad_token_id: Token | None = None
    tie_word_embeddings: bool = False


class Crop(Config):
    height: Side
    width: Side


class Shortest(Config):
    shortest_edge: Side


class ImageProcessorConfig(AnyImageProcessorConfig):
    size: Shortest | Crop
    crop_size: Crop
    do_center_crop: Literal[True] | None = True
    image_mean: Colour
    image_std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    do_convert_rgb: bool | None = True


DEFAULTS: Mapping[ImageCondition, RequestDefaults] = {
    "token_replace": RequestDefaults(),
    "latent_concat": RequestDefaults(frames=125),
    "channels": RequestDefaults(height=544, width=960, frames=97),
}
"""As of the references' pipelines. Of 129 frames, `latent_concat` shows 125. The guidance of SkyReels V1 (`channels`)
is classifier-free."""
BUCKET_STRIDE = 2
"""Sides of videos that have the shape of their image are multiples of so many strides, as in Tencent's own code."""


def _condition(configs: Configs) -> ImageCondition:
    said = configs.get("transformer", {}).get("image_condition_type")
    return next((kind for kind in IMAGE_STRIDES if kind == said), "channels")


def _problems(configs: Configs, llava: bool) -> list[tuple[str, str]]:
    transformer, latent = configs.get("transformer", {}), configs.get("vae", {}).get("latent_channels")
    processor, text = configs.get("image_processor", {}), configs.get("text_encoder", {})
    problems = []

    def problem(text: str) -> None:
        problems.append(("transformer/config.json", text))

    condition, kind = _condition(configs), transformer.get("image_condition_type")
    expected = latent and input_channels(condition, latent)
    if transformer and llava != (kind in IMAGE_STRIDES):
        kinds = "one of " + ", ".join(IMAGE_STRIDES) if llava else "none"
        problem(f"has image_condition_type {shown(kind)}; a folder of this pipeline has {kinds}")
    elif expected and transformer.get("in_channels", expected) != expected:
        channels = f"{expected}, as latents have {latent} channels and the image comes by {condition}"
        problem(f"has in_channels {transformer['in_channels']}; it must be {channels}")
    side = text.get("vision_config", {}).get("image_size")
    if processor and side and set(processor["crop_size"].values()) != {side}:
        size = f"{processor['crop_size']['height']} x {processor['crop_size']['width']}"
        text_of_it = f"makes images of {size} pixels, and text_encoder takes {side} x {side}"
        problems.append(("image_processor/preprocessor_config.json", text_of_it))
    return problems + shared_problems(
        {**configs, "text_encoder": text.get("text_config", text)},
        (
            ("out_channels", "vae", "latent_channels"),
            ("text_embed_dim", "text_encoder", "hidden_size"),
            ("pooled_projection_dim", "text_encoder_2", "hidden_size"),
        ),
    )


def size_of(image_height: int, image_width: int, defaults: RequestDefaults, stride: int) -> tuple[int, int]:
    """Height and width of a video that begins with such an image: of the model's own size, lying or standing, and the
    others of about as many pixels (`nearest_size`), the one of the nearest shape; the model's own where it is as near.
    """
    bucket = BUCKET_STRIDE * stride
    target = max(round(math.sqrt(defaults.height * defaults.width) / stride) * stride, bucket)
    sizes = [
        (defaults.height, defaults.width),
        (defaults.width, defaults.height),
        nearest_size(image_height, image_width, target, bucket),
    ]
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1] * image_width / image_height)))


def _limits(configs: Configs, said: Mapping[str, Any]) -> ModelLimits:
    defaults = with_defaults(DEFAULTS[_condition(configs)], said)
    limits = TEXT.limits(configs, vars(defaults))
    return replace(
        limits,
        image_size=partial(size_of, defaults=defaults, stride=limits.spatial_stride),
        image_required=True,
        guidance="classifier-free" if _condition(configs) == "channels" else "embedded",
    )


def _build(contents: Contents) -> ImageToVideo:
    networks, tokenizers = contents.networks, contents.tokenizers
    condition = _condition({"transformer": networks["transformer"].config})
    text: ImageTextEncoder | TextEncoder
    if condition in IMAGE_STRIDES:
        text = ImageTextEncoder(
            networks["text_encoder"],
            tokenizers["tokenizer"],
            tokenizers["image_processor"],
            networks["text_encoder_2"],
            tokenizers["tokenizer_2"],
            IMAGE_STRIDES[condition],
            contents.template or DEFAULT_TEMPLATE,
        )
    else:
        text = TextEncoder(
            networks["text_encoder"],
            tokenizers["tokenizer"],
            networks["text_encoder_2"],
            tokenizers["tokenizer_2"],
            contents.template or TEXT_TEMPLATE,
        )
    decoder = VideoDecoder(networks["vae"])
    return ImageToVideo(
        condition, networks["transformer"], decoder, text, contents.flow_shift, contents.limits, contents.device
    )


SKYREELS = replace(
    TEXT,
    makes="image to video, SkyReels V1 with the rest of HunyuanVideo",
    problems=partial(_problems, llava=False),
    limits=_limits,
    build=_build,
    also=ImageToVideo.also,
)
HUNYUAN = replace(
    SKYREELS,
    makes="image to video",
    example="hunyuanvideo-community/HunyuanVideo-I2V",
    classes={
        **TEXT.classes,
        "text_encoder": ("LlavaForConditionalGeneration", "LlavaModel"),
        "image_processor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    },
    networks={**TEXT.networks, "text_encoder": LlavaModel},
    configs={**TEXT.configs, "text_encoder": LlavaConfig, "image_processor": ImageProcessorConfig},
    problems=partial(_problems, llava=True),
)

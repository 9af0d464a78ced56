"""The configurations of a model folder's components: what they may say, and the networks that they ask for.

Only entries that are known and within bounds reach a library, so that no config.json chooses code, a kernel or an
amount of memory. Networks are built without memory (on PyTorch's meta device) to compare them with the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
from reelbatch.request import shown
from reelbatch.wording import shown_line

NETWORKS: dict[str, Any] = {
    "transformer": HunyuanVideoTransformer3DModel,
    "vae": AutoencoderKLHunyuanVideo,
    "text_encoder": transformers.LlamaModel,
    "text_encoder_2": transformers.CLIPTextModel,
}
"""The parts with weights, and the classes that they are loaded as."""

CODE_ENTRIES = {
    "attn_implementation": "an attention implementation",
    "_attn_implementation": "an attention implementation",
    "_attn_implementation_internal": "an attention implementation",
    "attention_implementation": "an attention implementation",
    "experts_implementation": "an implementation",
    "_experts_implementation": "an implementation",
    "use_kernels": "kernels to fetch",
    "kernel_config": "kernels to fetch",
    "auto_map": "code to run",
    "custom_pipelines": "code to run",
    "custom_generate": "code to run",
    "trust_remote_code": "code to run",
    "code_revision": "code to run",
    "quantization_config": "how weights are quantized (--dtype int8 does it here)",
    "compression_config": "how weights are compressed",
    "tokenizer_object": "an object",
    "tokenizer_file": "a file elsewhere",
    "vocab_file": "a file elsewhere",
    "merges_file": "a file elsewhere",
    "gguf_file": "a file elsewhere",
}
"""Entries by which a library would take code, a kernel or a file that nobody asked for: refused unless empty."""

SHOWN_FAULTS = 20

Layers = Annotated[int, Field(ge=0, le=256)]
Width = Annotated[int, Field(ge=1, le=2**17)]
Channels = Annotated[int, Field(ge=1, le=2**13)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Token = Annotated[int, Field(ge=-1, le=2**22)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=60)]
RopeValue = bool | int | float | Name | None | Annotated[list[float], Field(max_length=1024)]


class _Config(BaseModel):
    """Bounds are wide: they keep out what no machine could hold, and what no network has."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TransformerConfig(_Config):
    in_channels: Channels = 16
    out_channels: Channels = 16
    num_attention_heads: Heads = 24
    attention_head_dim: Heads = 128
    num_layers: Annotated[int, Field(ge=1, le=256)] = 20
    num_single_layers: Layers = 40
    num_refiner_layers: Layers = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    patch_size_t: Annotated[int, Field(ge=1, le=16)] = 1
    qk_norm: Name | None = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: Width = 4096
    pooled_projection_dim: Width = 768
    rope_theta: Positive = 256.0
    rope_axes_dim: Annotated[list[Heads], Field(min_length=3, max_length=3)] = [16, 56, 56]
    image_condition_type: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> TransformerConfig:
        if sum(self.rope_axes_dim) != self.attention_head_dim or any(side % 2 for side in self.rope_axes_dim):
            raise ValueError(
                f"rope_axes_dim {self.rope_axes_dim} must be even numbers that add up to attention_head_dim "
                f"{self.attention_head_dim}"
            )
        return self


class VaeConfig(_Config):
    in_channels: Annotated[int, Field(ge=3, le=3)] = 3
    out_channels: Annotated[int, Field(ge=3, le=3)] = 3
    latent_channels: Channels = 16
    down_block_types: Annotated[list[Name], Field(min_length=1, max_length=8)] = ["HunyuanVideoDownBlock3D"] * 4
    up_block_types: Annotated[list[Name], Field(min_length=1, max_length=8)] = ["HunyuanVideoUpBlock3D"] * 4
    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=8)] = [128, 256, 512, 512]
    layers_per_block: Annotated[int, Field(ge=1, le=32)] = 2
    act_fn: Name = "silu"
    norm_num_groups: Channels = 32
    scaling_factor: Positive = 0.476986
    spatial_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 8
    temporal_compression_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    mid_block_add_attention: bool = True


class LlamaTextConfig(_Config):
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


class ClipTextConfig(_Config):
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


class SchedulerConfig(_Config):
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0


CONFIGS: dict[str, type[_Config]] = {
    "transformer": TransformerConfig,
    "vae": VaeConfig,
    "text_encoder": LlamaTextConfig,
    "text_encoder_2": ClipTextConfig,
    "scheduler": SchedulerConfig,
}


def check_config(component: str, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a configuration that are known, and what is wrong with it; no entries where anything is."""
    faults = code_faults(content)
    try:
        known = CONFIGS[component].model_validate(dict(content)).model_dump(exclude_unset=True)
    except ValidationError as error:
        return {}, faults + validation_faults(error)
    return ({}, faults) if faults else (known, [])


def code_faults(content: Mapping[str, Any]) -> list[str]:
    """Entries of a JSON file by which it would choose code; of nested ones as well."""
    return [
        f"has {key} {shown(value)}: a model folder may not choose {CODE_ENTRIES[key]}; remove the entry"
        for key, value in _entries(content)
        if key in CODE_ENTRIES and value
    ]


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _entries(inner)


def validation_faults(error: ValidationError) -> list[str]:
    """pydantic's errors, a line each; of very many, the first ones and how many more there are."""
    lines = []
    for fault in error.errors()[:SHOWN_FAULTS]:
        field = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{shown_line(field)}: {message}; got {shown(fault['input'])}" if field else message)
    if (more := error.error_count() - SHOWN_FAULTS) > 0:
        lines.append(f"and {more} more faults of this kind")
    return lines


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a checked configuration, without memory for its weights.

    Raises:
        ValueError: if there is no such network.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = NETWORKS[component]
            if text_config := text_encoder_config(component, config):
                network = kind(text_config)
            else:
                network = kind.from_config(dict(config))
    except Exception as error:  # whatever a library says to numbers that do not fit each other
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"asks for a network that cannot be built ({shown_line(reason)}); get the file again"
        ) from None
    assert isinstance(network, nn.Module)
    return network


def text_encoder_config(component: str, config: Mapping[str, Any]) -> transformers.PreTrainedConfig | None:
    """transformers' own form of a checked configuration; None for the networks of Diffusers."""
    return NETWORKS[component].config_class(**config) if component.startswith("text_encoder") else None

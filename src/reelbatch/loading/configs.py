"""The configurations of a model folder's components: what they may say, and the networks that they ask for.

Only entries that are known and within bounds reach a library, so that no config.json chooses code, a kernel or an
amount of memory. Networks are built without memory (on PyTorch's meta device) to compare them with the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from reelbatch.wording import shown, shown_line

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
Side = Annotated[int, Field(ge=1, le=4096)]
Colour = Annotated[list[Share], Field(min_length=3, max_length=3)]
Name = Annotated[str, Field(max_length=60)]
RopeValue = bool | int | float | Name | None | Annotated[list[int | float], Field(max_length=1024)]


class Config(BaseModel):
    """Bounds are wide: they keep out what no machine could hold, and what no network has."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class AnyImageProcessorConfig(Config):
    """What the image processors of all families have."""

    do_resize: Literal[True] | None = True
    resample: Annotated[int, Field(ge=0, le=5)] | None = 3
    do_pad: Literal[False] | None = None
    do_rescale: bool | None = True
    rescale_factor: Positive = 1 / 255
    do_normalize: bool | None = True
    image_mean: Colour = Field([0.5, 0.5, 0.5])
    image_std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = Field([0.5, 0.5, 0.5])


class AnyTransformerConfig(Config):
    """What the transformers of all families have."""

    in_channels: Channels = 16
    out_channels: Channels = 16
    num_attention_heads: Heads = 24
    attention_head_dim: Heads = 128
    num_layers: Annotated[int, Field(ge=1, le=256)] = 20
    num_refiner_layers: Layers = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    patch_size_t: Annotated[int, Field(ge=1, le=16)] = 1
    qk_norm: Name | None = "rms_norm"
    text_embed_dim: Width = 4096
    rope_theta: Positive = 256.0
    rope_axes_dim: Annotated[list[Heads], Field(min_length=3, max_length=3)] = [16, 56, 56]

    @model_validator(mode="after")
    def _fits(self) -> AnyTransformerConfig:
        if sum(self.rope_axes_dim) != self.attention_head_dim or any(side % 2 for side in self.rope_axes_dim):
            raise ValueError(
                f"rope_axes_dim {self.rope_axes_dim} must be even numbers that add up to attention_head_dim "
                f"{self.attention_head_dim}"
            )
        return self


class SchedulerConfig(Config):
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0


def check_config(kind: type[Config], content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a configuration that are known, and what is wrong with it; no entries where anything is."""
    faults = code_faults(content)
    try:
        known = kind.model_validate(dict(content)).model_dump(exclude_unset=True)
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


def build(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """The network of a class and a checked configuration, without memory for its weights.

    Raises:
        ValueError: if there is no such network.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = transformers_config(kind, config)
            network = kind.from_config(dict(config)) if own is None else kind(own)
    except Exception as error:  # whatever a library says to numbers that do not fit each other
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"asks for a network that cannot be built ({shown_line(reason)}); get the file again"
        ) from None
    assert isinstance(network, nn.Module)
    return network


def transformers_config(kind: Any, config: Mapping[str, Any]) -> transformers.PreTrainedConfig | None:
    """transformers' own form of a checked configuration; None for the networks of Diffusers."""
    return kind.config_class(**config) if issubclass(kind, transformers.PreTrainedModel) else None

"""The model that a run starts from, and whether it can be trained as the config asks."""

from __future__ import annotations

import torch

from reelbatch.loading.hub import resolve
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.loading.precision import Precision
from reelbatch.models.family import Family, TrainableFamily
from reelbatch.train.config import ConfigError, TrainConfig


def load_base(config: TrainConfig, device: torch.device) -> tuple[Model, TrainableFamily]:
    """Raises ConfigError for a model that cannot be trained, or not by this config."""
    model = load(resolve(config.model), device, Precision.parse(f"transformer={base_dtype(config)}", device))
    family = trainable_family(model.family, config)
    family.set_attention_backend(config.attention)
    return model, family


def base_dtype(config: TrainConfig) -> str:
    """What the transformer is loaded in: fp32 where its weights are trained."""
    if config.method == "full":
        return "float32"
    if config.base_dtype != "auto":
        return config.base_dtype
    return {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]


def trainable_family(family: Family, config: TrainConfig) -> TrainableFamily:
    """The family, once it can be trained by this config; raises ConfigError otherwise."""
    if not isinstance(family, TrainableFamily):
        raise ConfigError(f"model={config.model}: a {type(family).__name__} cannot be trained here")
    faults = []
    if family.untrainable is not None:
        faults.append(family.untrainable)
    for name, takes, what in (
        ("guidance", family.limits.guidance == "embedded", "has no embedded guidance"),
        ("guidance_max", family.limits.guidance == "embedded", "has no embedded guidance"),
        ("image_dropout", family.limits.image_size is not None, "takes no image: it makes videos from text alone"),
    ):
        value = getattr(config, name)
        if not takes and value != TrainConfig.model_fields[name].default:
            faults.append(f"{what}; leave out {name}={value:g}")
    if faults:
        raise ConfigError("\n".join(f"model={config.model}: {fault}" for fault in faults))
    return family

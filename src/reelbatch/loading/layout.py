"""The Diffusers layout of a model folder: its components, and what their files are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from reelbatch.loading.configs import Config
from reelbatch.models.family import Family, Phase
from reelbatch.models.prompts import PromptTemplate
from reelbatch.request import ModelLimits, RequestDefaults

Configs = Mapping[str, Mapping[str, Any]]
"""The configurations of components, by their names; empty ones where there is none."""
TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
MODEL, DIFFUSERS = "model", "diffusion_pytorch_model"
"""What the weight files of transformers' and Diffusers' networks are called."""

CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
    "feature_extractor": "preprocessor_config.json",
    "image_processor": "preprocessor_config.json",
}
"""Components that are a configuration alone, and the file that it is in."""
PROCESSORS: Mapping[str, Any] = {"feature_extractor": SiglipImageProcessorPil, "image_processor": CLIPImageProcessorPil}
"""Components that make images ready for a vision tower, and the class that each is loaded as: it gives the same numbers
whether torchvision is here or not."""


def config_file(component: str) -> str:
    """Where in a folder a component's configuration is."""
    return f"{component}/{CONFIG_FILES.get(component, 'config.json')}"


@dataclass(frozen=True)
class Contents:
    """What has been loaded of a folder.

    Attributes:
        networks: by component. tokenizers: by component, and the image processor of models that have one.
        template: what the folder says of its prompt template.
    """

    networks: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    template: PromptTemplate | None
    limits: ModelLimits
    flow_shift: float
    device: torch.device


@dataclass(frozen=True)
class Layout:
    """How a family's models lie in a folder, and what they become.

    Attributes:
        makes: what its pipeline is for, in words. example: a hub id.
        classes: the components of a model folder, and the classes that each may have in model_index.json.
        weights: components with weights, and what their files are called.
        networks: the class that each of them is loaded as.
        configs: what the configuration of each component that has one may say.
        phases, blockwise, also: see `Family` and `Placement.take`.
        problems: of configurations that do not fit together: pairs of a file and what is wrong with it.
        limits: of configurations and of the defaults that the folder's `reelbatch.json` has.
        build: the family.
    """

    makes: str
    example: str
    classes: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, str]
    networks: Mapping[str, Any]
    configs: Mapping[str, type[Config]]
    phases: Mapping[str, Phase]
    blockwise: frozenset[str]
    problems: Callable[[Configs], Sequence[tuple[str, str]]]
    limits: Callable[[Configs, Mapping[str, Any]], ModelLimits]
    build: Callable[[Contents], Family]
    also: Mapping[str, tuple[Phase, ...]]


OTHER_SCHEDULES = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Scheduler settings that ask for other sigmas or another step than HunyuanVideo's."""


def shared_problems(configs: Configs, pairs: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """What is wrong with configurations of any family.

    Args:
        pairs: a setting of the transformer, a component, and its setting that must be equal.
    """
    transformer = configs.get("transformer", {})
    problems = []
    if transformer.get("patch_size_t", 1) != 1:
        problems.append(("transformer/config.json", f"has patch_size_t {transformer['patch_size_t']}; only 1 is known"))
    for setting, other, other_setting in pairs:
        value, expected = transformer.get(setting), configs.get(other, {}).get(other_setting)
        if None not in (value, expected) and value != expected:
            text = f"has {setting} {value}, but {other} has {other_setting} {expected}: these are parts of two models"
            problems.append(("transformer/config.json", text))
    return problems


def with_defaults(defaults: RequestDefaults, said: Mapping[str, Any]) -> RequestDefaults:
    """A model's defaults, with those that its folder says instead."""
    return RequestDefaults(**{**vars(defaults), **said})

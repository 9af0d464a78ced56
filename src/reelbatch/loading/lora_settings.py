"""What a LoRA file says besides its weights: its scales. Nothing else of it reaches a library.

PEFT's configuration, which Diffusers stores in a file's metadata, may name a module to import, regular expressions to
match, and ranks to allocate; so it is read here, and a new one is written from the shapes of the weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelbatch.loading.configs import validation_faults
from reelbatch.loading.lora_names import PREFIX
from reelbatch.loading.parameter_names import Target
from reelbatch.outside_json import parse
from reelbatch.wording import shown

MOST_METADATA = 4 * 2**20
"""Characters of metadata that are read."""
LITERAL = re.compile(r"\^?(?P<name>[\w.\\-]{1,300})\$?")
CHANGES_THE_NETWORK = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
"""Initialisations (`init_lora_weights`) after which a LoRA is for other weights than those of the model."""
OTHER_ADAPTERS = (
    "modules_to_save",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Settings with which a LoRA acts in another way than by `scale · B @ A`."""

Rank = Annotated[int, Field(ge=1, le=2**20)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
Layer = Annotated[str, Field(max_length=300)]


class Settings(BaseModel):
    """What is read of PEFT's configuration."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: Annotated[dict[Layer, Rank], Field(max_length=10_000)] | None = None
    alpha_pattern: Annotated[dict[Layer, Alpha], Field(max_length=10_000)] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | Annotated[str, Field(max_length=60)] | None = None


def adapter_config(
    metadata: Mapping[str, str],
    ranks: Mapping[str, int],
    *,
    dora: bool,
    bias: bool,
    spelled: Mapping[str, Target] = MappingProxyType({}),
) -> dict[str, Any]:
    """PEFT's configuration for weights of these ranks, by layer, with the scales that the file's metadata says.

    Args:
        dora, bias: whether there are DoRA's magnitudes, and biases, among the weights.
        spelled: the layers that a name in the metadata may stand for (`ParameterNames.targets`).

    Raises:
        ValueError: for metadata that cannot be used.
    """
    own = _settings(metadata)
    alphas: dict[str, float] = dict(ranks)  # a scale of 1
    if own is not None:
        known_ranks = _names(own.rank_pattern, "rank_pattern", spelled)
        known_alphas = _names(own.alpha_pattern, "alpha_pattern", spelled)
        for layer, rank in ranks.items():
            said = _of_layer(known_ranks, layer, own.r)
            if said != rank:
                raise ValueError(f"its metadata says rank {said} for {layer}, whose weights are of rank {rank}")
            alphas[layer] = _of_layer(known_alphas, layer, own.lora_alpha)
        if own.use_dora != dora:
            raise ValueError(
                f"its metadata says use_dora {own.use_dora}, and there are {'' if dora else 'no '}magnitudes"
            )
    usual_rank, usual_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items() if rank != usual_rank},
        "alpha_pattern": {f"^{layer}": alpha for layer, alpha in alphas.items() if alpha != usual_alpha},
        "target_modules": list(ranks),
        "use_dora": dora,
        "lora_bias": bias,
        "use_rslora": own is not None and own.use_rslora,
    }


def for_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of `adapter_config` with one pattern a value, as PEFT tries every pattern on every layer.

    Layers are named by regular expressions: of a list, PEFT would take all layers that end in one of its names.
    """
    grouped: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for name, patterns in grouped.items():
        layers: dict[Any, list[str]] = {}
        for key, value in config[name].items():
            layers.setdefault(value, []).append(key.removeprefix("^"))
        patterns.update({f"^{_any_of(names)}": value for value, names in layers.items()})
    return {**config, **grouped, "target_modules": _any_of(config["target_modules"])}


def _any_of(names: list[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _settings(metadata: Mapping[str, str]) -> Settings | None:
    """Raises ValueError."""
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return None
    if len(text) > MOST_METADATA:
        raise ValueError(f"its metadata has {len(text)} characters; {MOST_METADATA} are read at most")
    try:
        content = parse(text)
    except ValueError as error:
        raise ValueError(f"its metadata ({LORA_ADAPTER_METADATA_KEY}) is no JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its metadata ({LORA_ADAPTER_METADATA_KEY}) is no JSON object, but {shown(content)}")
    own = {name.removeprefix(PREFIX): value for name, value in content.items() if name.startswith(PREFIX)}
    if not own and "lora_alpha" in content:
        own = content  # of a network by itself, as Tencent's training of HunyuanVideo 1.5 saves it
    if not own:
        return None
    try:
        settings = Settings.model_validate(own)
    except ValidationError as error:
        raise ValueError(f"its metadata has {'; '.join(validation_faults(error)[:3])}") from None
    if others := [name for name in OTHER_ADAPTERS if own.get(name)]:
        raise ValueError(f"its metadata sets {', '.join(others)}, which is not a LoRA that is read here")
    start = settings.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_NETWORK):
        raise ValueError(
            f"it was trained from init_lora_weights={start}, which changes the network's own weights; convert it into "
            "a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    return settings


def _names(
    patterns: Mapping[str, Any] | None, setting: str, spelled: Mapping[str, Target]
) -> dict[str, tuple[bool, Any]]:
    """By the layer, or the end of layers, that a pattern names: whether it is a whole name, and the value."""
    names = {}
    for pattern, value in (patterns or {}).items():
        match = LITERAL.fullmatch(pattern)
        name = match["name"].replace("\\.", ".") if match else ""
        if not name or "\\" in name:
            raise ValueError(
                f"its {setting} has {shown(pattern)}, which is no layer's name; regular expressions are not read: name "
                "the layers one by one"
            )
        layers = spelled[name].layers if name in spelled else (name,)
        names.update(dict.fromkeys(layers, (pattern.startswith("^"), value)))
    return names


def _of_layer(names: Mapping[str, tuple[bool, Any]], layer: str, otherwise: Any) -> Any:
    """The value of the pattern that names a layer wholly, or else by its longest end."""
    parts = layer.split(".")
    for start in range(len(parts)):
        whole_only, value = names.get(".".join(parts[start:]), (True, None))
        if value is not None and (start == 0 or not whole_only):
            return value
    return otherwise


def check_scale(scale: float, name: str, most: float = 1000.0) -> float:
    """Raises ValueError for a scale that is no number, or one that no LoRA is used with."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or abs(scale) > most:
        raise ValueError(f"{name}: {shown(scale)} is no scale; give a number from {-most:g} to {most:g}, as 0.8")
    return float(scale)

"""What of a network is trained: LoRAs beside its layers, or its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import ModelMixin
from torch import nn

from reelbatch.train.config import ConfigError, TrainConfig


def prepare_network(network: ModelMixin, config: TrainConfig) -> None:
    """Makes trainable what is to be trained, in fp32, and nothing else.

    Args:
        network: the transformer of a `TrainableFamily`.

    Raises:
        ConfigError: if a target names no layer.
    """
    if config.method == "full":
        if config.weights == "untrained":
            reset_weights(network)
        network.to(torch.float32).requires_grad_(True)
        for name, module in network.named_modules():
            if re.fullmatch(network.without_effect, name):
                module.requires_grad_(False)
    else:
        network.requires_grad_(False)
        _add_lora(network, config)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train()


def _add_lora(network: ModelMixin, config: TrainConfig) -> None:
    from peft import LoraConfig

    network.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            target_modules=target_layers(network, config.targets),
            lora_dropout=config.lora_dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        )
    )
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(network: ModelMixin, targets: Iterable[str]) -> list[str]:
    """The full names of the layers that `targets` name, but for those without effect. Raises ConfigError for a target
    that names none."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if not re.fullmatch(network.without_effect, name)]
    groups: Mapping[str, str] = network.layer_groups
    chosen: dict[str, None] = {}
    for target in targets:
        pattern = groups.get(target, rf"(.*\.)?{re.escape(target)}")
        matching = [name for name in layers if re.fullmatch(pattern, name)]
        if not matching:
            ends = sorted({name.split("blocks.")[-1].partition(".")[2] or name for name in layers})
            last = {name.rpartition(".")[2] for name in layers}
            near = difflib.get_close_matches(target, [*groups, *ends, *last], n=1)
            hint = f"did you mean {near[0]}?" if near else f"give {', '.join(groups)}, or the end of a layer's name"
            raise ConfigError(f"targets: {target!r} names no linear layer of this model; {hint}")
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


@torch.no_grad()
def reset_weights(network: ModelMixin) -> None:
    """Untrained weights, modulations and output zero (adaLN-Zero, arXiv 2212.09748)."""
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(network.zero_at_start, name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}

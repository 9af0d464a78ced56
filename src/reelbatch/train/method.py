"""What of a network is trained: LoRAs beside its layers, or its weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from reelbatch.train.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": tuple(f"attn.{name}" for name in ATTENTION),
    "mlp": ("net.0.proj", "net.2", "proj_mlp", "single.proj_out"),
    "modulation": ("norm.linear", "norm1.linear", "norm1_context.linear"),
    "refiner": ("context_embedder",),
    "embedders": ("x_embedder", "time_text_embed"),
}
"""What the names in `targets` stand for: layers of the blocks for the first three, of parts for the others."""
ZERO_AT_START = ("norm", "norm1", "norm1_context", "norm_out")
"""Modules whose linear layer makes shifts, scales and gates."""


def prepare_network(network: HunyuanVideoTransformer3DModel, config: TrainConfig) -> None:
    """Makes trainable what is to be trained, in fp32, and nothing else.

    Raises:
        ConfigError: if a target names no layer.
    """
    if config.method == "full":
        if config.weights == "untrained":
            start_anew(network)
        network.to(torch.float32).requires_grad_(True)
    else:
        network.requires_grad_(False)
        _add_lora(network, config)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train()


def _add_lora(network: HunyuanVideoTransformer3DModel, config: TrainConfig) -> None:
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


def target_layers(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """The full names of the layers that `targets` name. Raises ConfigError for one that names none."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in layers if _names(target, name)]
        if not found:
            ends = sorted({name.split("blocks.")[-1].partition(".")[2] or name for name in layers})
            last = {name.rpartition(".")[2] for name in layers}
            near = difflib.get_close_matches(target, [*GROUPS, *ends, *last], n=1)
            hint = f"did you mean {near[0]}?" if near else f"give {', '.join(GROUPS)}, or the end of a layer's name"
            raise ConfigError(f"targets: {target!r} names no linear layer of this model; {hint}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _names(target: str, layer: str) -> bool:
    in_block = layer.startswith(("transformer_blocks.", "single_transformer_blocks."))
    if target in ("attention", "mlp", "modulation"):
        name = layer.replace("single_transformer_blocks", "single").split(".")
        told = ".".join([name[0], *name[2:]])  # without the block's number
        return in_block and any(told == end or told.endswith(f".{end}") for end in GROUPS[target])
    if target in GROUPS:
        return layer.startswith(tuple(f"{part}." for part in GROUPS[target]))
    return layer == target or layer.endswith(f".{target}")


@torch.no_grad()
def start_anew(network: nn.Module) -> None:
    """Untrained weights, modulations and output zero (adaLN-Zero, arXiv 2212.09748)."""
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    for name, module in network.named_modules():
        modulates = (name.split(".")[-2:-1] or [""])[0] in ZERO_AT_START
        if isinstance(module, nn.Linear) and (modulates or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}

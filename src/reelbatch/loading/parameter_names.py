"""Names of LoRA weights: Diffusers' (PEFT's), Tencent's, and kohya's (musubi-tuner), each in terms of the others.

    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    tencent     diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight
    kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight      and ….alpha

Tencent's network computes queries, keys and values (and, in its single-stream blocks, the MLP's input) with one layer
where Diffusers' has one each. One LoRA of the fused layer is several that share their A. In the other direction,
several LoRAs become one of the sum of their ranks whose B has them on its diagonal, or of their own rank where they
share their A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")
KOHYA = "lora_unet_"

_DOUBLE = {
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.linear": ("norm.linear",),
}
_REFINER = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_OTHER = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_STACKS = (
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER),
)
BLOCKS = 200
"""More than any network of this family has of a kind: kohya's names are read by spelling all that there can be."""


@dataclass(frozen=True)
class Pair:
    """A LoRA of one layer: it adds `scale · up @ down`."""

    down: Tensor
    """`[rank, in]`"""
    up: Tensor
    """`[out, rank]`"""
    scale: float = 1.0


def to_diffusers(weights: Mapping[str, Tensor], outputs: Mapping[str, int]) -> dict[str, Tensor]:
    """The LoRA weights of a file under Diffusers' names ("transformer.….lora_A.weight"), any alpha folded into B.

    Weights that have Diffusers' names already are given back as they are (no alpha is folded: theirs is in the file's
    metadata, or is their rank).

    Args:
        outputs: width of the output of each layer of the network, by Diffusers' name; fused layers are cut by it.

    Raises:
        ValueError: for names or shapes of no layer of this network.
    """
    given, weights = len(weights), {_without_prefix(name): tensor for name, tensor in weights.items()}
    if len(weights) < given:
        raise ValueError(f"{given - len(weights)} weights are there twice, under names with another beginning")
    kohya = any(name.startswith(KOHYA) for name in weights)
    ours = not kohya and not any(re.match(r"(double|single)_blocks\.|txt_in\.", name) for name in weights)
    if ours:
        return {f"transformer.{name}": tensor for name, tensor in weights.items()}
    renamed: dict[str, Tensor] = {}
    for layer, pair in _pairs(weights).items():
        targets = _diffusers_layers(layer)
        if targets is None or any(target not in outputs for target in targets):
            raise ValueError(f"there are weights for {_short(layer)}, which is no layer of this network")
        widths = [outputs[target] for target in targets]
        if sum(widths) != len(pair.up):
            raise ValueError(f"the weights for {layer} give {len(pair.up)} outputs; this network has {sum(widths)}")
        for target, up in zip(targets, pair.up.split(widths), strict=True):
            renamed[f"transformer.{target}.lora_A.weight"] = pair.down.clone()
            renamed[f"transformer.{target}.lora_B.weight"] = (up * pair.scale).contiguous()
    return renamed


def to_kohya(
    weights: Mapping[str, Tensor], outputs: Mapping[str, int], alphas: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """LoRA weights of Diffusers' names under kohya's, as musubi-tuner and ComfyUI read them, each with its alpha.

    Args:
        outputs: as for `to_diffusers`; the layers of a fused one that have no LoRA are zero in it.
        alphas: of layers, by Diffusers' name; the others' alpha is their rank.

    Raises:
        ValueError: for weights that this form has no place for (DoRA's magnitudes, the convolution of the patches).
    """
    pairs = _pairs({_without_prefix(name): tensor for name, tensor in weights.items()})
    groups: dict[str, dict[str, Pair]] = {}
    for layer, pair in pairs.items():
        if layer not in outputs or (fused := _tencent_layer(layer)) is None:
            raise ValueError(f"there are weights for {layer}, which kohya's names have no place for")
        rank = len(pair.down)
        scale = pair.scale * (alphas or {}).get(layer, rank) / rank
        groups.setdefault(fused, {})[layer] = Pair(pair.down, pair.up, scale)
    renamed: dict[str, Tensor] = {}
    for fused, parts in groups.items():
        targets = _diffusers_layers(fused)
        assert targets is not None
        joined = _fuse(parts, targets, outputs)
        name = KOHYA + fused.replace(".", "_")
        renamed[f"{name}.lora_down.weight"], renamed[f"{name}.lora_up.weight"] = joined.down, joined.up
        renamed[f"{name}.alpha"] = torch.tensor(joined.scale * len(joined.down))
    return renamed


def _fuse(parts: Mapping[str, Pair], targets: Sequence[str], outputs: Mapping[str, int]) -> Pair:
    parts = {target: parts[target] for target in targets if target in parts}  # A and B in one order
    first = next(iter(parts.values()))
    shared = all(torch.equal(pair.down, first.down) for pair in parts.values())
    down = first.down if shared else torch.cat([pair.down for pair in parts.values()])
    up = first.up.new_zeros(sum(outputs[target] for target in targets), len(down))
    row = column = 0
    for target in targets:
        if pair := parts.get(target):
            rank = len(pair.down)
            begin = 0 if shared else column
            up[row : row + len(pair.up), begin : begin + rank] = pair.up * (pair.scale / first.scale)
            column += rank
        row += outputs[target]
    return Pair(down.contiguous(), up.contiguous(), first.scale)


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The A, B and scale of each layer, whatever A and B are called."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.partition(".lora_") if ".lora_" in name else name.rpartition(".")
        layer = _kohya_layers().get(layer, layer)
        if kind in ("A.weight", "down.weight"):
            downs[layer] = tensor
        elif kind in ("B.weight", "up.weight"):
            ups[layer] = tensor
        elif kind == "alpha":
            if tensor.numel() != 1 or not tensor.isfinite().all():
                raise ValueError(f"{_short(name)} must be one finite number, and is {list(tensor.shape)}")
            alphas[layer] = float(tensor)
        else:
            raise ValueError(
                f"{_short(name)!r} is none of lora_A.weight, lora_B.weight, lora_down.weight, lora_up.weight, alpha"
            )
    if alone := sorted(downs.keys() ^ ups.keys()):
        raise ValueError(f"of {_short(alone[0])} there is only one of the two matrices of a LoRA")
    for layer, down in downs.items():
        if down.ndim != 2 or ups[layer].ndim != 2 or len(down) != ups[layer].shape[1] or len(down) == 0:
            raise ValueError(
                f"the matrices of {_short(layer)} are {list(down.shape)} and {list(ups[layer].shape)}; no LoRA is"
            )
    return {layer: Pair(down, ups[layer], alphas.get(layer, len(down)) / len(down)) for layer, down in downs.items()}


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:197]}..."


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _kohya_layers() -> dict[str, str]:
    """Tencent's layers by kohya's names: dots became underscores, which the names have besides."""
    if not _KOHYA_LAYERS:
        layers = [
            *_OTHER,
            *(f"{stack}.{i}.{part}" for stack, _, parts in _STACKS for i in range(BLOCKS) for part in parts),
        ]
        _KOHYA_LAYERS.update({KOHYA + layer.replace(".", "_"): layer for layer in layers})
    return _KOHYA_LAYERS


_KOHYA_LAYERS: dict[str, str] = {}


def _diffusers_layers(layer: str) -> tuple[str, ...] | None:
    """The layers of Diffusers' network that one of Tencent's is."""
    if layer in _OTHER:
        return (_OTHER[layer],)
    for stack, theirs, parts in _STACKS:
        if match := re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", layer):
            number, part = match.groups()
            return tuple(f"{theirs}.{number}.{name}" for name in parts[part]) if part in parts else None
    return None


def _tencent_layer(layer: str) -> str | None:
    """The layer of Tencent's network that one of Diffusers' is, or is a part of."""
    for ours, theirs in _OTHER.items():
        if theirs == layer:
            return ours
    for stack, theirs, parts in _STACKS:
        if match := re.fullmatch(rf"{re.escape(theirs)}\.(\d+)\.(.+)", layer):
            number, name = match.groups()
            return next((f"{stack}.{number}.{part}" for part, names in parts.items() if name in names), None)
    return None

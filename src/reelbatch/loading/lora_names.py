"""LoRA weights under Diffusers' (PEFT's) names, from files in any names; and under other programs' names.

    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    tencent     diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight
    kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight             and ….alpha
    comfyui     diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight       and ….alpha, ….diff, ….diff_b

One LoRA of a layer that is several of Diffusers' is several that share their A. In the other direction, several LoRAs
become one of the sum of their ranks whose B has them on its diagonal, or of their own rank where they share their A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelbatch.loading.differences import FACTORS, Difference, difference_of
from reelbatch.loading.parameter_names import KOHYA, ParameterNames, Target, other_than, swap_halves, without_prefix

Form = Literal["tencent", "kohya", "comfyui"]
PREFIX = "transformer."
DOWN, UP, MAGNITUDE, BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_B.bias"
"""How the names of a LoRA's weights end in Diffusers' form; a magnitude is DoRA's."""
ALPHA = ".alpha"
SPELLINGS = {
    ".lora_A.default.weight": DOWN,
    ".lora_down.weight": DOWN,
    ".lora.down.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_up.weight": UP,
    ".lora.up.weight": UP,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
    ".dora_scale": MAGNITUDE,
    **{name: name for name in (DOWN, UP, MAGNITUDE, BIAS, ALPHA)},
    **{f".{name}": f".{name}" for name in FACTORS},
    ".w_norm": ".diff",
    ".b_norm": ".diff_b",
}
"""What names of weights end in, and which weight of a layer it is."""
NOT_READ = {
    ".lora_mid.weight": "LoCon with a middle convolution",
    ".hada_t1": "LoHa of a convolution",
    ".lokr_t2": "LoKr of a convolution",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".on_input": "IA3",
    ".set_weight": "whole weights in the place of the model's",
    ".reshape_weight": "weights of another shape",
    ".scalar": "LyCORIS with use_scalar",
}
"""How names end of what other programs may store, and no LoRA is."""


@dataclass(frozen=True)
class Lora:
    """Attributes:
    weights: under Diffusers' names, "transformer.….lora_A.weight"; alphas of the file are folded into B.
    differences: what is added to a parameter, by Diffusers' name of it, "transformer_blocks.0.attn.norm_q.weight".
    """

    weights: dict[str, Tensor]
    differences: dict[str, Difference]


def to_diffusers(weights: Mapping[str, Tensor], outputs: Mapping[str, int], names: ParameterNames) -> Lora:
    """The LoRA in a file, under Diffusers' names.

    What is of no known kind, or of no known layer, is given back under its own name.

    Args:
        outputs: width of the output of each layer of the network, by Diffusers' name; fused layers are cut by it.
        names: of the network's layers.

    Raises:
        ValueError: for what is another kind of adapter or another model's, and for shapes of no layer of this network.
    """
    plain = {without_prefix(name): tensor for name, tensor in weights.items()}
    if len(plain) < len(weights):
        raise ValueError(f"{len(weights) - len(plain)} weights are there twice, under names with another beginning")
    lora = Lora({}, {})
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plain.items():
        layer, kind = _split(name)
        if layer in names.targets and kind:
            layers.setdefault(layer, {})[kind] = tensor
        elif kind and layer in (other := other_than(names)).targets:
            raise ValueError(not_of(names, other, f"{_short(layer)} is a layer of it"))
        else:
            lora.weights[f"{PREFIX}{name}"] = tensor
    for layer, parts in layers.items():
        _add(lora, layer, names.targets[layer], parts, outputs)
    return lora


def not_of(names: ParameterNames, other: ParameterNames, why: str) -> str:
    """That a LoRA is of the other model."""
    return (
        f"is a LoRA of {other.model} ({why}), and this model is {names.model}. They are two networks (of width "
        f"{other.width} and {names.width}): no LoRA of one fits the other. Get the LoRA that was trained for "
        f"{names.model}"
    )


def _split(name: str) -> tuple[str, str]:
    """The layer and the kind of a weight; no kind where it is none that is known."""
    for ending, what in NOT_READ.items():
        if name.endswith(ending):
            raise ValueError(
                f"holds {_short(name)}: {what}, which is not read; save it as a LoRA in the program that made it"
            )
    for ending, kind in SPELLINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), kind
    return name, ""


def _add(lora: Lora, layer: str, target: Target, parts: dict[str, Tensor], outputs: Mapping[str, int]) -> None:
    """The weights of one layer of the file, to those of the layers that it is."""
    bias_difference = parts.pop(".diff_b", None)
    factors = {kind.removeprefix("."): tensor for kind, tensor in parts.items() if kind.removeprefix(".") in FACTORS}
    given = {kind: parts[kind] for kind in (DOWN, UP, MAGNITUDE, BIAS) if kind in parts}
    alpha = parts.get(ALPHA)
    if alpha is not None and (alpha.numel() != 1 or not alpha.isfinite().all()):
        raise ValueError(f"{_short(layer)}.alpha must be one finite number, and is {list(alpha.shape)}")
    if factors and given:
        raise ValueError(f"{_short(layer)} is of two kinds at once: {', '.join(sorted((*given, *factors)))}")
    if factors:
        difference = difference_of(_short(layer), factors, None if alpha is None else float(alpha))
        lora.differences.update(_parts(layer, "weight", target, difference, outputs))
    if bias_difference is not None:
        difference = difference_of(_short(layer), {"diff": bias_difference}, None)
        lora.differences.update(_parts(layer, "bias", target, difference, outputs))
    if alpha is not None and DOWN in given and UP in given:
        given[UP] = _scaled(given[UP], float(alpha) / max(len(given[DOWN]), 1))
    if MAGNITUDE in given:
        given[MAGNITUDE] = _magnitude(layer, given[MAGNITUDE])
    for kind, tensor in given.items():
        rows: Sequence[Tensor]
        if kind == DOWN:
            rows = [tensor] if len(target.layers) == 1 else [tensor.clone() for _ in target.layers]
        else:
            rows = _rows(layer, swap_halves(tensor) if target.swapped else tensor, target, outputs)
        for name, part in zip(target.layers, rows, strict=True):
            lora.weights[f"{PREFIX}{name}{kind}"] = part.contiguous()


def _magnitude(layer: str, tensor: Tensor) -> Tensor:
    """DoRA's magnitudes of the outputs, as PEFT has them, `[out]`; those of a convolution as they are."""
    if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] > 1:
        raise ValueError(
            f"{_short(layer)}.dora_scale is of {list(tensor.shape)}: magnitudes of the inputs (LyCORIS with "
            "wd_on_output=False), which is not read; train with magnitudes of the outputs, or merge it"
        )
    return tensor[:, 0] if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor


def _rows(layer: str, tensor: Tensor, target: Target, outputs: Mapping[str, int]) -> Sequence[Tensor]:
    if len(target.layers) == 1:
        return [tensor]
    return tensor.split(_widths(layer, len(tensor) if tensor.ndim else 0, target, outputs))


def _widths(layer: str, rows: int, target: Target, outputs: Mapping[str, int]) -> list[int]:
    """How many of a layer's rows are of each layer of Diffusers'."""
    if any(name not in outputs for name in target.layers):
        raise ValueError(f"there are weights for {_short(layer)}, which is no layer of this network")
    widths = [outputs[name] for name in target.layers]
    if sum(widths) != rows:
        raise ValueError(f"the weights for {_short(layer)} give {rows} outputs; this network has {sum(widths)}")
    return widths


def _parts(
    layer: str, parameter: str, target: Target, difference: Difference, outputs: Mapping[str, int]
) -> dict[str, Difference]:
    """A difference of a fused layer as those of the layers that it is."""
    if target.swapped:
        difference = difference.swap_halves()
    if len(target.layers) == 1:
        return {f"{target.layers[0]}.{parameter}": difference}
    begin, parts = 0, {}
    rows = difference.shape[0] if difference.shape else 0
    for name, width in zip(target.layers, _widths(layer, rows, target, outputs), strict=True):
        parts[f"{name}.{parameter}"] = difference.rows(begin, begin + width)
        begin += width
    return parts


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return tensor
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor) * scale


# The other direction ----------------------------------------------------------------------------------------------


def from_diffusers(
    lora: Lora,
    outputs: Mapping[str, int],
    names: ParameterNames,
    form: Form,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """A LoRA under another program's names.

    Args:
        outputs: as for `to_diffusers`; the layers of a fused one that have no LoRA are zero in it.
        form: "tencent", "kohya" (musubi-tuner) or "comfyui". The last two have an alpha for each layer.
        alphas: of layers, by Diffusers' name; the others' alpha is their rank.

    Raises:
        ValueError: for weights that this form has no place for.
    """
    spelled = names.spelled("comfyui" if form == "comfyui" else "tencent")
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    targets: dict[str, Target] = {}
    for name, tensor in lora.weights.items():
        layer, kind = _split(name.removeprefix(PREFIX))
        if layer not in outputs or layer not in spelled or kind == BIAS:
            what = "a bias" if kind == BIAS else "weights"
            raise ValueError(f"there are {what} for {layer}, which {form}'s names have no place for")
        other, target = spelled[layer]
        targets[other] = target
        layers.setdefault(other, {}).setdefault(layer, {})[kind] = tensor
    written: dict[str, Tensor] = {}
    for other, parts in layers.items():
        scales = {name: (alphas or {}).get(name, len(part[DOWN])) / len(part[DOWN]) for name, part in parts.items()}
        _write(written, other, _fuse(parts, scales, targets[other], outputs), form)
    if lora.differences and form != "comfyui":
        some = next(iter(lora.differences))
        raise ValueError(f"it changes {some} by more than a LoRA can; only ComfyUI's names have a place for that")
    for name, (other, target) in _grouped(lora.differences, spelled).items():
        parameter = name.rpartition(".")[2]
        written[f"diffusion_model.{other}.{'diff_b' if parameter == 'bias' else 'diff'}"] = _joined(
            lora.differences, parameter, target, outputs
        )
    return written


def _write(written: dict[str, Tensor], layer: str, fused: dict[str, Tensor], form: Form) -> None:
    begin = KOHYA + layer.replace(".", "_") if form == "kohya" else f"diffusion_model.{layer}"
    down, up, scale = fused[DOWN], fused[UP], float(fused[ALPHA])
    if form == "tencent":
        written[f"{begin}{DOWN}"], written[f"{begin}{UP}"] = down, _scaled(up, scale).contiguous()
    else:
        written[f"{begin}.lora_down.weight"], written[f"{begin}.lora_up.weight"] = down, up
        written[f"{begin}{ALPHA}"] = torch.tensor(scale * len(down))
    if MAGNITUDE in fused:
        magnitude = fused[MAGNITUDE]
        if form == "tencent" or magnitude.ndim != 1:
            written[f"{begin}{MAGNITUDE}"] = magnitude
        else:
            written[f"{begin}.dora_scale"] = magnitude[:, None].contiguous()


def _fuse(
    parts: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float], target: Target, outputs: Mapping[str, int]
) -> dict[str, Tensor]:
    """One LoRA of a layer, of those of the layers that it is; its scale under `ALPHA`."""
    parts = {name: parts[name] for name in target.layers if name in parts}  # A and B in one order
    name, first = next(iter(parts.items()))
    scale = torch.tensor(scales[name], dtype=torch.float64)
    magnitudes = [part[MAGNITUDE] for part in parts.values() if MAGNITUDE in part]
    fused = {DOWN: first[DOWN].contiguous(), UP: first[UP], ALPHA: scale}
    if len(target.layers) > 1:
        shared = all(torch.equal(part[DOWN], first[DOWN]) for part in parts.values())
        down = first[DOWN] if shared else torch.cat([part[DOWN] for part in parts.values()])
        up = first[UP].new_zeros(sum(outputs[layer] for layer in target.layers), len(down))
        row = column = 0
        for layer in target.layers:
            if part := parts.get(layer):
                rank = len(part[DOWN])
                begin = 0 if shared else column
                up[row : row + len(part[UP]), begin : begin + rank] = part[UP] * (scales[layer] / float(scale))
                column += rank
            row += outputs[layer]
        fused |= {DOWN: down.contiguous(), UP: up}
    if magnitudes and len(magnitudes) < len(target.layers):
        raise ValueError(f"{name} has a magnitude (DoRA), and not all of {', '.join(target.layers)} have one")
    if magnitudes:
        fused[MAGNITUDE] = torch.cat(magnitudes) if len(magnitudes) > 1 else magnitudes[0]
    if target.swapped:
        fused |= {kind: swap_halves(fused[kind]) for kind in (UP, MAGNITUDE) if kind in fused}
    return {kind: tensor.contiguous() for kind, tensor in fused.items()}


def _grouped(
    differences: Mapping[str, Difference], spelled: Mapping[str, tuple[str, Target]]
) -> dict[str, tuple[str, Target]]:
    """One of the parameters of each layer of the other form that something is added to."""
    found: dict[tuple[str, str], str] = {}
    for name in differences:
        layer, _, parameter = name.rpartition(".")
        if layer not in spelled:
            raise ValueError(f"it changes {name}, which ComfyUI's names have no place for")
        found.setdefault((spelled[layer][0], parameter), name)
    return {name: spelled[name.rpartition(".")[0]] for name in found.values()}


def _joined(
    differences: Mapping[str, Difference], parameter: str, target: Target, outputs: Mapping[str, int]
) -> Tensor:
    """What is added to a parameter of a layer of the other form; zero where nothing is added."""
    given = {layer: differences.get(f"{layer}.{parameter}") for layer in target.layers}
    tensors = {layer: part.tensor() for layer, part in given.items() if part is not None}
    some = next(iter(tensors.values()))
    rows = [
        tensors[layer] if layer in tensors else some.new_zeros(outputs[layer], *some.shape[1:])
        for layer in target.layers
    ]
    joined = torch.cat(rows) if len(rows) > 1 else rows[0]
    return (swap_halves(joined) if target.swapped else joined).contiguous()


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:197]}..."

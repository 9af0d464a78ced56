"""LoRA files: read, checked against the network, put beside its weights; written, in the form of any program."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reelbatch.loading.lora_names import (
    ALPHA,
    BIAS,
    DOWN,
    MAGNITUDE,
    PREFIX,
    UP,
    Form,
    Lora,
    from_diffusers,
    not_of,
    to_diffusers,
)
from reelbatch.loading.lora_settings import adapter_config, check_scale, for_peft
from reelbatch.loading.parameter_names import names_of, other_than
from reelbatch.loading.stored import FLOATS
from reelbatch.wording import printable, shown_line

if TYPE_CHECKING:
    from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

SHOWN = 3
SUFFIXES = (DOWN, UP, MAGNITUDE, BIAS)
LONGEST = 200
"""Characters of a weight's name in a message."""
SMALL = 2**26
"""Numbers that any LoRA file may hold; one of more may hold twice as many as its network."""


class LoraError(ValueError):
    """A LoRA file that cannot be used; the message names it and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:scale`, the scale 1 where none is said. Raises LoraError."""
    name, colon, last = text.rpartition(":")
    if not colon or ("/" in last or "\\" in last or last.endswith(".safetensors")):
        return Path(text).expanduser(), 1.0
    try:
        scale = float(last)
    except ValueError:
        raise LoraError(
            f"--lora {text}: {last!r} is no scale; give FILE or FILE:scale, as style.safetensors:0.8"
        ) from None
    return Path(name).expanduser(), _checked_scale(scale, f"--lora {text}")


def _checked_scale(scale: float, name: str) -> float:
    try:
        return check_scale(scale, name)
    except ValueError as error:
        raise LoraError(str(error)) from None


def lora_label(path: str | Path, scale: float) -> str:
    """What to call a LoRA: its file's name, its scale, and the beginning of its hash. Raises LoraError."""
    return f"{Path(path).name}:{scale:g} ({lora_hash(path)[:12]})"


def lora_record(path: str | Path, scale: float) -> dict[str, Any]:
    """A LoRA as records name it: its file's name, its scale and the SHA-256 of its bytes. Raises LoraError."""
    return {"file": Path(path).name, "scale": scale, "sha256": lora_hash(path)}


def lora_hash(path: str | Path) -> str:
    """The SHA-256 of a LoRA file's bytes. Raises LoraError for a file that cannot be read."""
    try:
        about = Path(path).stat()
        return _file_hash(Path(path).absolute(), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise LoraError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # no path, such as one with a NUL
        raise LoraError(f"{path}: cannot be read: {error}") from None


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Read once, as long as size and time of the last change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_loras(transformer: HunyuanVideoTransformer3DModel, files: Sequence[tuple[str | Path, float]]) -> None:
    """Puts LoRAs beside the transformer's weights, each with its scale; all of them act together.

    What a file adds to whole weights (differences, LoHa, LoKr) is added to the network's own, in fp32, one file after
    the other.

    Args:
        files: safetensors files in any of the names of `lora_names`, and their scales.

    Raises:
        LoraError: for a file that cannot be read, and for one whose weights are not those of this network; the network
            is then as it was.
    """
    read = [
        (Path(path), *_read(Path(path), transformer), _checked_scale(scale, f"--lora {path}")) for path, scale in files
    ]
    own = _parameters(transformer)  # by the names that they have without adapters
    names: list[str] = []
    scales: list[float] = []
    for path, lora, config, scale in read:
        if not lora.weights:
            continue
        name = f"lora_{len(names)}"
        metadata = {f"{PREFIX}{key}": value for key, value in for_peft(config).items()}
        try:
            transformer.load_lora_adapter(lora.weights, prefix="transformer", adapter_name=name, metadata=metadata)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if names:
                transformer.delete_adapters(names)
            raise LoraError(f"{path}: cannot be put beside the network's weights ({error})") from error
        names.append(name)
        scales.append(scale)
    if names:
        transformer.set_adapters(names, scales)
    with torch.no_grad():
        for _, lora, _, scale in read:
            for name, difference in lora.differences.items():
                own[name].copy_(own[name].float() + scale * difference.tensor().to(own[name].device, torch.float32))
    if names:
        transformer.requires_grad_(False)


def check_loras(transformer: nn.Module, files: Sequence[tuple[str | Path, float]]) -> None:
    """Raises LoraError as `load_loras` would; the transformer's shapes are enough, so it may be on the meta device."""
    for path, _ in files:
        _read(Path(path), transformer)


def _read(path: Path, transformer: nn.Module) -> tuple[Lora, dict[str, Any]]:
    """Checked weights under Diffusers' names, and PEFT's configuration (`adapter_config`)."""
    stored, known = _read_file(path, transformer)
    names = names_of(transformer)
    try:
        lora = to_diffusers(stored, layer_widths(transformer), names)
    except ValueError as error:
        raise LoraError(f"{path}: {shown_line(str(error), 1000)}") from None
    weights = lora.weights
    if faults := _faults(lora, transformer):
        if made_for := _made_for_the_other(weights, transformer):
            raise LoraError(f"{path}: {made_for}")
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise LoraError(f"{path}: is no LoRA of this model: {'; '.join(faults[:SHOWN])}{more}")
    ranks = {_layer(name): len(tensor) for name, tensor in weights.items() if name.endswith(DOWN)}
    if not ranks:
        return lora, {}
    dora, bias = (any(name.endswith(suffix) for name in weights) for suffix in (MAGNITUDE, BIAS))
    if bias:  # PEFT would warn of those that are missing
        outputs = layer_widths(transformer)
        absent = {f"{PREFIX}{layer}{BIAS}": layer for layer in ranks}
        weights = {name: torch.zeros(outputs[layer]) for name, layer in absent.items()} | weights
    try:
        config = adapter_config(known, ranks, dora=dora, bias=bias, spelled=names.targets)
    except ValueError as error:
        raise LoraError(f"{path}: {error}") from None
    return Lora(weights, lora.differences), config


def _made_for_the_other(weights: Mapping[str, Tensor], transformer: nn.Module) -> str | None:
    """Why a LoRA is one of the other model, where its shapes say so."""
    names = names_of(transformer)
    other, own = other_than(names), _layers(transformer)
    for name, tensor in weights.items():
        layer = name.removeprefix(PREFIX).removesuffix(DOWN)
        takes_the_width = layer.endswith((".to_q", ".to_k", ".to_v", ".add_q_proj", ".add_k_proj", ".add_v_proj"))
        if name.endswith(DOWN) and takes_the_width and tensor.ndim == 2:
            width = tensor.shape[1]
            if width == other.width and (layer not in own or own[layer][1] != width):
                return not_of(names, other, f"{layer} has {width} inputs")
    return None


def _read_file(path: Path, transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, once what it holds is known to be of a LoRA's size."""
    most = max(SMALL, 2 * sum(parameter.numel() for parameter in transformer.parameters()))
    try:
        if path.exists() and not path.is_file():
            raise LoraError(f"{path}: is no file; give a safetensors file")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            count = sum(math.prod(part.get_shape()) for part in slices.values())
            if count > most:
                raise LoraError(f"{path}: holds {count} numbers; a LoRA of this model has {most} at most")
            numbers = [name for name in slices if not name.endswith(ALPHA)]  # an alpha may be a whole number
            if other := [name for name in numbers if slices[name].get_dtype() not in FLOATS]:
                raise LoraError(
                    f"{path}: holds {other[0]} in {slices[other[0]].get_dtype()}; weights are floating point"
                )
            return {name: file.get_tensor(name) for name in slices}, file.metadata() or {}
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file") from None
    except LoraError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise LoraError(f"{path}: is no whole safetensors file ({shown_line(str(error))})") from None


def _layer(name: str) -> str:
    """The layer that a weight of these names is beside."""
    suffix = next(suffix for suffix in SUFFIXES if name.endswith(suffix))
    return name.removeprefix(PREFIX).removesuffix(suffix)


def _faults(lora: Lora, transformer: nn.Module) -> list[str]:
    """What in these weights does not fit the network."""
    faults: list[str] = []
    layers, parameters = dict(_layers(transformer)), _parameters(transformer)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.weights.items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        layer = name.removeprefix(PREFIX).removesuffix(suffix or "")
        if suffix is None:
            faults.append(f"unexpected {name[:LONGEST]}")
        elif layer not in layers:
            near = difflib.get_close_matches(layer[:LONGEST], layers, n=1) if len(faults) < SHOWN else []
            faults.append(f"unexpected {name[:LONGEST]}" + (f" (near: {near[0]})" if near else ""))
        else:
            parts.setdefault(layer, {})[suffix] = tensor
    for name, difference in lora.differences.items():
        if name not in parameters:
            faults.append(f"unexpected difference of {name[:LONGEST]}")
        elif tuple(parameters[name].shape) != difference.shape:
            own = list(parameters[name].shape)
            faults.append(f"the difference of {name} is of {list(difference.shape)}; the network's is {own}")
        elif type(parameters[name].data) is not Tensor:
            faults.append(f"{name} is stored in 8 bits, and differences are added to whole weights: leave int8 out")
    for layer, pair in parts.items():
        a, b = pair.get(SUFFIXES[0]), pair.get(SUFFIXES[1])
        if a is None or b is None:
            faults.append(f"missing {layer}{SUFFIXES[0] if a is None else SUFFIXES[1]}")
            continue
        out, into, kernel = layers[layer]
        rank = len(a) if a.ndim else 0
        point = (1,) * len(kernel)
        magnitude = (1, out, *point) if kernel else (out,)
        wanted = dict(zip(SUFFIXES, ((rank, into, *kernel), (out, rank, *point), magnitude, (out,)), strict=True))
        if rank == 0 or any(tuple(tensor.shape) != wanted[suffix] for suffix, tensor in pair.items()):
            shapes = ", ".join(f"{suffix[1:]} {list(tensor.shape)}" for suffix, tensor in pair.items())
            faults.append(f"{layer} has {shapes}; the layer takes {into} and gives {out}")
        elif not all(_is_finite(tensor) for tensor in pair.values()):
            faults.append(f"{layer} holds NaN or infinity")
    magnitudes = sum(SUFFIXES[2] in pair for pair in parts.values())
    if 0 < magnitudes < len(parts):
        faults.append(f"only {magnitudes} of {len(parts)} layers have a magnitude (DoRA)")
    return faults or ([] if parts or lora.differences else ["there is no LoRA weight in it"])


def _is_finite(tensor: Tensor) -> bool:
    return bool((tensor if tensor.dtype.itemsize > 1 else tensor.float()).isfinite().all())


def _layers(transformer: nn.Module) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Outputs, inputs and kernel of every linear layer and convolution, by name; those of LoRAs are left out."""
    sizes: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for name, module in transformer.named_modules():
        if ".lora_" in name:
            continue
        name = name.removesuffix(".base_layer").replace(".base_layer.", ".")
        if isinstance(module, nn.Linear):
            sizes[name] = (module.out_features, module.in_features, ())
        elif isinstance(module, nn.Conv3d):
            sizes[name] = (module.out_channels, module.in_channels, tuple(module.kernel_size))
    return sizes


def _parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The network's own parameters, by the names that they have without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" not in name
    }


def layer_widths(transformer: nn.Module) -> dict[str, int]:
    """Outputs of every layer that a LoRA can be beside, by Diffusers' name."""
    return {name: out for name, (out, _, _) in _layers(transformer).items()}


def lora_weights(
    transformer: nn.Module, adapter: str, dtype: torch.dtype, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A LoRA's weights under PEFT's names, without the network's prefix, on the CPU; of `state`, where one is given."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(transformer, state_dict=state, adapter_name=adapter)
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}


def save_lora(
    transformer: Any,
    path: Path,
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes a file that `load_loras` and Diffusers' `HunyuanVideoPipeline.load_lora_weights` read.

    Args:
        state: the network's weights, where they are not in it (spread over devices).

    Raises:
        OSError: if it cannot be written.
    """
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in transformer.peft_config[adapter].to_dict().items()
    }
    HunyuanVideoPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=lora_weights(transformer, adapter, dtype, state),
        transformer_lora_adapter_metadata=config,
        weight_name=path.name,
    )


def convert_file(source: Path, to: Path, form: Form | Literal["diffusers"], transformer: nn.Module) -> None:
    """Writes the LoRA in `source` to `to` under other names (`lora_names`).

    Args:
        transformer: the network it is for: fused layers are cut and joined by its widths.

    Raises:
        LoraError: for a file that is no LoRA of this network, or that cannot be expressed in the other form.
    """
    from safetensors.torch import save_file

    lora, config = _read(source, transformer)
    if form == "diffusers":
        if lora.differences:
            raise LoraError(
                f"{source}: changes {next(iter(lora.differences))} by more than a LoRA can; only comfyui's names have "
                "a place for that"
            )
        own = {f"{PREFIX}{name}": value for name, value in config.items()}
        metadata = json.dumps(own, indent=2, sort_keys=True)
        save_file(lora.weights, to, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata})
        return
    try:
        alphas = _alphas(lora.weights, config)
        converted = from_diffusers(lora, layer_widths(transformer), names_of(transformer), form, alphas)
    except ValueError as error:
        raise LoraError(f"{source}: {error}") from None
    notes = {"format": "pt"}
    if form == "kohya":
        ranks = {str(len(tensor)) for name, tensor in converted.items() if name.endswith("lora_down.weight")}
        notes |= {"ss_network_module": "networks.lora", "ss_network_dim": max(ranks)}
    save_file(converted, to, metadata=notes)


def _alphas(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """The alpha of each layer as kohya means it, which acts with alpha / rank."""
    alphas = {}
    for name, down in weights.items():
        if name.endswith(SUFFIXES[0]):
            layer = _layer(name)
            alpha = float(config["alpha_pattern"].get(f"^{layer}", config["lora_alpha"]))
            alphas[layer] = alpha * len(down) ** 0.5 if config["use_rslora"] else alpha
    return alphas

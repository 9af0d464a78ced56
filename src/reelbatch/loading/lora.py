"""LoRA files: read, checked against the network, put beside its weights; written, in Diffusers' form or kohya's."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reelbatch.loading.parameter_names import to_diffusers, to_kohya

if TYPE_CHECKING:
    from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

PREFIX = "transformer."
SHOWN = 3
SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_A.bias", ".lora_B.bias")


class LoraError(ValueError):
    """A LoRA file that cannot be used; the message names it and what is wrong."""


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:scale`, the scale 1 where none is said. Raises LoraError."""
    name, colon, last = text.rpartition(":")
    if not colon or ("/" in last or "\\" in last or last.endswith(".safetensors")):
        return Path(text).expanduser(), 1.0
    try:
        return Path(name).expanduser(), float(last)
    except ValueError:
        raise LoraError(
            f"--lora {text}: {last!r} is no scale; give FILE or FILE:scale, as style.safetensors:0.8"
        ) from None


def lora_label(path: str | Path, scale: float) -> str:
    """What to call a LoRA: its file's name, its scale, and the beginning of the SHA-256 of its bytes."""
    about = lora_record(path, scale)
    return f"{about['file']}:{scale:g} ({about['sha256'][:12]})"


def lora_record(path: str | Path, scale: float) -> dict[str, Any]:
    """A LoRA as records name it: its file's name, its scale and the SHA-256 of its bytes. Raises LoraError."""
    try:
        about = Path(path).stat()
        digest = _file_hash(Path(path).absolute(), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise LoraError(f"{path}: cannot be read: {error.strerror}") from None
    return {"file": Path(path).name, "scale": scale, "sha256": digest}


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Read once, as long as size and time of the last change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_loras(transformer: HunyuanVideoTransformer3DModel, files: Sequence[tuple[str | Path, float]]) -> None:
    """Puts LoRAs beside the transformer's weights, each with its scale; all of them act together.

    Args:
        files: safetensors files in Diffusers', Tencent's or kohya's (musubi-tuner's) names, and their scales.

    Raises:
        LoraError: for a file that cannot be read, and for one whose weights are not those of this network; the network
            is then as it was.
    """
    read = [(_read(Path(path), transformer), scale) for path, scale in files]
    names = []
    for number, ((weights, config), _) in enumerate(read):
        name = f"lora_{number}"
        metadata = {f"{PREFIX}{key}": value for key, value in config.items()}
        transformer.load_lora_adapter(weights, prefix="transformer", adapter_name=name, metadata=metadata)
        names.append(name)
    if names:
        transformer.set_adapters(names, [scale for _, scale in read])
        transformer.requires_grad_(False)


def _read(path: Path, transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Checked weights under Diffusers' names, and PEFT's configuration: the file's own, or what its shapes say."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = file.metadata() or {}
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path}: is no whole safetensors file ({error})") from None
    try:
        converted = to_diffusers(weights, layer_widths(transformer))
    except ValueError as error:
        raise LoraError(f"{path}: {error}") from None
    if faults := _faults(converted, transformer):
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise LoraError(f"{path}: is no LoRA of this model: {'; '.join(faults[:SHOWN])}{more}")
    config = json.loads(known.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    own = {name.removeprefix(PREFIX): value for name, value in config.items() if name.startswith(PREFIX)}
    return converted, own or _config_of(converted)


def _config_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's configuration of weights that act as they are, with a scale of 1.

    Diffusers would guess it, and gives layers of another rank than the first a wrong scale.
    """
    ranks = {_layer(name): len(tensor) for name, tensor in weights.items() if name.endswith(SUFFIXES[0])}
    usual = next(iter(ranks.values()))
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "use_dora": any(name.endswith(SUFFIXES[2]) for name in weights),
        "lora_bias": any(name.endswith(SUFFIXES[4]) for name in weights),
    }


def _layer(name: str) -> str:
    """The layer that a weight of these names is beside."""
    suffix = next(suffix for suffix in SUFFIXES if name.endswith(suffix))
    return name.removeprefix(PREFIX).removesuffix(suffix)


def _faults(weights: Mapping[str, Tensor], transformer: nn.Module) -> list[str]:
    """What in these weights does not fit the network."""
    faults: list[str] = []
    layers = dict(_layers(transformer))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        layer = name.removeprefix(PREFIX).removesuffix(suffix or "")
        if suffix is None:
            faults.append(f"unexpected {name}")
        elif layer not in layers:
            near = difflib.get_close_matches(layer, layers, n=1)
            faults.append(f"unexpected {name}" + (f" (near: {near[0]})" if near else ""))
        else:
            parts.setdefault(layer, {})[suffix] = tensor
    for layer, pair in parts.items():
        a, b = pair.get(SUFFIXES[0]), pair.get(SUFFIXES[1])
        if a is None or b is None:
            faults.append(f"missing {layer}{SUFFIXES[0] if a is None else SUFFIXES[1]}")
            continue
        out, into = layers[layer]
        if a.shape[1] != into or b.shape[0] != out or a.shape[0] != b.shape[1]:
            faults.append(
                f"{layer} has A {list(a.shape)} and B {list(b.shape)}; the layer takes {into} and gives {out}"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            faults.append(f"{layer} holds NaN or infinity")
    return faults or ([] if parts else ["there is no LoRA weight in it"])


def _layers(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear layer and convolution, by name; those of LoRAs beside them are left out."""
    sizes = {}
    for name, module in transformer.named_modules():
        if ".lora_" in name:
            continue
        name = name.removesuffix(".base_layer").replace(".base_layer.", ".")
        if isinstance(module, nn.Linear):
            sizes[name] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv3d):
            sizes[name] = (module.out_channels, module.in_channels)
    return sizes


def layer_widths(transformer: nn.Module) -> dict[str, int]:
    """Outputs of every layer that a LoRA can be beside, by Diffusers' name."""
    return {name: out for name, (out, _) in _layers(transformer).items()}


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


def convert_file(source: Path, to: Path, form: str, transformer: nn.Module) -> None:
    """Writes the LoRA in `source` to `to` under other names.

    Args:
        form: "diffusers" or "kohya".
        transformer: the network it is for: fused layers are cut and joined by its widths.

    Raises:
        LoraError: for a file that is no LoRA of this network, or that cannot be expressed in the other form.
    """
    from safetensors.torch import save_file

    weights, config = _read(source, transformer)
    if form == "diffusers":
        own = {f"{PREFIX}{name}": value for name, value in config.items()}
        metadata = json.dumps(own, indent=2, sort_keys=True)
        save_file(weights, to, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata})
        return
    try:
        converted = to_kohya(weights, layer_widths(transformer), _alphas(weights, config))
    except ValueError as error:
        raise LoraError(f"{source}: {error}") from None
    ranks = {str(len(tensor)) for name, tensor in converted.items() if name.endswith("lora_down.weight")}
    save_file(
        converted, to, metadata={"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": max(ranks)}
    )


def _alphas(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """The alpha of each layer as kohya means it, which acts with alpha / rank."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alphas = {}
    for name, down in weights.items():
        if name.endswith(SUFFIXES[0]):
            layer = _layer(name)
            alpha = float(patterns.get(get_pattern_key(patterns, layer), config["lora_alpha"]))
            alphas[layer] = alpha * len(down) ** 0.5 if config.get("use_rslora") else alpha
    return alphas

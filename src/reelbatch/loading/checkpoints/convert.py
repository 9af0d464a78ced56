"""Models as others store them, written as model folders in Diffusers' layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from reelbatch.loading.checkpoints.kinds import Kind, choose
from reelbatch.loading.checkpoints.layouts import Found, find
from reelbatch.loading.checkpoints.parts import Part, config_of, reader, recognise
from reelbatch.loading.checkpoints.scales import whole_weights
from reelbatch.loading.checkpoints.towers import Towers, towers_of
from reelbatch.loading.checkpoints.weight_files import WeightFile
from reelbatch.loading.checkpoints.writing import SHARD_BYTES, Progress, Weights, size_of, take, write_json
from reelbatch.loading.configs import build, check_config
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import ModelInfo, inspect
from reelbatch.loading.layout import Layout
from reelbatch.loading.parameter_names import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, ParameterNames
from reelbatch.outside_json import read_object
from reelbatch.wording import shown_line

PUBLISHED_HEAD, PUBLISHED_AXES = 128, [16, 56, 56]
"""Channels of a head, and of them for frame, row and column, of every published model."""
USUAL_SHIFT = 7.0
"""Of the schedule, in the published folders of 1.0."""
REST = {
    HUNYUAN_VIDEO.model: {
        "vae": "tencent/HunyuanVideo (hunyuan-video-t2v-720p/vae)",
        "text_encoder": "xtuner/llava-llama-3-8b-v1_1-transformers (of text to video, its language model)",
        "text_encoder_2": "openai/clip-vit-large-patch14",
        "image_processor": "xtuner/llava-llama-3-8b-v1_1-transformers",
    },
    HUNYUAN_VIDEO_15.model: {
        "vae": "tencent/HunyuanVideo-1.5 (vae)",
        "text_encoder": "Qwen/Qwen2.5-VL-7B-Instruct (its language model)",
        "text_encoder_2": "google/byt5-small with the weights of AI-ModelScope/Glyph-SDXL-v2 (ModelScope)",
        "image_encoder": "black-forest-labs/FLUX.1-Redux-dev (image_encoder; its owner asks you to accept terms)",
        "feature_extractor": "black-forest-labs/FLUX.1-Redux-dev (feature_extractor)",
    },
}
"""Where the components come from that files of a transformer lack. Tokenizers are where the encoders are."""
VAE_NAMES = {
    "time_compression_ratio": "temporal_compression_ratio",
    "ffactor_spatial": "spatial_compression_ratio",
    "ffactor_temporal": "temporal_compression_ratio",
}
"""Entries of Tencent's configurations that Diffusers calls otherwise."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion is of, and what it writes; nothing has been written.

    Attributes:
        found: the files. kind: which model they are. layout: of the model folder.
        weights: the components that are converted. taken: folders of those that are taken as they are.
        towers: the encoders and tokenizers that are made from those of the layout.
        missing: the components that nothing has, and where they come from. base: the model that gives the rest.
    """

    found: Found
    kind: Kind
    layout: Layout
    weights: Mapping[str, Weights]
    towers: Towers
    taken: Mapping[str, Path]
    missing: Mapping[str, str]
    base: ModelInfo | None

    @property
    def size(self) -> int:
        """Bytes of what is converted, and of what is taken where it has to be copied."""
        return sum(weights.size for weights in self.weights.values()) + sum(map(size_of, self.taken.values()))


def plan(
    path: Path,
    asked: str | None = None,
    base: ModelInfo | None = None,
    vae: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """What converting a file or a folder would write.

    Args:
        asked: which published model it is (`kinds.KINDS`), where the weights do not tell.
        base: what is missing is taken from (`base_model`). vae: a file or folder of a VAE.
        dtype: of all weights; None leaves them as they are, and makes bfloat16 of those in 8 bits and fewer.

    Raises:
        ModelFolderError: for anything that cannot be converted; says what to do.
    """
    found = find(path, asked, vae)
    parts = {part.component: part for part in recognise(whole_weights(found.weights, found.scales, dtype))}
    if found.vae is not None:
        whole = whole_weights(found.vae, None, dtype)
        parts |= {part.component: part for part in recognise(whole) if part.component == "vae"}
    if "transformer" not in parts:
        raise ModelFolderError(f"{path}: holds the VAE alone; give the file of the transformer, and this one as --vae")
    transformer = parts["transformer"]
    _check_models(parts)
    shapes = config_of(transformer)
    kind = choose(transformer.names, shapes, asked, found.hint, path)
    layout = LAYOUTS.get(kind.pipeline)
    if layout is None:
        raise ModelFolderError(f"{path}: is {kind.about}, which reelbatch does not run; nothing was converted")
    configs = {"transformer": shapes | dict(kind.transformer) | _rotary(shapes, found, base, path)}
    if "vae" in parts:
        configs["vae"] = _vae_config(found, base, parts["vae"].names, layout)
    weights = {name: _weights(parts[name], layout, config, parts[name].file) for name, config in configs.items()}
    towers = towers_of(found.towers, layout, dtype)
    weights |= towers.weights
    needed = [name for name in layout.classes if name not in (*weights, *towers.files, "scheduler", "guider")]
    taken = _taken(base, layout, [*needed, "scheduler"] if kind.shift is None else needed)
    sources = REST[kind.names.model]
    missing = {
        name: sources.get(name, sources.get(name.replace("tokenizer", "text_encoder"), layout.example))
        for name in needed
        if name not in taken
    }
    return Conversion(found, kind, layout, weights, towers, taken, missing, base)


def _taken(base: ModelInfo | None, layout: Layout, needed: Sequence[str]) -> dict[str, Path]:
    """The folders of a base model that have what is needed; a tokenizer with its encoder only."""
    if base is None:
        return {}
    fits = {part.name for part in base.components if part.class_name in layout.classes.get(part.name, ())}
    fits &= set(needed)
    encoders = {name: name.replace("tokenizer", "text_encoder") for name in fits if "tokenizer" in name}
    fits -= {name for name, encoder in encoders.items() if encoder in needed and encoder not in fits}
    return {name: base.folder / name for name in needed if name in fits}


def base_model(folder: Path) -> ModelInfo:
    """A model folder that something is taken from. Raises ModelFolderError where anything is wrong with it."""
    base = inspect(folder)
    if base.problems:
        raise ModelFolderError("\n".join(base.problems))
    return base


def _check_models(parts: Mapping[str, Part]) -> None:
    models = {part.names.model: part for part in parts.values()}
    if len(models) > 1:
        said = " and ".join(f"{part.file.path} of {model}" for model, part in models.items())
        raise ModelFolderError(f"{said}: these are parts of two models")


def _rotary(shapes: Mapping[str, Any], found: Found, base: ModelInfo | None, path: Path) -> dict[str, Any]:
    """What of a transformer's configuration neither its shapes nor its kind tell: the axes of the rotary embedding."""
    head = shapes["attention_head_dim"]
    said = {"rope_axes_dim": found.config.get("rope_dim_list"), "rope_theta": found.config.get("rope_theta")}
    if base is not None and said["rope_axes_dim"] is None:
        network = base.layout.networks["transformer"]
        config = network.load_config(str(base.folder / "transformer"))
        if config.get("attention_head_dim") == head:
            said = {name: config.get(name) for name in said}
    said = {name: value for name, value in said.items() if value is not None}
    if "rope_axes_dim" not in said:
        if head != PUBLISHED_HEAD:
            raise ModelFolderError(
                f"{path}: has heads of {head} channels, and not {PUBLISHED_HEAD} as every published model: its weights "
                "do not tell how the rotary embedding divides them. Give --rest a model folder with the same heads"
            )
        said["rope_axes_dim"] = PUBLISHED_AXES
    if isinstance(theta := said.get("rope_theta"), int):
        said["rope_theta"] = float(theta)
    return said


def _vae_config(found: Found, base: ModelInfo | None, names: ParameterNames, layout: Layout) -> dict[str, Any]:
    config = {VAE_NAMES.get(name, name): value for name, value in found.vae_config.items()}
    if not config and base is not None:
        config = dict(layout.networks["vae"].load_config(str(base.folder / "vae")))
    if config.get("shift_factor"):
        raise ModelFolderError(f"{found.name}: the VAE's config.json has a shift_factor, which is not known here")
    blocks = len(config.get("block_out_channels", [])) if isinstance(config.get("block_out_channels"), list) else 0
    if names is HUNYUAN_VIDEO and blocks:
        config["down_block_types"] = ["HunyuanVideoDownBlock3D"] * blocks
        config["up_block_types"] = ["HunyuanVideoUpBlock3D"] * blocks
    return config


def _weights(part: Part, layout: Layout, config: Mapping[str, Any], file: WeightFile) -> Weights:
    checked, faults = check_config(layout.configs[part.component], config)
    if faults:
        raise ModelFolderError(f"{file.path}: {part.component}: {'; '.join(map(shown_line, faults))}")
    try:
        network: Any = build(layout.networks[part.component], checked)
    except ValueError as error:
        raise ModelFolderError(f"{file.path}: {part.component}: {error}") from None
    read = reader(part, network)
    shapes = network.state_dict()
    sizes = {name: weight.numel() * _itemsize(file, part.sources[name].name) for name, weight in shapes.items()}
    return Weights(layout.weights[part.component], sizes, read, network.save_config)


def _itemsize(file: WeightFile, name: str) -> int:
    tensor = file.tensors[name]
    return tensor.size // max(tensor.parameters, 1)


def check_out(conversion: Conversion, out: Path) -> None:
    """Raises ModelFolderError where a conversion cannot be written, before anything is."""
    if conversion.missing:
        lines = [f"  {name}: from {source}" for name, source in conversion.missing.items()]
        raise ModelFolderError(
            f"{conversion.found.weights.path}: holds no {', '.join(conversion.missing)}. Give --rest a model folder "
            f"or hub id in Diffusers' layout that has them, such as {conversion.layout.example}. They come from\n"
            + "\n".join(lines)
        )
    if (out / "model_index.json").exists():
        raise ModelFolderError(f"{out}: a model folder is there already; name another one")
    if out.exists() and not out.is_dir():
        raise ModelFolderError(f"{out}: is a file; name a folder")
    others = [entry.name for entry in out.iterdir() if entry.name not in _entries(conversion)] if out.is_dir() else []
    if others:
        raise ModelFolderError(f"{out}: holds {', '.join(sorted(others)[:3])}; name an empty folder, or a new one")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    there = sum(size_of(out / name) for name in conversion.weights if (out / name).is_dir())
    free, need = shutil.disk_usage(place).free, sum(w.size for w in conversion.weights.values()) - there
    if need > free:
        raise ModelFolderError(f"{out}: takes {need / 2**30:.1f} GiB, and the disk has {free / 2**30:.1f} GiB left")


def _entries(conversion: Conversion) -> tuple[str, ...]:
    return (*conversion.layout.classes, "reelbatch.json")


def write(conversion: Conversion, out: Path, progress: Progress, shard_bytes: int = SHARD_BYTES) -> ModelInfo:
    """Writes the model folder; goes on where an earlier conversion to the same folder was stopped.

    Every file of weights is read back and compared bit for bit; model_index.json is written last, so that a folder
    without it is not finished.

    Raises:
        ModelFolderError: for what `check_out` refuses, and where what was written is not what it should be.
        OSError: where it cannot be written.
    """
    check_out(conversion, out)
    for name, weights in conversion.weights.items():
        weights.write(out / name, shard_bytes, progress)
    for name, source in conversion.taken.items():
        take(source, out / name)
    for name, make in conversion.towers.files.items():
        (out / name).mkdir(exist_ok=True)
        make(out / name)
    layout, kind = conversion.layout, conversion.kind
    if "scheduler" not in conversion.taken:
        schedule = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": kind.shift or USUAL_SHIFT}
        _settings(out / "scheduler" / "scheduler_config.json", schedule)
    if "guider" in layout.classes:
        guider = {"_class_name": "ClassifierFreeGuidance", "guidance_scale": kind.guidance}
        _settings(out / "guider" / "guider_config.json", guider)
    base = conversion.base.folder / "reelbatch.json" if conversion.base else None
    profile = {**(read_object(base) if base is not None and base.is_file() else {}), **kind.profile}
    if profile:
        write_json(out / "reelbatch.json", profile)
    write_json(out / "model_index.json", _index(conversion, out))
    info = inspect(out)
    if info.problems:
        (out / "model_index.json").unlink()
        raise ModelFolderError("\n".join(info.problems))
    return info


def _settings(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**content, "_diffusers_version": diffusers.__version__})


def _index(conversion: Conversion, out: Path) -> dict[str, Any]:
    layout = conversion.layout
    index: dict[str, Any] = {"_class_name": conversion.kind.pipeline, "_diffusers_version": diffusers.__version__}
    given = () if conversion.base is None else conversion.base.components
    names = {component.name: component.class_name for component in given}
    for component, classes in layout.classes.items():
        library = "diffusers" if hasattr(diffusers, classes[0]) or component == "guider" else "transformers"
        taken = component in conversion.taken and names.get(component) in classes
        own = conversion.towers.classes.get(component, classes[0])
        index[component] = [library, names[component] if taken else own]
    return index


def describe(conversion: Conversion) -> dict[str, Any]:
    """A conversion as `--json` and `model-info` say it."""
    return {
        "layout": conversion.found.name,
        "file": str(conversion.found.weights.path),
        "format": conversion.found.weights.format,
        "model": conversion.kind.names.model,
        "kind": conversion.kind.name,
        "about": conversion.kind.about,
        "pipeline": conversion.kind.pipeline,
        "converted": {name: weights.size for name, weights in conversion.weights.items()},
        "tokenizers": sorted(conversion.towers.files),
        "taken": {name: str(folder) for name, folder in conversion.taken.items()},
        "rest": None if conversion.base is None else conversion.base.name,
        "missing": dict(conversion.missing),
    }

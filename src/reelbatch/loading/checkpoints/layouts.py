"""Where in a folder, or beside a file, what belongs to a model lies: Tencent's layouts of 1.0 and 1.5, and files alone.

1.0   hunyuan-video-t2v-720p/{transformers/mp_rank_00_model_states.pt, vae/}, text_encoder/, text_encoder_2/
1.5   transformer/VARIANT/, vae/, text_encoder/{llm, byt5-small, Glyph-SDXL-v2}/, vision_encoder/siglip/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelbatch.loading.assembly import transformer_config
from reelbatch.loading.checkpoints.kinds import FOLDERS
from reelbatch.loading.checkpoints.weight_files import WeightFile, open_several, open_weights
from reelbatch.loading.hub import ModelFolderError
from reelbatch.outside_json import read_object
from reelbatch.wording import shown

MAP = "_map"
ENDINGS = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".bin")
MOST_FILES = 1000
STATES = "*model_states*.pt"


@dataclass(frozen=True)
class Found:
    """Attributes:
    name: of the layout, in words. weights: of the transformer (and the VAE, where one file holds both).
    scales: Tencent's map of scales. vae: of the VAE. config, vae_config: Tencent's own configurations.
    hint: which model it is, as the layout says. towers: the folders where the encoders are, by Tencent's names.
    """

    name: str
    weights: WeightFile
    scales: WeightFile | None = None
    vae: WeightFile | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    hint: str | None = None
    towers: Mapping[str, Path] = field(default_factory=dict)


def find(path: Path, asked: str | None, vae: Path | None = None) -> Found:
    """What lies there.

    Args:
        path: a file of weights, or a folder. asked: the model of `--as`, which chooses among the variants of a folder.
        vae: a file or a folder of a VAE, instead of that of the layout.

    Raises:
        ModelFolderError: where nothing is that is known, or several things are and nothing says which is meant.
    """
    if not path.exists():
        raise ModelFolderError(f"{path}: no such file or folder")
    if path.is_file():
        found = _file(path)
    elif (path / "model_index.json").is_file():
        raise ModelFolderError(f"{path}: is in Diffusers' layout already; give it as --model")
    else:
        found = _tencent10(path) or _tencent15(path, asked) or _folder_of_files(path)
    if vae is not None:
        own = weights_in(vae) if vae.is_dir() else open_weights(vae)
        config = vae / "config.json" if vae.is_dir() else vae.with_name("config.json")
        found = Found(**{**vars(found), "vae": own, "vae_config": read_json(config)})
    return found


def is_foreign(path: Path) -> bool:
    """Whether it is a file, or a folder that looks like one of another layout than Diffusers'."""
    if not path.is_dir() or (path / "model_index.json").is_file() or transformer_config(path) is not None:
        return path.is_file()
    patterns = (f"transformers/{STATES}", f"hunyuan-video-*/transformers/{STATES}")
    folders = (path, *path.glob("transformer/*"), *path.glob("*"))
    return (
        any(file.suffix in ENDINGS for file in path.iterdir())
        or any(True for pattern in patterns for _ in path.glob(pattern))
        or any(folder.is_dir() and _is_variant(folder) for folder in folders)
    )


def _file(path: Path) -> Found:
    if MAP in path.stem and path.suffix == ".pt":
        raise ModelFolderError(f"{path}: is a map of scales; give the file of the weights beside it")
    weights = open_weights(path)
    scales, place = None, path.parent
    if weights.format == "PyTorch":
        scales = _scales_beside(path, weights)
    if place.name == "transformers" or place.parent.name == "transformer":  # within one of Tencent's layouts
        found = _tencent10(place) if place.name == "transformers" else _tencent15(place, None)
        if found is not None:
            return Found(**{**vars(found), "weights": weights, "scales": scales})
    return Found(f"one file ({weights.format})", weights, scales)


def _scales_beside(path: Path, weights: WeightFile) -> WeightFile | None:
    beside = path.with_name(f"{path.stem}{MAP}.pt")
    if beside.is_file():
        return open_weights(beside)
    if any(tensor.dtype.startswith("F8") for tensor in weights.tensors.values()):
        raise ModelFolderError(f"{beside}: missing: the scales of the 8-bit weights in {path.name}; download it again")
    return None


def _tencent10(path: Path) -> Found | None:
    """path: the root of the layout, hunyuan-video-…, or transformers."""
    places = [path, path / "transformers", *sorted(path.glob("hunyuan-video-*/transformers"))]
    files = [(place, _files(place, STATES)) for place in places if place.is_dir()]
    files = [(place, [file for file in names if MAP not in file.stem]) for place, names in files]
    files = [(place, names) for place, names in files if names]
    if not files:
        return None
    if len(files) > 1:
        raise ModelFolderError(
            f"{path}: holds {' and '.join(str(place.relative_to(path)) for place, _ in files)}; give one of them"
        )
    place, names = files[0]
    place = place.resolve()
    chosen = next((file for file in names if "_fp8" not in file.stem), names[0])  # whole weights, where both are
    weights = open_weights(chosen)
    model = place.parent if place.name == "transformers" else place
    root = model.parent
    vae = model / "vae"
    towers = {name: root / name for name in ("text_encoder", "text_encoder_2") if (root / name).is_dir()}
    return Found(
        "Tencent's layout of HunyuanVideo",
        weights,
        _scales_beside(chosen, weights),
        weights_in(vae) if vae.is_dir() else None,
        vae_config=read_json(vae / "config.json"),
        hint=FOLDERS.get(model.name),
        towers=towers,
    )


def _tencent15(path: Path, asked: str | None) -> Found | None:
    """path: the root of the layout, transformer, or one of its variants."""
    if _is_variant(path):
        variants = [path]
    else:
        inside = path / "transformer" if (path / "transformer").is_dir() else path
        variants = [folder for folder in sorted(inside.iterdir()) if folder.is_dir() and _is_variant(folder)]
    if not variants:
        return None
    if len(variants) > 1:
        named = [folder for folder in variants if folder.name == asked]
        if not named:
            listed = ", ".join(folder.name for folder in variants)
            raise ModelFolderError(f"{path}: holds several models; say which with --as NAME, one of {listed}")
        variants = named
    (variant,) = variants
    variant = variant.resolve()
    root = variant.parent.parent
    places = {
        "text_encoder": root / "text_encoder" / "llm",
        "byt5": root / "text_encoder" / "byt5-small",
        "glyph": root / "text_encoder" / "Glyph-SDXL-v2",
        "image_encoder": root / "vision_encoder" / "siglip" / "image_encoder",
        "feature_extractor": root / "vision_encoder" / "siglip" / "feature_extractor",
    }
    vae = root / "vae"
    return Found(
        "Tencent's layout of HunyuanVideo 1.5",
        weights_in(variant),
        vae=weights_in(vae) if (vae / "config.json").is_file() else None,
        config=read_json(variant / "config.json"),
        vae_config=read_json(vae / "config.json"),
        hint=variant.name,
        towers={name: folder for name, folder in places.items() if folder.is_dir()},
    )


def _is_variant(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(_files(folder, "*.safetensors")) and "mm_double_blocks_depth" in read_json(config)


def _folder_of_files(path: Path) -> Found:
    weights = weights_in(path)
    return Found(f"a folder of weights ({weights.format})", weights)


def weights_in(folder: Path, name: str | None = None) -> WeightFile:
    """The weights of one network in a folder: the file of a name, the only file, or the files that an index lists."""
    if name is not None and (folder / name).is_file():
        return open_weights(folder / name)
    indexes = _files(folder, "*.safetensors.index.json")
    if len(indexes) == 1:
        return open_several(_listed(indexes[0]))
    files = [file for file in _files(folder, "*") if file.suffix in ENDINGS]
    whole = [file for file in files if file.name == "model.safetensors"]
    files = whole or files  # beside the same weights for PyTorch, TensorFlow and Flax
    names = ", ".join(file.name for file in files[:10])
    if len(files) != 1:
        what = f"holds {len(files)} files of weights ({names}); give the one that is meant" if files else "holds none"
        raise ModelFolderError(f"{folder}: {what}: a file of weights, or one of Tencent's layouts, is expected")
    return open_weights(files[0])


def _listed(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFolderError(f"{index}: lists {shown(name)}, which is no safetensors file beside it")
    if not 0 < len(names) <= MOST_FILES:
        raise ModelFolderError(f"{index}: lists {len(names)} files; download it again")
    return [index.parent / name for name in names]


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    if len(files) > MOST_FILES:
        raise ModelFolderError(f"{folder}: holds more than {MOST_FILES} files; give the one that is meant")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelFolderError(f"{path}: {error}") from None

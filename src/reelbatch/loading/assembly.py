"""A transformer in a folder of its own, and the rest from a base model: a folder of links to both.

SkyReels V1 and other models trained from HunyuanVideo are published so: `config.json` and weights at the root of a
repository, without text towers, VAE and scheduler.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from reelbatch.device import cache_folder
from reelbatch.loading.families import LAYOUTS
from reelbatch.loading.hunyuan_video_image import DEFAULTS
from reelbatch.outside_json import read_object

TEXT_BASE, IMAGE_BASE = "hunyuanvideo-community/HunyuanVideo", "hunyuanvideo-community/HunyuanVideo-I2V"
TRANSFORMER_FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json")
"""What a transformer's folder holds."""
SKYREELS_TEXT: Mapping[str, Any] = {
    "guidance": "classifier-free",
    "defaults": {name: getattr(DEFAULTS["channels"], name) for name in ("height", "width", "frames")},
}
"""What SkyReels V1's text-to-video transformer, whose configuration is HunyuanVideo's, is used with."""


def transformer_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a folder that is a HunyuanVideo transformer alone; None for any other."""
    if (folder / "model_index.json").exists():
        return None
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError):
        return None
    return config if config.get("_class_name") == "HunyuanVideoTransformer3DModel" else None


def pipeline_of(config: Mapping[str, Any]) -> str:
    """The class of pipeline that a transformer is made for."""
    if config.get("image_condition_type"):
        return "HunyuanVideoImageToVideoPipeline"
    twice = config.get("in_channels", 16) == 2 * config.get("out_channels", 16)
    return "HunyuanSkyreelsImageToVideoPipeline" if twice else "HunyuanVideoPipeline"


def base_of(config: Mapping[str, Any]) -> str:
    """The hub id of the model that has the rest."""
    return IMAGE_BASE if config.get("image_condition_type") else TEXT_BASE


def assemble(transformer: Path, config: Mapping[str, Any], base: Path, name: str) -> Path:
    """A model folder of a transformer (`transformer_config`) and the other components of `base`; the same every time.

    A `reelbatch.json` beside the transformer says what holds for both together; of the base's, the prompt template
    holds too.

    Args:
        name: of the model. One of SkyReels V1 has its name in it, and is guided by a negative prompt.

    Raises:
        OSError, ValueError: if a file of either cannot be read.
    """
    transformer, base, pipeline = transformer.absolute(), base.absolute(), pipeline_of(config)
    index = {**read_object(base / "model_index.json"), "_class_name": pipeline}
    profile: dict[str, Any] = {}
    if (base / "reelbatch.json").is_file():
        said = read_object(base / "reelbatch.json")
        profile = {key: said[key] for key in ("prompt_template",) if key in said}
    if pipeline == "HunyuanVideoPipeline" and "skyreels" in name.lower():
        profile |= SKYREELS_TEXT
    if (transformer / "reelbatch.json").is_file():
        profile |= read_object(transformer / "reelbatch.json")
    content = json.dumps([str(transformer), str(base), index, profile], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = cache_folder() / "assembled" / key / f"models--{name.replace('/', '--')}"
    if not folder.is_dir():
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(dir=folder.parent.parent))
        try:
            _link(made / folder.name, transformer, base, index, profile)
            os.rename(made, folder.parent)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not folder.is_dir():  # else another process was quicker
                raise
    return folder


def _link(folder: Path, transformer: Path, base: Path, index: Mapping[str, Any], profile: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "reelbatch.json").write_text(json.dumps(profile), encoding="utf-8")
    for component in LAYOUTS[str(index["_class_name"])].classes:
        source = transformer if component == "transformer" else base / component
        if source.is_dir():
            (folder / component).symlink_to(source, target_is_directory=True)

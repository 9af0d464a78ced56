"""The trained weights as files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from reelbatch.loading.lora import save_lora
from reelbatch.loading.model import Model
from reelbatch.loading.precision import DTYPES
from reelbatch.train.config import TrainConfig

LORA_FILE = "lora.safetensors"


def write_trained(config: TrainConfig, model: Model, state: dict[str, Tensor] | None) -> Path:
    """The LoRA file, or the model folder, in the run's folder; put in its place when whole.

    Args:
        state: the transformer's weights, where they are not in it (spread over devices).

    Raises:
        OSError: if it cannot be written.
    """
    if config.method == "full":
        return write_model(model, config.out / "model", DTYPES[config.save_dtype], state)
    path = config.out / LORA_FILE
    part = config.out / f".{LORA_FILE}"
    save_lora(model.family.transformer, part, dtype=DTYPES[config.save_dtype], state=state)
    part.replace(path)
    return path


def write_model(model: Model, folder: Path, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> Path:
    """A whole model folder in the Diffusers layout with this transformer; what did not change is linked, or copied.

    Args:
        state: the transformer's weights, where they are not in it (spread over devices).
    """
    from reelbatch.models.hunyuan_video.transformer import HunyuanVideoTransformer3DModel

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for source in sorted(model.folder.rglob("*")):
        inside = source.relative_to(model.folder)
        if source.is_file() and inside.parts[0] != "transformer" and not inside.name.startswith("."):
            (part / inside).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), part / inside)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, part / inside)
    written = HunyuanVideoTransformer3DModel.from_config(model.family.transformer.config)
    written.load_state_dict(model.family.transformer.state_dict() if state is None else state)
    written.to(dtype).save_pretrained(part / "transformer")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder

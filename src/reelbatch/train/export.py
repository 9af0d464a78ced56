"""The trained weights as files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from reelbatch.files import link_or_copy
from reelbatch.loading.lora import save_lora
from reelbatch.loading.precision import DTYPES
from reelbatch.models.family import TrainableFamily
from reelbatch.train.config import TrainConfig

LORA_FILE = "lora.safetensors"
TRANSFORMER = "transformer"
"""The folder of the part that is trained."""


def write_trained(config: TrainConfig, base: Path, family: TrainableFamily, state: dict[str, Tensor] | None) -> Path:
    """Writes the LoRA file, or the model folder, into the run's folder, and returns its path.

    Args:
        base: the model folder that was trained from.
        state: the transformer's weights, where they are not in it (spread over devices).

    Raises:
        OSError: if it cannot be written.
    """
    if config.method == "full":
        return write_model(base, family, config.out / "model", DTYPES[config.save_dtype], state)
    path = config.out / LORA_FILE
    part = config.out / f".{LORA_FILE}"
    save_lora(family.transformer, part, dtype=DTYPES[config.save_dtype], state=state)
    part.replace(path)
    return path


def write_model(
    base: Path, family: TrainableFamily, folder: Path, dtype: torch.dtype, state: dict[str, Tensor] | None = None
) -> Path:
    """Writes a whole model folder with this transformer; what did not change is linked, or copied, from `base`.

    Args:
        state: the transformer's weights, where they are not in it (spread over devices).
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for source in sorted(base.rglob("*")):
        inside = source.relative_to(base)
        if source.is_file() and inside.parts[0] != TRANSFORMER and not inside.name.startswith("."):
            (part / inside).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, part / inside)
    family.transformer.save_copy(part / TRANSFORMER, dtype, state)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder

"""The identity of a run: what a measurement of it holds for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reelbatch.device import choose_device, device_name
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.lora import lora_hash
from reelbatch.loading.precision import Precision
from reelbatch.memory.identity import Identity
from reelbatch.versions import versions


def identity(
    folder: Path,
    model: str,
    shapes: str,
    *,
    device: str | torch.device = "auto",
    dtype: Precision | str = "auto",
    attention: str = "auto",
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Identity:
    """The identity of a run of the model in `folder`, with LoRA files and their scales.

    Raises:
        LoraError: for a LoRA file that cannot be read.
    """
    chosen = choose_device(device)
    return Identity(
        model=model,
        weights=weights_hash(folder),
        device=described(chosen),
        dtype=str(Precision.parse(dtype, chosen)),
        attention=attention,
        versions=versions(),
        shapes=shapes,
        loras=tuple(sorted((lora_hash(path), scale) for path, scale in loras)),
    )


def described(device: torch.device) -> str:
    return f"{device.type}: {device_name(device)}"


def any_shape(folder: Path, model: str, device: torch.device, dtype: Precision | str) -> Identity:
    """What a calibration holds for: a model on a device in a dtype, whatever it makes."""
    return identity(folder, model, "any shape", device=device, dtype=dtype)

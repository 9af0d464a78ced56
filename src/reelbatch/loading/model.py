"""Model: a family of networks, loaded, with where it came from and where its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reelbatch.device import processor_of, threads_of
from reelbatch.loading.inspection import FolderProfile
from reelbatch.loading.precision import Precision
from reelbatch.memory.placement import Offload, Placement
from reelbatch.models.family import Family
from reelbatch.request import ModelLimits


@dataclass(frozen=True)
class Model:
    """A loaded model. Its networks compute on the placement's device, each in its dtype, in evaluation mode.

    Attributes:
        name: of the model, with its LoRAs.
        folder: where it was loaded from.
        precision: dtypes of its parts.
        placement: where the weights are.
        profile: what the folder says besides the networks.
        weights: the hash of the folder's weights.
        loras: a record of each (`lora_record`).
    """

    name: str
    folder: Path
    family: Family
    precision: Precision
    placement: Placement
    profile: FolderProfile = field(default_factory=FolderProfile)
    weights: str = ""
    loras: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def record(self) -> dict[str, Any]:
        """What a video depends on here; JSON values."""
        return {
            "model": self.name,
            "weights": self.weights,
            "lora": [dict(lora) for lora in self.loras],
            "device": str(self.device),
            "processor": processor_of(self.device),
            "threads": threads_of(self.device),
            "dtype": str(self.precision),
            "offload": self.offload,
        }

    @property
    def offload(self) -> Offload:
        """Which weights are on the device."""
        return self.placement.offload

    @property
    def limits(self) -> ModelLimits:
        """What the model can make, and its defaults."""
        return self.family.limits

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The words that a little model knows; None for a model that knows language."""
        return frozenset(self.profile.vocabulary) or None

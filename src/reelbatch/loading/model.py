"""Model: a family of networks, loaded, with where it came from and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

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
    """

    name: str
    folder: Path
    family: Family
    precision: Precision
    placement: Placement
    profile: FolderProfile = field(default_factory=FolderProfile)

    @property
    def device(self) -> torch.device:
        return self.placement.device

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

"""Setups: a batch of equal videos of a model that is not loaded, how it runs, and what that is estimated to take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from reelbatch.engine.planner import Isolation
from reelbatch.loading.hub import REAL_MODEL, model_name, resolve_here
from reelbatch.loading.precision import Precision
from reelbatch.loading.skeleton import from_folder, hunyuanvideo_13b
from reelbatch.memory.calibration import Calibration
from reelbatch.memory.estimate import Estimator, Plan
from reelbatch.memory.placement import Offload
from reelbatch.models.family import Family, Phase
from reelbatch.request import VideoRequest

PLAIN_13B = ("hunyuanvideo-13b", "hunyuanvideo", "13b", REAL_MODEL.lower())
"""Names of HunyuanVideo (13B) that are planned from the configuration in the code, without a folder."""
LARGEST_BATCH = 256
"""Batches that are not looked beyond."""


class Planned:
    """A model that is not loaded, with an estimator for each precision and isolation.

    Args:
        skeleton: the family in a precision.
        device: where it is to run; it need not be here.
    """

    def __init__(self, name: str, skeleton: Callable[[Precision], Family], device: torch.device) -> None:
        self.name, self.device = name, device
        self.family = lru_cache(8)(skeleton)
        self.estimator = lru_cache(16)(self._estimator)

    def _estimator(self, precision: Precision, isolation: Isolation) -> Estimator:
        return Estimator(self.family(precision), isolation, self.device)


@dataclass(frozen=True)
class Setup:
    """A batch of equal videos, and how it is to run.

    Attributes:
        held: bytes that the process holds before the model is loaded; they count on a CPU.
        calibration: what estimates are corrected by, in the dtype that it was measured in.
    """

    model: Planned
    request: VideoRequest
    batch_size: int
    precision: Precision
    isolation: Isolation = "exact"
    offload: Offload = "none"
    held: int = 0
    calibration: Calibration | None = None

    @property
    def estimator(self) -> Estimator:
        return self.model.estimator(self.precision, self.isolation)

    def plan(self) -> Plan:
        """The estimate, corrected where there is a calibration."""
        estimated = self.estimator.plan([self.request] * self.batch_size, self.offload)
        known = self.calibration
        return known.corrected(estimated) if known and known.identity.dtype == str(self.precision) else estimated

    def peak(self) -> int:
        """Estimated bytes, with those that the process holds already."""
        return self.held + self.plan().peak

    def phase_bytes(self, phase: Phase) -> int:
        """Estimated bytes of one phase, with those that the process holds already."""
        return self.held + self.plan().phases[phase]

    def largest_batch(self, available: int) -> int:
        """Videos of this kind that fit together, `LARGEST_BATCH` at most; 0 if not even one does."""
        sizes = range(1, LARGEST_BATCH + 1)
        return bisect_left(sizes, True, key=lambda size: replace(self, batch_size=size).peak() > available)


def open_model(model: str, device: torch.device) -> Planned:
    """A model that is planned for, without loading it.

    Raises:
        ValueError: if there is no such folder, or it lacks a configuration.
    """
    if model.lower() in PLAIN_13B:
        return _plain_13b(device)
    folder = resolve_here(model)
    if not folder.is_dir():
        raise ValueError(
            f"model {model!r}: no such folder. A plan downloads nothing: give a model folder, demo, or {PLAIN_13B[0]}"
        )
    return Planned(model_name(folder), lambda precision: from_folder(folder, precision, device), device)


@lru_cache(4)
def _plain_13b(device: torch.device) -> Planned:
    return Planned(PLAIN_13B[0], lambda precision: hunyuanvideo_13b(precision, device), device)

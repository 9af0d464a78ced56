"""Calibration: estimates of memory corrected by a few small measured videos, for one model on one device.

Calibrations are kept in the user's cache directory, and hold for the same weights, device, dtype and versions only.
`engine/calibrate.py` measures them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from reelbatch.device import cache_folder
from reelbatch.memory.estimate import Plan
from reelbatch.memory.identity import Identity

CorrectedPhase = Literal["step", "decode"]
CORRECTED: tuple[CorrectedPhase, ...] = ("step", "decode")
ESTIMATES = "traces"
SCALES = (0.8, 1.25)
"""What a scale is kept within: the videos measured are small, and those planned for are not."""


class Correction(BaseModel):
    """Activations of a phase are `scale` × the estimate + `offset` bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(gt=0)
    offset: int

    def of(self, estimated: int) -> int:
        """The corrected estimate of the bytes that a phase takes besides weights."""
        return max(int(self.scale * estimated) + self.offset, 0)


class Calibration(BaseModel):
    """Corrections for an identity, and the errors of the uncorrected estimates (over measured, less 1).

    Attributes:
        estimates: how those that it corrects were made; files without it are of a time of fitted formulas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: Identity
    step: Correction
    decode: Correction
    errors: dict[CorrectedPhase, tuple[float, ...]]
    measured: date
    estimates: str = "formulas"

    def corrected(self, estimated: Plan) -> Plan:
        """The plan with its steps and its decoding corrected; weights and text stay."""
        return replace(estimated, step=self.step.of(estimated.step), decode=self.decode.of(estimated.decode))

    @property
    def line(self) -> str:
        """Where corrections come from, in a line."""
        return f"corrected by {len(self.errors['step'])} small videos measured here on {self.measured}"


class Stored(NamedTuple):
    """A stored calibration that fits, or None and why the one that is there does not."""

    calibration: Calibration | None = None
    refused: str | None = None


def fit(pairs: Sequence[tuple[int, int]]) -> Correction:
    """The least-squares line through pairs of estimated and measured bytes, raised to where none is underestimated."""
    count = len(pairs)
    middle, level = sum(x for x, _ in pairs) / count, sum(y for _, y in pairs) / count
    spread = sum((x - middle) ** 2 for x, _ in pairs)
    slope = sum((x - middle) * (y - level) for x, y in pairs) / spread if spread else 1.0
    scale = min(max(slope, SCALES[0]), SCALES[1])
    return Correction(scale=scale, offset=round(max(y - scale * x for x, y in pairs)))


def find(wanted: Identity) -> Stored:
    """The stored calibration of a model on a device that is here."""
    try:
        content = _path(wanted).read_bytes()
    except OSError:
        return Stored()
    try:
        calibration = Calibration.model_validate_json(content)
    except ValueError:
        return Stored(None, f"{_path(wanted).name} is damaged or of another version")
    if calibration.estimates != ESTIMATES:
        return Stored(None, "it corrects the estimates of an earlier version, which were computed differently")
    differences = calibration.identity.differences(wanted)
    return Stored(None, "; ".join(differences)) if differences else Stored(calibration)


def store(calibration: Calibration) -> Path:
    """Writes a calibration, in the place of one of the same model, device and dtype; returns its file."""
    path = _path(calibration.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def _path(wanted: Identity) -> Path:
    key = hashlib.sha256(json.dumps([wanted.model, wanted.device, wanted.dtype]).encode()).hexdigest()[:16]
    return cache_folder() / "calibrations" / f"{key}.json"

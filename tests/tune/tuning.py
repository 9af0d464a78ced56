"""What the tests of `tune` share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.engine.config import EngineConfig
from reelbatch.loading.inspection import ModelInfo
from reelbatch.loading.model import Model
from reelbatch.request import VideoRequest
from reelbatch.tune import profiles, workload

GIB = 2**30
CPU = EngineConfig(device="cpu")
AMPLE = 3600
"""Seconds of a budget that no load uses up: with few sizes, repeats and videos, a sweep ends by itself."""


def call(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def request(**fields) -> VideoRequest:
    return VideoRequest(**{"prompt": "a cat", "seed": 1, "height": 32, "width": 32, "frames": 9, "steps": 10, **fields})


def little_memory(model: Model, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which no more than so many samples fit into a step."""
    forward = model.family.transformer.forward

    def limited(*args, packs, **kwargs):
        if sum(map(len, packs)) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, packs=packs, **kwargs)

    monkeypatch.setattr(model.family.transformer, "forward", limited)


def small(info: ModelInfo, largest: int = 4, **fields) -> workload.Workload:
    return workload.of_shape(info, {"frames": 1, **fields}, largest)


def profile(identity: profiles.Identity, **fields) -> profiles.Profile:
    base = {
        "batch_size": 6,
        "isolation": "packed",
        "exact_batch_size": 2,
        "packed_batch_size": 6,
        "videos_per_hour": 100.0,
        "last_video_seconds": 3.0,
        "peak_bytes": GIB,
        "why": "it is best.",
        "measured": "2026-11-01",
    }
    return profiles.Profile(identity=identity, **{**base, **fields})

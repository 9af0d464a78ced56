"""Fixtures of the tests of `tune`."""

from __future__ import annotations

import math
from functools import cache as cached
from pathlib import Path

import pytest
from leftovers import nothing_left  # noqa: F401  a fixture

from reelbatch.loading.inspection import ModelInfo, inspect
from reelbatch.loading.load import load
from reelbatch.loading.model import Model
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.estimate import Estimator
from reelbatch.tune import baseline, comparison, evidence, profiles, repeats, run

ESTIMATOR, SKELETON = cached(Estimator), cached(from_folder)
"""Estimates are the same each time; one of them takes seconds."""


@pytest.fixture(scope="module")
def info(tiny_folder: Path) -> ModelInfo:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "cpu", "float32")


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST_REPEATS", 3)
    monkeypatch.setattr(evidence, "SLACK", math.inf)  # figures of a busy machine are far apart
    monkeypatch.setattr(comparison, "COMPARED", ((2, 1.0), (1, 0.0)))
    monkeypatch.setattr(baseline, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(run, "Estimator", ESTIMATOR)
    monkeypatch.setattr(run, "from_folder", SKELETON)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def about(tiny_folder: Path) -> profiles.Identity:
    return profiles.identity(tiny_folder, "tiny", "32×32×9", device="cpu", dtype="float32")

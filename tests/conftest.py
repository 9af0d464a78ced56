"""Fixtures that every test file shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import HunyuanVideoPipeline
from fake_cuda import cuda  # noqa: F401  a fixture
from manifests import manifest  # noqa: F401  a fixture

# One thread: the tiny networks are slower with more, and several test runs then share a machine without harm.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a person has tuned on this machine has no say in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REELBATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, patch 2. Read only: copy it before changing anything."""
    return tiny.make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_folder_patch1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with patch 1, as the bundled model has it."""
    return tiny.make_folder(tmp_path_factory.mktemp("tiny_patch1"), patch_size=1, seed=1)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> HunyuanVideoPipeline:
    """Diffusers' own pipeline on `tiny_folder`, the reference of the parity tests."""
    pipeline = HunyuanVideoPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Fixtures of the tests of `repair`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
)
from diffusers import HunyuanVideoTransformer3DModel as Reference
from leftovers import nothing_left  # noqa: F401  a fixture
from pipelines import quiet, with_transformer
from torch.overrides import TorchFunctionMode
from video15 import make_transformer, make_vae

import reelbatch
from reelbatch import HunyuanVideoTransformer3DModel
from reelbatch.loading.hub import DEMO_FOLDER


@pytest.fixture
def pipe(tiny_pipeline) -> HunyuanVideoPipeline:
    """Diffusers' pipeline with a transformer of its own; the other components are shared by all tests."""
    return with_transformer(tiny_pipeline, copy.deepcopy(tiny_pipeline.transformer))


@pytest.fixture(scope="module")
def loaded_demo() -> HunyuanVideoPipeline:
    return quiet(HunyuanVideoPipeline.from_pretrained(DEMO_FOLDER))


@pytest.fixture
def demo(loaded_demo) -> Iterator[HunyuanVideoPipeline]:
    yield loaded_demo
    reelbatch.restore(loaded_demo)


@pytest.fixture
def own_pipe(tiny_folder: Path) -> HunyuanVideoPipeline:
    """One that shares nothing with other tests, for hooks on every component."""
    return quiet(HunyuanVideoPipeline.from_pretrained(tiny_folder))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return tiny.transformer()


@pytest.fixture
def model(reference: Reference) -> HunyuanVideoTransformer3DModel:
    ours = HunyuanVideoTransformer3DModel.from_config(reference.config)
    ours.load_state_dict(reference.state_dict())
    return ours.eval()


@pytest.fixture
def transformer() -> HunyuanVideo15Transformer3DModel:
    return make_transformer()


@pytest.fixture
def vae() -> AutoencoderKLHunyuanVideo15:
    return make_vae()


class AttentionCalls(TorchFunctionMode):
    """(mask, samples, queries, keys) of every call of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, int, int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, query, key, value, attn_mask=None, **options) -> None:
        self.calls.append((attn_mask, query.shape[0], query.shape[-2], key.shape[-2]))


@pytest.fixture
def attention_calls() -> Iterator[list[tuple[Any, int, int, int]]]:
    with AttentionCalls() as noted:
        yield noted.calls

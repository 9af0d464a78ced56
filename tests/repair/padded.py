"""Padded batches, as Diffusers' pipelines give them to a transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT = 9
LENGTHS = (7, 4, 9)


def padded_batch() -> dict[str, Tensor]:
    """Three samples of text lengths 7, 4 and 9; padding is noise."""
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(3, 4, 2, 4, 6),
        "timestep": torch.tensor([1000.0, 600.0, 100.0]),
        "encoder_hidden_states": torch.randn(3, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]).float(),
        "pooled_projections": torch.randn(3, 24),
        "guidance": torch.tensor([6000.0, 2500.0, 9000.0]),
    }


def run(model: torch.nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, return_dict=False, **options)[0]


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())

"""What the choice of an attention kernel depends on: device, dtype, kind of mask, head sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reelbatch.attention.masks import DenseMask
from reelbatch.attention.rules import RuleMask

Mask = DenseMask | RuleMask | None
"""What one sample's attention is restricted to, prepared; None is unrestricted."""
Rows = Float[Tensor, "tokens heads head_dim"]
Heads = Float[Tensor, "1 heads tokens head_dim"]
Kind = Literal["none", "keys", "dense", "rules"]
HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
"""Compute capability from which on flash attention, cuDNN's attention and bfloat16 kernels exist."""


def kind_of(mask: Mask) -> Kind:
    if mask is None:
        return "none"
    if isinstance(mask, RuleMask):
        return "rules"
    return "dense" if mask.keys is None else "keys"


class Setting(NamedTuple):
    """What a choice depends on. What is None is not known, and is no reason to refuse."""

    device: str
    """The type of the device."""
    dtype: torch.dtype
    kind: Kind
    samples: int = 1
    training: bool = False
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device."""
    head_dim: int | None = None
    """Head size of queries and keys."""
    value_dim: int | None = None
    learned_mask: bool = False
    """Whether a mask tensor gets a gradient."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, kind: Kind) -> Setting:
        """The setting of one sample on a device of this machine, with the device's compute capability."""
        return cls(device.type, dtype, kind, capability=compute_capability(device))

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mask: Mask, samples: int = 1) -> Setting:
        """The setting of a call."""
        grad = torch.is_grad_enabled()
        return cls(
            query.device.type,
            query.dtype,
            kind_of(mask),
            samples,
            training=grad and any(part.requires_grad for part in (query, key, value)),
            capability=compute_capability(query.device),
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            learned_mask=grad and isinstance(mask, DenseMask) and mask.scores.requires_grad,
        )

    @property
    def below_ampere(self) -> bool:
        return self.capability is not None and self.capability < AMPERE

    @property
    def needs_ampere(self) -> str:
        """What to say of a kernel on such a device."""
        major, minor = self.capability or AMPERE
        return f"needs compute capability 8.0, and this device has {major}.{minor}"

    @property
    def one_head_size(self) -> str:
        return f"heads of one size, and queries have {self.head_dim}, values {self.value_dim}"


@lru_cache(maxsize=64)
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor version of a CUDA device; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None

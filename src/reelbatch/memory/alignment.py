"""Weights at aligned addresses: those that are read from a file in place lie wherever they lie in it.

Kernels of a matrix library may differ by address in their last bits (see `reelbatch.models.linear`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes; what PyTorch's own allocator gives on a CPU."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where it lies at an aligned address, or not on the CPU; else a copy that does."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"  # others hold several tensors
    return tensor.clone() if plain and tensor.data_ptr() % ALIGNMENT else tensor


@torch.no_grad()
def align_weights(network: nn.Module) -> None:
    """Moves a network's weights and buffers to aligned addresses; they stay the same objects."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = aligned(tensor.data)

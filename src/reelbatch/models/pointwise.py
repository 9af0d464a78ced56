"""Norms and activations that treat every row by itself, in few passes and with few new tensors on a CPU.

PyTorch has no CPU kernel for RMS norms and a slow one for GELU's tanh form; and a new tensor of some megabytes costs
more than the arithmetic in it, as the system has to map and clear its pages.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from jaxtyping import Float
from torch import Tensor, nn

NORM_EPS = 1e-6


def _on_cpu_without_grad(rows: Tensor) -> bool:
    """Whether operations of our own, in place, are right and faster than PyTorch's."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_grad_enabled()


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head's channels. On a CPU, where PyTorch has no kernel for it, it overwrites its input."""

    def forward(self, x: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "tokens heads head_dim"]:
        if not _on_cpu_without_grad(x):
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
        return x.mul_(scale).mul_(self.weight)


def gelu_tanh(rows: Tensor) -> Tensor:
    """GELU in its tanh form, `0.5 x (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x³)`.

    On a CPU as `x sigmoid(2 u)`, which is the same: PyTorch's sigmoid takes half the time of its tanh.
    """
    if not _on_cpu_without_grad(rows):
        return F.gelu(rows, approximate="tanh")
    factor = 2 * math.sqrt(2 / math.pi)
    twice_u = rows.square().mul_(0.044715 * factor).add_(factor).mul_(rows)
    return twice_u.sigmoid_().mul_(rows)


class TanhGELU(GELU):
    def gelu(self, gate: Tensor) -> Tensor:
        return gelu_tanh(gate)


def gelu_feed_forward(dim: int, ratio: float) -> FeedForward:
    """The feed-forward of a block; `ratio`: of its hidden width to `dim`."""
    layer = FeedForward(dim, mult=ratio, activation_fn="gelu-approximate")
    layer.net[0].__class__ = TanhGELU
    return layer

"""Another machine: weights and inputs at odd addresses, and products whose bits depend on them.

On AMD's processors, the last bits of small fp32 products depend on where their operands lie; on Intel's they do not.
With these, a test sees the same on both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ODD_OFFSETS = (4, 8, 16, 20, 24, 40, 60)
"""Bytes beyond a multiple of 64."""
FEW_ROWS = 4


def place(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy at an address that is `offset` modulo 64, rounded up to whole elements."""
    offset = -(-offset // tensor.element_size()) * tensor.element_size()
    raw = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    placed = raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    assert placed.data_ptr() % 64 == offset % 64
    return placed


@torch.no_grad()
def place_weights(network: nn.Module, *offsets: int) -> None:
    """Moves every weight and buffer of a network to the offsets, in turn."""
    for number, tensor in enumerate((*network.parameters(), *network.buffers())):
        tensor.data = place(tensor.data, offsets[number % len(offsets)])


def misaligned_weights(network: nn.Module) -> list[str]:
    """Names of the weights that lie at no multiple of 64 bytes."""
    return [name for name, tensor in network.named_parameters() if tensor.data_ptr() % 64]


@contextmanager
def bits_by_address() -> Iterator[Counter[int]]:
    """While entered, fp32 products of under 4 rows differ in their last bits by the addresses of their operands, as on
    some machines. Counts the calls with so few rows."""
    calls: Counter[int] = Counter()

    def scaled(result: Tensor, rows: int, *operands: Tensor) -> Tensor:
        if rows >= FEW_ROWS or result.dtype != torch.float32 or result.device.type != "cpu":
            return result
        calls[rows] += 1
        return result * (1 + 1e-6 * sum(operand.data_ptr() % 64 for operand in operands))

    with _products(scaled):
        yield calls


@contextmanager
def no_bits_twice() -> Iterator[None]:
    """While entered, fp32 products of under 4 rows, and those with weights or inputs that lie at no multiple of 64
    bytes, never give the same bits twice."""
    calls = count(1)

    def scaled(result: Tensor, rows: int, *operands: Tensor) -> Tensor:
        lies_badly = any(operand.data_ptr() % 64 for operand in operands)
        unstable = result.dtype == torch.float32 and result.device.type == "cpu" and (rows < FEW_ROWS or lies_badly)
        return result * (1 + 1e-6 * next(calls)) if unstable else result

    with _products(scaled):
        yield


@contextmanager
def _products(scaled) -> Iterator[None]:
    linear, conv3d = F.linear, F.conv3d

    def other_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return scaled(linear(input, weight, bias), input.shape[:-1].numel(), input, weight)

    def other_conv3d(input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        result = conv3d(input, weight, *args, **kwargs)
        return scaled(result, result[:, 0].numel(), weight)  # the input is copied before it is multiplied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", other_linear)
        patch.setattr(F, "conv3d", other_conv3d)
        yield

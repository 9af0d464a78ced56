"""Linear layers whose result does not depend on where their weights and inputs lie in memory.

On a CPU, PyTorch hands fp32 products to a matrix library that chooses its kernel by shape and by address. Measured
(`benchmarks/bits.py`) with MKL on an AMD EPYC with AVX2: where a thread has 1 row, the last bits depend on the address
of the weights, and where it has 2 or 3, on that of the input. The same weights lie elsewhere when they come from disk,
so products that small are padded with zero rows, or done without the library (`FewRowsLinear`). Products in bfloat16
and float16 depend on no address.

Two cases are not padded. Layers with 10 outputs or fewer depend on the address of the input for any number of rows;
here inputs are results of other operations, which PyTorch puts at aligned addresses. Products of 5 to 7 rows and the
like in float64, in which no network is run, depend on the address of the weights, which are aligned when loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

ROWS = 4
"""Rows of a product from which on its bits do not depend on addresses."""
MOST_PRODUCTS = 2**16
"""Of weights and a row that are kept at once; they lie in the cache until they are summed."""
DTYPES = (torch.float32, torch.float64)


def padding_of(rows: int, tensor: Tensor) -> int:
    """Zero rows to add to a product of so many rows, in the dtype and on the device of `tensor`.

    Threads get whole fours of rows and the last one the rest. From 4 × threads² rows on, the rest is never under 4.
    """
    if rows % ROWS == 0 or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return 0
    return -rows % ROWS if rows < ROWS * torch.get_num_threads() ** 2 else 0


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """`rows` [n, …] with `count` more rows of zeros."""
    return torch.cat([rows, rows.new_zeros(count, *rows.shape[1:])]) if count else rows


def linear(layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`layer(rows)`, small products padded meanwhile.

    Args:
        layer: treats every row by itself: a linear layer (quantized, or with LoRAs beside it), or several in line.
        rows: [..., n, features].
    """
    count = rows.shape[-2]
    if isinstance(layer, FewRowsLinear) and layer.takes(rows):
        return layer(rows)
    padding = padding_of(count if rows.ndim == 2 else rows.shape[:-1].numel(), rows)
    return layer(F.pad(rows, (0, 0, 0, padding))).narrow(-2, 0, count) if padding else layer(rows)


class FewRowsLinear(nn.Linear):
    """A linear layer that is mostly given fewer rows than `ROWS`: one a sample.

    On a CPU they are multiplied and summed, a row after the other: bits depend on no address, other rows or thread
    count, and it takes less time than a padded product does, as PyTorch shares the work among threads and the matrix
    library does not.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.takes(input):
            return super().forward(input)
        return torch.stack([self._row(row) for row in input])

    def takes(self, rows: Tensor) -> bool:
        """Whether rows [n, features] need no padding."""
        plain = type(self.weight) in (nn.Parameter, FakeTensor) and rows.dtype == self.weight.dtype == torch.float32
        few = rows.ndim == 2 and 0 < len(rows) < ROWS and rows.device.type == "cpu"
        return plain and few and not torch.is_grad_enabled()

    def _row(self, row: Tensor) -> Tensor:
        at_once = max(MOST_PRODUCTS // self.in_features, 1)
        sums = [torch.linalg.vecdot(weights, row) for weights in self.weight.split(at_once)]
        out = torch.cat(sums) if len(sums) > 1 else sums[0]
        return out if self.bias is None else out.add_(self.bias)


class PaddedLinear(nn.Linear):
    """A linear layer for networks whose code is not ours; see `pad_linears`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(super().forward, input)


def pad_linears(network: nn.Module) -> None:
    """Has every linear layer of a network pad its small products, in place; weights and hooks stay as they are."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = PaddedLinear
